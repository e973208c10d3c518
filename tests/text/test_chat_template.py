"""Chat templates give the text that transformers gives, and each character says who wrote it."""

from __future__ import annotations

import functools
import json
import re
import string
import threading
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitbundle import BundleError
from splitbundle.text.chat_template import ChatTemplate
from splitbundle.text.marked import MODEL, TEMPLATE, USER, Marked
from splitbundle.text.template_json import as_json
from splitbundle.text.template_limits import budget
from tests.support.conversations import CONTROL, CONVERSATIONS, DOCUMENTS, TIME, TOOLS, changed, transformers_text
from tests.support.paths import TESTS

FORMATS: Final = sorted(path.stem for path in (TESTS / "text" / "templates").glob("*.jinja"))
VARIABLES: Final = {"bos_token": "<s>", "eos_token": "</s>"}
CYRILLIC: Final = "абвгдежзийклмнопрстуфхцчшщАБВГДЕЖЗИЙКЛМНОПРСТУФХЦЧШЩ"
ARMENIAN: Final = "աբգդեզէըթժիլխծկհձղճմյնշոչպԱԲԳԴԵԶԷԸԹԺԻԼԽԾԿՀՁՂՃՄՅՆՇՈՉՊ"


def source(name: str) -> str:
    return (TESTS / "text" / "templates" / f"{name}.jinja").read_text("utf-8")


@functools.cache
def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, file="chat_template.jinja", variables=VARIABLES, clock=lambda: TIME)


def rendered(text: str, **variables: Any) -> Marked:
    return template(text).render([{"role": "user", "content": "a<b"}], **variables)


def same(text: str, conversation: dict[str, Any]) -> bool:
    """Assert that transformers renders the same, and return whether that is a text."""
    expected = transformers_text(text, conversation, VARIABLES)
    if expected is None:
        with pytest.raises(BundleError) as caught:
            template(text).render(**conversation)
        assert caught.value.codes == ("text.template",)
        return False
    assert template(text).render(**conversation) == expected
    return True


def test_there_are_thirty_conversations() -> None:
    assert len(CONVERSATIONS) == 30


@pytest.mark.parametrize("name", FORMATS)
def test_formats_render_as_in_transformers(name: str) -> None:
    text = source(name)
    given_texts = [each for each in CONVERSATIONS if same(text, CONVERSATIONS[each])]
    assert len(given_texts) >= 15  # the rest are roles, tools or parts that the format doesn't have


def owned(conversation: dict[str, Any]) -> dict[str, Any]:
    """Return the conversation with Armenian letters in what the model wrote, and Cyrillic ones in the rest."""

    def alphabet(letters: str) -> dict[int, str]:
        return str.maketrans(string.ascii_letters + "{}<>[]|&`_#%\"'\\*", letters + letters[:16])

    def change(value: Any, letters: str) -> Any:
        return changed(
            value, lambda text: text.translate(alphabet(letters)).replace("｜", letters[0]).replace("▁", " ")
        )

    messages = [
        change(message, ARMENIAN if message["role"] == "assistant" else CYRILLIC)
        for message in conversation["messages"]
    ]
    return change(conversation | {"messages": []}, CYRILLIC) | {"messages": messages}


@pytest.mark.parametrize("name", FORMATS)
def test_each_character_says_who_wrote_it(name: str) -> None:
    seen: set[int] = set()
    made = template(source(name))
    for given_name, conversation in CONVERSATIONS.items():
        if given_name == "parts":  # a format without parts writes the list, as a whole with the user's mark
            continue
        try:
            text = made.render(**owned(conversation))
        except BundleError:
            continue
        for character, mark in zip(str.__str__(text), text.marks, strict=True):
            if character in ARMENIAN or character in CYRILLIC:
                assert mark == (MODEL if character in ARMENIAN else USER)
                seen.add(mark)
            elif character in "<>|[]{}｜▁":
                assert mark == TEMPLATE
                seen.add(mark)
    assert seen == {TEMPLATE, MODEL, USER}


@pytest.mark.parametrize("name", FORMATS)
def test_spelled_control_tokens_are_not_the_templates(name: str) -> None:
    """A template writes as many control tokens of its own as when the messages spell none."""

    made = template(source(name))

    def own(conversation: dict[str, Any]) -> list[str] | None:
        try:
            text = made.render(**conversation)
        except BundleError:
            return None
        found = re.finditer("|".join(map(re.escape, CONTROL)), str.__str__(text))
        return [each[0] for each in found if not any(text.marks[each.start() : each.end()])]

    spelled = 0
    for conversation in CONVERSATIONS.values():
        quiet = changed(conversation, lambda text: "x" if text else "")
        loud = changed(conversation, lambda text: f"x{''.join(CONTROL)}" if text else "")
        if name in ("qwen3", "deepseek_r1"):  # these read </think> in what the model wrote
            loud = changed(conversation, lambda text: f"x{''.join(CONTROL).replace('</think>', '')}" if text else "")
        if name == "harmony":  # it refuses channels in what the model wrote
            loud = changed(conversation, lambda text: f"x{''.join(CONTROL[::-1])}" if text else "")
        expected = own(quiet)
        assert own(loud) == expected
        spelled += expected is not None
    assert spelled >= 15


@pytest.mark.parametrize(
    "expression",
    [
        *("x|trim", "x.strip('<')", "x|upper|lower", "x|title", "x|replace('z', 'y')", "x.split('|')|join(':')"),
        *("x|tojson", "{'k': [x]}|tojson(indent=2)", "x|list|join", "x|reverse", "x[::-1]", "x[2:]", "x ~ x", "'' ~ x"),
        *("'' + x", "x + ''", "x * 2", "'%s' % x", "'%s%s' % ('a', x)", "'{}'.format(x)", "'{a}'.format(a=x)"),
        *("[x]|string", "{x: x}|string", "x|string|string", "x|indent(2, true)", "x|center(40)", "x.zfill(40)"),
        *("x|truncate(8, true)", "'%s'|format(x)", "[x, x]|join(x)", "x.partition('|')|join", "x.rsplit('m', 1)|last"),
        *("[x]|map('upper')|join", "[x]|select('string')|first", "dict(a=x).a", "dict(a=x)['a']", "namespace(a=x).a"),
        *("(x, 1)|first", "[[1, x]]|sort|last|last", "{x: 1}|items|first|first", "{x: 1}|dictsort|first|first"),
        *(
            "x|default('d')",
            "x if x else ''",
            "x or ''",
            "x and x",
            "'<|im_end|>'.replace('<|im_end|>', x)",
            "''.join([x])",
        ),
        *("[x]|sum(start='')", "[x, x]|unique|first", "[x]|max", "x|capitalize", "x.splitlines()[0]", "x|d(x)|safe"),
        *("x.removeprefix('<')", "x.expandtabs()", "(x|tojson)[1:-1]", "dict.fromkeys([x], 1)|list|first", "x|first"),
        *("dict(**{x: 1})|list|first", "[{'a': x}]|map(attribute='a')|list|first", "[{'a': x}]|selectattr('a')|first"),
        *("x.casefold().swapcase()", "strftime_now(x)", "loop_over(x)", "called(x)", "set_block(x)"),
    ],
)
def test_no_expression_loses_marks(expression: str) -> None:
    """Of ``<|im_end|>`` in a message, no character becomes the template's."""
    text = (
        "{% macro loop_over(t) %}{% for c in t %}{{ c }}{% endfor %}{% endmacro %}"
        "{% macro called(t) %}{% call(u) passed(t) %}{{ u }}{% endcall %}{% endmacro %}"
        "{% macro passed(t) %}{{ caller(t) }}{% endmacro %}"
        "{% macro set_block(t) %}{% set s %}{% filter upper %}{{ t }}{% endfilter %}{% endset %}{{ s }}{% endmacro %}"
        "{% set x = messages[0].content %}{{ " + expression + " }}"
    )
    got = template(text).render([{"role": "user", "content": "<|im_end|>"}])
    found = [mark for each, mark in zip(str.__str__(got), got.marks, strict=True) if each in "<|im_end|>IMENDimend"]
    assert found
    assert all(mark == USER for mark in found if mark), "a mark that nothing has"
    if expression not in ("{'k': [x]}|tojson(indent=2)", "[{'a': x}]|selectattr('a')|first"):
        assert set(found) == {USER}


VALUES: Final = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES, st.booleans(), st.none() | st.integers(0, 4) | st.just("\t"), st.booleans())
def test_json_is_that_of_the_standard_library(value: Any, ascii_only: bool, indent: Any, sort: bool) -> None:
    for separators in (None, (",", ":")):
        with budget(0):
            got = as_json(value, ascii_only, indent, separators, sort)
        assert got == json.dumps(value, ensure_ascii=ascii_only, indent=indent, separators=separators, sort_keys=sort)
        assert not any(got.marks)


@given(st.text(max_size=8), st.booleans())
def test_json_keeps_marks(text: str, ascii_only: bool) -> None:
    with budget(0):
        got = as_json([Marked(text, USER), "plain", {Marked("k", MODEL): 1}], ascii_only)
    inner = len(json.dumps(text, ensure_ascii=ascii_only)) - 2
    assert got.marks == bytes(2) + bytes((USER,)) * inner + bytes(len('", "plain", {"')) + b"\1" + bytes(len('": 1}]'))


JINJA: Final = (TESTS / "text" / "templates" / "jinja.txt").read_text("utf-8").splitlines()
"""Templates with what Jinja has: the sandbox of transformers renders each to the same text."""


@pytest.mark.parametrize("text", JINJA)
def test_jinja_means_what_it_means_in_transformers(text: str) -> None:
    assert same(text, {"messages": [{"role": "user", "content": "Say\n'é'"}]})


def test_roles_and_types_are_the_programs() -> None:
    text = (
        "{{ messages[0].role }}|{{ messages[0].content[0].type }}|{{ messages[0].content[0].text }}|{{ tools[0].type }}"
    )
    message = {"role": "user", "content": [{"type": "text", "text": "type"}]}
    got = template(text).render([message], tools=[{"type": "function"}])
    assert got == "user|text|type|function"
    assert got.marks == bytes(10) + bytes((USER,)) * 4 + bytes(9)


@pytest.mark.rule("SB-T-011")
@pytest.mark.parametrize("name", ["range", "dict", "namespace", "raise_exception", "strftime_now"])
def test_a_function_wins_over_a_variable_of_the_bundle(name: str) -> None:
    made = ChatTemplate(f"{{{{ {name} is callable }}}}", file="t", variables={name: "text", "bos_token": "<s>"})
    assert made.render([]) == "True"


@pytest.mark.rule("SB-T-011")
@pytest.mark.parametrize("name", ["messages", "tools", "documents", "add_generation_prompt"])
def test_the_chat_wins_over_a_variable_of_the_bundle(name: str) -> None:
    assert ChatTemplate(f"{{{{ {name} is string }}}}", file="t", variables={name: "text"}).render([]) == "False"


def test_variables_of_a_call_are_marked_and_those_of_the_model_are_not() -> None:
    got = template("{{ bos_token }}{{ date }}{{ eos_token }}").render([{"role": "user", "content": ""}], date="</s>")
    assert got == "<s></s></s>"
    assert got.marks == bytes(3) + bytes((USER,)) * 4 + bytes(4)
    again = template("{{ bos_token }}").render([], bos_token="<x>")
    assert again.marks == bytes((USER,)) * 3


@pytest.mark.parametrize(
    ("arguments", "argument", "expected", "got"),
    [
        ({"messages": "hi"}, "messages", "a list of messages", "'hi'"),
        ({"messages": [1]}, "messages[0]", "a dict with a role", "1"),
        ({"messages": [{"content": "x"}]}, "messages[0]", "a dict with a role", "{'content': 'x'}"),
        ({"messages": [{"role": "a b"}]}, "messages[0]['role']", "1 to 64 letters", "'a b'"),
        ({"messages": [{"role": "<|im_end|>"}]}, "messages[0]['role']", "1 to 64 letters", "'<|im_end|>'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "</s>"}]}]},
            "messages[0]['content'][0]['type']",
            "1 to 64 letters",
            "'</s>'",
        ),
        ({"messages": [{"role": "user", "content": b"x"}]}, "messages[0]['content']", "plain data", "a bytes"),
        ({"messages": [{"role": "user", "n": 1 << 2000}]}, "messages[0]['n']", "1024 bits", "a larger integer"),
        ({"messages": [{"role": "user", 5: "x"}]}, "messages[0] key", "a string", "a int"),
        ({"messages": [], "tools": [{"f": len}]}, "tools[0]['f']", "plain data", "a builtin_function_or_method"),
        ({"messages": [], "tools": "x"}, "tools", "a list", "'x'"),
        ({"messages": [], "documents": [{"t": {1}}]}, "documents[0]['t']", "plain data", "a set"),
        ({"messages": [], "value": object()}, "value", "plain data", "a object"),
    ],
)
def test_what_is_not_plain_data_is_refused(arguments: dict[str, Any], argument: str, expected: str, got: str) -> None:
    with pytest.raises(BundleError) as caught:
        template("x").render(**arguments)
    (problem,) = caught.value.problems
    assert problem.code == "input.value"
    assert problem.argument == argument
    assert expected in problem.expected
    assert problem.got == got


def test_what_is_nested_too_deep_is_refused() -> None:
    nested: Any = "x"
    for _ in range(64):
        nested = [nested]
    with pytest.raises(BundleError, match="nested at most 64 levels deep"):
        template("x").render([], value=nested)
    nested = []
    nested.append(nested)
    with pytest.raises(BundleError, match="nested at most 64 levels deep"):
        template("x").render([], documents=nested)


@pytest.mark.parametrize(
    ("text", "expected", "got"),
    [
        (
            "a\n{{ raise_exception('No\ntools, please') }}",
            "messages that this template accepts",
            "line 2: No tools, please",
        ),
        ("a\n{{ x.y }}", "everything that the template reads", "line 2: 'x' is undefined"),
        (
            "{{ messages[0].x + 'a' }}",
            "everything that the template reads",
            "line 1: 'dict object' has no attribute 'x'",
        ),
        ("a\nb{% if %}", "a Jinja template", "line 2: Expected an expression, got 'end of statement block'"),
        ("{{ 'a'|nothing }}", "a Jinja template", "line 1: No filter named 'nothing'."),
        (
            "{{ 'a'.__class__.x }}",
            "no more than format",
            "line 1: access to attribute '__class__' of 'str' object is unsafe.",
        ),
        ("{{ ns.x }}{% set ns = namespace(_x=1) %}", "everything that the template reads", "line 1: 'ns' is undefined"),
        ("{% set ns = namespace(_x=1) %}", "no more than format", "line 1: a namespace can't have the name '_x'"),
        ("a\n\n{% include 'x' %}", "no more than format", "line 3: chat templates have no Include"),
        ("\n{{ 1 / 0 }}", "messages that this template can format", "line 2: ZeroDivisionError: division by zero"),
        (
            "{{ tools|length }}",
            "messages that this template can format",
            "line 1: TypeError: object of type 'NoneType' has no len()",
        ),
        ("{{ messages() }}", "no more than format", "line 1: a value of the type list is not callable"),
        (
            "{{ messages.append(1) }}",
            "no more than format",
            "line 1: access to attribute 'append' of 'list' object is unsafe.",
        ),
    ],
)
def test_an_error_names_the_file_the_line_and_the_next_step(text: str, expected: str, got: str) -> None:
    with pytest.raises(BundleError) as caught:
        rendered(text)
    (problem,) = caught.value.problems
    assert (problem.code, problem.file) == ("text.template", "chat_template.jinja")
    assert expected in problem.expected
    assert problem.got.startswith(got)
    assert problem.hint
    assert caught.value.__context__ is None  # it would hold the messages


def test_threads_share_a_template() -> None:
    shared, wrong = template(source("harmony")), []
    conversation = CONVERSATIONS["tools"]
    expected = [shared.render(conversation["messages"], tools=TOOLS, reasoning_effort=str(n)) for n in range(8)]

    def work(number: int) -> None:
        for _ in range(20):
            got = shared.render(conversation["messages"], tools=TOOLS, reasoning_effort=str(number))
            if (got, got.marks) != (expected[number], expected[number].marks):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(set(expected)) == 8


def test_the_input_stays_as_it_is() -> None:
    conversation = {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "documents": DOCUMENTS}
    before = json.dumps(conversation)
    template("{{ messages }}{{ documents }}").render(**conversation)
    assert json.dumps(conversation) == before


def test_a_long_conversation_is_within_the_limits() -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"{n} some words\n" * 40} for n in range(1_001)]
    for name in FORMATS:
        got = template(source(name)).render(turns, tools=TOOLS * 5, add_generation_prompt=True)
        assert len(got) > 300_000, name


def test_templates_are_files_of_this_folder() -> None:
    assert len(FORMATS) >= 12
    assert all(Path(TESTS / "text" / "templates" / f"{name}.jinja").stat().st_size < 16_000 for name in FORMATS)
