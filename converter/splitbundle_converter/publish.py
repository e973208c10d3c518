"""A bundle appears whole or not at all: written beside its destination, made durable, then renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from splitbundle.errors import BundleError, Problem

_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1
_RENAME_EXCHANGE: Final = 2


@contextlib.contextmanager
def publishing(destination: str | os.PathLike[str], *, force: bool) -> Iterator[Path]:
    """A directory to write into, which becomes ``destination`` when the block ends well and vanishes when it doesn't.

    Raises:
        BundleError: ``output.exists`` without ``force``; ``output.failed`` where it can't be written.
    """
    target = Path(os.path.abspath(destination))  # not resolved: a link is replaced, not followed
    _refuse_existing(target, force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    except OSError as error:
        raise _failed(target, error) from error
    try:
        yield staging
        try:
            _make_durable(staging)
            _replace(staging, target, force)
        except OSError as error:
            raise _failed(target, error) from error
    finally:
        # Gone already if all went well. What can't be removed must not hide the error that brought us here.
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_existing(target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if not force:
        hint = "--force replaces it once the new one is complete"
        raise BundleError(
            Problem(
                code="output.exists",
                file=str(target),
                expected="nothing there",
                got="an existing file or directory",
                hint=hint,
            )
        )
    if (
        target.is_symlink()
        or not target.is_dir()
        or (any(target.iterdir()) and not (target / "manifest.json").exists())
    ):
        hint = "--force only replaces bundles; remove it yourself"
        raise BundleError(
            Problem(
                code="output.exists",
                file=str(target),
                expected="a bundle, to be replaced",
                got="something else",
                hint=hint,
            )
        )


def _sweep(target: Path) -> None:
    """Removes what an old bundle left when its replacement was killed after the new one was in place."""
    if target.exists():
        for left in target.parent.glob(f".{target.name}.old-*"):
            shutil.rmtree(left, ignore_errors=True)


def _make_durable(staging: Path) -> None:
    """Flushes every file and directory, with the modes that any new file has: mkdtemp's are private."""
    mask = os.umask(0)
    os.umask(mask)
    for directory, _, files in os.walk(staging):
        for name in files:
            path = Path(directory, name)
            path.chmod(0o666 & ~mask)
            _flush(path)
        Path(directory).chmod(0o777 & ~mask)
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
    if not os.path.lexists(target):
        if not _renameat2(staging, target, _RENAME_NOREPLACE):
            staging.rename(target)
    elif not force:
        _refuse_existing(target, force)
    elif _renameat2(staging, target, _RENAME_EXCHANGE):
        pass  # the old bundle now stands in staging, which is removed
    else:
        # Two renames; whoever opens the bundle after an interruption between them puts the old one back.
        old = target.with_name(f".{target.name}.old-{staging.name.rpartition('-')[2]}")
        target.rename(old)
        staging.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    _flush(target.parent)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Linux's rename with flags; False where the system or the file system has none."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(target))


def _failed(target: Path, error: OSError) -> BundleError:
    if error.errno == errno.EEXIST:
        hint = "Another writer was first; --force replaces it"
        return BundleError(
            Problem(
                code="output.exists",
                file=str(target),
                expected="nothing there",
                got="a new bundle",
                hint=hint,
            )
        )
    got = f"{type(error).__name__}: {error}"
    return BundleError(Problem(code="output.failed", file=str(target), expected="a place that can be written", got=got))
