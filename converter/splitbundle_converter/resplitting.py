"""Cutting a bundle again: another manifest over the same units, copied as they are listed. The fingerprint stays."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from splitbundle.bundle import Bundle
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import strict_json
from splitbundle.format.genai import GENAI
from splitbundle.format.manifest import document
from splitbundle.format.manifest.document import identity
from splitbundle.format.names import CARD
from splitbundle.opening import open_bundle
from splitbundle.storage.files import FETCH, Progress, check_digest, missing, open_file, read_file, sha256
from splitbundle_converter.errors import refusal
from splitbundle_converter.graphs import request
from splitbundle_converter.writing.atomic_directory import atomic_directory
from splitbundle_converter.writing.documents import relocated, write_documents
from splitbundle_converter.writing.shards import make_shards


def resplit(
    bundle: str | os.PathLike[str] | Bundle,
    output: str | os.PathLike[str],
    *,
    split: Sequence[int] = (),
    names: Sequence[str] | None = None,
    check: bool = True,
    force: bool = False,
    onnx: bool | str | None = None,
    genai: bool | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Writes a bundle with other cuts. Files are copied, sharing their blocks where the file system can.

    Args:
        bundle: a whole bundle.
        output: the new bundle's directory; it may be the old one's, with ``force``.
        split: the cuts.
        names: the shards' names, as for ``convert``.
        check: whether to hold each copied file against its digest, and what new graphs compute against the golden
            vectors.
        force: whether to replace an existing bundle.
        onnx: whether to add a graph to each shard, for onnxruntime, as for ``convert``; by default of the variant that
            the old shards' graphs have, if they have any.
        genai: whether to add what onnxruntime-genai needs to run the graphs; by default if it was there.
        progress: called with what is being done, how much is done, and how much there is.

    Raises:
        BundleError: ``usage.*``, ``output.*``, ``file.*``.
        ParityError: graphs that don't compute what the original model did.
    """
    old = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    old_graphs = {shard.graph.file: shard.graph.variant for shard in old.shards if shard.graph is not None}
    if genai is None:
        genai = onnx is not False and GENAI[0] in old.manifest.files
    graphs = request.graph_writer(_variant(old_graphs.values()) if onnx is None else onnx, genai=genai)
    if graphs is not None:
        graphs.check(old.manifest.storage)
    target = Path(os.path.abspath(output))  # now: replacing a directory moves whoever stands in it
    _check_outside(old, target)
    cuts = tuple(split)
    given = None if names is None else tuple(names)
    left = {CARD, *old_graphs, *GENAI}
    kept = {path: file for path, file in old.manifest.files.items() if path not in left}
    absent = [path for path in old.absent() if path in kept]
    if absent:
        raise BundleError(missing(path) for path in absent)
    shards = make_shards(old.architecture, cuts, given, old.manifest.units, kept)
    total = sum(file.size for file in kept.values())
    done = 0
    before = _identity(old)
    with atomic_directory(target, force=force) as root:
        _check_unchanged(old, before)
        for path, file in kept.items():
            if progress is not None:
                progress("copying", done, total)
            _copy(old.path, root, path, old)
            if check:
                with open_file(root, path) as copied:
                    check_digest(path, file, sha256(copied))
            done += file.size
        if progress is not None:
            progress("copying", total, total)
        hidden_size = old.architecture.hidden_size if cuts else None
        draft = replace(old.manifest, shards=shards, hidden_size=hidden_size, files=kept)
        write_documents(root, draft, old.architecture)
        if graphs is not None:
            graphs(root)
        made = open_bundle(root)
        if graphs is not None and check and made.manifest.vectors is not None:
            made.run_vectors(backend="onnxruntime", progress=progress)
        _check_unchanged(old, before)
    return relocated(made, target)


def _check_outside(old: Bundle, target: Path) -> None:
    """Refuses to write into the bundle that is read; in its place is another matter."""
    if Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(old.path)):
        got = f"a place inside of {old.path}"
        raise refusal("output.failed", str(target), "a place outside of the bundle that is read", got)


def _identity(bundle: Bundle) -> tuple[int, int]:
    """Which directory stands at a bundle's place: another one after the bundle was replaced."""
    try:
        status = bundle.path.stat()
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def _check_unchanged(old: Bundle, before: tuple[int, int]) -> None:
    """Refuses to go on where some files may be of one bundle and some of another."""
    if _identity(old) != before or identity(read_file(old.path, document.FILE, strict_json.MAX_BYTES)) != old.id:
        expected, hint = "the bundle that was opened, until it is copied", "Run this again"
        got = "another one, which replaced it meanwhile"
        raise BundleError(Problem(code="file.changed", file=str(old.path), expected=expected, got=got, hint=hint))


def _variant(variants: Iterable[str]) -> str | bool:
    known = list(dict.fromkeys(variants))
    if len(known) > 1:
        expected = "one variant, where the old shards have several"
        raise refusal("usage.onnx", None, expected, quoted(known), argument="onnx")
    return known[0] if known else False


def _copy(old: Path, new: Path, path: str, bundle: Bundle) -> None:
    place = new / path
    place.parent.mkdir(exist_ok=True)
    with open_file(old, path, bundle.manifest.files[path]) as source, place.open("wb") as target:
        size = bundle.manifest.files[path].size
        if hasattr(os, "copy_file_range"):
            try:
                while size and (copied := os.copy_file_range(source.fileno(), target.fileno(), size)):
                    size -= copied
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
        if size:
            source.seek(0)
            target.seek(0)
            shutil.copyfileobj(source, target, 2**20)
            if target.tell() != bundle.manifest.files[path].size:
                expected, got = f"{bundle.manifest.files[path].size} bytes", f"{target.tell()}, while it was copied"
                raise BundleError(Problem(code="file.size", file=path, expected=expected, got=got, hint=FETCH))


def add_onnx(
    bundle: str | os.PathLike[str] | Bundle,
    output: str | os.PathLike[str] | None = None,
    *,
    variant: str | None = None,
    check: bool = True,
    force: bool = False,
    genai: bool | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Adds a graph to each shard of a bundle, for onnxruntime. The weights, the cuts and the fingerprint stay.

    Args:
        bundle: a whole bundle.
        output: the new bundle's directory; by default the old one's, which stays whole until the new one is complete.
        variant: of the graphs: "standard" computes in float32, "float16" in the float16 that weights are stored in; by
            default that of the graphs that are there, or "standard".
        check: whether to hold each copied file against its digest, and what the graphs compute against the golden
            vectors.
        force: whether to replace an existing bundle at ``output``.
        genai: whether to add what onnxruntime-genai needs to run the graphs; by default if it was there.
        progress: called with what is being done, how much is done, and how much there is.

    Raises:
        BundleError: ``usage.onnx``, ``usage.genai``, ``output.*``, ``file.*``.
        ParityError: graphs that don't compute what the original model did.
        MissingExtra: without onnx and onnxruntime.
    """
    old = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    names = [shard.name for shard in old.shards]
    target, force = (old.path, True) if output is None else (output, force)
    there = _variant(shard.graph.variant for shard in old.shards if shard.graph is not None) if variant is None else ""
    return resplit(
        old,
        target,
        split=old.manifest.cuts,
        names=names,
        check=check,
        force=force,
        onnx=variant or there or "standard",
        genai=genai,
        progress=progress,
    )
