"""Where a pulled bundle goes: into the cache, or into a directory of the user."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from splitbundle.errors import BundleError, Problem
from splitbundle.format import names
from splitbundle.format.manifest.document import FILE, File, checksums
from splitbundle.records import record
from splitbundle.sharing.cache import Cache
from splitbundle.sharing.store import Store, is_file, is_file_of
from splitbundle.storage import files
from splitbundle.storage.documents import Documents, read_documents
from splitbundle.storage.recovery import recover
from splitbundle.writing.atomic_directory import atomic_directory, remove_unfinished

if sys.platform != "win32":
    import fcntl

POLL: Final = 0.1


@record(frozen=True, slots=True, kw_only=True)
class Content:
    """The documents of the bundle that is pulled, and the bytes of its manifest."""

    documents: Documents
    manifest: bytes


class Output(Protocol):
    """A place for a bundle."""

    root: Path
    """The directory of the bundle."""
    store: Store

    def missing(self, wanted: Mapping[str, File]) -> dict[str, File]:
        """Return the files that aren't there."""

    def seed(self, wanted: Mapping[str, File]) -> None:
        """Take what lies nearby on this machine into the store."""

    def finish(self, paths: Sequence[str], extra: Mapping[str, bytes]) -> None:
        """Make the bundle visible with these files, and with small ``extra`` ones."""


class CacheOutput:
    """The bundle's directory in the cache."""

    def __init__(self, cache: Cache, content: Content) -> None:
        self._cache = cache
        self._content = content
        self.root = cache.path_of(content.documents.id)
        self.store = cache.store

    def missing(self, wanted: Mapping[str, File]) -> dict[str, File]:
        """Return the files that the bundle's directory doesn't have."""
        return {path: file for path, file in wanted.items() if not is_file_of(self.root / path, file.size)}

    def seed(self, wanted: Mapping[str, File]) -> None:
        """Do nothing: the store is the cache's own."""

    def finish(self, paths: Sequence[str], extra: Mapping[str, bytes]) -> None:
        """Link the files into the bundle's directory."""
        found = self._content.documents
        root = self._cache.begin(found.id, found.manifest, self._content.manifest, paths)
        for path in paths:
            self._cache.link(root, path, found.manifest.files[path])
        for path, data in extra.items():
            self._cache.add(root, path, data)


def check_output(output: str | os.PathLike[str]) -> Path:
    """Return the absolute path of an output, before anything is pulled for it.

    Raises:
        BundleError: ``output.exists`` for a path where no bundle may be written, whatever is pulled.
    """
    target = Path(os.path.abspath(output))
    recover(target)
    if os.path.lexists(target) and (target.is_symlink() or not _is_bundle_or_empty(target)):
        hint = "Choose another output"
        expected = "nothing there, an empty directory, or a bundle"
        raise BundleError(
            Problem(code="output.exists", file=str(target), expected=expected, got="something else", hint=hint)
        )
    return target


def _is_bundle_or_empty(target: Path) -> bool:
    try:
        return target.is_dir() and (not any(target.iterdir()) or is_file(target / FILE))
    except OSError as error:
        raise BundleError(files.unreadable(str(target), error)) from error


class DirectoryOutput:
    """A directory of the user. It appears with all that was asked for, or not at all.

    What was downloaded so far lies in ``.NAME.pull`` beside it, from where the next pull goes on.
    """

    def __init__(self, target: Path, store: Store, cache: Cache, content: Content, *, force: bool) -> None:
        self.root = target
        self.store = store
        self._content = content
        self._force = force
        self._cache = cache
        self._good: set[str] = set()
        self._old = self._existing()

    @classmethod
    @contextlib.contextmanager
    def at(
        cls, output: str | os.PathLike[str], cache: Cache, content: Content, *, force: bool
    ) -> Iterator[DirectoryOutput]:
        """Lock the place for this process. At the end, remove what was downloaded if the bundle is complete.

        Raises:
            BundleError: ``output.exists``, ``output.failed``.
        """
        target = check_output(output)
        with _writing(target):
            remove_unfinished(target)
        with _alone(target.with_name(f".{target.name}.pull")) as place:
            store = Store(place)
            with _writing(target):
                store.prepare()
            try:
                yield cls(target, store, cache, content, force=force)
            except BaseException:
                with contextlib.suppress(OSError):
                    if not any(path.is_file() for path in place.rglob("*")):
                        shutil.rmtree(place)  # nothing to go on from
                raise
            with contextlib.suppress(OSError):  # the next pull removes it
                shutil.rmtree(place)

    def _existing(self) -> Documents | None:
        """Return the documents of the bundle that is there already."""
        if not os.path.lexists(self.root):
            return None
        try:
            found = None if self.root.is_symlink() else read_documents(self.root)
        except BundleError:
            found = None
        same = found is not None and found.id == self._content.documents.id
        if not same and Path.cwd().is_relative_to(self.root):
            expected, got = "another directory than the one where this runs", "that one"
            raise self._refused(expected, got, "Name a new directory: this one would be replaced")
        if self.root.is_dir() and not any(self.root.iterdir()):
            return None
        if not same and not self._force:
            got = "something else" if found is None else "another bundle"
            hint = "Choose another output, or force=True replaces a bundle there"
            raise self._refused("nothing there, or a part of the same bundle", got, hint)
        return found

    def _refused(self, expected: str, got: str, hint: str) -> BundleError:
        problem = Problem(code="output.exists", file=str(self.root), expected=expected, got=got, hint=hint)
        return BundleError(problem)

    def missing(self, wanted: Mapping[str, File]) -> dict[str, File]:
        """Return the files that the directory doesn't have, or has with other bytes."""
        if self._old is None or self._old.id != self._content.documents.id:
            return dict(wanted)
        listed = self._content.documents.manifest.files
        self._good = {path for path, file in listed.items() if _is_good(self.root, path, file)}
        return {path: file for path, file in wanted.items() if path not in self._good}

    def seed(self, wanted: Mapping[str, File]) -> None:
        """Copy files of the same digest from the cache, and from the bundle that is to be replaced."""
        old = {} if self._old is None else {file.sha256: path for path, file in self._old.manifest.files.items()}
        with _writing(self.root):
            for file in wanted.values():
                if self._cache.store.has(file):
                    blob = self._cache.store.blob(file.sha256)
                    if self.store.take(self._cache.root, blob.relative_to(self._cache.root).as_posix(), file):
                        continue
                if file.sha256 in old:
                    self.store.take(self.root, old[file.sha256], file)

    def finish(self, paths: Sequence[str], extra: Mapping[str, bytes]) -> None:
        """Write the directory from what was downloaded, and from what was there."""
        found, digest = self._content.documents, self._content.documents.id.removeprefix("sha256:")
        if self._old is not None and self._old.id == found.id:
            self._add(paths, extra)
            return
        force = self._force or self._old is not None or self.root.is_dir()  # an empty one, as was checked
        with atomic_directory(self.root, force=force) as root:
            for path in sorted(paths):
                place = root / path
                place.parent.mkdir(parents=True, exist_ok=True)
                _join(self.store.blob(found.manifest.files[path].sha256), place)
                place.chmod(0o644)
            for path, data in {
                **extra,
                FILE: self._content.manifest,
                names.SUMS: checksums(found.manifest.files, digest),
            }.items():
                (root / path).parent.mkdir(exist_ok=True)
                (root / path).write_bytes(data)

    def _add(self, paths: Sequence[str], extra: Mapping[str, bytes]) -> None:
        """Add files to the part of this bundle that is there. Each appears whole, and the user's own files stay."""
        listed = self._content.documents.manifest.files
        with _writing(self.root):
            for path in sorted(set(paths) - self._good):
                staged = self.store.parts / secrets.token_hex(16)
                _join(self.store.blob(listed[path].sha256), staged)
                staged.chmod(0o644)
                self._place(staged, path)
            for path, data in extra.items():
                if not self._has(path, data):
                    staged = self.store.parts / secrets.token_hex(16)
                    staged.write_bytes(data)
                    self._place(staged, path)

    def _place(self, staged: Path, path: str) -> None:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged, place)

    def _has(self, path: str, data: bytes) -> bool:
        try:
            return files.read_file(self.root, path, len(data)) == data
        except BundleError:
            return False


def _join(source: Path, place: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)


def _is_good(root: Path, path: str, listed: File) -> bool:
    if not is_file_of(root / path, listed.size):
        return False
    try:
        with files.open_file(root, path, listed) as file:
            return files.sha256(file) == listed.sha256
    except (BundleError, OSError):
        return False


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[Path]:
    """Make a directory, and lock it against other processes that pull to the same output."""
    if sys.platform == "win32":
        yield place
        return
    with _writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    handle = _lock(place)
    try:
        yield place
    finally:
        with contextlib.suppress(OSError):  # nothing was written through it
            os.close(handle)


def _lock(place: Path) -> int:
    """Make and lock a directory, and return its handle. Wait for the process that has it."""
    while True:
        with _writing(place):
            place.mkdir(exist_ok=True)
            handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            time.sleep(POLL)
            continue
        except OSError:  # a file system without locks
            return handle
        with contextlib.suppress(OSError):  # the process before may have removed it
            if os.path.samestat(os.fstat(handle), os.lstat(place)):
                return handle
        os.close(handle)


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        got = f"{type(error).__name__}: {error}"
        hint = "Choose another output, or make room there"
        expected = "a place that can be written"
        problem = Problem(code="output.failed", file=str(place), expected=expected, got=got, hint=hint)
        raise BundleError(problem) from error
