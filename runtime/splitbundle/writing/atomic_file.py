"""Write one file atomically: write it beside its destination, flush it to disk, then rename it."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from splitbundle.errors import BundleError, Problem
from splitbundle.storage.recovery import directory_lock
from splitbundle.writing.atomic_directory import (
    TEMPORARY,
    absolute_target,
    belongs_to,
    flush,
    flush_handle,
    is_file,
    line_of,
    lock_file,
    rename,
    temporary_path,
    unwritable,
)

Ours = Callable[[Path], bool]
"""Tells whether an existing regular file may be replaced."""


@contextlib.contextmanager
def atomic_file(
    destination: str | os.PathLike[str], *, force: bool, ours: Ours, beside: Path | None = None
) -> Iterator[BinaryIO]:
    """Open a new file to write into. It becomes ``destination`` if the block succeeds, and is removed otherwise.

    Args:
        destination: the file.
        force: whether to replace what is there, if it is one of ours.
        ours: tells whether a regular file may be replaced.
        beside: a path on the same file system, beside which the unfinished file lies; by default the destination.

    Raises:
        BundleError: ``output.exists`` if ``destination`` exists and ``force`` is false, or if it is not one of ours;
            ``output.failed`` if the system refuses to write.
    """
    target = absolute_target(destination)
    anchor = beside or target
    made: os.stat_result | None = None
    placed = False
    try:
        with directory_lock(target.parent):
            _refuse_existing(target, force, ours)
        _remove_unfinished(anchor)
        with _temporary(anchor) as (place, file):
            yield file
            file.flush()
            flush_handle(file.fileno(), disk=True)
            made = os.fstat(file.fileno())
            if sys.platform == "win32":
                file.close()  # Windows renames no open file. Elsewhere, the lock must last until the file is in place
            with directory_lock(target.parent):
                _place(place, target, force, ours)
                placed = True
            flush(target.parent)
    except OSError as error:
        if placed or (made is not None and _is_there(made, target)):
            raise _not_durable(target, error) from error
        named = None if error.filename is None else Path(os.fsdecode(error.filename))
        if named is not None and not belongs_to(named, target) and not belongs_to(named, anchor):
            raise  # an error about a file that was being read
        raise unwritable(target, error) from error


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Open a new file beside the target. It stays locked until the block or the process ends.

    A process that can lock such a file knows that its writer was killed.
    """
    claimed = False
    while not claimed:
        place = temporary_path(target)
        try:  # around all steps, because an interruption may come between any two of them
            with place.open("xb") as file:
                lock_file(file, wait=True)
                # Before this process locked the file, another writer may have taken it for a killed writer's file
                # and removed it.
                claimed = os.path.lexists(place)
                if claimed:
                    yield place, file
        finally:
            with contextlib.suppress(OSError):  # it has the name of the target now, or the next writer removes it
                place.unlink()


def _remove_unfinished(target: Path) -> None:
    """Remove unfinished files of this target, if no writer is at work on them."""
    for place in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        if not TEMPORARY.search(place.name) or place.suffix == ".lock" or not is_file(place):
            continue  # another program's or the user's entry, or one of a directory that is being written
        with contextlib.suppress(OSError), place.open("rb") as left:
            if lock_file(left, wait=False):
                place.unlink()


def _refuse_existing(target: Path, force: bool, ours: Ours) -> None:
    if not os.path.lexists(target):
        return
    replaceable = is_file(target) and ours(target)
    if replaceable and force:
        return
    expected, got = "nothing there", "an existing file or directory"
    hint = "force=True replaces it once the new one is complete"
    if not replaceable:
        hint = "Remove it yourself, or choose another output: force=True won't replace it"
        if force:
            expected, got = "a file of the same kind, to be replaced", "something else"
    raise BundleError(Problem(code="output.exists", file=str(target), expected=expected, got=got, hint=hint))


def _place(place: Path, target: Path, force: bool, ours: Ours) -> None:
    # Packing takes minutes. Meanwhile, another process may have created the target.
    _refuse_existing(target, force, ours)
    if force:
        place.replace(target)
        return
    try:
        if not rename(place, target, exchange=False):
            place.rename(target)
    except OSError as error:
        if error.errno == errno.EEXIST:
            hint = "Another writer was first; force=True replaces it"
            expected, got = "nothing there", "a new file"
            problem = Problem(code="output.exists", file=str(target), expected=expected, got=got, hint=hint)
            raise BundleError(problem) from error
        raise


def _is_there(made: os.stat_result, target: Path) -> bool:
    """Return whether the new file is at its destination, even if a later step failed."""
    try:
        return os.path.samestat(made, target.lstat())
    except OSError:
        return False


def _not_durable(target: Path, error: OSError) -> BundleError:
    expected = "a new file that survives a power failure"
    hint = "The new file is in place. Free or replace the disk, and run this again"
    return BundleError(
        Problem(code="output.failed", file=str(target), expected=expected, got=line_of(error), hint=hint)
    )
