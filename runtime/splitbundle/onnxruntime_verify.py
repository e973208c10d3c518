"""Running the golden vectors with onnxruntime, and both backends against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy

from splitbundle import golden
from splitbundle.bundle import VECTORS
from splitbundle.manifest import VARIANTS
from splitbundle.onnxruntime_stage import load_stages

if TYPE_CHECKING:
    from splitbundle.bundle import Bundle
    from splitbundle.files import Progress
    from splitbundle.selections import Selection


def run_vectors(bundle: Bundle, shard: str | None, progress: Progress | None) -> list[golden.Difference]:
    """See ``Bundle.run_vectors``."""
    tensors = {} if bundle.manifest.vectors is None else _arrays(bundle)
    outputs = golden.compute(bundle, shard, tensors, lambda part: load_stages(bundle, [part])[0], progress)
    original = golden.original_outputs(tensors, outputs)
    return golden.compare(outputs, original, ("onnxruntime", "original"), _tolerance(bundle))


def run_both(bundle: Bundle, shard: str | None, progress: Progress | None) -> list[golden.Difference]:
    """Each backend against the original model, and then the two against each other."""
    from splitbundle.torch_over_numpy import StageOverNumpy
    from splitbundle.torch_stage import load_stages as load_torch

    def torch_stage(part: Selection) -> Callable[..., Any]:
        return StageOverNumpy(load_torch(bundle, [part], dtype="float32")[0])

    tensors = {} if bundle.manifest.vectors is None else _arrays(bundle)
    torch_outputs = golden.compute(bundle, shard, tensors, torch_stage, progress)
    outputs = golden.compute(bundle, shard, tensors, lambda part: load_stages(bundle, [part])[0], progress)
    original = golden.original_outputs(tensors, outputs)
    return [
        *golden.compare(torch_outputs, original, ("torch", "original")),
        *golden.compare(outputs, original, ("onnxruntime", "original"), _tolerance(bundle)),
        *golden.compare(outputs, torch_outputs, ("onnxruntime", "torch"), _tolerance(bundle)),
    ]


def _tolerance(bundle: Bundle) -> float:
    narrow = any(shard.graph is not None and VARIANTS[shard.graph.variant] == "float16" for shard in bundle.shards)
    return golden.FLOAT16_TOLERANCE if narrow else golden.TOLERANCE


def _arrays(bundle: Bundle) -> dict[str, numpy.ndarray]:
    """The golden vectors."""
    arrays: dict[str, numpy.ndarray] = {}
    for data, found in bundle.weight_bytes(VECTORS):
        for name, (tensor, offset) in found.layout.items():
            dtype = numpy.dtype(tensor.dtype)
            count = tensor.size // dtype.itemsize
            flat = numpy.frombuffer(data, dtype, count, found.start + offset)
            arrays[name] = flat.reshape(tensor.shape)
    return arrays
