"""List what the cache has, check it, and remove what isn't needed any more."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from splitbundle.errors import BundleError, Problem, VerificationError, quoted
from splitbundle.format import names
from splitbundle.format.manifest.document import checksums
from splitbundle.records import record
from splitbundle.sharing.cache import UNFINISHED, Cache, write_whole
from splitbundle.storage import files
from splitbundle.storage.documents import read_documents
from splitbundle.storage.files import Progress
from splitbundle.storage.reader import BundleReader


@record(frozen=True, slots=True, kw_only=True)
class CachedBundle:
    """A bundle in the cache."""

    bundle_id: str
    path: Path
    name: str
    """The model's name; empty for a directory that isn't a bundle any more."""
    bytes: int
    """The size of its files that are here. Bundles may share some of them."""
    shards: tuple[str, ...]
    """The names of the shards that are whole."""
    references: tuple[str, ...]
    """The references that meant it when they were last asked."""
    used: float
    """When it was last pulled, or found in the cache, in seconds since 1970."""


def every_bundle(cache: Cache) -> list[CachedBundle]:
    """Return the bundles in the cache, the last used first."""
    remembered = cache.remembered()
    found = []
    with cache.writing():
        places = _bundles(cache)
    for place in places:
        bundle_id = f"sha256:{place.name}"
        name, size = "", 0
        shards: tuple[str, ...] = ()
        with contextlib.suppress(BundleError):
            reader = BundleReader(place, *read_documents(place, bundle_id))
            absent = set(reader.absent())
            name, shards = reader.manifest.model.name, reader.whole_shards()
            size = sum(file.size for path, file in reader.manifest.files.items() if path not in absent)
        found.append(
            CachedBundle(
                bundle_id=bundle_id,
                path=place,
                name=name,
                bytes=size,
                shards=shards,
                references=tuple(each.reference for each in remembered if each.bundle_id == bundle_id),
                used=place.stat().st_mtime,
            )
        )
    return sorted(found, key=lambda each: -each.used)


def total_bytes(cache: Cache) -> int:
    """Return the bytes that the cache takes. A file with several names counts once."""
    seen: dict[tuple[int, int], int] = {}
    for directory, _, inside in os.walk(cache.root):
        for name in inside:
            with contextlib.suppress(OSError):
                status = os.lstat(os.path.join(directory, name))
                seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())


def prune(
    cache: Cache, which: Sequence[str], *, older_than: float | None, everything: bool
) -> tuple[list[CachedBundle], int]:
    """Remove bundles from the cache, and all files that no bundle needs, also unfinished ones.

    A process that has mapped a file goes on with it.

    Args:
        cache: the cache.
        which: bundle ids (or their first digits, at least 8) and references.
        older_than: seconds; bundles that weren't used for so long are removed.
        everything: whether to remove all bundles.

    Returns:
        The removed bundles, and the freed bytes.

    Raises:
        BundleError: ``input.value`` for a name that no bundle in the cache has; ``output.failed``.
    """
    if not cache.root.exists():
        return [], 0
    with cache.lock(alone=True), cache.writing():
        before, bundles = total_bytes(cache), every_bundle(cache)
        for name in which:
            if not any(_is_meant(each, name) for each in bundles):
                expected = "the id or a reference of a bundle in the cache"
                problem = Problem(code="input.value", argument="bundle", expected=expected, got=quoted(name))
                raise BundleError(problem)
        oldest = None if older_than is None else time.time() - older_than
        gone = [
            each
            for each in bundles
            if everything or any(_is_meant(each, name) for name in which) or (oldest is not None and each.used < oldest)
        ]
        for each in gone:
            # A rename first: a removal that is interrupted must not leave half of a bundle under its id.
            _hide(each.path)
        for place in cache.bundles.glob(".*"):
            shutil.rmtree(place, ignore_errors=True)
        for reference in cache.remembered():
            if reference.bundle_id in {each.bundle_id for each in gone}:
                cache.forget(reference.reference)
        for blob in _blobs(cache):
            if blob.stat().st_nlink == 1:  # no bundle links to it
                blob.unlink()
        for part in cache.store.parts.glob("*"):
            part.unlink()
        for place in (cache.root, cache.references):
            for unfinished in place.glob(".*"):
                if UNFINISHED.search(unfinished.name):
                    unfinished.unlink()
        return gone, before - total_bytes(cache)


def verify(cache: Cache, progress: Progress | None) -> tuple[int, int]:
    """Hash every file of the cache, remove those whose digest isn't their name, and mend the documents of bundles.

    Returns:
        The number of files, and their bytes.

    Raises:
        VerificationError: ``file.digest`` for each file that was removed.
    """
    if not cache.root.exists():
        return 0, 0
    with cache.lock(alone=True), cache.writing():
        blobs = list(_blobs(cache))
        total, done, problems = sum(blob.stat().st_size for blob in blobs), 0, []
        for blob in blobs:
            expected, status = blob.parent.name + blob.name, blob.stat()
            with blob.open("rb", buffering=0) as file:
                got = files.sha256(file)
            done += status.st_size
            if progress is not None:
                progress("verifying", done, total)
            if got == expected:
                continue
            links = [place for place in _linked(cache) if os.path.samestat(os.lstat(place), status)]
            for place in (*links, blob):
                place.unlink()
            hint = "It was removed. The next pull fetches it again"
            problems.append(
                Problem(code="file.digest", file=str(blob), expected=f"sha256 {expected}", got=got, hint=hint)
            )
        for bundle in _bundles(cache):
            problems += _mend_documents(bundle)
        if problems:
            raise VerificationError(problems)
        return len(blobs), total


def _mend_documents(bundle: Path) -> list[Problem]:
    """Write damaged checksums of a bundle anew. Remove its directory if the manifest is damaged: no file is lost."""
    bundle_id = f"sha256:{bundle.name}"
    try:
        found = read_documents(bundle, bundle_id)
    except BundleError as error:
        _hide(bundle)
        hint = "The directory was removed. The next pull makes it from the files, which are still here"
        first = error.problems[0]
        got = f"{first.file}: {first.got}"
        return [Problem(code="file.digest", file=str(bundle), expected=f"the bundle {bundle_id}", got=got, hint=hint)]
    sums = checksums(found.manifest.files, bundle.name)
    place = bundle / names.SUMS
    if place.is_file() and place.read_bytes() == sums:
        return []
    write_whole(place, sums)
    expected, hint = "the digests of the manifest", "It was written anew"
    return [Problem(code="file.digest", file=str(place), expected=expected, got="others", hint=hint)]


def _hide(bundle: Path) -> None:
    """Take a bundle away under a new name. ``prune`` removes what is there; two of one bundle may wait for that."""
    os.rename(bundle, bundle.with_name(f".{bundle.name}.{secrets.token_hex(8)}.removed"))


def _is_meant(bundle: CachedBundle, name: str) -> bool:
    digits = name.removeprefix("sha256:")
    return name in bundle.references or (len(digits) >= 8 and bundle.path.name.startswith(digits))


def _bundles(cache: Cache) -> list[Path]:
    try:
        return [place for place in cache.bundles.iterdir() if names.SHA256.fullmatch(place.name)]
    except FileNotFoundError:
        return []


def _blobs(cache: Cache) -> Iterator[Path]:
    for place in sorted((cache.root / "blobs").glob("??/*")):
        if names.SHA256.fullmatch(place.parent.name + place.name):
            yield place


def _linked(cache: Cache) -> Iterator[Path]:
    for bundle in _bundles(cache):
        for directory, _, inside in os.walk(bundle):
            yield from (Path(directory, name) for name in inside)
