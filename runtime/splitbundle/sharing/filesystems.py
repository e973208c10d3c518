"""Bundles in the file systems of fsspec: object stores, and servers for files."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from splitbundle.errors import BundleError, MissingExtra, Problem, VerificationError, quoted
from splitbundle.format import names, strict_json
from splitbundle.format.manifest.document import FILE, File, Manifest
from splitbundle.sharing.jobs import Stopped
from splitbundle.sharing.network import NetworkError, Pace, Patience, network_error, persistently
from splitbundle.sharing.reference import Reference
from splitbundle.sharing.transport import LocalFile, Resolved, files_there

try:
    import fsspec
except ModuleNotFoundError as missing:
    if missing.name != "fsspec":
        raise
    raise MissingExtra.of("fsspec", "share", "share bundles through s3://, sftp:// and ftp://") from None

LIBRARIES = {"s3": "s3fs", "sftp": "sshfs", "ssh": "sshfs"}
"""The libraries that fsspec needs for a scheme."""


class FileSystemPlace:
    """A directory of a file system."""

    def __init__(self, reference: Reference, patience: Patience) -> None:
        self.reference = reference
        self.patience = patience
        self._own = threading.local()

    def system(self) -> tuple[Any, str]:
        """Connect once in each thread, and return the file system and the path in it."""
        found: tuple[Any, str] | None = getattr(self._own, "found", None)
        if found is None:
            # fsspec keeps file systems for reuse, and would hand one with a dead connection to the next caller. And
            # some of them have one connection, which serves one file at a time.
            with self.failures():
                # sshfs believes any host unless it is told where to look. An empty tuple is SSH's own configuration.
                options = {"known_hosts": ()} if self.reference.scheme in ("sftp", "ssh") else {}
                system, path = fsspec.core.url_to_fs(self.reference.unpinned, skip_instance_cache=True, **options)
                if type(system).__module__ == "fsspec.implementations.sftp":
                    raise ImportError("only fsspec's own client, which believes any host key")
            found = self._own.found = system, str(path).rstrip("/")
        return found

    def path_of(self, path: str) -> str:
        """Return the path of a bundle's file in the file system."""
        return f"{self.system()[1]}/{path}"

    def read(self, path: str, limit: int) -> bytes:
        """Return a whole small file."""

        def once() -> bytes:
            system, _ = self.system()
            with self.failures(), system.open(self.path_of(path), "rb") as file:
                data: bytes = file.read(limit + 1)
            if len(data) > limit:
                raise network_error("network.answer", self.path_of(path), f"at most {limit} bytes", "more")
            return data

        return persistently(once, self.patience)

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Turn the errors of the libraries into ``NetworkError``."""
        place = str(self.reference)
        try:
            yield
        except (BundleError, Stopped):
            raise
        except FileNotFoundError as error:
            hint = "Check the spelling of the reference"
            raise network_error("network.missing", place, "a file there", f"none: {_said(error)}", hint) from error
        except PermissionError as error:
            hint = "Set the login as the library for this scheme wants it: docs/guides/share.md has a list"
            raise network_error("network.auth", place, "access", _said(error), hint) from error
        except ImportError as error:
            library = LIBRARIES.get(self.reference.scheme, "fsspec")
            problem = Problem(
                code="backend.missing",
                expected=f"the library {library}, for {self.reference.scheme}://",
                got=_said(error),
                hint=f"Install it: pip install {library}",
            )
            raise MissingExtra(problem) from error
        except Exception as error:  # each file system raises the errors of its own library
            self._own.found = None
            named = type(error).__name__
            if "HostKey" in named:
                hint = "Log in with ssh once, to see the host's key and to keep it in ~/.ssh/known_hosts"
                raise network_error("network.auth", place, "a host that SSH knows", _said(error), hint) from error
            if any(word in named for word in ("Auth", "Credential", "Permission")):
                hint = "Set the login as the library for this scheme wants it: docs/guides/share.md has a list"
                raise network_error("network.auth", place, "access", f"{named}: {_said(error)}", hint) from error
            raise network_error(
                "network", place, "an answer from there", f"{named}: {_said(error)}", "Run this again", transient=True
            ) from error


class FileSystemSource:
    """A bundle in a directory of a file system."""

    def __init__(self, reference: Reference, patience: Patience) -> None:
        self._place = FileSystemPlace(reference, patience)

    def resolve(self) -> Resolved:
        """Return the pin: a file system has no revisions."""
        return Resolved(bundle_id=self._place.reference.pin)

    def read(self, path: str, limit: int) -> bytes:
        """Return a small file."""
        return self._place.read(path, limit)

    def open(self, path: str, listed: File, start: int) -> FileSystemStream:
        """Open a listed file."""
        place = self._place
        system, _ = place.system()
        with place.failures():
            size = system.size(place.path_of(path))
            if size is not None and size != listed.size:
                hint = "The other side has another file than the one that the manifest lists"
                raise VerificationError(
                    Problem(
                        code="file.size", file=path, expected=f"{listed.size} bytes", got=f"{size} bytes", hint=hint
                    )
                )
            file = system.open(place.path_of(path), "rb", block_size=2**22, cache_type="readahead")
            file.seek(start)
        return FileSystemStream(place, file, path, start)

    def signatures(self) -> list[str]:
        """Return the paths of the signatures."""
        system, root = self._place.system()
        try:
            with self._place.failures():
                found = system.ls(f"{root}/signatures", detail=False)
        except NetworkError:
            return []
        paths = [f"signatures/{str(each).rstrip('/').rpartition('/')[2]}" for each in found]
        return sorted(path for path in paths if names.is_signature(path))

    def moved(self) -> str | None:
        """Return None. If the bundle was replaced, a digest of a file differs."""
        return None


class FileSystemStream:
    """An open file of a file system."""

    def __init__(self, place: FileSystemPlace, file: Any, path: str, start: int) -> None:
        self._place, self._file, self.start = place, file, start
        self._pace = Pace(path, place.patience.timeout)

    def readinto(self, view: memoryview) -> int:
        """Read the next bytes; 0 at the end."""
        with self._place.failures():
            data = self._file.read(len(view))
        view[: len(data)] = data
        self._pace.moved(len(data))
        return len(data)

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(Exception):  # nothing was written
            self._file.close()


class FileSystemDestination:
    """A directory of a file system. The manifest is written last, so that a bundle appears with all its files."""

    by_digest = False

    def __init__(self, reference: Reference, patience: Patience) -> None:
        self._place = FileSystemPlace(reference, patience)
        self._last: tuple[File, LocalFile] | None = None

    def begin(self, manifest: Manifest, listed: Mapping[str, File], *, force: bool, dry_run: bool) -> set[str]:
        """Find out which files are there already. Hide another bundle that is to be replaced."""
        place = self._place
        try:
            old = place.read(FILE, strict_json.MAX_BYTES)
        except NetworkError as error:
            if error.codes != ("network.missing",):
                raise
            return set()
        before: dict[str, tuple[int, str]] = {}
        try:
            before = files_there(old)
        except BundleError as error:
            if any(code.startswith("json.") for code in error.codes):
                return set()  # an interrupted push left it, so there is no bundle to lose
        if before.get(FILE) != (listed[FILE].size, listed[FILE].sha256):
            if not force:
                hint = "Choose another place, or force=True replaces it. No pull works there until that is done"
                raise BundleError(
                    Problem(
                        code="output.exists",
                        file=str(place.reference),
                        expected="nothing there, or this bundle",
                        got="another bundle",
                        hint=hint,
                    )
                )
            if not dry_run:
                with place.failures():
                    place.system()[0].rm_file(place.path_of(FILE))
        return {
            path
            for path, file in listed.items()
            if before.get(path) == (file.size, file.sha256) and self._size(path) == file.size
        }

    def _size(self, path: str) -> int | None:
        try:
            with self._place.failures():
                size: int | None = self._place.system()[0].size(self._place.path_of(path))
        except NetworkError:
            return None
        return size

    def send(self, path: str, listed: File, file: LocalFile) -> None:
        """Write one file; the manifest at ``finish``."""
        if path == FILE:
            self._last = listed, file
            return
        self._write(path, listed, file)

    def _write(self, path: str, listed: File, local: LocalFile) -> None:
        place = self._place

        def once() -> None:
            system, _ = place.system()
            target = place.path_of(path)
            with place.failures():
                if place.reference.scheme != "s3":  # there, it would make a bucket of a misspelled name
                    _make_directory(system, target.rpartition("/")[0])
                file = system.open(target, "wb", block_size=2**23)
                try:
                    for piece in local.pieces():
                        file.write(piece)
                    file.close()
                except BaseException:
                    _give_up(system, file, target)
                    raise
            size = self._size(path)
            if size != listed.size:
                expected = f"{listed.size} bytes there"
                raise network_error("network.answer", target, expected, quoted(size), transient=True)

        persistently(once, place.patience)

    def finish(self) -> str | None:
        """Write the manifest."""
        if self._last is not None:
            self._write(FILE, *self._last)
        return None


def _make_directory(system: Any, path: str) -> None:
    """Make a directory. Another thread may make it at the same moment, which some servers take for an error."""
    try:
        system.makedirs(path, exist_ok=True)
    except Exception:  # each file system raises the errors of its own library
        if not system.isdir(path):
            raise


def _give_up(system: Any, file: Any, target: str) -> None:
    """Leave no half of a file, as far as the file system lets us."""
    with contextlib.suppress(Exception):
        file.discard()
    file.closed = True  # otherwise the object would upload what it has when it is collected
    with contextlib.suppress(Exception):
        system.rm_file(target)


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
