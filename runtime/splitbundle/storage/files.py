"""Open, map and hash a bundle's files. Only regular files of the listed size are read, and no links."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

from splitbundle.errors import BundleError, Problem
from splitbundle.format.manifest.document import File

CHUNK: Final = 2**20
HASHED_AT_ONCE: Final = 2**17
"""Bytes that are read and hashed at once. They stay in the core's cache between the two."""
THREAD_BYTES: Final = 2**20
"""The calling thread copies or hashes any file with fewer bytes itself: to start a thread takes as long."""
MAX_TEXT_BYTES: Final = 256 * 2**20
"""The largest tokenizer file, in bytes. A vocabulary of a million tokens takes some 100 MB."""

_MOUNT_POINT: Final = 0xA0000003
"""IO_REPARSE_TAG_MOUNT_POINT of Windows, by which ``st_reparse_tag`` marks a junction."""

Progress = Callable[[str, int, int], None]
"""A function that is called with the name of the work, the amount that is done, and the total amount."""


def open_file(root: Path, path: str, expected: File | None = None) -> BinaryIO:
    """Open ``root/path`` for reading.

    Raises:
        BundleError: ``file.missing``, ``file.kind`` (a link, a directory …), ``file.unreadable``, ``file.size``.
    """
    place = root
    for part in path.split("/"):
        place = place / part
        try:
            status = os.lstat(place)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(missing(path)) from None
        except OSError as error:
            raise BundleError(unreadable(path, error)) from error
        wanted = stat.S_ISREG if place == root / path else stat.S_ISDIR
        if not wanted(status.st_mode) or is_junction(status):
            raise BundleError(
                Problem(
                    code="file.kind",
                    file=path,
                    expected="a regular file in real directories",
                    got=f"{place.relative_to(root).as_posix()} is {_kind(status)}",
                    hint="Put the file itself there: cp -rL copies the files that links point to",
                )
            )
    # The file may be exchanged between lstat and open. The flags refuse a link, and don't wait for a pipe.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(place, flags | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:  # it was there just now
        raise BundleError(unreadable(path, _replaced())) from None
    except OSError as error:
        raise BundleError(unreadable(path, error)) from error
    try:
        opened = os.fstat(handle)
        if not os.path.samestat(status, opened):
            raise _replaced()
        file = os.fdopen(handle, "rb", buffering=0)
    except OSError as error:
        os.close(handle)
        raise BundleError(unreadable(path, error)) from error
    size = opened.st_size
    if expected is not None and size != expected.size:
        file.close()
        raise BundleError(
            Problem(
                code="file.size",
                file=path,
                expected=f"{expected.size} bytes",
                got=f"{size} bytes",
                hint=FETCH,
            )
        )
    return file


@contextlib.contextmanager
def closed_at_last(file: BinaryIO) -> Iterator[BinaryIO]:
    """Close a file at the end of the block. Ignore an error of ``close``, because nothing was written to the file."""
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


def _replaced() -> OSError:
    return OSError(errno.ESTALE, "the file was replaced while it was opened")


FETCH: Final = "The file isn't the one that the manifest lists: fetch or convert it again"


_NEXT: Final = {
    errno.EACCES: "Check the permissions of the file and of the directories above it",
    errno.EPERM: "Check the permissions of the file and of the directories above it",
    errno.ESTALE: "A writer is replacing the bundle: open it again",
    errno.EMFILE: "This process has too many open files: ulimit -n raises the limit",
    errno.ENFILE: "This system has too many open files: close some",
    errno.EIO: "The disk or the network failed: fetch the bundle to another disk",
}
"""An error number of the system -> the next step."""


def unreadable(path: str, error: OSError) -> Problem:
    """Return the problem of a file that the system refuses to read."""
    return Problem(
        code="file.unreadable",
        file=path,
        expected="a file that can be read",
        got=f"{error.strerror}",
        hint=_NEXT.get(error.errno or 0),
    )


def is_there(root: Path, path: str) -> bool:
    """Return whether something is at ``root/path``.

    ``Path.exists`` returns False for every error of the system since Python 3.14. But a file that this system can't
    look at now isn't absent: a merge onto its own part would leave it out, and remove it.

    Raises:
        BundleError: ``file.unreadable`` if the system can't tell.
    """
    try:
        os.stat(root / path)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise BundleError(unreadable(path, error)) from error
    return True


def is_same(one: str | os.PathLike[str], other: str | os.PathLike[str]) -> bool:
    """Return whether two paths lead to one file or directory. Neither need exist.

    The paths alone don't tell it: where the system ignores case, one directory has many names.
    """
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def missing(path: str) -> Problem:
    """Return the problem of a file that is missing."""
    hint = "Copy it from the same bundle elsewhere, or merge the two"
    return Problem(code="file.missing", file=path, expected="a file that the manifest lists", got="none", hint=hint)


def map_private(file: BinaryIO, path: str, listed: File) -> mmap.mmap:
    """Map an open file copy-on-write. The mapping lives as long as an object refers to it.

    Raises:
        BundleError: ``file.unreadable``.
    """
    try:
        return mmap.mmap(file.fileno(), listed.size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # the system has no more mappings, or the file was just shortened
        got = getattr(error, "strerror", None) or str(error)
        problem = Problem(code="file.unreadable", file=path, expected="a file that can be mapped", got=got)
        raise BundleError(problem) from error


def read_private(file: BinaryIO, path: str, listed: File) -> mmap.mmap:
    """Read an open file once into private memory of this process, and hash the bytes there.

    Raises:
        BundleError: ``file.digest``, ``file.size``, ``file.unreadable``.
    """
    try:
        memory = _private_memory(listed.size)
    except OSError as error:
        expected, got = f"memory for its {listed.size} bytes", f"{error.strerror}"
        hint = 'Without verify="always", it is mapped and takes no memory'
        raise BundleError(Problem(code="file.unreadable", file=path, expected=expected, got=got, hint=hint)) from error
    digest, done = hashlib.sha256(), 0
    file.seek(0)
    with memoryview(memory) as view:
        while done < listed.size:
            try:
                count = file.readinto(view[done : min(done + CHUNK, listed.size)])  # type: ignore[attr-defined]
            except OSError as error:
                raise BundleError(unreadable(path, error)) from error
            if not count:
                expected, got = f"{listed.size} bytes", f"{done} bytes"
                raise BundleError(Problem(code="file.size", file=path, expected=expected, got=got))
            digest.update(view[done : done + count])
            done += count
    check_digest(path, listed, digest.hexdigest())
    return memory


def _private_memory(size: int) -> mmap.mmap:
    """Return private memory. After a fork each process has its own copy; Python's default would share it."""
    if hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


def check_digest(path: str, listed: File, digest: str) -> None:
    """Check that a file's digest is the listed one.

    Raises:
        BundleError: ``file.digest``.
    """
    if digest != listed.sha256:
        raise BundleError(
            Problem(code="file.digest", file=path, expected=f"sha256 {listed.sha256}", got=digest, hint=FETCH)
        )


def read_listed(root: Path, path: str, expected: File, limit: int) -> bytes:
    """Read a small file, and check that its digest is the listed one.

    Raises:
        BundleError: as for ``read_file``, and ``file.digest``.
    """
    data = read_file(root, path, limit, expected)
    check_digest(path, expected, hashlib.sha256(data).hexdigest())
    return data


def read_file(root: Path, path: str, limit: int, expected: File | None = None) -> bytes:
    """Read a small file.

    Raises:
        BundleError: as for ``open_file``, and ``json.size`` (or ``file.size``) above ``limit`` bytes.
    """
    try:
        with open_file(root, path, expected) as file:
            # Never more than the file has: Python allocates the requested number of bytes first.
            data = read_fully(file, min(limit, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        raise BundleError(unreadable(path, error)) from error
    if len(data) > limit:
        code = "json.size" if path.endswith(".json") else "file.size"
        got = f"more than {limit} bytes"
        raise BundleError(Problem(code=code, file=path, expected=f"at most {limit} bytes", got=got))
    return data


def read_fully(file: BinaryIO, size: int) -> bytes:
    """Read the next ``size`` bytes, or all bytes before the end. A single read may return fewer."""
    pieces = []
    while size and (piece := file.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def sha256(file: BinaryIO, advance: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 digest of a file from its present position to its end."""
    digest = hashlib.sha256()
    buffer = bytearray(HASHED_AT_ONCE)
    view = memoryview(buffer)
    while count := file.readinto(view):  # type: ignore[attr-defined]  # every raw binary file has it
        digest.update(view[:count])
        if advance is not None:
            advance(count)
    return digest.hexdigest()


def unlisted(root: Path, listed: set[str]) -> list[str]:
    """Return the files, links and empty directories under ``root`` that aren't in ``listed``, sorted.

    The name of an empty directory ends with ``/``. A directory for listed files isn't reported, even without them.

    Raises:
        BundleError: ``file.unreadable`` for a directory that can't be listed.
    """
    found: list[str] = []
    empty: set[str] = set()
    expected = {parent.as_posix() for path in listed for parent in PurePosixPath(path).parents}

    def fail(error: OSError) -> None:
        raise error  # a directory that can't be listed may hold anything

    try:
        for directory, directories, files in os.walk(root, onerror=fail):
            here = Path(directory)
            links = [name for name in directories if _is_link(here / name)]
            found += [(here / name).relative_to(root).as_posix() for name in (*files, *links)]
            if not files and not directories and (place := here.relative_to(root).as_posix()) not in expected:
                empty.add(f"{place}/")
            directories[:] = [name for name in directories if name not in links]  # os.walk may follow a junction
    except OSError as error:
        failed = os.path.relpath(os.fsdecode(error.filename or root), root)
        raise BundleError(unreadable(failed if len(failed) < 100 else f"{failed[:100]}…", error)) from error
    return sorted(empty | {path for path in found if path not in listed})


def is_junction(status: os.stat_result) -> bool:
    """Return whether the result of ``lstat`` is that of a junction: a link to a directory, which only Windows has.

    Windows calls it a directory. Anybody may make one, also without the right to make symbolic links.
    """
    return getattr(status, "st_reparse_tag", 0) == _MOUNT_POINT


def _is_link(place: Path) -> bool:
    try:
        status = os.lstat(place)
    except OSError:
        return False
    return stat.S_ISLNK(status.st_mode) or is_junction(status)


def _kind(status: os.stat_result) -> str:
    if is_junction(status):
        return "a junction"
    kinds = (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in kinds if test(status.st_mode)), "a device")
