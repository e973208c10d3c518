"""Chat templates that would take hours, gigabytes or the machine, or that reach for what lies outside them."""

from __future__ import annotations

from typing import Final


def _grown(start: str, step: str, then: str = "") -> str:
    """Return a template that applies a step a hundred times to ``ns.x``."""
    return (
        f"{{% set ns = namespace(x={start}) %}}{{% for i in range(100) %}}{{% set ns.x = {step} %}}{{% endfor %}}{then}"
    )


def _repeated(statement: str, before: str = "") -> str:
    return f"{before}{{% for i in range(100000) %}}{statement}{{% endfor %}}"


TEXT: Final = "{% set t = 'ab ' * 1000000 %}"

LARGE: Final = {
    "constant": "{{ 'a' * 10**9 }}",
    "list": "{{ ([0] * 10**9)|length }}",
    "text doubled by ~": _grown("'ab'", "ns.x ~ ns.x", "{{ ns.x }}"),
    "text doubled by +": _grown("'\U0001f642'", "ns.x + ns.x", "{{ ns.x }}"),
    "text doubled by replace": _grown("'ab'", "ns.x.replace('', ns.x)"),
    "text doubled by join": _grown("'ab'", "ns.x.join([ns.x, ns.x])"),
    "text doubled by format": _grown("'ab'", "'{0}{0}'.format(ns.x)"),
    "text doubled by %": _grown("'ab'", "'%s%s' % (ns.x, ns.x)"),
    "text doubled by a block": _grown("'ab'", "y").replace(
        "{% set ns.x", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x"
    ),
    "list doubled": _grown("[0]", "ns.x + ns.x"),
    "list doubled by sum": _grown("[0]", "[ns.x, ns.x]|sum(start=[])"),
    "width of ljust": "{{ 'a'.ljust(10**9) }}",
    "width of zfill": "{{ '1'.zfill(10**9) }}",
    "width of center": "{{ 'a'|center(10**9) }}",
    "width of indent": "{{ 'a'|indent(10**9) }}",
    "width of tojson": "{{ [1]|tojson(indent=10**9) }}",
    "width of expandtabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "width of %": "{{ '%1000000000d' % 1 }}",
    "width given to %": "{{ '%*d' % (10**9, 1) }}",
    "width of a test": "{{ '%1000000000d' is odd }}",
    "width of format": "{{ '{:>1000000000}'.format(1) }}",
    "width given to format": "{{ '{:>{}}'.format(1, 10**9) }}",
    "power": "{{ 9**9**9 }}",
    "squares": _grown("3", "ns.x * ns.x"),
    "range": "{{ range(10**9)|list }}",
    "range of large numbers": "{{ range(10**18, 10**18 + 10**9)|list }}",
    "pieces": "{{ ('ab' * 2000000).split('a')|length }}",
    "words": TEXT + "{{ t.split()|length }}",
    "characters": TEXT + "{{ t|list|length }}",
    "output": _repeated("x" * 1_000),
    "centered numbers": "{{ range(100000)|map('string')|map('center', 1000)|list }}",
    "nested call blocks": "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call f() %}" * 25
    + "x" * 10_000
    + "{% endcall %}" * 25,
    "time": "{{ strftime_now('%Y' * 100000) }}",
    "digits": "{{ " + "1" * 500_000 + " }}",
    "number from text": "{{ ('9' * 1000000)|int }}",
    "precision": "{{ 1.5|round(10**9, 'ceil') }}",
    "long template": "x" * (2**20 + 1),
    "many tokens": "{{ a }}" * 30_000,
}
"""Templates that ask for a large result."""

LONG: Final = {
    "loops": "{% for i in range(100000) %}" * 3 + "{% endfor %}" * 3,
    "fat loop": _repeated("{% set a = [1, 2, 3] %}" * 1_500),
    "fat macro": "{% macro f() %}" + "{% set a = [1, 2, 3] %}" * 1_500 + "{% endmacro %}" + _repeated("{{ f() }}"),
    "fat test": "{% for i in range(100000) if " + " or ".join(["false"] * 80) + " %}{% endfor %}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "shared lists written": _grown("[0]", "[ns.x, ns.x]", "{{ ns.x }}"),
    "shared lists as JSON": _grown("[0]", "[ns.x, ns.x]", "{{ ns.x|tojson }}"),
    "shared dicts written": _grown("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x|string }}"),
    "shared lists compared": _grown("[0]", "[ns.x, ns.x]", "{{ ns.x == [ns.x[0], ns.x[0]] }}"),
    "shared lists changed": _grown(
        "[0]", "[ns.x, ns.x]", "{% for z in [ns.x, ns.x] %}{{ loop.changed(z) }}{% endfor %}"
    ),
    "sorting": "{% set s = 'a' * 100000 %}{{ ([s ~ 'a', s ~ 'b'] * 10000)|sort|length }}",
    "sorting often": _repeated("{% set x = l|sort(reverse=true) %}", "{% set l = range(100000)|list %}"),
    "sorting dicts": _repeated("{% set x = d|dictsort %}", "{% set d = dict.fromkeys(range(100000)|list) %}"),
    "unique": "{{ (range(100000)|list * 5)|unique|list|length }}",
    "search from the right": "{% set s = 'a' * 500000 %}" + _repeated("{% set x = s.rfind('b' ~ s[:250000]) %}"),
    "search in": _repeated(
        "{% if p in s %}{% endif %}", "{% set s = 'a' * 2500 %}{% set p = 'a' * 624 ~ 'b' ~ 'a' * 624 %}"
    ),
    "search by find": _repeated(
        "{% set x = s.find(p) %}", "{% set s = 'a' * 2500 %}{% set p = 'a' * 624 ~ 'b' ~ 'a' * 624 %}"
    ),
    "strip": _repeated("{% set x = s.strip(p) %}", "{% set s = 'a' * 100000 %}{% set p = 'b' * 100000 ~ 'a' %}"),
    "index": _repeated("{% set x = l.index(99999) %}", "{% set l = range(100000)|list %}"),
    "slices": _repeated("{% set x = t[1:] %}", TEXT),
    "words counted": _repeated("{% set x = t|wordcount %}", TEXT),
    "titles": _repeated("{% set x = t|title %}", TEXT),
    "cases": _repeated("{% set x = t|upper %}", "{% set t = 'ß' * 500000 %}"),
    "cycle": _repeated("{{ loop.cycle(*range(100000)) }}"),
    "keywords": _repeated("{% set x = dict(**d) %}", "{% set d = dict.fromkeys(range(1000)|map('string')) %}"),
}
"""Templates that ask for much time."""

DEEP: Final = {
    "macro": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "lists": _repeated("{% set ns.x = [ns.x] %}", "{% set ns = namespace(x=[0]) %}") + "{{ ns.x == [ns.x] }}",
    "key": _repeated("{% set ns.x = (ns.x,) %}", "{% set ns = namespace(x=(0,)) %}") + "{{ {ns.x: 1} }}",
    "lazy filters": _repeated("{% set ns.x = ns.x|select %}", "{% set ns = namespace(x=[1]) %}") + "{{ ns.x|list }}",
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "some parentheses": "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    "some brackets": "{{ " + "[" * 150 + "1" + "]" * 150 + " }}",
    "some nots": "{{ " + "not " * 10_000 + "1 }}",
    "some sums": "{{ " + "1 + " * 5_000 + "1 }}",
    "some attributes": "{{ a" + ".b" * 5_000 + " }}",
    "some ifs": "{% if 1 %}" * 100 + "{% endif %}" * 100,
    "some elifs": "{% if 0 %}" + "{% elif 0 %}" * 4_000 + "{% endif %}",
    "some fors": "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
}
"""Templates that nest too deep."""

OUTSIDE: Final = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by item": "{{ ''['__class__']['__mro__'] }}",
    "class by map": "{{ ['']|map(attribute='__class__.__mro__')|list }}",
    "class by format": "{{ '{0.__class__.__init__}'.format(messages) }}",
    "class by format_map": "{{ '{x}'.format_map({'x': 1}) }}",
    "globals": "{{ raise_exception.__globals__['os'] }}",
    "globals of a macro": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "inside of a namespace": "{{ namespace()._Namespace__attrs.x }}",
    "underscore in a namespace": "{% set ns = namespace(**{'__init__': 1}) %}",
    "inside of a loop": "{% for i in [1] %}{{ loop._iterator.gi_frame }}{% endfor %}",
    "self": "{{ self._TemplateReference__context.environment }}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({'role': 'system'}) }}",
    "filter attr": "{{ ''|attr('__class__') }}",
    "filter by another name": "{{ [1]|map('spend work')|list }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'x' as y %}",
    "from": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
    "block": "{% block x %}{% endblock %}",
    "autoescape": "{% autoescape true %}{% endautoescape %}",
    "lipsum": "{{ lipsum(n=10000) }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "function written": "{{ raise_exception }}",
    "macro written": "{% macro f() %}{% endmacro %}{{ [f] }}",
}
"""Templates that reach for what lies outside them."""

HOSTILE: Final = {
    f"{kind}: {name}": text
    for kind, texts in (("large", LARGE), ("long", LONG), ("deep", DEEP), ("outside", OUTSIDE))
    for name, text in texts.items()
}
