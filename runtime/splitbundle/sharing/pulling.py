"""Pull a bundle, or some shards of it, from another machine into the cache or into a directory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

from splitbundle.errors import BundleError, Problem, VerificationError
from splitbundle.format import strict_json
from splitbundle.format.architecture.decoder import FILE as ARCHITECTURE
from splitbundle.format.architecture.parser import parse_architecture
from splitbundle.format.manifest import document, rules
from splitbundle.format.manifest.document import FILE, File
from splitbundle.format.manifest.parser import parse_manifest
from splitbundle.partial.shard_files import listed_files
from splitbundle.records import field, record, replace
from splitbundle.sharing.cache import Cache, is_offline
from splitbundle.sharing.downloading import Downloads
from splitbundle.sharing.jobs import JOBS
from splitbundle.sharing.network import NetworkError, Patience, network_error, patience
from splitbundle.sharing.output import CacheOutput, Content, DirectoryOutput, Output, check_output
from splitbundle.sharing.places import open_source
from splitbundle.sharing.reference import Reference
from splitbundle.sharing.store import check_space
from splitbundle.sharing.transport import Resolved, Source, another_bundle
from splitbundle.storage import files, signature_files
from splitbundle.storage.counting import counter
from splitbundle.storage.documents import Documents, read_documents
from splitbundle.storage.files import Progress
from splitbundle.storage.reader import BundleReader

WHAT: Final = "pulling"


@record(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The part of a bundle that is asked for."""

    shards: tuple[str, ...] | None = None
    """The names of the shards; None for everything, and an empty tuple for the documents alone."""
    vectors: bool = True
    """With shards: whether to include the golden vectors."""
    text: bool = False
    """With shards: whether to include the tokenizer."""

    def files(self, found: Documents, root: Path) -> dict[str, File]:
        """Return the listed files by their paths.

        Raises:
            BundleError: ``stage.name``.
        """
        listed = found.manifest.files
        if self.shards is None:
            return dict(listed)
        if not self.shards:
            return {ARCHITECTURE: listed[ARCHITECTURE]}
        reader = BundleReader(root, found.manifest, found.architecture, found.id)
        paths = listed_files(reader, self.shards, vectors=self.vectors, text=self.text)
        return {path: listed[path] for path in paths}


@record(frozen=True, slots=True, kw_only=True)
class Pulled:
    """What a pull did, or with ``dry_run`` would do."""

    path: Path
    documents: Documents
    revision: str | None = None
    """The revision that was read, if the place has revisions."""
    paths: tuple[str, ...] = ()
    """The listed files that were asked for."""
    fetched: tuple[str, ...] = ()
    """Those of them that weren't on this machine."""
    bytes: int = 0
    """The size of the files that were asked for."""
    moved: int = 0
    """The bytes of files that came over the network. With ``dry_run``: those that would come."""
    note: str | None = None
    """What the user should know, if anything."""


@record(frozen=True, slots=True, kw_only=True)
class PullHow:
    """How to pull."""

    patience: Patience = field(default_factory=patience)
    force: bool = False
    dry_run: bool = False
    jobs: int = JOBS
    signatures: bool = False
    """Whether to ask for new signatures of a bundle that is in the cache, where nothing else has to be asked."""
    progress: Progress | None = None


def pull(
    reference: Reference,
    wanted: Wanted,
    how: PullHow,
    *,
    output: str | os.PathLike[str] | None = None,
    offline: bool = False,
) -> Pulled:
    """Pull a bundle into the cache, or into the directory ``output``. See ``splitbundle.pull``."""
    cache = Cache()
    if output is not None:
        check_output(output)
    offline = bool(reference.scheme) and (offline or is_offline())
    known = _in_cache(cache, reference, wanted, current=offline)
    if known is not None and how.signatures and not offline:
        with contextlib.suppress(BundleError):  # the bundle is here, also without the network
            _bring_signatures(cache, known, open_source(reference, how.patience))
    if known is not None and output is None:
        return known
    if offline and known is None:
        raise _not_in_cache(reference)
    source = open_source(_local(known.path) if known is not None else reference, how.patience)
    if output is not None:
        return _pull_from(source, source.resolve(), reference, wanted, how, cache, output)
    resolved = source.resolve()
    remembered = cache.recall(str(reference)) if resolved.revision else None
    if remembered is not None and remembered.revision == resolved.revision:
        known = _known(cache, remembered.bundle_id, wanted)
        if known is not None:
            with contextlib.suppress(BundleError):
                _bring_signatures(cache, known, source)
            return replace(known, revision=resolved.revision)
    cache.prepare()
    with cache.lock(alone=False):
        return _pull_from(source, resolved, reference, wanted, how, cache, None)


def _pull_from(
    source: Source,
    resolved: Resolved,
    reference: Reference,
    wanted: Wanted,
    how: PullHow,
    cache: Cache,
    output: str | os.PathLike[str] | None,
) -> Pulled:
    content, architecture = _read_documents(source, resolved.bundle_id, str(reference))
    with contextlib.ExitStack() as stack:
        if output is None:
            place: Output = CacheOutput(cache, content)
        else:
            place = stack.enter_context(DirectoryOutput.at(output, cache, content, force=how.force))
        made = _fill(place, source, content, architecture, wanted, how)
    made = replace(made, revision=resolved.revision)
    if how.dry_run:
        return made
    if output is None and reference.scheme:
        cache.remember(str(reference), content.documents.id, resolved.revision)
    elif reference.scheme:
        with contextlib.suppress(BundleError):  # a machine without a place for a cache
            cache.prepare()
            cache.remember(str(reference), content.documents.id, resolved.revision)
    now = source.moved()
    if now is not None:
        note = f"{reference.unpinned} means {now} now. The bundle that was pulled is the whole of {resolved.revision}"
        return replace(made, note=note)
    return made


def _fill(place: Output, source: Source, content: Content, architecture: bytes, wanted: Wanted, how: PullHow) -> Pulled:
    listed = wanted.files(content.documents, place.root)
    missing = place.missing(listed)
    if not how.dry_run:
        place.seed(missing)
    absent = {path: file for path, file in missing.items() if not place.store.has(file)}
    unique = {file.sha256: file for file in absent.values()}
    left = sum(file.size - place.store.present_part(file) for file in unique.values())
    made = Pulled(
        path=place.root,
        documents=content.documents,
        paths=tuple(listed),
        fetched=tuple(absent),
        bytes=sum(file.size for file in listed.values()),
        moved=left,
    )
    if how.dry_run:
        return made
    check_space(place.store, left)
    if ARCHITECTURE in absent:
        place.store.add(architecture, absent.pop(ARCHITECTURE))
    advance = counter(WHAT, sum(file.size for file in unique.values()), how.progress)
    downloads = Downloads(source, place.store, how.patience, advance)
    try:
        downloads.run(absent, how.jobs)
    except VerificationError:
        _explain_change(source, content)
        raise
    except NetworkError as error:
        if error.codes != ("network.missing",):
            raise
        hint = "That place may have only a part of the bundle: name the shards to pull. inspect shows their names"
        raise NetworkError(replace(each, hint=hint) for each in error.problems) from error
    place.finish(list(missing), _signatures(source))
    return replace(made, moved=downloads.received + len(architecture) * (ARCHITECTURE in made.fetched))


def _read_documents(source: Source, expected: str | None, name: str) -> tuple[Content, bytes]:
    """Read and check the manifest, and then the architecture.

    Raises:
        VerificationError: ``file.digest``, ``file.size``.
        BundleError: every problem of either document.
    """
    data = source.read(FILE, strict_json.MAX_BYTES)
    identity = document.identity(data)
    if expected not in (None, identity):
        raise another_bundle(str(expected), identity, name)
    manifest = parse_manifest(data)
    listed = manifest.files[ARCHITECTURE]
    architecture = source.read(ARCHITECTURE, strict_json.MAX_BYTES)
    digest = document.identity(architecture).removeprefix("sha256:")
    try:
        files.check_digest(ARCHITECTURE, listed, digest)
    except BundleError as error:
        raise VerificationError(error.problems) from error
    parsed = parse_architecture(architecture)
    rules.check_against(manifest, parsed)
    return Content(documents=Documents(manifest, parsed, identity), manifest=data), architecture


def _explain_change(source: Source, content: Content) -> None:
    """If the bundle was replaced while it was pulled, say so in place of what follows from it.

    Raises:
        BundleError: ``file.changed``.
    """
    try:
        now = document.identity(source.read(FILE, strict_json.MAX_BYTES))
    except BundleError:
        return
    if now != content.documents.id:
        expected, hint = f"the bundle id {content.documents.id}, as at the beginning", "Run this again"
        raise BundleError(Problem(code="file.changed", file=FILE, expected=expected, got=now, hint=hint))


def _signatures(source: Source) -> dict[str, bytes]:
    paths = source.signatures()[: signature_files.MAX_NUMBER]
    return {path: source.read(path, signature_files.MAX_BYTES) for path in paths}


def _bring_signatures(cache: Cache, known: Pulled, source: Source) -> None:
    """Put the signatures that a source has now beside a bundle in the cache. No digest of the bundle covers them."""
    source.resolve()
    for path, data in _signatures(source).items():
        cache.add(known.path, path, data)


def _in_cache(cache: Cache, reference: Reference, wanted: Wanted, *, current: bool) -> Pulled | None:
    """Return the bundle in the cache, if no other machine has to be asked for what is wanted.

    Args:
        cache: the cache.
        reference: the reference.
        wanted: the wanted part.
        current: whether to take what the reference meant when it was last asked.
    """
    if not reference.scheme:
        return None
    remembered = cache.recall(str(reference)) if current or reference.pin is not None else None
    bundle_id = reference.pin if remembered is None else remembered.bundle_id
    return None if bundle_id is None else _known(cache, bundle_id, wanted)


def _known(cache: Cache, bundle_id: str, wanted: Wanted) -> Pulled | None:
    root = cache.path_of(bundle_id)
    try:
        found = read_documents(root, bundle_id)
    except BundleError:
        return None
    listed = wanted.files(found, root)
    if any(not files.is_there(root, path) for path in listed):
        return None
    size = sum(file.size for file in listed.values())
    with contextlib.suppress(OSError):  # for cache list, and for prune --older-than
        os.utime(root)
    return Pulled(path=root, documents=found, paths=tuple(listed), bytes=size)


def _local(path: Path) -> Reference:
    return Reference(scheme="", host="", path=str(path))


def _not_in_cache(reference: Reference) -> BundleError:
    hint = "Pull it once with the network. offline=True, SPLITBUNDLE_OFFLINE or HF_HUB_OFFLINE forbids it"
    return network_error("network", str(reference), "a bundle with these files in the cache", "offline, and none", hint)
