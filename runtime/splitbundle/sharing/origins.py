"""Where a bundle was pulled from, to say how to pull what it lacks."""

from __future__ import annotations

import shlex
from collections.abc import Collection

from splitbundle.errors import BundleError
from splitbundle.records import replace
from splitbundle.sharing.cache import Cache, Remembered
from splitbundle.sharing.reference import parse_reference
from splitbundle.storage.reader import BundleReader

DAMAGED: tuple[str, ...] = ("file.digest", "file.size", "file.header-digest")


def with_origin(bundle: BundleReader, error: BundleError, shard: str | None) -> BundleError:
    """Return the error with the next step for a bundle that was pulled: the pull of what it lacks, or of what is wrong.

    Args:
        bundle: the bundle.
        error: the error.
        shard: the shard that is wanted, if it is known.
    """
    cache = Cache()
    listed = bundle.manifest.files.keys()
    absent = {str(each.file) for each in error.problems if each.code == "file.missing"} & listed
    wrong = {str(each.file) for each in error.problems if each.code in DAMAGED} & listed
    origin = next((each for each in cache.remembered() if each.bundle_id == bundle.id), None)
    hints: dict[str, str] = {}
    if absent and origin is not None:
        hints = dict.fromkeys(absent, f"Pull it: {_command(bundle, origin, absent, shard, cache)}")
    if wrong and bundle.path == cache.path_of(bundle.id):
        hints |= dict.fromkeys(wrong, "The cache is damaged: splitbundle cache verify removes it. Then pull it again")
    if not hints:
        return error
    return type(error)(replace(each, hint=hints.get(str(each.file), each.hint)) for each in error.problems)


def _command(bundle: BundleReader, origin: Remembered, absent: Collection[str], shard: str | None, cache: Cache) -> str:
    """Return the command that pulls some absent files: those of one shard, or else the whole bundle."""
    needing = [each.name for each in bundle.shards if set(absent) <= set(bundle.files_of(each))]
    shard = shard if shard in needing else next(iter(needing), None)
    words = ["splitbundle", "pull", _exact(origin), *([] if shard is None else ["--shard", shard])]
    if bundle.path != cache.path_of(bundle.id):
        words += ["-o", str(bundle.path)]
    return shlex.join(words)


def _exact(origin: Remembered) -> str:
    """Return a reference that still means this bundle after its tag or its branch has moved."""
    reference = parse_reference(origin.reference)
    if reference.scheme == "oci" and origin.revision is not None:
        return str(replace(reference, revision=None, pin=origin.revision))
    revision = origin.revision if reference.scheme == "hf" else reference.revision
    return str(replace(reference, revision=revision, pin=origin.bundle_id))
