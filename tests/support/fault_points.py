"""The faults that each system call of a command can meet."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tests.support.syscalls import Call, Fault

WRITE_FLAGS: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES: Final = frozenset(
    {"open", "openat", "write", "pwrite64", "writev", "copy_file_range", "sendfile", "fallocate", "truncate"}
    | {
        "ftruncate",
        "mkdir",
        "mkdirat",
        "link",
        "linkat",
        "rename",
        "renameat",
        "renameat2",
        "rmdir",
        "unlink",
        "unlinkat",
        "chmod",
    }
    | {"fchmod", "fchmodat"}
)
"""Calls that change files on the disk. A kill before another call is like a kill before the next of these."""
MOVES: Final = frozenset({"rename", "renameat", "renameat2", "copy_file_range", "sendfile"})
TRANSFERS: Final = frozenset({"read", "write", "pread64", "pwrite64", "copy_file_range", "sendfile"})
ROOM: Final = CHANGES - {"rmdir", "unlink", "unlinkat", "chmod", "fchmod", "fchmodat"} | {"fsync", "fdatasync", "close"}


def changes(call: Call) -> bool:
    """Whether a call changes files on the disk, if it succeeds."""
    if call.name in ("open", "openat"):
        return bool(call.arguments[1 if call.name == "open" else 2] & WRITE_FLAGS)
    return call.name in CHANGES


def errors_of(call: Call) -> list[int]:
    """The errors that a call can meet."""
    found = [errno.EIO]
    if call.name in ROOM and (changes(call) or call.name in ("fsync", "fdatasync", "close")):
        found.append(errno.ENOSPC)
    if changes(call) and call.name not in TRANSFERS:
        found += [errno.EROFS, errno.EACCES]
    if call.name in ("open", "openat"):
        found.append(errno.EMFILE)
    if call.name in MOVES:
        found.append(errno.EXDEV)
    if call.name in TRANSFERS | {"open", "openat", "fsync", "flock"}:
        found.append(errno.EINTR)
    if call.name == "flock":
        found.append(errno.ENOLCK)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One fault at one call."""

    call: Call
    what: str
    fault: Fault
    onward: Callable[[Call], bool] | None = None
    """The later calls that fail too: a full disk stays full."""


def points(calls: Sequence[Call], thorough: bool) -> Iterator[Point]:
    """The fault of each call."""
    for i, call in enumerate(calls):
        errors = errors_of(call)
        for error in errors if thorough else [errors[i % len(errors)]]:
            # Linux closes a handle even if close reports an error.
            yield Point(call=call, what=errno.errorcode[error], fault=Fault(error=error, late=call.name == "close"))
        if call.name in TRANSFERS:
            yield Point(call=call, what="short", fault=Fault(short=True))
        interruptions = [signal.SIGINT, signal.SIGTERM]
        for number in interruptions if thorough else [interruptions[i % 2]]:
            yield Point(call=call, what=number.name, fault=Fault(signal=number))
        if changes(call) or thorough:
            yield Point(call=call, what="SIGKILL", fault=Fault(signal=signal.SIGKILL))
        if not changes(call) and call.name not in ("fsync", "close") and not thorough:
            continue
        if call.name in MOVES | {"fsync"} or (thorough and call.name != "close"):
            yield Point(call=call, what="EIO, though done", fault=Fault(error=errno.EIO, late=True))
        onward: list[tuple[int, Callable[[Call], bool]]] = [
            (errno.EIO, lambda call: True),
            (errno.ENOSPC, lambda call: errno.ENOSPC in errors_of(call)),
            (errno.EROFS, lambda call: changes(call)),
        ]
        for error, fails in onward if thorough else [onward[i % 3]]:
            if fails(call):
                what = f"{errno.errorcode[error]} from there on"
                yield Point(call=call, what=what, fault=Fault(error=error, last=False), onward=fails)
