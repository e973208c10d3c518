"""Merge partial bundles of one id into a fuller one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from splitbundle.errors import BundleError, quoted, within, wrong_argument
from splitbundle.format.architecture.decoder import FILE as ARCHITECTURE
from splitbundle.format.manifest.document import FILE
from splitbundle.partial.extracting import copy_documents
from splitbundle.storage.documents import read_documents
from splitbundle.storage.files import Progress, is_same, is_there
from splitbundle.storage.reader import BundleReader
from splitbundle.storage.recovery import recover
from splitbundle.storage.signature_files import copy_signatures
from splitbundle.writing.atomic_directory import atomic_directory
from splitbundle.writing.copying import check_outside, copy_files, unchanged

ReaderT = TypeVar("ReaderT", bound=BundleReader)


def merge(
    bundles: Sequence[ReaderT],
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> ReaderT:
    """Write a bundle with the files of all given ones, which must have one id. See ``splitbundle.merge``."""
    if isinstance(bundles, str | os.PathLike) or not bundles:
        raise wrong_argument("bundles", "a list of at least one bundle", quoted(bundles))
    first = bundles[0]
    for other in bundles[1:]:
        if other.id != first.id:
            raise _other_bundle(first, other)
    target = Path(os.path.abspath(output))
    for bundle in bundles:
        check_outside(bundle, target)
    if force:
        recover(target)
    if force and is_there(target, FILE) and not any(is_same(target, bundle.path) for bundle in bundles):
        found = read_documents(target)
        if found.id == first.id:  # what is there already stays: a merge never has less than its target
            bundles = [*bundles, type(first)(target, found.manifest, found.architecture, found.id)]
    sources = _sources(bundles)
    with atomic_directory(target, force=force) as root, ExitStack() as stack:
        for bundle in bundles:
            stack.enter_context(unchanged(bundle))
        for bundle, paths in zip(bundles, sources, strict=True):
            try:
                copy_files(bundle, paths, root, check=True, progress=progress)
            except BundleError as error:
                raise BundleError(within(error, bundle.path)) from error
        copy_documents(first, root)
        for bundle in bundles:
            try:
                copy_signatures(bundle.path, root)
            except BundleError as error:
                raise BundleError(within(error, bundle.path)) from error
    return type(first)(target, first.manifest, first.architecture, first.id)


def _sources(bundles: Sequence[BundleReader]) -> list[list[str]]:
    """Return the paths to copy from each bundle: each listed file from the first bundle that has it."""
    taken: set[str] = set()
    sources = []
    for bundle in bundles:
        absent = set(bundle.absent())
        paths = [path for path in bundle.manifest.files if path not in absent and path not in taken]
        taken.update(paths)
        sources.append(paths)
    sources[0] = [ARCHITECTURE, *(path for path in sources[0] if path != ARCHITECTURE)]  # every bundle has it
    return sources


def _other_bundle(first: BundleReader, other: BundleReader) -> BundleError:
    if other.fingerprint == first.fingerprint:
        hint = "They are of one model with other cuts or graphs. Extract the parts from one bundle"
    else:
        hint = "They are of two models, which nothing can merge"
    return wrong_argument("bundles", f"parts of one bundle, {first.id}", f"{other.id}, at {other.path}", hint)
