"""Stages in order, over numpy arrays. All of them use onnxruntime, or some of them use torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy

from splitbundle.backends.onnxruntime.sampling import draw, likeliest, log_probabilities
from splitbundle.backends.onnxruntime.stage import load_stages
from splitbundle.stages.pipeline import PipelineBase, check_tiling
from splitbundle.stages.sampling import History, RowGenerators, Sampling
from splitbundle.stages.session import Session

if TYPE_CHECKING:
    from splitbundle.storage.reader import BundleReader

__all__ = ["Pipeline", "Session", "load_pipeline", "load_stages"]


class Pipeline(PipelineBase):
    """A model made of stages, over numpy arrays. Their layer ranges leave no gap and don't overlap."""

    def __init__(self, stages: Sequence[Any], *, same_weights: bool = True) -> None:
        """Check the stages and join them.

        Args:
            stages: the stages in order: each of this backend, of torch, or one that keeps the contract of a stage
                (``splitbundle.extending``). Their layer ranges tile the model; the first embeds, the last has the head.
            same_weights: whether the fingerprints must show that all stages come from one model.

        Raises:
            BundleError: ``pipeline.tiling``, ``pipeline.fingerprint``.
        """
        check_tiling(stages, same_weights=same_weights)
        self.stages = [stage.over_numpy() if hasattr(stage, "over_numpy") else stage for stage in stages]

    __call__ = PipelineBase.forward

    def _in_order(self) -> Sequence[Any]:
        return self.stages

    def token_ids(self, rows: Sequence[Sequence[int]]) -> numpy.ndarray:
        """Return rows of equal length as an array for this pipeline. *Shape:* (batch, sequence), int64."""
        return numpy.array(rows, dtype=numpy.int64)

    def _nested(self, array: object) -> list[list[Any]] | None:
        return array.tolist() if isinstance(array, numpy.ndarray) else None

    def _shift(self, x: numpy.ndarray, starts: Sequence[int]) -> numpy.ndarray:
        if not any(starts):
            return x
        return numpy.stack([numpy.roll(row, -start, axis=0) for row, start in zip(x, starts, strict=True)])

    def _lengthen(self, x: numpy.ndarray, more: int) -> numpy.ndarray:
        return numpy.pad(x, ((0, 0), (0, more), (0, 0)))

    def _draw(
        self, logits: numpy.ndarray, sampling: Sampling, generators: RowGenerators, history: History | None
    ) -> numpy.ndarray:
        return draw(logits, sampling, generators, history)

    def _scores(self, logits: numpy.ndarray, token_ids: numpy.ndarray) -> numpy.ndarray:
        return log_probabilities(logits, token_ids)

    def _likeliest(self, logits: numpy.ndarray, number: int) -> list[tuple[tuple[int, float], ...]]:
        return likeliest(logits, number)

    def _row(self, values: list[int], like: numpy.ndarray) -> numpy.ndarray:
        return numpy.array(values, dtype=numpy.int64)


def load_pipeline(bundle: BundleReader, **options: Any) -> Pipeline:
    """Load all shards of a bundle as one pipeline. See ``Bundle.pipeline``."""
    return Pipeline(load_stages(bundle, [bundle.select(shard.name) for shard in bundle.shards], **options))
