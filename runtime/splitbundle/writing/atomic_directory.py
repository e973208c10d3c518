"""Write a directory atomically: write it beside its destination, flush it to disk, then rename it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from splitbundle.errors import BundleError, Problem
from splitbundle.format import strict_json
from splitbundle.format.manifest.document import FILE
from splitbundle.storage import files
from splitbundle.storage.recovery import backup_path, directory_lock, is_backup, recover

if sys.platform != "win32":
    import fcntl

_AT_FDCWD: Final = -100
_LOCK: Final = ".lock"
TEMPORARY: Final = re.compile(r"\.tmp-[0-9a-f]{16}(\.lock)?\Z")
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
"""The error numbers of file systems that do not support locks."""


@contextlib.contextmanager
def atomic_directory(
    destination: str | os.PathLike[str], *, force: bool, ours: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Create a directory to write into. It becomes ``destination`` if the block succeeds, and is removed otherwise.

    Args:
        destination: the directory.
        force: whether to replace what is there, if it is one of ours.
        ours: tells whether a directory may be replaced; by default, whether it is a bundle or empty.

    Raises:
        BundleError: ``output.exists`` if ``destination`` exists and ``force`` is false, or if it is not one of ours;
            ``output.failed`` if the system refuses to write.
    """
    ours = _is_bundle if ours is None else ours
    target = absolute_target(destination)
    made: os.stat_result | None = None
    try:
        _prepare(target, force, ours)
        with _staging(target) as staging:
            yield staging
            _make_durable(staging)
            made = staging.stat()
            with directory_lock(target.parent):
                _replace(staging, target, force, ours)
    except OSError as error:
        if made is not None and _is_there(made, target):
            raise _not_durable(target, error, ours) from error
        if error.filename is not None and not belongs_to(Path(os.fsdecode(error.filename)), target):
            raise  # an error about a file that was being read
        raise unwritable(target, error) from error


@contextlib.contextmanager
def scratch_directory(destination: str | os.PathLike[str], *, force: bool) -> Iterator[Path]:
    """Create a private directory beside ``destination`` for temporary files. It is removed at the end of the block.

    Its name has the form of an unfinished bundle's name. So the next writer of this destination removes it if this
    process is killed.

    Raises:
        BundleError: ``output.exists`` and ``output.failed``, as for ``atomic_directory``, but before the work begins.
    """
    target = absolute_target(destination)
    with contextlib.ExitStack() as stack:
        try:
            _prepare(target, force, _is_bundle)
            directory = stack.enter_context(_staging(target))
            directory.chmod(0o700)
        except OSError as error:
            raise unwritable(target, error) from error
        yield directory


def belongs_to(path: Path, target: Path) -> bool:
    """Return whether the path in an error is the target, a temporary entry beside it, or their parent directory."""
    if not path.is_relative_to(target.parent):
        return False
    inside = path.relative_to(target.parent).parts
    return not inside or inside[0] == target.name or inside[0].startswith(f".{target.name}.")


def absolute_target(destination: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a destination, and make the directories above it.

    Raises:
        BundleError: ``output.failed``.
    """
    target = Path(os.path.abspath(destination))  # not resolved, because a link must be refused, not followed
    if not target.name or "\0" in str(target):
        raise unwritable(target, "no name for a file or a directory")
    made = []
    for place in target.parents:
        if os.path.lexists(place):
            break
        made.append(place)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for place in made:
            flush(place.parent)
    except FileExistsError as error:
        raise unwritable(target, f"{target.parent} is a file") from error
    except OSError as error:
        raise unwritable(target, error) from error
    return target


def _prepare(target: Path, force: bool, ours: Callable[[Path], bool]) -> None:
    """Recover from an interrupted replacement, check that the target may be written, and remove unfinished bundles.

    Unfinished bundles come from writers that were killed.
    """

    def may_be_old(place: Path) -> bool:
        return is_backup(place) or ours(place)

    recover(target, may_be_old)
    with directory_lock(target.parent):  # while another writer replaces a bundle, the target is absent for a moment
        _refuse_existing(target, force, ours)
        old = backup_path(target)
        if os.path.lexists(target) and may_be_old(old):  # a writer replaced the bundle, and was killed then
            # One rename moves the backup away. Removing it in place could leave half of it, and recovery would restore
            # this half.
            old.rename(temporary_path(target))
    remove_unfinished(target)


def remove_unfinished(target: Path) -> None:
    """Remove unfinished directories of this target, and their lock files, if no writer is at work on them."""
    for place in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        if not TEMPORARY.search(place.name):
            continue  # another program's or the user's entry
        if place.name.endswith(_LOCK):
            if not is_file(place):
                continue
            with contextlib.suppress(OSError), place.open("rb") as left:
                if lock_file(left, wait=False):
                    _remove(place.with_name(place.name.removesuffix(_LOCK)))
                    place.unlink()
        elif not os.path.lexists(place.with_name(place.name + _LOCK)):  # a running writer has a lock file
            _remove(place)


def is_file(place: Path) -> bool:
    """Return whether a regular file, and no link, is there."""
    try:
        return stat.S_ISREG(place.lstat().st_mode)
    except OSError:
        return False  # it was removed meanwhile


def temporary_path(target: Path) -> Path:
    """Return a new path beside the target, in the form that ``remove_unfinished`` knows."""
    return target.with_name(f".{target.name}.tmp-{secrets.token_hex(8)}")


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Create a new directory beside the target, and a lock file that stays locked until the block or process ends."""
    claimed = False
    while not claimed:
        staging = temporary_path(target)
        lock = staging.with_name(staging.name + _LOCK)
        try:  # around all steps, because an interruption may come between any two of them
            with files.closed_at_last(lock.open("xb")) as held:
                lock_file(held, wait=True)
                # Before this process locked the file, another writer may have taken it for a killed writer's file
                # and removed it.
                claimed = os.path.lexists(lock)
                if claimed:
                    staging.mkdir()
                    yield staging
        finally:
            # This is an unfinished bundle, a replaced bundle or a scratch directory. If the removal fails, this must
            # not hide an earlier error; the next writer tries again.
            _remove(staging)
            with contextlib.suppress(OSError):
                lock.unlink()


def lock_file(file: BinaryIO, *, wait: bool) -> bool:
    """Lock a file until it is closed or the process ends.

    Returns:
        True if the file is locked now. False if another process has the lock, or if locks are not supported.

    Raises:
        OSError: With ``wait``, the lock failed for another reason. Other processes may not have this error. They would
            then treat this running writer as a killed one.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if wait and error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _refuse_existing(target: Path, force: bool, ours: Callable[[Path], bool]) -> None:
    if not os.path.lexists(target):
        return
    replaceable = ours(target)
    if replaceable and force:
        return
    expected, got = "nothing there", "an existing file or directory"
    hint = "force=True replaces it once the new one is complete"
    if not replaceable:
        hint = "Remove it yourself, or choose another output: force=True won't replace it"
        if force:
            expected = "a bundle, to be replaced" if ours is _is_bundle else "one of the same kind, to be replaced"
            got = "something else"
    raise BundleError(Problem(code="output.exists", file=str(target), expected=expected, got=got, hint=hint))


def _is_bundle(target: Path) -> bool:
    """Return whether this is a bundle, complete or damaged, or an empty directory. ``--force`` removes only these."""
    if target.is_symlink() or not target.is_dir():
        return False
    if not any(target.iterdir()):
        return True
    try:
        document = strict_json.parse(files.read_file(target, FILE, strict_json.MAX_BYTES), FILE)
    except BundleError:
        return False
    return isinstance(document, dict) and document.get("format") == "splitbundle"


def _make_durable(staging: Path) -> None:
    def fail(error: OSError) -> None:
        raise error  # without this, os.walk would skip a directory, and its files would not be flushed

    for directory, _, names in os.walk(staging, onerror=fail):
        for name in names:
            flush(Path(directory, name))
        flush(Path(directory))


def flush(path: Path) -> None:
    """Flush a file to disk, or a directory with all that was flushed before."""
    is_directory = sys.platform in ("darwin", "win32") and path.is_dir()  # Linux needs no difference
    if sys.platform == "win32" and is_directory:
        return  # Windows can't flush a directory
    # Windows flushes only what may be written. Elsewhere, a file that nobody may write is flushed all the same.
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        flush_handle(handle, disk=is_directory)
    finally:
        os.close(handle)


def flush_handle(handle: int, *, disk: bool) -> None:
    """Flush an open file or directory.

    Args:
        handle: its handle.
        disk: whether what the disk itself holds back must be written, too. On macOS ``fsync`` leaves it there, and
            writing it takes milliseconds.
    """
    if sys.platform == "darwin" and disk:
        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
    os.fsync(handle)


def _replace(staging: Path, target: Path, force: bool, ours: Callable[[Path], bool]) -> None:
    # A conversion takes minutes. Meanwhile, another process may have created the target.
    _refuse_existing(target, force, ours)
    old, two_steps = backup_path(target), False
    try:
        if not os.path.lexists(target):
            if not rename(staging, target, exchange=False):
                staging.rename(target)
        elif not rename(staging, target, exchange=True):
            # Two renames. If an interruption comes between them, the next reader or writer of the bundle recovers it.
            two_steps = True
            target.rename(old)
            try:
                staging.rename(target)
            except BaseException:
                with contextlib.suppress(OSError):
                    old.rename(target)
                raise
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            raise _beaten(target, ours) from error
        raise
    try:
        flush(target.parent)
        if two_steps:
            old.rename(staging)
        # After an exchange, the old bundle is already at the path of ``staging``, which is removed at the end.
    except OSError as error:
        raise _not_durable(target, error, ours) from error


def _is_there(made: os.stat_result, target: Path) -> bool:
    """Return whether the new directory is at its destination, even if a later step failed."""
    try:
        return os.path.samestat(made, target.lstat())
    except OSError:
        return False


def rename(source: Path, target: Path, *, exchange: bool) -> bool:
    """Rename to a free path, or exchange two directories, in one step. Return False if the system can't do this.

    Linux has renameat2 with RENAME_NOREPLACE (1) and RENAME_EXCHANGE (2), macOS renamex_np with RENAME_EXCL (4) and
    RENAME_SWAP (2).

    Raises:
        OSError: The rename failed.
    """
    if sys.platform not in ("linux", "darwin"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(source), os.fsencode(target)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        status = libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], 2 if exchange else 1)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        status = libc.renamex_np(*paths, 2 if exchange else 4)
    else:
        return False
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(target))


def _remove(directory: Path) -> None:
    """Remove a temporary directory, including read-only directories in it, if the system allows it.

    A link with such a name comes from another program, so neither the link nor its target is removed.
    """
    if os.path.islink(directory):  # islink raises no OSError
        return
    for place, _, _ in os.walk(directory):
        with contextlib.suppress(OSError):
            Path(place).chmod(0o700)
    with contextlib.suppress(OSError):  # ignore_errors does not cover errors of closing a directory
        shutil.rmtree(directory, ignore_errors=True)


def _beaten(target: Path, ours: Callable[[Path], bool]) -> BundleError:
    got = "a new bundle" if ours is _is_bundle else "a new directory"
    hint = "Another writer was first; force=True replaces it"
    return BundleError(Problem(code="output.exists", file=str(target), expected="nothing there", got=got, hint=hint))


def _not_durable(target: Path, error: OSError, ours: Callable[[Path], bool]) -> BundleError:
    if ours is _is_bundle:
        expected = "a new bundle that survives a power failure"
        hint = "The bundle is in place. Check it with splitbundle verify; free or replace the disk, and run this again"
    else:
        expected = "a new directory that survives a power failure"
        hint = "The new directory is in place. Free or replace the disk, and run this again"
    return BundleError(
        Problem(code="output.failed", file=str(target), expected=expected, got=line_of(error), hint=hint)
    )


def unwritable(target: Path, got: str | OSError) -> BundleError:
    """Return the error of a target that can't be written: ``output.failed``."""
    hint = "Choose another output, or make room there"
    expected = "a place that can be written"
    said = got if isinstance(got, str) else line_of(got)
    return BundleError(Problem(code="output.failed", file=str(target), expected=expected, got=said, hint=hint))


def line_of(error: OSError) -> str:
    """Return an error of the system as one line."""
    return f"{type(error).__name__}: {error}"
