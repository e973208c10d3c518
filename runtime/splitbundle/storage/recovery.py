"""Recover a bundle whose replacement in two steps was interrupted, and lock its directory meanwhile."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

if sys.platform != "win32":
    import fcntl

LOCK_TIMEOUT: Final = 5.0
"""Seconds to wait for the lock. Any process that can read a directory can lock it, and mustn't stop the others."""


def backup_path(target: Path) -> Path:
    """Return the path of the old bundle between the two renames that replace it.

    Each bundle has one such path. So there is never a choice between several old bundles, which only their clocks
    could tell apart.
    """
    return target.with_name(f".{target.name}.old")


def is_backup(place: Path) -> bool:
    """Return whether a directory looks like a bundle or is empty. An empty directory may be replaced too.

    Other programs may keep their own files under that name. These are left alone.
    """
    try:
        if not stat.S_ISDIR(os.lstat(place).st_mode):
            return False
        return not any(place.iterdir()) or stat.S_ISREG(os.lstat(place / "manifest.json").st_mode)
    except OSError:
        return False


def recover(target: Path, ours: Callable[[Path], bool] = is_backup) -> None:
    """Put the old bundle back if its replacement was interrupted. Otherwise do nothing.

    This fails only if ``ours`` does. If the system refuses the rename (on a read-only mount), the caller finds no
    bundle.

    Args:
        target: the directory of the bundle.
        ours: tells whether a directory may be the old one.
    """
    if not target.name or os.path.lexists(target):  # the root of a file system has no name, and is never replaced
        return
    old = backup_path(target)
    if not ours(old):
        return
    with contextlib.suppress(OSError), directory_lock(target.parent):
        if not os.path.lexists(target):  # a running writer may have finished in the meantime
            old.rename(target)


@contextlib.contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Lock a directory against other processes that replace bundles in it, for a few steps that belong together.

    The lock is on the directory itself, so a process that dies leaves nothing behind. If the system has no such
    locks, or another process holds the lock for ``LOCK_TIMEOUT`` seconds, the block runs without the lock.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(0.01)
                    continue
            except OSError:  # this file system has no locks
                pass
            break
        yield
    finally:
        with contextlib.suppress(OSError):  # nothing was written through it
            os.close(handle)
