"""JSON of a template's values, as ``json.dumps`` writes it, with the marks of the strings in it."""

from __future__ import annotations

import json
import re
from typing import Any, Final

from splitbundle.text.marked import Marked, greatest, marks_of
from splitbundle.text.template_limits import DEPTH, ITEM, OBJECT, LimitReached, spend

__all__ = ["as_json"]

_ESCAPED: Final = re.compile(r'["\\\x00-\x1f]')
_ESCAPED_ASCII: Final = re.compile(r'["\\\x00-\x1f]|[^\x00-\x7e]|\x7f')
_WIDTH: Final = 64
"""The greatest indentation of a level."""


def as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> Marked:
    """Return a value as JSON. The arguments are those of the filter ``tojson`` in chat templates of Hugging Face.

    An escaped character has the mark of the character. The template wrote the punctuation.

    Raises:
        TypeError: JSON has no such value.
        LimitReached: the text is too long, nested too deep or indented too far.
    """
    if isinstance(indent, int):
        if indent > _WIDTH:
            raise LimitReached(f"an indentation of more than {_WIDTH}")
        indent = " " * indent
    between, after_key = separators or ("," if indent is not None else ", ", ": ")
    writer = _Writer(bool(ensure_ascii), indent, Marked(between), Marked(after_key), bool(sort_keys))
    writer.write(value, 0)
    return Marked("").join(writer.pieces)


class _Writer:
    def __init__(self, ascii_only: bool, indent: str | None, between: Marked, after_key: Marked, sort: bool) -> None:
        self.pieces: list[str] = []
        self._ascii, self._indent, self._sort = ascii_only, indent, sort
        self._between, self._after_key = between, after_key

    def write(self, value: Any, depth: int) -> None:
        """Append the pieces of a value that lies so deep."""
        if depth > DEPTH:
            raise LimitReached(f"values that are nested more than {DEPTH} levels deep")
        if isinstance(value, str):
            self._append(self._quoted(value))
        elif isinstance(value, dict):
            pairs = sorted(value.items()) if self._sort else value.items()
            self._nested("{}", [(self._key(key), each) for key, each in pairs], depth)
        elif isinstance(value, list | tuple):
            spend(ITEM * len(value))
            self._nested("[]", [(None, each) for each in value], depth)
        elif value is None or isinstance(value, int | float):
            self._append(json.dumps(value))
        else:
            raise TypeError(f"a value of the type {type(value).__name__} has no JSON")

    def _nested(self, ends: str, pairs: list[tuple[str | None, Any]], depth: int) -> None:
        self._append(ends[0])
        for number, (key, each) in enumerate(pairs):
            if number:
                self._append(self._between)
            self._new_line(depth + 1)
            if key is not None:
                self._append(key)
                self._append(self._after_key)
            self.write(each, depth + 1)
        if pairs:
            self._new_line(depth)
        self._append(ends[1])

    def _new_line(self, depth: int) -> None:
        if self._indent is not None:
            spend(len(self._indent) * depth)
            self._append(Marked("\n") + Marked(self._indent) * depth)

    def _append(self, text: str) -> None:
        spend(len(text) + ITEM)
        self.pieces.append(text)

    def _key(self, key: Any) -> Marked:
        spend(OBJECT)
        if isinstance(key, str):
            return self._quoted(key)
        if key is None or isinstance(key, int | float):
            return Marked(json.dumps(json.dumps(key)))
        raise TypeError(f"a key of the type {type(key).__name__} has no JSON")

    def _quoted(self, text: str) -> Marked:
        spend(len(text) * (12 if self._ascii else 6))  # an escape has up to so many characters
        result = json.dumps(str.__str__(text), ensure_ascii=self._ascii)
        if len(result) == len(text) + 2:
            return Marked(result, b"\0" + marks_of(text) + b"\0")
        marks, given, at = bytearray(1), marks_of(text), 0
        for found in (_ESCAPED_ASCII if self._ascii else _ESCAPED).finditer(str.__str__(text)):
            marks += given[at : found.start()]
            at = found.end()
            marks += given[found.start() : at] * (len(json.dumps(found[0], ensure_ascii=self._ascii)) - 2)
        marks += given[at:] + b"\0"
        return Marked(result, bytes(marks) if len(marks) == len(result) else greatest(text))
