"""The filters and tests of chat templates. They give what Jinja's give, keep marks, and spend work first.

Left out are the filters that make HTML, that give another result each time, and that no chat template needs.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cmp_to_key
from typing import Any, Final, cast

from jinja2 import Environment, Undefined, pass_environment
from jinja2.exceptions import FilterArgumentError, TemplateRuntimeError
from jinja2.tests import TESTS as _JINJA

from splitbundle.text.marked import Marked
from splitbundle.text.template_json import as_json
from splitbundle.text.template_limits import ITEM, OBJECT, Lazy, LimitReached, items, number, spend, weigh
from splitbundle.text.template_operations import (
    Method,
    arithmetic,
    compared,
    contained,
    digits,
    formatted,
    key,
    method,
    text,
)

__all__ = ["FILTERS", "TESTS"]

_WORD: Final = re.compile(r"\w+")
_BETWEEN_WORDS: Final = re.compile(r"[-\s({\[<]+")


def _method(name: str) -> Callable[..., Any]:
    """Return the filter that calls a method of the value's text."""
    return lambda value, *values: method(Method(text(value), name), values, {})


def _title(value: Any) -> Marked:
    whole, at, parts = text(value), 0, []
    spend(16 * len(whole))
    for found in _BETWEEN_WORDS.finditer(str.__str__(whole)):
        spend(2 * OBJECT)
        parts += [whole[at : found.start()], whole[found.start() : found.end()]]
        at = found.end()
    parts.append(whole[at:])
    return Marked("").join(part[:1].upper() + part[1:].lower() for part in parts if part)


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> Any:
    return method(Method(text(value), "replace"), (text(old), text(new), -1 if count is None else count), {})


def _trim(value: Any, chars: str | None = None) -> Any:
    return method(Method(text(value), "strip"), () if chars is None else (chars,), {})


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Marked:
    indentation = Marked(width) if isinstance(width, str) else arithmetic("*", " ", width)
    lines = method(Method(arithmetic("+", text(value), "\n"), "splitlines"), (), {})
    spend(len(lines) * (len(indentation) + OBJECT) + len(text(value)))
    rest = [indentation + line if line or blank else line for line in lines[1:]]
    return Marked("\n").join([indentation + lines[0] if first else lines[0], *rest])


def _truncate(value: Any, length: int = 255, killwords: bool = False, end: str = "...", leeway: int = 5) -> Any:
    if length < len(end) or leeway < 0:
        raise FilterArgumentError(f"expected a length of at least {len(end)}")
    if len(value) <= length + leeway:
        return value
    spend(OBJECT + length)
    start = text(value)[: length - len(end)]
    return arithmetic("+", start if killwords else start.rsplit(" ", 1)[0], end)


def _wordcount(value: Any) -> int:
    spend(8 * len(text(value)))
    return sum(1 for _ in _WORD.finditer(text(value)))


def _format(value: Any, *values: Any, **named: Any) -> Marked:
    if values and named:
        raise FilterArgumentError("can't handle positional and keyword arguments at the same time")
    return formatted(text(value), named or values)


def _int(value: Any, default: Any = 0, base: int = 10) -> Any:
    try:
        return number(int(digits(value), base) if isinstance(value, str) else int(value))
    except (TypeError, ValueError):
        try:
            return number(int(float(value)))
        except (TypeError, ValueError, OverflowError):
            return default


def _float(value: Any, default: Any = 0.0) -> Any:
    try:
        return float(digits(value))
    except (TypeError, ValueError):
        return default


def _round(value: Any, precision: int = 0, method: str = "common") -> Any:
    if not isinstance(value, int | float):
        raise TypeError("only a number can be rounded")
    if abs(precision) > 300:
        raise LimitReached("a precision of more than 300 digits")
    if method == "common":
        return round(value, precision)
    if method not in ("ceil", "floor"):
        raise FilterArgumentError("method must be common, ceil or floor")
    return getattr(math, method)(value * 10**precision) / 10**precision


def _default(value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    return default_value if isinstance(value, Undefined) or (boolean and not value) else value


def _first(value: Any) -> Any:
    return next(iter(value), Undefined("the sequence is empty, so it has no first item"))


def _last(value: Any) -> Any:
    return next(iter(reversed(value)), Undefined("the sequence is empty, so it has no last item"))


def _reverse(value: Any) -> Any:
    if isinstance(value, str):
        spend(OBJECT + len(value))
        return text(value)[::-1]
    listed = items(value)
    return Lazy(reversed(listed))


def _items(value: Any) -> Any:
    if isinstance(value, Undefined):
        return Lazy(())
    if not isinstance(value, dict):
        raise TypeError("only a dict has pairs of keys and values")
    return Lazy(value.items())


def _getter(environment: Environment, attribute: Any, ignore_case: bool = False, default: Any = None) -> Any:
    """Return a function that returns an attribute of an item: ``a.b.0`` is looked up step by step."""
    path = attribute.split(".") if isinstance(attribute, str) else [] if attribute is None else [attribute]
    steps = [int(digits(step)) if isinstance(step, str) and step.isdigit() else step for step in path]

    def get(item: Any) -> Any:
        for step in steps:
            spend(ITEM)
            item = environment.getitem(item, step)
            if default is not None and isinstance(item, Undefined):
                item = default
        return method(Method(text(item), "lower"), (), {}) if ignore_case and isinstance(item, str) else item

    return get


@pass_environment
def _join(environment: Environment, value: Any, d: Any = "", attribute: Any = None) -> Marked:
    if attribute is not None:
        value = map(_getter(environment, attribute), value)
    between, parts = text(d), [text(each) for each in items(value if hasattr(value, "__len__") else Lazy(value))]
    spend(sum(map(len, parts)) + len(between) * len(parts))
    return between.join(parts)


@pass_environment
def _map(environment: Environment, value: Any, *names: Any, **named: Any) -> Lazy:
    if not names and "attribute" in named:
        change = _getter(environment, named.pop("attribute"), default=named.pop("default", None))
        if named:
            raise FilterArgumentError(f"unexpected keyword argument {next(iter(named))!r}")
    else:
        if not names or names[0] not in FILTERS:
            raise TemplateRuntimeError(f"no filter named {names[0] if names else ''!r}")
        called, rest = FILTERS[names[0]], names[1:]
        before = (environment,) if called in _WITH_ENVIRONMENT else ()

        def change(item: Any) -> Any:
            return called(*before, item, *rest, **named)

    return Lazy((change(item) for item in value) if value else (), value)


def _selection(keep: bool, by_attribute: bool) -> Callable[..., Any]:
    """Return the filter that selects or rejects items, by themselves or by an attribute."""

    def select(environment: Environment, value: Any, *names: Any, **named: Any) -> Lazy:
        get = None
        if by_attribute:
            if not names:
                raise FilterArgumentError("the name of an attribute is missing")
            get, names = _getter(environment, names[0]), names[1:]
        if names and names[0] not in TESTS:
            raise TemplateRuntimeError(f"no test named {names[0]!r}")
        test, rest = (TESTS[names[0]], names[1:]) if names else (bool, ())

        def chosen() -> Iterator[Any]:
            for item in value or ():
                spend(OBJECT)
                if bool(test(get(item) if get else item, *rest, **named)) is keep:
                    yield item

        return Lazy(chosen(), value)

    return pass_environment(select)


def _sorted(value: Any, get: Callable[[Any], Any], reverse: bool) -> list[Any]:
    """Return a list of sorted items. Each comparison spends what it costs."""

    def compare(left: tuple[Any, Any], right: tuple[Any, Any]) -> int:
        spend(OBJECT)
        weigh(left[0], right[0])
        return -1 if left[0] < right[0] else 1 if right[0] < left[0] else 0

    pairs = [(get(item), item) for item in items(value)]
    return [item for _, item in sorted(pairs, key=cmp_to_key(compare), reverse=reverse)]


@pass_environment
def _sort(
    environment: Environment, value: Any, reverse: bool = False, case_sensitive: bool = False, attribute: Any = None
) -> list[Any]:
    names = attribute.split(",") if isinstance(attribute, str) else [attribute]
    getters = [_getter(environment, name, ignore_case=not case_sensitive) for name in names]
    return _sorted(value, lambda item: [get(item) for get in getters], reverse)


def _dictsort(value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False) -> list[Any]:
    if by not in ("key", "value"):
        raise FilterArgumentError('You can only sort by either "key" or "value"')
    place = ("key", "value").index(by)

    def get(pair: tuple[Any, Any]) -> Any:
        return pair[place] if case_sensitive or not isinstance(pair[place], str) else _FOLDED(pair[place])

    return _sorted(_items(value), get, reverse)


@pass_environment
def _unique(environment: Environment, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Lazy:
    get, seen = _getter(environment, attribute, ignore_case=not case_sensitive), set()

    def firsts() -> Iterator[Any]:
        for item in value:
            known = key(get(item))
            if known not in seen:
                spend(OBJECT)
                seen.add(known)
                yield item

    return Lazy(firsts(), value)


def _extreme(greatest: bool) -> Callable[..., Any]:
    def find(environment: Environment, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
        get = _getter(environment, attribute, ignore_case=not case_sensitive)
        found = _sorted(value, get, greatest)
        return found[0] if found else Undefined("the sequence is empty, so it has no such item")

    return pass_environment(find)


@pass_environment
def _sum(environment: Environment, value: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    get, total = _getter(environment, attribute), start
    for item in Lazy(value, value):
        total = arithmetic("+", total, get(item))
    return total


_FOLDED: Final = _method("lower")
FILTERS: Final[dict[str, Callable[..., Any]]] = {
    **{name: _method(name) for name in ("upper", "lower", "capitalize")},
    "center": lambda value, width=80: method(Method(text(value), "center"), (width,), {}),
    "title": _title,
    "replace": _replace,
    "trim": _trim,
    "indent": _indent,
    "truncate": _truncate,
    "wordcount": _wordcount,
    "format": _format,
    "string": text,
    "safe": text,
    "tojson": as_json,
    "int": _int,
    "float": _float,
    "round": _round,
    "abs": abs,
    "default": _default,
    "d": _default,
    "length": len,
    "count": len,
    "first": _first,
    "last": _last,
    "list": items,
    "reverse": _reverse,
    "items": _items,
    "join": _join,
    "map": _map,
    "sort": _sort,
    "dictsort": _dictsort,
    "unique": _unique,
    "select": _selection(True, by_attribute=False),
    "reject": _selection(False, by_attribute=False),
    "selectattr": _selection(True, by_attribute=True),
    "rejectattr": _selection(False, by_attribute=True),
    "min": _extreme(False),
    "max": _extreme(True),
    "sum": _sum,
}
_WITH_ENVIRONMENT: Final = tuple(
    FILTERS[name] for name in ("join", "map", "sort", "unique", "min", "max", "sum")
) + tuple(FILTERS[name] for name in ("select", "reject", "selectattr", "rejectattr"))


def _comparison(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda value, other: compare(compared(value), compared(other))


_PLAIN_TESTS: Final = (
    *("defined", "undefined", "none", "boolean", "false", "true", "integer", "float", "number"),
    *("string", "mapping", "sequence", "sameas", "iterable"),
)
_COMPARISONS: Final = {
    **dict.fromkeys(("==", "eq", "equalto"), operator.eq),
    **dict.fromkeys(("!=", "ne"), operator.ne),
    **dict.fromkeys((">", "gt", "greaterthan"), operator.gt),
    **dict.fromkeys(("<", "lt", "lessthan"), operator.lt),
    ">=": operator.ge,
    "ge": operator.ge,
    "<=": operator.le,
    "le": operator.le,
}
TESTS: Final[dict[str, Callable[..., Any]]] = {
    **{name: cast(Callable[..., Any], _JINJA[name]) for name in _PLAIN_TESTS},
    **{name: _comparison(compare) for name, compare in _COMPARISONS.items()},
    "in": contained,
    "odd": lambda value: arithmetic("%", value, 2) == 1,
    "even": lambda value: arithmetic("%", value, 2) == 0,
    "divisibleby": lambda value, by: arithmetic("%", value, by) == 0,
    "lower": lambda value: method(Method(text(value), "islower"), (), {}),
    "upper": lambda value: method(Method(text(value), "isupper"), (), {}),
    "callable": lambda value: callable(value) or isinstance(value, Method),
}
