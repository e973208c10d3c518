"""Read JSON strictly, and write it canonically.

The standard parser accepts more than RFC 8259 allows, and keeps the last of two equal keys. If two readers disagree
about one file, that is a security hole. So a document that can be read in two ways is refused before any field is read.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Final, NoReturn

from splitbundle.errors import BundleError, Problem, quoted

MAX_BYTES: Final = 16 * 2**20
MAX_MARKS: Final = 2**20
"""The largest number of ``[``, ``{`` and ``,``. The parsed values take a hundred times the bytes of the text."""
MAX_DEPTH: Final = 64
MAX_INTEGER: Final = 2**53 - 1
"""The largest integer that every JSON implementation reads exactly (RFC 8259, section 6)."""
_LONG: Final = b"0" * 16
"""An integer of fewer digits is within the limits."""
_ZEROS: Final = bytes(ord("0") if chr(byte).isascii() and chr(byte).isdigit() else byte for byte in range(256))
"""Makes every digit a zero. A search for zeros after it is ten times as fast as one with a regular expression."""


_LARGE: Final = 2**20


class _Refused(ValueError):
    def __init__(self, code: str, expected: str, got: str) -> None:
        super().__init__(expected)
        self.code, self.expected, self.got = code, expected, got


def parse(
    data: bytes,
    file: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_marks: int = MAX_MARKS,
    constant: Callable[[str], Any] | None = None,
    max_integer: int = MAX_INTEGER,
) -> Any:
    """Return the value of a JSON document.

    ``constant`` returns the value of NaN and the infinities, which are no JSON. By default they are refused.
    ``max_integer`` is the largest integer, and the negative of the smallest.

    Raises:
        BundleError: one problem, with a ``json.*`` code, that names ``file``.
    """

    def refuse(code: str, expected: str, got: str, offset: int | None = None) -> NoReturn:
        raise BundleError(Problem(code=code, file=file, offset=offset, expected=expected, got=got))

    if len(data) > max_bytes:
        refuse("json.size", f"at most {max_bytes} bytes", f"{len(data)} bytes")
    if (marks := sum(data.count(mark) for mark in b"[{,")) > max_marks:
        refuse("json.size", f"at most {max_marks} of the characters [ {{ and ,", f"{marks}")
    if data.startswith(b"\xef\xbb\xbf"):
        refuse("json.encoding", "UTF-8 without a byte order mark", "a byte order mark", 0)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse("json.encoding", "UTF-8", f"byte 0x{data[error.start]:02x}", error.start)
    try:
        with _without_collection(len(data) > _LARGE):
            value = json.loads(
                text,
                object_pairs_hook=_object,
                # A tokenizer has a million integers and strings. Where no integer is long, and no escape could be a
                # lone surrogate, the parser of the library needs no help.
                parse_int=(lambda digits: _integer(digits, max_integer)) if _LONG in data.translate(_ZEROS) else None,
                parse_float=_float,
                parse_constant=constant or _constant,
            )
    except _Refused as refused:
        refuse(refused.code, refused.expected, refused.got)
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode("utf-8"))
        refuse("json.syntax", "one JSON document (RFC 8259)", error.msg, offset)
    except RecursionError:
        refuse("json.depth", f"at most {MAX_DEPTH} levels of nesting", "more than the parser can take")
    _check_depth(value, refuse)
    if "\\ud" in text or "\\uD" in text:  # UTF-8 has no surrogates, so only an escape can write one
        _check_texts(value, refuse)
    return value


def dump(value: object) -> bytes:
    """Return ``value`` in the form in which splitbundle writes JSON: keys in order, two spaces, ASCII, a newline."""
    return (json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def dump_compact(value: object) -> bytes:
    """Return ``value`` on one line without spaces: the form of safetensors headers."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


@contextmanager
def _without_collection(large: bool) -> Iterator[None]:
    """Let the garbage collector rest: parsed values have no cycles, and it would look at them again and again."""
    collects = large and gc.isenabled()
    if collects:
        gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused("json.duplicate-key", "every key once in an object", f"{quoted(key)} twice")
            seen.add(key)
    return members


def _integer(digits: str, most: int) -> int:
    # Check the length first: the conversion of a million digits takes quadratic time.
    if len(digits) > len(str(most)) + 1 or abs(int(digits)) > most:
        raise _Refused("json.number", f"integers from -{most} to {most}", f"{len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _Refused("json.number", "a number that a 64-bit float can hold", quoted(digits))
    return value


def _constant(name: str) -> NoReturn:
    raise _Refused("json.number", "a JSON number", name)


def _check_depth(value: Any, refuse: Any) -> None:
    level, depth = ([value] if isinstance(value, dict | list) else []), 1
    while any(level):  # what these contain is one level deeper
        depth += 1
        if depth > MAX_DEPTH:
            refuse("json.depth", f"at most {MAX_DEPTH} levels of nesting", "more")
        below = [item.values() if type(item) is dict else item for item in level]
        # A tokenizer has a million arrays of strings alone. A set of types tells that soon.
        deeper = {dict, list} & set(map(type, chain.from_iterable(below)))
        level = [child for child in chain.from_iterable(below) if type(child) in deeper] if deeper else []


def _check_texts(value: Any, refuse: Any) -> None:
    level: list[Any] = [value]
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                _check_text(item, refuse)
            elif isinstance(item, dict):
                for key in item:
                    _check_text(key, refuse)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level = below


def _check_text(text: str, refuse: Any) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        refuse("json.encoding", "text without lone surrogates", quoted(text))
