"""Files by their digests: whole ones, which don't change any more, and unfinished ones that a later pull completes."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from pathlib import Path
from typing import BinaryIO, Final

from splitbundle.errors import BundleError, Problem
from splitbundle.format.manifest.document import File
from splitbundle.storage import files
from splitbundle.writing.copying import copy_bytes

if sys.platform != "win32":
    import fcntl

READ_ONLY: Final = 0o444


class Store:
    """A directory of files by their SHA-256 digests: ``blobs`` has whole ones, and ``parts`` unfinished ones."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.parts = root / "parts"

    def prepare(self) -> None:
        """Make the directories.

        Raises:
            OSError: The system refuses it.
        """
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)
        self.parts.mkdir(exist_ok=True)

    def blob(self, sha256: str) -> Path:
        """Return the path of the whole file with this digest."""
        return self.root / "blobs" / sha256[:2] / sha256[2:]

    def has(self, listed: File) -> bool:
        """Return whether the whole file is here. A file that was shortened since isn't."""
        return is_file_of(self.blob(listed.sha256), listed.size)

    def present_part(self, listed: File) -> int:
        """Return the bytes of the unfinished file that are here."""
        try:
            return min(os.lstat(self.parts / listed.sha256).st_size, listed.size)
        except OSError:
            return 0

    def claim(self, listed: File) -> BinaryIO | None:
        """Open the unfinished file for this process alone. Return None while another process has it.

        The lock is on the file itself, so a process that dies leaves nothing behind. Where the system has no locks, or
        has none that work here, each process gets a file of its own.

        Raises:
            OSError: The system refuses it.
        """
        place = self.parts / listed.sha256
        if sys.platform == "win32":
            return self.claim_own(listed)
        while True:
            handle = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            file = os.fdopen(handle, "r+b", buffering=0)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return None
            except OSError:
                file.close()
                return self.claim_own(listed)
            # The process that had it may have finished it, and moved it away.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(handle), os.lstat(place)):
                    return file
            file.close()

    def claim_own(self, listed: File) -> BinaryIO:
        """Open an unfinished file that no other process knows. A later pull can't complete it."""
        place = self.parts / f"{listed.sha256}.{secrets.token_hex(8)}"
        return open(str(place), "x+b", buffering=0)

    def keep(self, part: BinaryIO, listed: File) -> None:
        """Make a whole, checked file visible under its digest, and unchangeable. Windows removes no read-only file.

        Raises:
            OSError: The system refuses it.
        """
        place = self.blob(listed.sha256)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.fsync(part.fileno())
        if sys.platform == "win32":
            part.close()  # Windows renames no open file
        else:
            os.fchmod(part.fileno(), READ_ONLY)
        os.replace(self._place_of(part, listed), place)

    def add(self, data: bytes, listed: File) -> None:
        """Keep a small file whose digest was checked.

        Raises:
            OSError: The system refuses it.
        """
        if not self.has(listed):
            with contextlib.closing(self.claim_own(listed)) as part:
                write_all(part, data)
                self.keep(part, listed)

    def take(self, root: Path, path: str, listed: File) -> bool:
        """Copy a file from nearby, and check it. Return False if it isn't the listed one.

        The copy shares disk blocks where the file system can.

        Raises:
            OSError: The system refuses to write.
        """
        if self.has(listed):
            return True
        try:
            source = files.open_file(root, path, listed)
        except BundleError:
            return False
        with contextlib.closing(source), contextlib.closing(self.claim_own(listed)) as part:
            copy_bytes(source, part, listed.size)
            part.seek(0)
            if files.sha256(part) == listed.sha256:
                self.keep(part, listed)
                return True
            self.forget(part, listed)
            return False

    def forget(self, part: BinaryIO, listed: File) -> None:
        """Remove an unfinished file that this process has claimed. Nothing can be written to it any more."""
        if sys.platform == "win32":
            part.close()  # Windows removes no open file
        with contextlib.suppress(OSError):
            os.unlink(self._place_of(part, listed))

    def _place_of(self, part: BinaryIO, listed: File) -> str | Path:
        """Return the path of an unfinished file. One that was opened by its handle has a number for a name."""
        return part.name if isinstance(part.name, str) else self.parts / listed.sha256

    def free_bytes(self) -> int | None:
        """Return the free bytes of the file system, or None if the system can't tell."""
        try:
            if hasattr(os, "statvfs"):
                found = os.statvfs(self.root)
                return found.f_bavail * found.f_frsize
            import shutil

            return shutil.disk_usage(self.root).free
        except OSError:
            return None


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write bytes to a file without a buffer. The system may take a part of them at a time."""
    done, view = 0, memoryview(data)
    while done < len(view):
        done += file.write(view[done:])


def start_writing(file: BinaryIO, start: int, end: int) -> None:
    """Let the system begin to write some bytes of a file to the disk, and don't wait for it."""
    if hasattr(os, "posix_fadvise"):  # Linux begins to write what isn't written yet of a range that isn't needed
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)


def is_file(place: Path) -> bool:
    """Return whether a regular file is at a path."""
    try:
        return stat.S_ISREG(os.lstat(place).st_mode)
    except OSError:
        return False


def is_file_of(place: Path, size: int) -> bool:
    """Return whether a regular file of this size is at a path."""
    try:
        found = os.lstat(place)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def check_space(store: Store, needed: int) -> None:
    """Check that the file system has room before anything is moved.

    Raises:
        BundleError: ``output.space``.
    """
    free = store.free_bytes()
    if free is not None and free < needed:
        hint = (
            "Free some space, choose another output, set SPLITBUNDLE_CACHE, or empty the cache: splitbundle cache prune"
        )
        raise BundleError(
            Problem(
                code="output.space",
                file=str(store.root),
                expected=f"{needed:,} bytes of free space",
                got=f"{free:,} bytes",
                hint=hint,
            )
        )
