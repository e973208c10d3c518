"""The golden vectors of a bundle whose weights were changed: its own results, and those of the model before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import torch

from splitbundle.backends.torch.stage import load_stages
from splitbundle.backends.torch.weight_files import write_weights
from splitbundle.backends.torch.weights import map_tensors
from splitbundle.format.manifest.document import File, Vectors
from splitbundle.storage import files
from splitbundle.storage.documents import read_documents
from splitbundle.storage.files import Progress
from splitbundle.storage.reader import VECTORS, BundleReader

ORIGINAL: Final = "original-vectors.safetensors"
"""The file of the golden vectors of the model before it was quantized."""


def vectors_of_itself(bundle: BundleReader, root: Path, progress: Progress | None) -> tuple[Vectors, File] | str:
    """Compute the new bundle's golden vectors through its own shards, one at a time, in float32, and write them.

    The cases are those of the old vectors. Return a reason in words if there are none.
    """
    old = bundle.manifest.vectors
    made = read_documents(root)
    new = BundleReader(root, made.manifest, made.architecture, made.id)
    if old is None or new.absent() or old.file in bundle.absent():
        return "The bundle is partial, so it has no golden vectors: they need every shard."
    given = map_tensors(bundle, VECTORS)
    cases, layers = range(len(old.lengths)), len(made.architecture.layers)
    tensors = {f"case.{case}.ids": given[f"case.{case}.ids"] for case in cases}
    states = [tensors[f"case.{case}.ids"][None] for case in cases]
    for step in range(layers + 2):  # the embedding, each layer, and the head
        if progress is not None:
            progress("computing golden vectors", step, layers + 2)
        embeds, head = step == 0, step == layers + 1
        around = (0, 0) if embeds else (layers, layers) if head else (step - 1, step)
        selection = new.select(layers=around, embeds=embeds, head=head)
        stage = load_stages(new, [selection], dtype="float32", kernels="torch")[0]
        with torch.no_grad():
            states = [stage(state, logits="last") for state in states]
        for case in cases:
            name = f"case.{case}.logits" if head else f"case.{case}.hidden.{step}"
            tensors[name] = states[case][0, -1] if head else states[case][0]
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        return "The bundle has no golden vectors: its weights give NaN or infinity."
    stored = new.stored_vectors(old.lengths)
    entry = write_weights(root / old.file, stored, tensors.__getitem__)()
    return Vectors(file=old.file, lengths=old.lengths, of_itself=True), entry


def copy_original_vectors(bundle: BundleReader, root: Path) -> dict[str, File]:
    """Copy the golden vectors of the model before it was quantized, and return their entry in the manifest."""
    vectors = bundle.manifest.vectors
    if vectors is None:
        raise RuntimeError("a bundle without golden vectors has none to copy")
    source = vectors.file if vectors.original is None else vectors.original
    with (
        files.open_file(bundle.path, source, bundle.manifest.files[source]) as old,
        (root / ORIGINAL).open("wb") as new,
    ):
        shutil.copyfileobj(old, new)
    return {ORIGINAL: bundle.manifest.files[source]}
