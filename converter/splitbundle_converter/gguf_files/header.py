"""Check the header of a GGUF file before the library reads it: the library believes every count in the file.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO, Final

from splitbundle_converter.errors import AGAIN, refusal

_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""A type of values -> its size in bytes."""
_STRING, _ARRAY = 8, 9
_MOST_VALUES: Final = 4_000_000
"""The most values of all arrays. A vocabulary has some 300,000 tokens, with a type, a score and a merge for each."""
_MOST_ENTRIES: Final = 1_000_000
"""The most fields, and the most tensors."""
_MOST_TEXT: Final = 16 * 2**20
"""The most bytes of a text. The largest is a chat template."""


class _Wrong(Exception):
    """A number in the header that the file can't hold."""


class _Walk:
    """Reads a header from its beginning to the end of the list of tensors, and keeps nothing of it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._values = 0

    def check(self) -> None:
        """Walk the header.

        Raises:
            _Wrong: A count or a size doesn't fit.
        """
        if self._take(4) != b"GGUF":
            raise _Wrong("other first bytes than GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise _Wrong(f"version {version}")
        tensors, fields = self._number("<Q"), self._number("<Q")
        if max(tensors, fields) > _MOST_ENTRIES:
            raise _Wrong(f"{tensors} tensors and {fields} fields")
        for _ in range(fields):
            self._text()
            self._value(self._number("<I"))
        for _ in range(tensors):
            self._text()
            dimensions = self._number("<I")
            if dimensions > 4:
                raise _Wrong(f"a tensor of {dimensions} dimensions")
            self._skip(8 * dimensions + 4 + 8)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._text()
        elif kind == _ARRAY:
            inner, count = self._number("<I"), self._number("<Q")
            self._values += count
            if self._values > _MOST_VALUES:
                raise _Wrong(f"arrays of {self._values} values")
            if inner == _STRING:
                for _ in range(count):
                    self._text()
            elif inner in _SIZES:
                self._skip(_SIZES[inner] * count)
            else:
                raise _Wrong(f"an array of type {inner}")
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        else:
            raise _Wrong(f"a value of type {kind}")

    def _text(self) -> None:
        length = self._number("<Q")
        if length > _MOST_TEXT:
            raise _Wrong(f"a text of {length} bytes")
        self._skip(length)

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _take(self, count: int) -> bytes:
        data = self._file.read(count)
        if len(data) < count:
            raise _Wrong("an end within the header")
        return data

    def _skip(self, count: int) -> None:
        if self._file.seek(count, 1) > self._size:
            raise _Wrong("an end within the header")


def check_header(path: Path) -> None:
    """Check that the counts and sizes in a file's header fit into the file, and aren't too large.

    Raises:
        BundleError: ``source.unreadable``.
    """
    try:
        with path.open("rb") as file:
            _Walk(file, path.stat().st_size).check()
    except _Wrong as wrong:
        raise refusal("source.unreadable", path.name, "a GGUF file", str(wrong), AGAIN) from None
    except OSError as error:
        raise refusal("source.unreadable", path.name, "a file that can be read", f"{error.strerror}") from error
