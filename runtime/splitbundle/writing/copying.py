"""Copy files of one bundle into another one that is being written. Copies share disk blocks where the system can."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from splitbundle import processors
from splitbundle.errors import BundleError, Problem
from splitbundle.format import strict_json
from splitbundle.format.manifest import document
from splitbundle.format.manifest.document import File
from splitbundle.storage.files import (
    FETCH,
    THREAD_BYTES,
    Progress,
    check_digest,
    is_same,
    missing,
    open_file,
    read_file,
    sha256,
)
from splitbundle.storage.reader import BundleReader
from splitbundle.writing.atomic_directory import flush


def refuse_missing(bundle: BundleReader, paths: Sequence[str]) -> None:
    """Raise ``file.missing`` for each listed file that a partial bundle lacks."""
    absent = [path for path in bundle.absent() if path in set(paths)]
    if absent:
        raise BundleError(missing(path) for path in absent)


def copy_files(
    bundle: BundleReader, paths: Sequence[str], root: Path, *, check: bool, progress: Progress | None
) -> dict[str, File]:
    """Copy listed files of a bundle to the same paths under ``root``, and return their entries in the manifest.

    Args:
        bundle: the bundle.
        paths: the listed files to copy.
        root: the directory of the new bundle.
        check: whether to hash each copy, and compare it with the listed digest.
        progress: called with the name of the work, the bytes that are done, and the total in bytes.

    Raises:
        BundleError: ``file.*``.
    """
    listed = {path: bundle.manifest.files[path] for path in paths}
    total, done = sum(file.size for file in listed.values()), 0

    def copy(path: str) -> None:
        _copy(bundle.path, root, path, listed[path])
        if check:
            with open_file(root, path) as copied:
                check_digest(path, listed[path], sha256(copied))

    def copy_large(path: str) -> None:
        copy(path)
        flush(root / path)  # the disk writes this file while the next one is copied and hashed

    large = [path for path in paths if listed[path].size >= THREAD_BYTES]
    workers = min(processors.usable(), len(large))
    with ThreadPoolExecutor(max_workers=max(workers, 1)) as pool:
        running = {path: pool.submit(copy_large, path) for path in large} if workers > 1 else {}
        try:
            for path, file in listed.items():
                if progress is not None:
                    progress("copying", done, total)
                if path in running:
                    running[path].result()
                else:
                    copy(path)
                done += file.size
        finally:
            pool.shutdown(cancel_futures=True)
    if progress is not None:
        progress("copying", total, total)
    return listed


def check_outside(bundle: BundleReader, target: Path) -> None:
    """Raise ``output.failed`` if the target is inside of the bundle. It may be the bundle itself, to replace it."""
    above = Path(os.path.realpath(target.parent))
    if any(is_same(place, bundle.path) for place in (above, *above.parents)):
        expected, got = "a place outside of the bundle that is read", f"a place inside of {bundle.path}"
        raise BundleError(Problem(code="output.failed", file=str(target), expected=expected, got=got))


@contextmanager
def unchanged(bundle: BundleReader) -> Iterator[None]:
    """Raise ``file.changed`` if the bundle is replaced before the end of the block: files could come from two bundles.

    Raises:
        BundleError: ``file.changed``.
    """
    before = _place(bundle)
    _check_unchanged(bundle, before)
    yield
    _check_unchanged(bundle, before)


def _place(bundle: BundleReader) -> tuple[int, int]:
    """Return the device and inode of the bundle's directory. They change when the bundle is replaced."""
    try:
        status = bundle.path.stat()
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def _check_unchanged(bundle: BundleReader, before: tuple[int, int]) -> None:
    data = read_file(bundle.path, document.FILE, strict_json.MAX_BYTES)
    if _place(bundle) != before or document.identity(data) != bundle.id:
        expected, hint = "the bundle that was opened, unchanged during the copy", "Run this again"
        got = "another bundle, which replaced it during the copy"
        raise BundleError(Problem(code="file.changed", file=str(bundle.path), expected=expected, got=got, hint=hint))


def _copy(old: Path, new: Path, path: str, listed: File) -> None:
    place = new / path
    place.parent.mkdir(parents=True, exist_ok=True)
    with open_file(old, path, listed) as source, place.open("wb") as target:
        copied = copy_bytes(source, target, listed.size)
        if copied != listed.size:
            expected, got = f"{listed.size} bytes", f"{copied}, while it was copied"
            raise BundleError(Problem(code="file.size", file=path, expected=expected, got=got, hint=FETCH))


def copy_bytes(source: BinaryIO, target: BinaryIO, size: int) -> int:
    """Copy a file of ``size`` bytes from its beginning, and return the bytes that were copied.

    The copy shares disk blocks where the file system can.
    """
    left = size
    if hasattr(os, "copy_file_range"):
        try:
            while left and (copied := os.copy_file_range(source.fileno(), target.fileno(), left)):
                left -= copied
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    if left:
        source.seek(0)
        target.seek(0)
        shutil.copyfileobj(source, target, 2**20)
        return target.tell()
    return size
