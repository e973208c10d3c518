"""Put rules of Windows on this process, which Linux doesn't have. It stands in for a machine with Windows, in part.

Windows renames and removes no file that is open or mapped, no directory with one inside, and no read-only file. It
flushes only what may be written, and ``rename`` replaces nothing. It has no ``fcntl``, no modes and no ``fork``.
``apply`` must come before splitbundle is imported, and is never undone. It says nothing of paths, of the console, of
signals and of torch: ``os.name`` stays as it is, so the standard library takes Linux's ways.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import stat
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

ABSENT = (
    *("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK"),
    *("copy_file_range", "fchmod", "fork", "posix_fadvise", "posix_spawnp", "register_at_fork", "sched_getaffinity"),
    *("sendfile", "wait4", "waitid"),
)
"""Names of ``os`` that Windows lacks. ``fchmod`` came with Python 3.13."""
MODULES = ("fcntl", "grp", "pwd", "readline", "resource", "termios")


def apply() -> None:
    """Put the rules on this process."""
    import fcntl  # before it is gone

    flags_of: Callable[[int], int] = lambda handle: fcntl.fcntl(handle, fcntl.F_GETFL)  # noqa: E731
    for name in ABSENT:
        delattr(os, name)
    _guard_names()
    _guard_flush(flags_of)
    _guard_writing()
    # These take Linux's ways when they are imported.
    import asyncio  # noqa: F401
    import concurrent.futures  # noqa: F401
    import multiprocessing  # noqa: F401
    import shutil  # noqa: F401
    import socket  # noqa: F401
    import ssl
    import subprocess  # noqa: F401
    import tempfile  # noqa: F401

    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    ssl.enum_certificates = lambda store: []  # type: ignore[attr-defined]  # Windows' own store of authorities
    sys.platform = "win32"


def in_use(path: Any) -> bool:
    """Return whether this process has a file open or mapped: the path itself, or one below it."""
    place = os.path.realpath(os.fsdecode(path))
    opened = []
    for handle in os.listdir("/proc/self/fd"):
        try:
            opened.append(os.readlink(f"/proc/self/fd/{handle}"))
        except OSError:
            continue  # the handle of this very listing
    with _open("/proc/self/maps") as maps:
        opened += [line.rstrip("\n").split(maxsplit=5)[-1] for line in maps]
    return any(each == place or each.startswith(f"{place}/") for each in opened)


def _refuse(path: Any, why: str) -> None:
    raise PermissionError(errno.EACCES, f"Windows would refuse this: {why}", os.fsdecode(path))


def _is_read_only(path: Any) -> bool:
    try:
        mode = _lstat(path).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) and not mode & stat.S_IWUSR


def _guard_names() -> None:
    rename, replace, unlink = os.rename, os.replace, os.unlink

    def guarded_rename(source: Any, target: Any) -> None:
        if in_use(source):
            _refuse(source, "the file is open")
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "Windows replaces nothing here", os.fsdecode(target))
        rename(source, target)

    def guarded_replace(source: Any, target: Any) -> None:
        for path in (source, target):
            if in_use(path):
                _refuse(path, "the file is open")
        if _is_read_only(target):
            _refuse(target, "the file is read-only")
        if os.path.isdir(target):
            _refuse(target, "it is a directory")
        replace(source, target)

    def guarded_unlink(path: Any, **named: Any) -> None:
        if named.get("dir_fd") is not None:
            raise NotImplementedError("dir_fd")
        if in_use(path):
            _refuse(path, "the file is open")
        if _is_read_only(path):
            _refuse(path, "the file is read-only")
        unlink(path)

    # Python 3.10 keeps these in a class, which would make methods of plain functions.
    os.rename, os.replace = partial(guarded_rename), partial(guarded_replace)  # type: ignore[assignment]
    os.unlink = os.remove = partial(guarded_unlink)


def _guard_flush(flags_of: Callable[[int], int]) -> None:
    fsync = os.fsync

    def guarded(handle: Any) -> None:
        number = handle if isinstance(handle, int) else handle.fileno()
        if flags_of(number) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Windows flushes only what may be written")
        fsync(handle)

    os.fsync = guarded


def _guard_writing() -> None:
    open_handle = os.open

    def guarded_handle(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if os.path.isdir(path):
            _refuse(path, "it is a directory")
        if flags & os.O_ACCMODE != os.O_RDONLY and _is_read_only(path):
            _refuse(path, "the file is read-only")
        return open_handle(path, flags, *more, **named)

    def guarded_open(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        if not isinstance(file, int) and set(mode) & set("wax+") and _is_read_only(file):
            _refuse(file, "the file is read-only")
        return _open(file, mode, *more, **named)

    os.open = partial(guarded_handle)
    builtins.open = io.open = partial(guarded_open)


_open, _lstat = builtins.open, os.lstat
