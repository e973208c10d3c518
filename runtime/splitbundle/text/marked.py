"""Text that remembers, for each character, who wrote it. A chat template is rendered with such text.

So a tokenizer can tell a control token of the template from the same characters in a message.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, SupportsIndex

__all__ = ["MODEL", "TEMPLATE", "USER", "Marked", "greatest", "is_unicode"]

TEMPLATE: Final = 0
"""The mark of a character that the template wrote."""
MODEL: Final = 1
"""The mark of a character that the model wrote."""
USER: Final = 2
"""The mark of a character that a user, a tool, a document or a system message wrote."""

_SIMPLE: Final = re.compile("%[sd%]")


class Marked(str):
    """A string with a mark for each character. It compares, hashes and tests as its text.

    Each method that returns text returns marked text. A character keeps its mark where the method moves it or changes
    it. Where this can't be followed, all characters of the result have the greatest mark of the inputs. A plain ``str``
    counts as written by the template.

    ``str.__format__`` and f-strings give plain text: Python offers no way to keep marks there.
    """

    __slots__ = ("marks",)

    marks: bytes
    """*Shape:* (length of the text,). The values are ``TEMPLATE``, ``MODEL`` and ``USER``."""

    def __new__(cls, text: str = "", marks: bytes | int | None = None) -> Marked:
        """Return ``text`` with these marks: one a character, one for all, or those that it has already.

        Raises:
            ValueError: the number of marks isn't the number of characters.
        """
        made = super().__new__(cls, text)
        if isinstance(marks, int):
            marks = bytes((marks,)) * len(made)
        made.marks = marks_of(text) if marks is None else marks
        if len(made.marks) != len(made):
            raise ValueError(f"expected {len(made)} marks, got {len(made.marks)}")
        return made

    def __reduce__(self) -> tuple[type[Marked], tuple[str, bytes]]:
        return type(self), (_plain(self), self.marks)

    def __str__(self) -> str:
        return self  # so that str(text) keeps the marks

    def __getitem__(self, index: SupportsIndex | slice) -> Marked:
        text = super().__getitem__(index)
        if isinstance(index, slice):
            return Marked(text, self.marks[index])
        return Marked(text, self.marks[index])

    def __iter__(self) -> Iterator[Marked]:
        for character, mark in zip(super().__iter__(), self.marks, strict=True):
            yield Marked(character, mark)

    def __add__(self, other: str) -> Marked:
        if not isinstance(other, str):
            return NotImplemented
        return Marked(super().__add__(other), self.marks + marks_of(other))

    def __radd__(self, other: str) -> Marked:
        if not isinstance(other, str):
            return NotImplemented
        return Marked(_plain(other) + _plain(self), marks_of(other) + self.marks)

    def __mul__(self, times: SupportsIndex) -> Marked:
        return Marked(super().__mul__(times), self.marks * times)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> Marked:
        pieces = _SIMPLE.split(_plain(self))
        signs = _SIMPLE.findall(_plain(self))
        if any("%" in piece for piece in pieces) or isinstance(values, dict):
            return Marked(super().__mod__(values), greatest(self, values))
        result = super().__mod__(values)  # refuses a wrong number of values
        given = iter(values if isinstance(values, tuple) else (values,))
        made, at = [self[: len(pieces[0])]], len(pieces[0])
        for sign, piece in zip(signs, pieces[1:], strict=True):
            if sign == "%%":
                made.append(self[at : at + 1])
            else:
                value = next(given)
                exact = sign == "%s" and isinstance(value, Marked)
                made.append(value if exact else Marked(_plain(sign) % (value,), greatest(value, self[at : at + 2])))
            at += 2 + len(piece)
            made.append(self[at - len(piece) : at])
        joined = _joined(made)
        return joined if _plain(joined) == result else Marked(result, greatest(self, values))

    def __rmod__(self, other: Any) -> Marked:
        return Marked(other) % self if isinstance(other, str) else NotImplemented

    def upper(self) -> Marked:
        return self._cased(str.upper)

    def lower(self) -> Marked:
        return self._cased(str.lower)

    def casefold(self) -> Marked:
        return self._cased(str.casefold)

    def swapcase(self) -> Marked:
        return self._cased(str.swapcase)

    def title(self) -> Marked:
        return self._cased(str.title)

    def capitalize(self) -> Marked:
        return self._cased(str.capitalize)

    def _cased(self, change: Callable[[str], str]) -> Marked:
        text = change(_plain(self))
        if len(text) == len(self):  # no character becomes fewer than one, so each became one
            return Marked(text, self.marks)
        marks = bytearray()
        for character, mark in zip(_plain(self), self.marks, strict=True):
            marks += bytes((mark,)) * len(change(character))
        # The case of a letter may depend on its neighbors, as in titles. Then so may the number of its characters.
        in_titles = change in (str.title, str.capitalize)
        return Marked(text, greatest(self) if in_titles or len(marks) != len(text) else bytes(marks))

    def center(self, width: SupportsIndex, fill: str = " ", /) -> Marked:
        text = super().center(width, fill)
        room = len(text) - len(self)
        return self._padded(text, room // 2 + (room & len(text) & 1), fill)

    def ljust(self, width: SupportsIndex, fill: str = " ", /) -> Marked:
        return self._padded(super().ljust(width, fill), 0, fill)

    def rjust(self, width: SupportsIndex, fill: str = " ", /) -> Marked:
        text = super().rjust(width, fill)
        return self._padded(text, len(text) - len(self), fill)

    def zfill(self, width: SupportsIndex, /) -> Marked:
        text = super().zfill(width)
        sign = 1 if self.startswith(("+", "-")) else 0
        return Marked(text, self.marks[:sign] + bytes(len(text) - len(self)) + self.marks[sign:])

    def _padded(self, text: str, left: int, fill: str) -> Marked:
        mark = marks_of(fill)
        return Marked(text, mark * left + self.marks + mark * (len(text) - len(self) - left))

    def expandtabs(self, /, tabsize: SupportsIndex = 8) -> Marked:
        text, marks, size = super().expandtabs(tabsize), bytearray(), tabsize.__index__()
        at = column = 0
        for piece in _plain(self).split("\t"):
            upto = at + len(piece)
            marks += self.marks[at:upto]
            start = max(piece.rfind("\n"), piece.rfind("\r")) + 1
            column = len(piece) - start if start else column + len(piece)
            if upto < len(self) and size > 0:  # a tab follows
                marks += self.marks[upto : upto + 1] * (size - column % size)
                column += size - column % size
            at = upto + 1
        return Marked(text, bytes(marks))

    def strip(self, chars: str | None = None, /) -> Marked:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Marked:
        text = super().lstrip(chars)
        return Marked(text, self.marks[len(self) - len(text) :])

    def rstrip(self, chars: str | None = None, /) -> Marked:
        text = super().rstrip(chars)
        return Marked(text, self.marks[: len(text)])

    def removeprefix(self, prefix: str, /) -> Marked:
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> Marked:
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Marked]:  # type: ignore[override]
        return self._pieces(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Marked]:  # type: ignore[override]
        return self._pieces(super().rsplit(sep, maxsplit), sep)

    def _pieces(self, pieces: list[str], sep: str | None) -> list[Marked]:
        found, at, plain = [], 0, _plain(self)
        for piece in pieces:
            if sep is None:  # only spaces lie before a piece, and none begins a piece, except the first of rsplit
                at = plain.index(piece, at)
            found.append(Marked(piece, self.marks[at : at + len(piece)]))
            at += len(piece) + len(sep or "")
        return found

    def splitlines(self, keepends: bool = False) -> list[Marked]:  # type: ignore[override]
        found, at = [], 0
        for line, whole in zip(super().splitlines(keepends), super().splitlines(True), strict=True):
            found.append(Marked(line, self.marks[at : at + len(line)]))
            at += len(whole)
        return found

    def partition(self, sep: str, /) -> tuple[Marked, Marked, Marked]:
        return self._parted(super().partition(sep))

    def rpartition(self, sep: str, /) -> tuple[Marked, Marked, Marked]:
        return self._parted(super().rpartition(sep))

    def _parted(self, parts: tuple[str, str, str]) -> tuple[Marked, Marked, Marked]:
        first, second = len(parts[0]), len(parts[0]) + len(parts[1])
        return self[:first], self[first:second], self[second:]

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Marked:
        text = super().replace(old, new, count)
        plain, sought, written, marks, at = _plain(self), _plain(old), marks_of(new), bytearray(), 0
        left = count.__index__() if count.__index__() >= 0 else len(plain) + 1
        while left and (found := plain.find(sought, at)) >= 0:
            marks += self.marks[at:found] + written
            if not sought:  # the new text goes before each character and after the last one
                if found == len(plain):
                    return Marked(text, bytes(marks))
                marks += self.marks[found : found + 1]
            at, left = found + (len(sought) or 1), left - 1
        return Marked(text, bytes(marks) + self.marks[at:])

    def join(self, parts: Iterable[str], /) -> Marked:
        parts = list(parts)
        text = super().join(parts)
        return Marked(text, self.marks.join([marks_of(part) for part in parts]))

    def format(self, *values: object, **named: object) -> Marked:
        return self._formatted(values, named)

    def format_map(self, named: Mapping[str, object], /) -> Marked:  # type: ignore[override]
        return self._formatted((), named)

    def _formatted(self, values: tuple[object, ...], named: Mapping[str, object]) -> Marked:
        result = string.Formatter().vformat(_plain(self), values, named)
        formatter, own, number = string.Formatter(), greatest(self), 0
        made: list[Marked] = []
        for literal, field, spec, conversion in formatter.parse(_plain(self)):
            made.append(Marked(literal, own))
            if field is None:
                continue
            if "{" in (spec or ""):
                return Marked(result, greatest(self, values, dict(named)))
            if field == "" or field[0] in ".[":
                field, number = f"{number}{field}", number + 1
            value, _ = formatter.get_field(field, values, named)
            if isinstance(value, Marked) and not spec and conversion in (None, "s"):
                made.append(value)
                continue
            shown = formatter.convert_field(value, conversion) if conversion else value
            made.append(Marked(format(shown, spec or ""), greatest(self, value)))
        return _joined(made)

    def translate(self, table: Any, /) -> Marked:
        text, marks = super().translate(table), bytearray()
        for character, mark in zip(_plain(self), self.marks, strict=True):
            marks += bytes((mark,)) * len(character.translate(table))
        written = greatest(list(table.values())) if isinstance(table, dict) else 0
        return Marked(text, bytes(max(mark, written) for mark in marks))


def marks_of(text: str) -> bytes:
    """Return the marks of a text. A plain string was written by the template."""
    return text.marks if isinstance(text, Marked) else bytes(len(text))


def is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogate. UTF-8, and so the library ``tokenizers``, has none."""
    try:
        str.encode(text)
    except UnicodeEncodeError:
        return False
    return True


def greatest(*values: object) -> int:
    """Return the greatest mark in these strings, marks and containers, at any depth."""
    found, left, seen = 0, list(values), set()
    while left:
        value = left.pop()
        if isinstance(value, Marked):
            found = max(found, USER if USER in value.marks else MODEL if MODEL in value.marks else TEMPLATE)
        elif isinstance(value, int):
            continue
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += value
            left += value.values() if isinstance(value, dict) else ()
    return found


def _plain(text: str) -> str:
    """Return the text without its marks."""
    return str.__str__(text)


def _joined(parts: list[Marked]) -> Marked:
    return Marked("").join(parts)
