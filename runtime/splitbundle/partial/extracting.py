"""Take shards out of a bundle: a partial bundle of the same id, whose files are unchanged."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from splitbundle.errors import BundleError, Problem
from splitbundle.format.manifest.document import FILE, File, checksums, identity
from splitbundle.format.names import SUMS
from splitbundle.format.strict_json import MAX_BYTES
from splitbundle.partial.shard_files import listed_files
from splitbundle.storage.files import Progress, check_digest, is_same, read_file
from splitbundle.storage.reader import BundleReader
from splitbundle.storage.signature_files import copy_signatures
from splitbundle.writing.atomic_directory import atomic_directory
from splitbundle.writing.copying import check_outside, copy_files, refuse_missing, unchanged

ReaderT = TypeVar("ReaderT", bound=BundleReader)


def extract(
    bundle: ReaderT,
    output: str | os.PathLike[str],
    shards: Sequence[str],
    *,
    vectors: bool = True,
    text: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ReaderT:
    """Write a partial bundle with the files of some shards. See ``Bundle.extract``."""
    paths = listed_files(bundle, shards, vectors=vectors, text=text)
    refuse_missing(bundle, paths)
    target = Path(os.path.abspath(output))
    check_outside(bundle, target)
    if is_same(target, bundle.path):
        expected, got = "another place than the bundle that is read", f"{bundle.path} itself"
        hint = "This would remove its other shards"
        raise BundleError(Problem(code="output.failed", file=str(target), expected=expected, got=got, hint=hint))
    with atomic_directory(target, force=force) as root, unchanged(bundle):
        copy_files(bundle, paths, root, check=True, progress=progress)
        copy_documents(bundle, root)
        copy_signatures(bundle.path, root)
    return type(bundle)(target, bundle.manifest, bundle.architecture, bundle.id)


def copy_documents(bundle: BundleReader, root: Path) -> None:
    """Write the manifest of a bundle, byte for byte, and its checksums, which follow from it.

    Raises:
        BundleError: ``file.digest`` if the manifest isn't the one that was opened; ``file.*``.
    """
    digest = bundle.id.removeprefix("sha256:")
    data = read_file(bundle.path, FILE, MAX_BYTES)
    check_digest(FILE, File(size=len(data), sha256=digest), identity(data).removeprefix("sha256:"))
    (root / FILE).write_bytes(data)
    (root / SUMS).write_bytes(checksums(bundle.manifest.files, digest))
