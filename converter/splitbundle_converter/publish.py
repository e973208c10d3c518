"""A bundle appears whole or not at all: written beside its destination, made durable, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from splitbundle import strict_json
from splitbundle.bundle import mend
from splitbundle.errors import BundleError, Problem

if sys.platform != "win32":
    import fcntl

_AT_FDCWD: Final = -100
_LOCK: Final = ".lock"


@contextlib.contextmanager
def publishing(destination: str | os.PathLike[str], *, force: bool) -> Iterator[Path]:
    """A directory to write into, which becomes ``destination`` when the block ends well and vanishes when it doesn't.

    Raises:
        BundleError: ``output.exists`` without ``force``, or for what isn't a bundle; ``output.failed`` where the system
            doesn't let it be written.
    """
    target = _place(destination)
    try:
        mend(target)
        _refuse_existing(target, force)
        _sweep(target)
        with _staging(target) as staging:
            yield staging
            _make_durable(staging)
            _replace(staging, target, force)
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(target.parent)):
            raise  # something that was being read, somewhere else
        raise _failed(target, error) from error


@contextlib.contextmanager
def scratch(destination: str | os.PathLike[str], *, force: bool) -> Iterator[Path]:
    """A private directory beside ``destination`` for what is needed on the way; it vanishes however the block ends.

    It is called as half-written bundles are, so the next writer of this destination removes what a killed one left.

    Raises:
        BundleError: ``output.exists`` and ``output.failed``, as ``publishing``: before the work, not after it.
    """
    target = _place(destination)
    with contextlib.ExitStack() as stack:
        try:
            mend(target)
            _refuse_existing(target, force)
            _sweep(target)
            directory = stack.enter_context(_staging(target))
            directory.chmod(0o700)
        except OSError as error:
            raise _failed(target, error) from error
        yield directory


def _place(destination: str | os.PathLike[str]) -> Path:
    target = Path(os.path.abspath(destination))  # not resolved: a link is refused, not followed
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise _unwritable(target, f"{target.parent} is a file") from error
    except OSError as error:
        raise _failed(target, error) from error
    return target


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A new directory beside the target, and beside it a file that is locked for as long as its writer lives."""
    staging = target.with_name(f".{target.name}.tmp-{secrets.token_hex(8)}")
    lock = staging.with_name(staging.name + _LOCK)
    try:  # around all of it: an interruption may come between any two steps
        with lock.open("xb") as held:
            _lock(held, wait=True)
            staging.mkdir()
            yield staging
    finally:
        # Gone already if all went well. What can't be removed must not hide the error that brought us here.
        _remove(staging)
        with contextlib.suppress(OSError):
            lock.unlink()


def _lock(file: BinaryIO, *, wait: bool) -> bool:
    """Locks a file until it is closed, if only by its process's end; False where another has it, or nobody can tell."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _refuse_existing(target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        expected, got = "nothing there", "an existing file or directory"
        hint = "--force replaces it once the new one is complete"
    elif not _is_bundle(target):
        expected, got, hint = "a bundle, to be replaced", "something else", "Remove it yourself: --force won't"
    else:
        return
    raise BundleError(Problem(code="output.exists", file=str(target), expected=expected, got=got, hint=hint))


def _is_bundle(target: Path) -> bool:
    """Whether this is a bundle, whole or spoilt, or an empty directory: all that ``--force`` may remove."""
    if target.is_symlink() or not target.is_dir():
        return False
    if not any(target.iterdir()):
        return True
    try:
        document = strict_json.parse((target / "manifest.json").read_bytes(), "manifest.json")
    except (OSError, BundleError):
        return False
    return isinstance(document, dict) and document.get("format") == "splitbundle"


def _sweep(target: Path) -> None:
    """Removes what killed writers of this destination left: half-written bundles, and old ones that were replaced."""
    name = glob.escape(target.name)
    for lock in target.parent.glob(f".{name}.tmp-*{_LOCK}"):
        with contextlib.suppress(OSError), lock.open("rb") as left:
            if _lock(left, wait=False):
                _remove(lock.with_name(lock.name.removesuffix(_LOCK)))
                lock.unlink()
    if target.exists():
        for old in target.parent.glob(f".{name}.old-*"):
            _remove(old)


def _make_durable(staging: Path) -> None:
    for directory, _, files in os.walk(staging):
        for name in files:
            _flush(Path(directory, name))
        _flush(Path(directory))


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle of a directory to flush
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(staging: Path, target: Path, force: bool) -> None:
    # Converting takes minutes, in which something else may have come to stand there.
    _refuse_existing(target, force)
    if not os.path.lexists(target):
        if not _rename(staging, target, exchange=False):
            staging.rename(target)
    elif not _rename(staging, target, exchange=True):
        # Two renames; whoever opens the bundle or writes here after an interruption between them puts the old one back.
        old = target.with_name(f".{target.name}.old-{secrets.token_hex(8)}")
        target.rename(old)
        staging.rename(target)
        _remove(old)
    # Where they were exchanged, the old bundle now stands in staging, which is removed.
    _flush(target.parent)


def _rename(source: Path, target: Path, *, exchange: bool) -> bool:
    """Renames onto nothing, or exchanges two directories, in one step; False where the system can't.

    Linux has renameat2 with RENAME_NOREPLACE (1) and RENAME_EXCHANGE (2), macOS renamex_np with RENAME_EXCL (4) and
    RENAME_SWAP (2).
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
    """Removes a directory of ours, read-only ones in it too, as far as the system lets us."""
    for place, _, _ in os.walk(directory):
        with contextlib.suppress(OSError):
            Path(place).chmod(0o700)
    shutil.rmtree(directory, ignore_errors=True)


def _failed(target: Path, error: OSError) -> BundleError:
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        hint = "Another writer was first; --force replaces it"
        return BundleError(
            Problem(code="output.exists", file=str(target), expected="nothing there", got="a new bundle", hint=hint)
        )
    return _unwritable(target, f"{type(error).__name__}: {error}")


def _unwritable(target: Path, got: str) -> BundleError:
    hint = "Choose another place with --output, or make room there"
    expected = "a place that can be written"
    return BundleError(Problem(code="output.failed", file=str(target), expected=expected, got=got, hint=hint))
