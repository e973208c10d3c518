"""Compute the golden vectors with onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from splitbundle.backends.onnxruntime.stage import load_stages
from splitbundle.format.graph import VARIANTS
from splitbundle.stages import golden
from splitbundle.storage.reader import ORIGINAL_VECTORS, VECTORS

if TYPE_CHECKING:
    from splitbundle.storage.files import Progress
    from splitbundle.storage.reader import BundleReader


def run_vectors(
    bundle: BundleReader, shard: str | None, threads: int | None, progress: Progress | None
) -> list[golden.Difference]:
    """See ``Bundle.run_vectors``."""
    tensors = {} if bundle.manifest.vectors is None else read_golden(bundle)
    outputs = golden.compute(
        bundle, shard, tensors, lambda part: load_stages(bundle, [part], threads=threads, exact=True)[0], progress
    )
    original = golden.original_outputs(tensors, outputs)
    return golden.compare(outputs, original, ("onnxruntime", golden.side(bundle)), tensors, tolerance(bundle))


def check_stage(bundle: BundleReader, shard: str, stage: Any) -> list[golden.Difference]:
    """Compare a stage that another machine computes with the golden vectors of its shard."""
    tensors = {} if bundle.manifest.vectors is None else read_golden(bundle)
    outputs = golden.compute(bundle, shard, tensors, lambda selection: stage, None)
    between = "the server", golden.side(bundle)
    limit = max(golden.of_dtype(stage.link.welcome.dtype), tolerance(bundle))
    return golden.compare(outputs, golden.original_outputs(tensors, outputs), between, tensors, limit)


def tolerance(bundle: BundleReader) -> float:
    """Return the largest relative difference that rounding explains in the graphs of this variant."""
    if bundle.manifest.storage.encodings:
        return golden.QUANTIZED_TOLERANCE
    narrow = any(shard.graph is not None and VARIANTS[shard.graph.variant] == "float16" for shard in bundle.shards)
    return golden.FLOAT16_TOLERANCE if narrow else golden.TOLERANCE


def distances(bundle: BundleReader) -> list[golden.Difference]:
    """See ``Bundle.distances``."""
    return golden.distances(bundle, read_golden(bundle), read_golden(bundle, ORIGINAL_VECTORS))


def read_golden(bundle: BundleReader, group: str = VECTORS) -> dict[str, numpy.ndarray]:
    """Return the golden vectors, or those of the model before it was quantized, by name."""
    arrays: dict[str, numpy.ndarray] = {}
    for data, found in bundle.weight_bytes(group):
        for name, (tensor, offset) in found.layout.items():
            dtype = numpy.dtype(tensor.dtype)
            count = tensor.size // dtype.itemsize
            flat = numpy.frombuffer(data, dtype, count, found.start + offset)
            arrays[name] = flat.reshape(tensor.shape)
    return arrays
