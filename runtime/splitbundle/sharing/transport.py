"""What a transport has to do: give the files of a bundle, and take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from splitbundle.errors import BundleError, Problem, VerificationError
from splitbundle.format import names
from splitbundle.format.manifest.document import FILE, File, Manifest, checksums, identity
from splitbundle.format.manifest.parser import parse_manifest
from splitbundle.records import record


@record(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What a reference means now."""

    revision: str | None = None
    """The name of the revision that is read, if the place has revisions."""
    bundle_id: str | None = None
    """The only bundle id to accept, if there is one."""


class Stream(Protocol):
    """The bytes of a file, from ``start`` on."""

    start: int
    """The first byte that comes. It is 0 where a server can't begin elsewhere."""

    def readinto(self, view: memoryview) -> int:
        """Read the next bytes; 0 at the end. Raise ``NetworkError`` if the other side fails."""

    def close(self) -> None:
        """Give the connection back."""


class Source(Protocol):
    """A bundle on another machine, or in another place of this one."""

    def resolve(self) -> Resolved:
        """Find out what the reference means now, so that all later calls read one revision.

        Raises:
            NetworkError: nothing is there, or it can't be reached.
        """

    def read(self, path: str, limit: int) -> bytes:
        """Return a small file: the manifest, a document or a signature. The caller checks its digest."""

    def open(self, path: str, listed: File, start: int) -> Stream:
        """Open a listed file from its byte ``start`` on."""

    def signatures(self) -> list[str]:
        """Return the paths of the signatures that come with the bundle, if the place can list them."""

    def moved(self) -> str | None:
        """Return the name of the revision that the reference means now, if it is another one than at ``resolve``."""


@record(frozen=True, slots=True, kw_only=True)
class LocalFile:
    """A file that is pushed."""

    place: Path
    pieces: Callable[[], Iterator[bytes]]
    """Begins to read the file anew with each call."""


class Destination(Protocol):
    """A place that bundles can be pushed to."""

    by_digest: bool
    """Whether files of the same digest are stored once."""

    def begin(self, manifest: Manifest, listed: Mapping[str, File], *, force: bool, dry_run: bool) -> set[str]:
        """Return the paths that are there already. With ``dry_run``, nothing is changed.

        Args:
            manifest: the manifest.
            listed: every file to push, with the manifest, the checksums and the signatures.
            force: whether another bundle may be replaced.
            dry_run: whether nothing will follow.

        Raises:
            NetworkError: the place can't be reached.
            BundleError: ``output.exists`` for another bundle under this reference.
        """

    def send(self, path: str, listed: File, file: LocalFile) -> None:
        """Send one file, or keep it for ``finish``."""

    def finish(self) -> str | None:
        """Make the bundle visible, after all files are there. Return the name of its revision."""


def files_there(data: bytes) -> dict[str, tuple[int, str]]:
    """Return the size and the digest of each file of a bundle that is there, from the bytes of its manifest.

    Raises:
        BundleError: the manifest can't be read.
    """
    files = dict(parse_manifest(data).files)
    sums = checksums(files, identity(data).removeprefix("sha256:"))
    for path, content in ((FILE, data), (names.SUMS, sums)):
        files[path] = File(size=len(content), sha256=identity(content).removeprefix("sha256:"))
    return {path: (file.size, file.sha256) for path, file in files.items()}


def another_bundle(expected: str, got: str, place: str) -> BundleError:
    """Return the error of a place that has another bundle than the pinned one."""
    hint = "Another bundle is there now. Ask the person who gave you the id, or leave the id out to take this one"
    wanted = f"the bundle id {expected}"
    return VerificationError(
        Problem(code="file.digest", file=f"{place} manifest.json", expected=wanted, got=got, hint=hint)
    )
