"""Cut a bundle into other shards: write a new manifest and copy the listed files. The fingerprint does not change."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from splitbundle.bundle import Bundle
from splitbundle.errors import quoted
from splitbundle.format.genai import GENAI
from splitbundle.format.names import CARD
from splitbundle.opening import open_bundle, relocated
from splitbundle.planning.costs import bundle_costs
from splitbundle.planning.cuts import cuts_for
from splitbundle.storage.files import Progress
from splitbundle.writing.atomic_directory import atomic_directory
from splitbundle.writing.copying import check_outside, copy_files, refuse_missing, unchanged
from splitbundle.writing.documents import write_documents
from splitbundle.writing.shards import make_shards
from splitbundle_converter.errors import refusal
from splitbundle_converter.graphs import request
from splitbundle_converter.published_schemas import check_schemas


def resplit(
    bundle: str | os.PathLike[str] | Bundle,
    output: str | os.PathLike[str],
    *,
    split: Sequence[int] = (),
    equal: int | None = None,
    max_shard_size: int | None = None,
    names: Sequence[str] | None = None,
    check: bool = True,
    force: bool = False,
    onnx: bool | str | None = None,
    genai: bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Write a bundle with other cuts. The files are copied; the copies share disk blocks if the file system can.

    Args:
        bundle: A complete bundle.
        output: The directory of the new bundle. With ``force``, it may be the directory of the old bundle.
        split: The cuts, as for ``convert``. Give at most one of ``split``, ``equal`` and ``max_shard_size``.
        equal: The number of shards, as for ``convert``.
        max_shard_size: The largest size of a shard in bytes, as for ``convert``.
        names: The names of the shards, as for ``convert``.
        check: Whether to verify each copied file, and to compare new graphs with the golden vectors.
        force: Whether to replace an existing bundle.
        onnx: Whether to add a graph for onnxruntime to each shard, as for ``convert``. By default the new shards get
            graphs of the same variant as the old shards, if these have graphs.
        genai: Whether to add the configuration that onnxruntime-genai needs to run the graphs. By default it is added
            if the old bundle has it.
        threads: The number of threads that compare the graphs with the golden vectors; by default one for each core.
        progress: A function that is called with the current step, the amount done, and the total amount.

    Returns:
        The new bundle, opened.

    Raises:
        BundleError: ``usage.*``, ``output.*``, ``file.*``.
        ParityError: The graphs do not compute the same results as the original model.
    """
    old = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    old_graphs = {shard.graph.file: shard.graph.variant for shard in old.shards if shard.graph is not None}
    if genai is None:
        genai = onnx is not False and GENAI[0] in old.manifest.files
    graphs = request.graph_writer(_variant(old_graphs.values()) if onnx is None else onnx, genai=genai)
    if graphs is not None:
        graphs.check(old.manifest.storage)
    # The path is made absolute first: replacing the current directory of this process would change its meaning.
    target = Path(os.path.abspath(output))
    check_outside(old, target)
    cuts = cuts_for(
        tuple(split) or None, equal, max_shard_size, lambda: bundle_costs(old.manifest, old.architecture), default=()
    )
    left = {CARD, *old_graphs, *GENAI}
    kept = {path: file for path, file in old.manifest.files.items() if path not in left}
    refuse_missing(old, list(kept))
    shards = make_shards(old.architecture, cuts, names, old.manifest.units, kept)
    with atomic_directory(target, force=force) as root, unchanged(old):
        copy_files(old, list(kept), root, check=check, progress=progress)
        hidden_size = old.architecture.hidden_size if cuts else None
        draft = replace(old.manifest, shards=shards, hidden_size=hidden_size, files=kept)
        write_documents(root, draft, old.architecture)
        if graphs is not None:
            graphs(root)
        made = open_bundle(root)
        check_schemas(made)
        if graphs is not None and check and made.manifest.vectors is not None:
            made.run_vectors(backend="onnxruntime", threads=threads, progress=progress)
    return relocated(made, target)


def _variant(variants: Iterable[str]) -> str | bool:
    known = list(dict.fromkeys(variants))
    if len(known) > 1:
        expected = "one variant, where the old shards have several"
        raise refusal("usage.onnx", None, expected, quoted(known), argument="onnx")
    return known[0] if known else False


def add_onnx(
    bundle: str | os.PathLike[str] | Bundle,
    output: str | os.PathLike[str] | None = None,
    *,
    variant: str | None = None,
    check: bool = True,
    force: bool = False,
    genai: bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Add a graph for onnxruntime to each shard of a bundle. The weights, the cuts and the fingerprint do not change.

    Args:
        bundle: A complete bundle.
        output: The directory of the new bundle. By default it is the directory of the old bundle, which stays in place
            until the new one is complete.
        variant: The variant of the graphs: "standard" computes in float32, "float16" computes in float16, the dtype of
            the stored weights; "matmul_nbits" multiplies weights of 4 bits. By default it is the variant of the
            present graphs, or the one that fits the weights.
        check: Whether to verify each copied file, and to compare the graphs with the golden vectors.
        force: Whether to replace an existing bundle at ``output``.
        genai: Whether to add the configuration that onnxruntime-genai needs to run the graphs. By default it is added
            if the old bundle has it.
        threads: The number of threads that compare the graphs with the golden vectors; by default one for each core.
        progress: A function that is called with the current step, the amount done, and the total amount.

    Returns:
        The new bundle, opened.

    Raises:
        BundleError: ``usage.onnx``, ``usage.genai``, ``output.*``, ``file.*``.
        ParityError: The graphs do not compute the same results as the original model.
        MissingExtra: onnx or onnxruntime is not installed.
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
        onnx=variant or there or True,
        genai=genai,
        threads=threads,
        progress=progress,
    )
