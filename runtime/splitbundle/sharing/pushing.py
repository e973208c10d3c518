"""Push a bundle to another machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from splitbundle.errors import BundleError, Problem
from splitbundle.format import names, strict_json
from splitbundle.format.manifest import document
from splitbundle.format.manifest.document import FILE, File
from splitbundle.records import field, record, replace
from splitbundle.sharing.jobs import JOBS, Stopped, run_jobs
from splitbundle.sharing.network import Patience, patience
from splitbundle.sharing.places import open_destination
from splitbundle.sharing.reference import Reference
from splitbundle.sharing.transport import LocalFile
from splitbundle.storage import files, signature_files
from splitbundle.storage.counting import counter
from splitbundle.storage.files import Progress
from splitbundle.storage.reader import BundleReader
from splitbundle.verification.verify import check_digests
from splitbundle.writing.copying import refuse_missing

PIECE: Final = 2**20
"""The bytes that are read and sent at once."""
WHAT: Final = "pushing"


@record(frozen=True, slots=True, kw_only=True)
class Pushed:
    """What a push did, or with ``dry_run`` would do."""

    reference: str
    bundle_id: str
    revision: str | None
    """The revision that the reference means now, if the place has revisions."""
    sent: tuple[str, ...]
    """The files that weren't there."""
    bytes: int
    """The size of the whole bundle."""
    moved: int
    """The bytes of the files that were sent. With ``dry_run``: those that would be."""


@record(frozen=True, slots=True, kw_only=True)
class PushHow:
    """How to push."""

    patience: Patience = field(default_factory=patience)
    force: bool = False
    dry_run: bool = False
    check: bool = True
    """Whether to check the digests of all files first."""
    jobs: int = JOBS
    progress: Progress | None = None


def push(bundle: BundleReader, reference: Reference, how: PushHow) -> Pushed:
    """Push a bundle. See ``splitbundle.push``."""
    destination = open_destination(reference, how.patience)
    refuse_missing(bundle, list(bundle.manifest.files))
    listed = all_files(bundle)
    if how.check and not how.dry_run:
        check_digests(bundle, list(bundle.manifest.files), how.progress)
    there = destination.begin(bundle.manifest, listed, force=how.force, dry_run=how.dry_run)
    absent = {path: file for path, file in listed.items() if path not in there}
    unique = {file.sha256: path for path, file in reversed(list(absent.items()))}
    total = sum(listed[path].size for path in unique.values())
    made = Pushed(
        reference=str(reference),
        bundle_id=bundle.id,
        revision=None,
        sent=tuple(absent),
        bytes=sum(file.size for file in listed.values()),
        moved=total,
    )
    if how.dry_run:
        return made
    advance, stop = counter(WHAT, total, how.progress), threading.Event()

    def send(path: str) -> bool:
        pieces = partial(_pieces, bundle, path, listed[path], advance, stop)
        destination.send(path, listed[path], LocalFile(place=bundle.path / path, pieces=pieces))
        return True

    paths = list(absent) if not destination.by_digest else list(unique.values())
    run_jobs([partial(send, path) for path in sorted(paths, key=lambda path: -listed[path].size)], how.jobs, stop)
    revision = destination.finish()
    return replace(made, revision=revision)


def all_files(bundle: BundleReader) -> dict[str, File]:
    """Return every file of a bundle in order: the manifest, its checksums, the listed files, and the signatures.

    Raises:
        BundleError: ``file.*``; ``sums.mismatch``.
    """
    found: dict[str, File] = {}
    for path in (FILE, names.SUMS):
        data = files.read_file(bundle.path, path, strict_json.MAX_BYTES)
        found[path] = _entry(data)
        sums = document.checksums(bundle.manifest.files, bundle.id.removeprefix("sha256:"))
        if path == names.SUMS and data != sums:
            expected, got = "the digests of the manifest", "others"
            raise BundleError(Problem(code="sums.mismatch", file=path, expected=expected, got=got))
    if f"sha256:{found[FILE].sha256}" != bundle.id:
        expected, got = f"the bundle id {bundle.id}, as when it was opened", f"sha256:{found[FILE].sha256}"
        raise BundleError(Problem(code="file.digest", file=FILE, expected=expected, got=got, hint="Open it again"))
    found |= bundle.manifest.files
    for path in signature_files.signature_files(bundle.path):
        found[path] = _entry(signature_files.read_signature(bundle.path, path))
    return found


def _entry(data: bytes) -> File:
    return File(size=len(data), sha256=document.identity(data).removeprefix("sha256:"))


def _pieces(
    bundle: BundleReader, path: str, listed: File, advance: Callable[[int], None], stop: threading.Event
) -> Iterator[bytes]:
    """Yield a file in pieces. A second reading takes back what the first one counted."""
    sent = 0
    with files.closed_at_last(files.open_file(bundle.path, path, listed)) as file:
        try:
            while sent < listed.size:
                piece = file.read(min(PIECE, listed.size - sent))
                if stop.is_set():
                    raise Stopped
                if not piece:
                    expected, got = f"{listed.size} bytes", f"{sent}: it was shortened while it was sent"
                    raise BundleError(Problem(code="file.size", file=path, expected=expected, got=got))
                yield piece
                sent += len(piece)
                advance(len(piece))
        except OSError as error:
            raise BundleError(files.unreadable(path, error)) from error
        except GeneratorExit:
            advance(-sent)
            raise
