"""What templates do with strings, lists and dicts: operators and methods. Each keeps marks and spends work first."""

from __future__ import annotations

import operator
import re
import string
from collections.abc import Callable, Iterable
from typing import Any, Final

from jinja2 import Undefined

from splitbundle.text.marked import Marked, greatest
from splitbundle.text.template_limits import DEPTH, ITEM, OBJECT, Lazy, LimitReached, items, number, spend, weigh

__all__ = [
    "Method",
    "arithmetic",
    "compared",
    "concatenated",
    "contained",
    "digits",
    "formatted",
    "has_method",
    "key",
    "method",
    "piece",
    "text",
]

_ARITHMETIC: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
}
_LONGEST_NUMBER: Final = 512
"""The digits of the longest number that is read from a text."""

_SPACES: Final = re.compile(r"\s+")
_LINES: Final = re.compile("[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]")
_CONVERSION: Final = re.compile(r"%(?:\(\w+\))?[-#0 +]*\d{0,3}(?:\.\d{0,3})?[diouxXeEfFgGcrsa%]")
_FIELD: Final = re.compile(r"\w*", re.ASCII)
_SPECIFICATION: Final = re.compile(r"(?:.?[<>=^])?[-+ ]?#?0?\d{0,3}[,_]?(?:\.\d{1,3})?[bcdeEfFgGosxX%]?")

_TESTS: Final = (
    *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric"),
    *("isprintable", "isspace", "istitle", "isupper"),
)
_TEXT_METHODS: Final = {
    **dict.fromkeys((*_TESTS, "startswith", "endswith", "find", "index", "count"), 1),
    **dict.fromkeys(("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "partition", "rpartition"), 1),
    **dict.fromkeys(("rfind", "rindex", "split", "rsplit", "splitlines", "replace", "join", "format"), 1),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs"), 1),
    **dict.fromkeys(("upper", "lower", "casefold", "swapcase", "title", "capitalize"), 16),
}
"""The methods of strings that templates may call, and what they cost for each character."""
_METHODS: Final = {
    str: frozenset(_TEXT_METHODS),
    dict: frozenset(("get", "items", "keys", "values", "copy")),
    list: frozenset(("index", "count", "copy")),
    tuple: frozenset(("index", "count")),
}


class Method:
    """A method of a string, list, dict or tuple, ready to be called by ``method``."""

    __slots__ = ("name", "of")

    def __init__(self, of: Any, name: str) -> None:
        self.of, self.name = of, name


def has_method(value: object, name: str) -> bool | None:
    """Return whether a value has this method: True if templates may call it, False if not, None if there is none."""
    for kind, names in _METHODS.items():
        if isinstance(value, kind):
            return name in names if hasattr(kind, name) else None
    return None


def text(value: Any) -> Marked:
    """Return a value as text, as Python writes it.

    Raises:
        TypeError: the value is neither plain data nor undefined.
    """
    if isinstance(value, Marked):
        return value
    if isinstance(value, str):
        return Marked(value)
    if value is None or isinstance(value, int | float | range | Undefined):
        return Marked(str(value))
    if isinstance(value, dict | list | tuple):
        _only_plain(value)
        weigh(value, per_character=10)  # an escape has up to ten characters
        written = str(value)
        spend(len(written))
        return Marked(written, greatest(value))
    raise TypeError(f"a value of the type {type(value).__name__} can't be written")


def _only_plain(value: object, depth: int = 0) -> None:
    if depth > DEPTH:
        raise LimitReached(f"values that are nested more than {DEPTH} levels deep")
    if isinstance(value, dict | list | tuple):
        spend(ITEM * (len(value) + 1))
        for each in value:
            _only_plain(each, depth + 1)
        for each in value.values() if isinstance(value, dict) else ():
            _only_plain(each, depth + 1)
    elif value is not None and not isinstance(value, str | int | float | range | Undefined):
        raise TypeError(f"a value of the type {type(value).__name__} can't be written")


def concatenated(parts: Iterable[Any]) -> Marked:
    """Return the values as one text."""
    made: list[str] = []
    for part in parts:
        piece_of_text = part if isinstance(part, str) else text(part)
        spend(len(piece_of_text) + ITEM)
        made.append(piece_of_text)
    return Marked("").join(made)


def piece(value: Any, start: Any, stop: Any, step: Any) -> Any:
    """Return the slice of a string, list or tuple."""
    if isinstance(value, str | list | tuple | range):
        size = len(range(len(value))[start:stop:step])
        spend(OBJECT + size * (1 if isinstance(value, str) else ITEM))
    return (text(value) if isinstance(value, str) else value)[start:stop:step]


def compared(value: Any) -> Any:
    """Return a value for a comparison, after spending what the comparison may cost."""
    value = items(value) if isinstance(value, Lazy) else value
    weigh(value)
    return value


def key(value: Any) -> Any:
    """Return a value that is a key of a dict.

    Raises:
        TypeError: it is neither a string nor a number, a truth value or none.
    """
    if value is not None and not isinstance(value, str | int | float | Undefined):
        raise TypeError(f"a value of the type {type(value).__name__} can't be a key")
    return value


def arithmetic(sign: str, left: Any, right: Any) -> Any:
    """Return ``left sign right``."""
    if isinstance(left, str):
        left = text(left)
        if sign == "%":
            return formatted(left, right)
    if sign == "*" and isinstance(left, int) and not isinstance(right, int | float):
        left, right = (text(right) if isinstance(right, str) else right), left
    size = _size(left)
    if sign == "*" and isinstance(right, int):
        size *= max(right, 0)
    elif sign == "+":
        size += _size(right)
    elif sign == "**" and isinstance(left, int) and isinstance(right, int) and right > 64 and abs(left) > 1:
        raise LimitReached("an integer of more than 64 bits")
    spend(OBJECT + size)
    return number(_ARITHMETIC[sign](left, right))


def _size(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    return ITEM * len(value) if isinstance(value, list | tuple) else 0


def contained(value: Any, container: Any) -> bool:
    """Return ``value in container``."""
    if isinstance(value, str) and isinstance(container, str):
        spend(ITEM + len(container) + _searching(len(container), len(value)))
        return value in container
    value, container = compared(value), compared(container)
    return value in container


def _searching(size: int, sought: int) -> int:
    """Return what a search costs. Python's is quadratic in short texts, and linear in long ones."""
    return min(size * sought, 2**22) >> 5


def formatted(template: Marked, values: Any) -> Marked:
    """Return ``template % values``. Widths have at most three digits."""
    plain = str.__str__(template)
    if "%" in _CONVERSION.sub("", plain):
        raise LimitReached("a format with a conversion that isn't simple")
    given = list(values.values()) if isinstance(values, dict) else values if isinstance(values, tuple) else (values,)
    _spend_on_fields(template, plain.count("%"), given)
    made: Marked = template % values
    return made


def _spend_on_fields(template: Marked, fields: int, given: Iterable[Any]) -> None:
    longest = max((len(text(value)) for value in given), default=0)
    spend(OBJECT + len(template) + fields * (10 * longest + 1000 + OBJECT))


def method(called: Method, values: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Return what a method returns."""
    of, name = called.of, called.name
    spend(OBJECT)
    if isinstance(of, str):
        return _text_method(text(of), name, values, named)
    if isinstance(of, list | tuple) and name != "copy":
        weigh(of, *values)
        return getattr(of, name)(*(compared(value) for value in values), **named)
    if name == "get":
        return of.get(key(values[0]), *values[1:]) if values and not named else of.get(*values, **named)
    if values or named:
        raise TypeError(f"{name}() takes no arguments")
    spend(len(of) * (OBJECT if name == "items" else ITEM))
    return of.copy() if name == "copy" else list(getattr(of, name)())


def _text_method(of: Marked, name: str, values: tuple[Any, ...], named: dict[str, Any]) -> Any:
    size, plain = len(of), str.__str__(of)
    given = [*values, *named.values()]
    strings = sum(len(value) for value in given if isinstance(value, str))
    wide = max((value for value in given if isinstance(value, int)), default=0)
    spend(size * _TEXT_METHODS[name] + strings + _searching(size, strings))
    if name in ("strip", "lstrip", "rstrip"):
        spend(size * strings >> 4)
    elif name in ("startswith", "endswith"):
        weigh(*values)
    elif name in ("rfind", "rindex", "rsplit", "rpartition"):  # their search is slow where a long text nearly matches
        spend(size * strings >> 5)
    elif name in ("center", "ljust", "rjust", "zfill"):
        spend(wide)
    elif name == "expandtabs":
        spend(plain.count("\t") * max(wide, 8))
    elif name == "replace" and len(values) > 1 and isinstance(values[0], str) and isinstance(values[1], str):
        found = plain.count(values[0])
        limit = values[2] if len(values) > 2 and isinstance(values[2], int) and values[2] >= 0 else found
        spend(min(found, limit) * (len(values[1]) + 8))
    elif name == "join" and len(values) == 1:
        parts = items(values[0])
        spend(sum(len(part) + size for part in parts if isinstance(part, str)))
        return of.join(parts)
    elif name == "format":
        return _bracketed(of, values, named)
    if name in ("split", "rsplit", "splitlines"):
        sought = values[0] if values else named.get("sep")
        pieces = sum(1 for _ in (_LINES if name == "splitlines" else _SPACES).finditer(plain))
        if isinstance(sought, str) and name != "splitlines":
            pieces = plain.count(sought)
        limit = values[1] if len(values) > 1 else named.get("maxsplit", -1)
        if isinstance(limit, int) and limit >= 0 and name != "splitlines":
            pieces = min(pieces, limit)
        spend(OBJECT * (pieces + 1))
    return getattr(of, name)(*values, **named)


def _bracketed(of: Marked, values: tuple[Any, ...], named: dict[str, Any]) -> Marked:
    fields = 0
    for _, field, specification, _ in string.Formatter().parse(str.__str__(of)):
        if field is not None:
            fields += 1
            if not _FIELD.fullmatch(field) or not _SPECIFICATION.fullmatch(specification or ""):
                raise LimitReached("a format with a field that isn't simple")
    _spend_on_fields(of, fields, [*values, *named.values()])
    return of.format(*values, **named)


def digits(value: Any) -> Any:
    """Return a value that is to be read as a number.

    Raises:
        LimitReached: it is a text that is too long for one.
    """
    if isinstance(value, str) and len(value) > _LONGEST_NUMBER:
        raise LimitReached(f"a number of more than {_LONGEST_NUMBER} characters")
    return value
