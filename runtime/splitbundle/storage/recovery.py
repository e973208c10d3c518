"""Where a bundle stands while it is replaced in two steps, and how whoever comes next ends what was interrupted."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

if sys.platform != "win32":
    import fcntl

LOCK_TIMEOUT: Final = 5.0
"""Seconds to wait for whoever else writes here. Whoever may read a directory can lock it, and mustn't stop others."""


def backup_path(target: Path) -> Path:
    """Where the old bundle stands between the two renames that replace it. There is one such place, so never a choice
    between several old bundles, which nothing but their clocks would tell apart.
    """
    return target.with_name(f".{target.name}.old")


def is_backup(place: Path) -> bool:
    """Whether what stands there looks like a bundle, or is empty, which may be replaced too.

    Others may keep something else under that name: it stays theirs.
    """
    try:
        if not stat.S_ISDIR(os.lstat(place).st_mode):
            return False
        return not any(place.iterdir()) or stat.S_ISREG(os.lstat(place / "manifest.json").st_mode)
    except OSError:
        return False


def recover(target: Path) -> None:
    """Puts the old bundle back where its replacement was interrupted; where nothing was, nothing happens.

    It never fails: where the system refuses it, on a read-only mount, there is no bundle, as the caller will find.
    """
    if not target.name or os.path.lexists(target):  # the root of a file system has no name, and isn't replaced
        return
    old = backup_path(target)
    if not is_backup(old):
        return
    with contextlib.suppress(OSError), directory_lock(target.parent):
        if not os.path.lexists(target):  # or a living writer has just come to its end
            old.rename(target)


@contextlib.contextmanager
def directory_lock(directory: Path) -> Iterator[None]:
    """Keeps others out who change which bundles stand in a directory, for the few steps that belong together.

    The directory itself is locked, so nothing is left behind by whoever dies; where the system has no such locks, or
    somebody holds one for long, the block runs without it.
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
            except OSError:  # no locks here
                pass
            break
        yield
    finally:
        with contextlib.suppress(OSError):  # nothing was written through it
            os.close(handle)
