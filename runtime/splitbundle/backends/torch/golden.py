"""Compute the golden vectors with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from splitbundle.backends.torch.router_ties import compare_by_layer, has_experts
from splitbundle.backends.torch.stage import load_stages
from splitbundle.backends.torch.weights import map_tensors
from splitbundle.stages import golden
from splitbundle.storage.reader import ORIGINAL_VECTORS, VECTORS

if TYPE_CHECKING:
    from splitbundle.format.selection import Selection
    from splitbundle.storage.files import Progress
    from splitbundle.storage.reader import BundleReader


def run_vectors(
    bundle: BundleReader, shard: str | None, threads: int | None, progress: Progress | None
) -> list[golden.Difference]:
    """See ``Bundle.run_vectors``."""
    tensors = {} if bundle.manifest.vectors is None else map_tensors(bundle, VECTORS)

    # The fast kernels for quantized weights round the inputs. Vectors are compared without this rounding.
    kernels = "torch" if bundle.manifest.storage.encodings else None

    def load(selection: Selection) -> Callable[..., Any]:
        stage = load_stages(bundle, [selection], dtype="float32", threads=threads, kernels=kernels)[0]

        def run(given: Tensor, **options: Any) -> Tensor:
            with torch.no_grad():
                return stage(given, **options)  # type: ignore[no-any-return]

        return run

    outputs = golden.compute(bundle, shard, tensors, load, progress)
    original = golden.original_outputs(tensors, outputs)
    differences = golden.compare(outputs, original, ("torch", golden.side(bundle)), tensors)
    if golden.wrong(differences) and has_experts(bundle):
        by_layer = compare_by_layer(bundle, shard, tensors, threads)
        return differences if golden.wrong(by_layer) else by_layer
    return differences


def distances(bundle: BundleReader) -> list[golden.Difference]:
    """See ``Bundle.distances``."""
    return golden.distances(bundle, map_tensors(bundle, VECTORS), map_tensors(bundle, ORIGINAL_VECTORS))


def check_stage(bundle: BundleReader, shard: str, stage: Any) -> list[golden.Difference]:
    """Compare a stage that another machine computes with the golden vectors of its shard."""
    tensors = {} if bundle.manifest.vectors is None else map_tensors(bundle, VECTORS)

    def run(given: Tensor, **options: Any) -> Tensor:
        with torch.no_grad():
            return stage(given.to(stage.dtype), **options).float()  # type: ignore[no-any-return]

    outputs = golden.compute(bundle, shard, tensors, lambda selection: run, None)
    between = "the server", golden.side(bundle)
    limit = golden.of_dtype(stage.link.welcome.dtype)
    if bundle.manifest.storage.encodings:
        limit = max(limit, golden.QUANTIZED_TOLERANCE)
    return golden.compare(outputs, golden.original_outputs(tensors, outputs), between, tensors, limit)
