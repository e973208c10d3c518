"""Where a bundle was pulled from, to say how to pull what it lacks."""

from __future__ import annotations

import shlex

from splitbundle.errors import BundleError
from splitbundle.records import replace
from splitbundle.sharing.cache import Cache
from splitbundle.storage.reader import BundleReader


def pull_command(bundle: BundleReader, path: str, shard: str | None) -> str | None:
    """Return the command that pulls a listed file of a bundle, or None if it isn't known where the bundle came from.

    Args:
        bundle: the bundle.
        path: the file.
        shard: the shard that is wanted, if it is known.
    """
    cache = Cache()
    origin = next((each.reference for each in cache.remembered() if each.bundle_id == bundle.id), None)
    if origin is None:
        return None
    needing = [each.name for each in bundle.shards if path in bundle.files_of(each)]
    shard = shard if shard in needing else next(iter(needing), None)
    words = ["splitbundle", "pull", origin, *([] if shard is None else ["--shard", shard])]
    if bundle.path != cache.path_of(bundle.id):
        words += ["-o", str(bundle.path)]
    return shlex.join(words)


def with_origin(bundle: BundleReader, error: BundleError, shard: str | None) -> BundleError:
    """Return the error with the command that pulls the absent files, if it is known where they came from."""
    listed = {each.file for each in error.problems if each.code == "file.missing"} & bundle.manifest.files.keys()
    command = pull_command(bundle, min(map(str, listed)), shard) if listed else None
    if command is None:
        return error
    hint = f"Pull it: {command}"
    return type(error)(replace(each, hint=hint) if each.file in listed else each for each in error.problems)
