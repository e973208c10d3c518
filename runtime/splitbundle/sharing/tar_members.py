"""Read the headers of a tar archive, and believe none of them.

``tarfile.open`` follows the links and believes the sizes of an archive. Here each header is read by itself and checked
against the length of the file. Only regular files and directories are accepted.
"""

from __future__ import annotations

import re
import tarfile
from tarfile import BLOCKSIZE
from typing import BinaryIO, Final, NamedTuple, NoReturn

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.storage.files import read_fully

MAX_MEMBERS: Final = 2**15
"""The largest number of headers in an archive. A reader has them all in memory, and takes some 20 µs for each."""
MAX_NAME: Final = 1024
"""The largest header for a long name, in bytes. The longest path in a bundle has 504 characters."""
MAX_ZEROS: Final = 2**20
"""The largest number of zeros after the end of an archive. tar fills the last of its records with them."""
_ZEROS: Final = bytes(BLOCKSIZE)
_SIZE: Final = slice(124, 136)
_OCTAL: Final = re.compile(rb" *[0-7]+[ \0]*\Z")
_RECORD: Final = re.compile(rb"([1-9][0-9]{0,3}) ([^=\n]+)=")
_KINDS: Final = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGLINK: "a link with a long name",
    tarfile.XGLTYPE: "a header for all members",
}
REPACK: Final = "Make the archive with Bundle.pack, or with GNU tar from the bundle's directory"
"""The next step for an archive whose members have another form."""


class Member(NamedTuple):
    """A regular file or a directory in an archive."""

    name: str
    """The name as it stands there, without a leading ``./`` and a trailing ``/``."""
    is_directory: bool
    at: int
    """The offset of its header."""
    start: int
    """The offset of its data."""
    size: int


def refuse(code: str, archive: str, offset: int, expected: str, got: str, hint: str | None = None) -> NoReturn:
    """Raise the error for a place in an archive."""
    raise BundleError(Problem(code=code, file=archive, offset=offset, expected=expected, got=got, hint=hint))


def read_members(file: BinaryIO, length: int, archive: str) -> list[Member]:
    """Return the members of an archive in order. The data of files isn't read.

    Args:
        file: the archive, open for reading.
        length: its length in bytes.
        archive: its path, for messages.

    Raises:
        BundleError: ``archive.header``, ``archive.truncated``, ``archive.trailing``, ``archive.member``,
            ``archive.name``, ``archive.duplicate``.
        OSError: the archive can't be read.
    """
    members: list[Member] = []
    seen: set[str] = set()
    at, count = 0, 0
    long: dict[str, str] = {}
    """What the headers before a member say of it: its path, its size."""
    while True:
        block = _read(file, at, BLOCKSIZE, length, archive)
        if block == _ZEROS:
            if long:
                refuse("archive.header", archive, at, "the member that a long name belongs to", "the end")
            _check_end(file, at, length, archive)
            return members
        count += 1
        if count > MAX_MEMBERS:
            refuse("archive.member", archive, at, f"at most {MAX_MEMBERS} headers", "more", REPACK)
        header, size = _parse(block, at, archive)
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            _read_long(file, header.type, at, size, length, archive, long)
            at += BLOCKSIZE + _padded(size)
            continue
        size = _long_size(long, size, at, archive)
        member = _member(header, long.get("path", header.name), at, size, archive)
        if member.start + _padded(size) > length:
            _truncated(archive, length, f"{size} bytes of {quoted(member.name)}, and the end of the archive")
        if member.name in seen:
            refuse("archive.duplicate", archive, at, "each member once", f"{quoted(member.name)} twice", REPACK)
        seen.add(member.name)
        members.append(member)
        long = {}
        at = member.start + _padded(size)


def _padded(size: int) -> int:
    return -(-size // BLOCKSIZE) * BLOCKSIZE


def _read(file: BinaryIO, at: int, size: int, length: int, archive: str) -> bytes:
    file.seek(at)
    data = read_fully(file, size) if at + size <= length else b""
    if len(data) != size:
        _truncated(archive, length, "more members, or the two blocks of zeros that end an archive")
    return data


def _truncated(archive: str, length: int, expected: str) -> NoReturn:
    hint = "The archive is cut off: copy or download it again"
    refuse("archive.truncated", archive, length, expected, "the end of the file", hint)


def _check_end(file: BinaryIO, at: int, length: int, archive: str) -> None:
    """Check that there is nothing but zeros from ``at`` on, at least two blocks of them, and few."""
    if length - at < 2 * BLOCKSIZE:
        _truncated(archive, length, "two blocks of zeros")
    if length - at > MAX_ZEROS:
        got = f"{length - at} bytes after the last member"
        refuse("archive.trailing", archive, at, f"at most {MAX_ZEROS} bytes of zeros at the end", got)
    file.seek(at)
    rest = read_fully(file, length - at)
    if rest.strip(b"\0") or len(rest) != length - at:
        refuse("archive.trailing", archive, at, "only zeros after the last member", "other bytes")


def _parse(block: bytes, at: int, archive: str) -> tuple[tarfile.TarInfo, int]:
    """Return a header, and the size that it states. The size is read strictly: readers disagree about odd ones."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        refuse("archive.header", archive, at, "a header of a tar archive", str(error))
    field = block[_SIZE]
    if _OCTAL.match(field):
        return header, int(field.strip(b" \0"), 8)
    if field[0] == 0x80:  # GNU's form for large sizes: a big-endian number
        return header, int.from_bytes(field[1:], "big")
    refuse("archive.header", archive, at, "a size in octal digits, or GNU's form for large ones", quoted(field))


def _read_long(
    file: BinaryIO, kind: bytes, at: int, size: int, length: int, archive: str, long: dict[str, str]
) -> None:
    """Note what a header for the next member says: GNU's long name, or POSIX's records."""
    if size > MAX_NAME:
        refuse("archive.name", archive, at, f"names and attributes of at most {MAX_NAME} bytes", f"{size}", REPACK)
    if long:
        refuse("archive.header", archive, at, "one long name for a member", "several", REPACK)
    data = _read(file, at + BLOCKSIZE, _padded(size), length, archive)[:size]
    if kind == tarfile.GNUTYPE_LONGNAME:
        long["path"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
        return
    long[""] = ""  # it was there, even if none of its records matters
    position = 0
    while position < size:
        found = _RECORD.match(data, position)
        end = position + int(found[1]) if found else 0
        if found is None or not found.end() < end <= size or data[end - 1 : end] != b"\n":
            refuse("archive.header", archive, at, "records of the form LENGTH KEY=VALUE", quoted(data[position:]))
        key, value = (part.decode("utf-8", "surrogateescape") for part in (found[2], data[found.end() : end - 1]))
        if key.startswith("GNU.sparse") or key in ("linkpath", "hdrcharset"):
            got = "a sparse file" if key.startswith("GNU") else f"the attribute {key}"
            refuse("archive.member", archive, at, "regular files and directories", got, REPACK)
        if key in long:
            refuse("archive.header", archive, at, "each attribute once", f"{quoted(key)} twice")
        long[key] = value
        position = end


def _long_size(long: dict[str, str], size: int, at: int, archive: str) -> int:
    stated = long.get("size")
    if stated is None:
        return size
    if not re.fullmatch(r"[0-9]{1,19}", stated, re.ASCII):
        refuse("archive.header", archive, at, "a size in decimal digits", quoted(stated))
    return int(stated)


def _member(header: tarfile.TarInfo, name: str, at: int, size: int, archive: str) -> Member:
    is_directory = header.type == tarfile.DIRTYPE
    if header.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        got = f"{quoted(name)}, {_KINDS.get(header.type, f'of the type {quoted(header.type)}')}"
        refuse("archive.member", archive, at, "regular files and directories", got, REPACK)
    if is_directory and size:
        refuse("archive.member", archive, at, "a directory without data", f"{size} bytes of {quoted(name)}")
    short = name.removeprefix("./")
    short = short.removesuffix("/") if is_directory else short
    if is_directory and name in (".", "./"):
        short = ""
    elif any(part in ("", ".", "..") for part in short.split("/")):
        expected = "relative names without . and .. in them"
        refuse("archive.name", archive, at, expected, quoted(name), REPACK)
    return Member(short, is_directory, at, at + BLOCKSIZE, size)
