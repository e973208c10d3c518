"""Tell by its first bytes whether a file is an archive, and name the command that makes a bundle of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

TAR: Final = "tar"
_MARKS: Final = (
    (0, b"\x1f\x8b", "gzip", "gunzip"),
    (0, b"\xfd7zXZ\x00", "xz", "unxz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (0, b"BZh", "bzip2", "bunzip2"),
    (0, b"\x04\x22\x4d\x18", "lz4", "unlz4"),
    (0, b"PK\x03\x04", "zip", "unzip"),
    (257, b"ustar", TAR, None),
)
"""The offset of some bytes, these bytes, the kind that they mark, and the command that decompresses it."""
_READ: Final = 262
_ENDINGS: Final = (".gz", ".tgz", ".xz", ".txz", ".zst", ".bz2", ".lz4", ".zip", ".tar", ".splitbundle")


def kind_of(data: bytes) -> str | None:
    """Return the kind of an archive by its first bytes, such as ``"tar"`` or ``"gzip"``; None for any other file."""
    return next((kind for offset, mark, kind, _ in _MARKS if data[offset : offset + len(mark)] == mark), None)


def file_kind(path: Path) -> str | None:
    """Return the kind of an archive; None for any other file, and for one that can't be read."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError:
        return None
    try:
        return kind_of(os.read(handle, _READ)) if stat.S_ISREG(os.fstat(handle).st_mode) else None
    except OSError:
        return None
    finally:
        os.close(handle)


def next_step(path: str, kind: str) -> str:
    """Return the sentence that says how a bundle is made of an archive."""
    from shlex import quote  # only for this rare message

    name = os.path.basename(path)
    while name.endswith(_ENDINGS):
        name = os.path.splitext(name)[0]
    output = quote(f"{name or 'model'}.splitbundle")
    if kind == TAR:
        return f"Unpack it: splitbundle unpack {quote(path)} -o {output}"
    tool = next(tool for _, _, each, tool in _MARKS if each == kind)
    if kind == "zip":
        return f"Unpack it: {tool} {quote(path)}, and give the directory"
    plain = os.path.splitext(path)[0]
    plain = plain if plain.endswith(".tar") or not path.endswith((".tgz", ".txz")) else f"{plain}.tar"
    return f"Decompress it: {tool} {quote(path)}, and then: splitbundle unpack {quote(plain)} -o {output}"
