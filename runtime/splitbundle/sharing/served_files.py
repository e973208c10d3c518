"""The files of a directory that a file server may hand out: bundles and archives, and of a bundle the listed files."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import names, strict_json
from splitbundle.format.manifest.document import FILE, Manifest, identity
from splitbundle.format.manifest.parser import parse_manifest
from splitbundle.format.names import is_signature
from splitbundle.records import record
from splitbundle.storage import files
from splitbundle.storage.documents import read_documents
from splitbundle.storage.reader import BundleReader

BUNDLE: Final = ".splitbundle"
ARCHIVE: Final = ".tar"
MAX_NAMES: Final = 1000
"""The most bundles and archives of one directory."""
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


class Served(NamedTuple):
    """A file to send. The caller closes it."""

    file: BinaryIO
    size: int
    tag: str
    """The validator of HTTP: the digest of a listed file."""


@record(frozen=True, slots=True, kw_only=True)
class ServedBundle:
    """A bundle that is served."""

    name: str
    """The first part of the paths of its URLs."""
    id: str
    """Its bundle id."""
    shards: tuple[str, ...] | None
    """The shards that are whole, if only a part of the bundle is there."""


class _Known(NamedTuple):
    """A manifest that was read, with the state of its file."""

    state: tuple[int, ...]
    id: str
    manifest: Manifest


class ServedFiles:
    """What may be read from a directory: a bundle, or bundles and archives that lie directly in it. Threads share it.

    A bundle may be added, replaced and removed while it is served.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Look at the directory.

        Raises:
            BundleError: ``file.missing`` if it is no directory; ``file.*`` and ``manifest.*`` if it is a bundle that
                can't be read.
        """
        self._root = Path(os.path.abspath(directory))
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()
        self._only: str | None = None
        if not self._root.is_dir():
            expected, got = "a directory with bundles, or a bundle", "a file" if self._root.exists() else "nothing"
            raise BundleError(Problem(code="file.missing", file=str(directory), expected=expected, got=got))
        if files.is_there(self._root, FILE):
            own = self._root.name
            self._only = own if _NAME.fullmatch(own) else f"bundle{BUNDLE}"
            self._read(self._only)

    def bundles(self) -> list[ServedBundle]:
        """Return the bundles that can be served now."""
        found = []
        for name in [self._only] if self._only is not None else self._names(BUNDLE):
            with contextlib.suppress(BundleError):
                found.append(ServedBundle(name=name, id=self._read(name).id, shards=self._whole_shards(name)))
        return found

    def _whole_shards(self, name: str) -> tuple[str, ...] | None:
        root = self._root if self._only is not None else self._root / name
        reader = BundleReader(root, *read_documents(root))
        return reader.whole_shards() if reader.absent() else None

    def archives(self) -> list[str]:
        """Return the names of the archives that can be served now."""
        return list(self._names(ARCHIVE))

    def left_out(self) -> list[tuple[str, Problem]]:
        """Return the names of bundles that aren't served, each with the first problem of it."""
        found = [(name, _unfit(name)) for name in self._entries(BUNDLE) if not _NAME.fullmatch(name)]
        found += [(name, _unfit(name)) for name in self._entries(ARCHIVE) if not _NAME.fullmatch(name)]
        for name in self._names(BUNDLE):
            try:
                self._read(name)
            except BundleError as error:
                found.append((name, error.problems[0]))
        return found

    def open(self, path: str) -> Served | None:
        """Open a file by its path below the root of the server, or return None if there is none to serve.

        Args:
            path: the path, with ``/`` between its parts. Anything may be in it.
        """
        name, _, inside = path.partition("/")
        if not _NAME.fullmatch(name):
            return None
        try:
            if inside:
                return self._file_of(name, inside)
            return self._archive(name) if name.endswith(ARCHIVE) and self._only is None else None
        except (BundleError, OSError):
            return None

    def _file_of(self, name: str, path: str) -> Served | None:
        if name != self._only and (self._only is not None or not name.endswith(BUNDLE)):
            return None
        known = self._read(name)
        listed = known.manifest.files.get(path)
        if listed is not None:
            file = files.open_file(self._root, self._inside(name, path), listed)
            return Served(file, listed.size, listed.sha256)
        folder, _, last = path.rpartition("/")
        signature = is_signature(path) and folder == "signatures" and bool(_NAME.fullmatch(last))
        if path not in (FILE, names.SUMS) and not signature:
            return None
        file = files.open_file(self._root, self._inside(name, path))
        with contextlib.ExitStack() as undo:
            undo.callback(file.close)
            size = os.fstat(file.fileno()).st_size
            if size > strict_json.MAX_BYTES:
                return None
            tag = files.sha256(file)
            file.seek(0)
            undo.pop_all()
        return Served(file, size, tag)

    def _archive(self, name: str) -> Served:
        file = files.open_file(self._root, name)
        status = os.fstat(file.fileno())
        # To hash an archive at each request would read all of it. A writer replaces it, so that its inode differs.
        state = f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
        return Served(file, status.st_size, hashlib.sha256(state.encode()).hexdigest()[:32])

    def _inside(self, name: str, path: str) -> str:
        return path if self._only is not None else f"{name}/{path}"

    def _entries(self, suffix: str) -> list[str]:
        if self._only is not None:
            return []
        try:
            return sorted(name for name in os.listdir(self._root) if name.endswith(suffix))
        except OSError:
            return []

    def _names(self, suffix: str) -> Iterator[str]:
        directory = suffix == BUNDLE
        for name in [name for name in self._entries(suffix) if _NAME.fullmatch(name)][:MAX_NAMES]:
            place = self._root / name
            if not place.is_symlink() and (place.is_dir() if directory else place.is_file()):
                yield name

    def _read(self, name: str) -> _Known:
        """Return the manifest of a bundle. It is parsed again if the file was replaced.

        Raises:
            BundleError: ``file.*``, ``json.*``, ``manifest.*`` and so on.
        """
        path = self._inside(name, FILE)
        with files.closed_at_last(files.open_file(self._root, path)) as file:
            status = os.fstat(file.fileno())
            state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            with self._lock:
                known = self._known.get(name)
            if known is not None and known.state == state:
                return known
            data = files.read_fully(file, min(status.st_size, strict_json.MAX_BYTES) + 1)
        parsed = parse_manifest(data)
        known = _Known(state, identity(data), parsed)
        with self._lock:
            if len(self._known) >= MAX_NAMES:
                self._known.clear()
            self._known[name] = known
        return known


def _unfit(name: str) -> Problem:
    expected, hint = "a name of A-Z a-z 0-9 . _ -, as it is a part of a URL", "Rename it"
    return Problem(code="input.value", file=name, expected=expected, got=quoted(name), hint=hint)
