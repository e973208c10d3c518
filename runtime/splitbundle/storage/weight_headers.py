"""Read the header of a weight file. Its digest is checked before its JSON is parsed."""

from __future__ import annotations

import hashlib
from typing import BinaryIO, NoReturn

from splitbundle.errors import BundleError, Problem
from splitbundle.format.manifest.document import File
from splitbundle.format.weight_layout import ALIGNMENT, MAX_HEADER, Tensor, Weights, parse
from splitbundle.storage import files


def read_header(
    file: BinaryIO, path: str, listed: File, expected: dict[str, Tensor], *, part: bool = False, more: bool = False
) -> Weights:
    """Read and check the header of an open weight file.

    The header's digest is checked before its JSON is parsed. Then the header must be, byte for byte, the canonical
    header of the ``expected`` tensors (in order of use), which the architecture implies. A ``part`` is one of several
    files of a unit, and holds at least one tensor. With ``more``, other files follow, and this file holds only the
    first of the tensors.

    Raises:
        BundleError: ``weights.header``, ``file.header-digest``, ``weights.tensors``, ``weights.layout``;
            ``file.unreadable``.
    """
    try:
        raw = _read_bytes(file, path, listed)
    except OSError as error:
        raise BundleError(files.unreadable(path, error)) from error
    check_header(raw, path, listed)
    return parse(raw, path, listed.size, expected, part=part, more=more)


def check_header(raw: bytes, path: str, listed: File) -> None:
    """Check that a header is the listed one.

    Raises:
        BundleError: ``file.header-digest``.
    """
    digest = hashlib.sha256(raw).hexdigest()
    if digest != listed.header_sha256:
        expected, hint = (
            f"a header with sha256 {listed.header_sha256}",
            "The file isn't the one that the manifest lists",
        )
        raise BundleError(Problem(code="file.header-digest", file=path, expected=expected, got=digest, hint=hint))


def _read_bytes(file: BinaryIO, path: str, listed: File) -> bytes:
    def refuse(expected: str, got: str) -> NoReturn:
        raise BundleError(Problem(code="weights.header", file=path, offset=0, expected=expected, got=got))

    start = files.read_fully(file, 8)
    if len(start) < 8:
        refuse("a header length of 8 bytes", f"a file of {len(start)} bytes")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER or 8 + length > listed.size:
        refuse(f"a header of at most {min(MAX_HEADER, listed.size - 8)} bytes", f"a length of {length}")
    if (8 + length) % ALIGNMENT:
        refuse(f"data that begins at a multiple of {ALIGNMENT}", f"data at {8 + length}")
    text = files.read_fully(file, length)
    if len(text) < length:
        refuse(f"a header of {length} bytes", f"a file that ends after {8 + len(text)}")
    return start + text
