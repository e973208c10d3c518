"""Stages in order, computed with torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitbundle.backends.torch.sampling import draw, likeliest, log_probabilities
from splitbundle.backends.torch.stage import Stage, load_stages, unwrapped
from splitbundle.stages.pipeline import PipelineBase, check_tiling
from splitbundle.stages.sampling import History, RowGenerators, Sampling
from splitbundle.stages.session import Session

if TYPE_CHECKING:
    from splitbundle.storage.reader import BundleReader

__all__ = ["Pipeline", "Session", "load_pipeline", "load_stages"]


class _Wrapped:
    """A stage inside a wrapper such as ``DistributedDataParallel``: the wrapper computes, the stage says what it is."""

    def __init__(self, wrapper: nn.Module, stage: Stage) -> None:
        self._wrapper, self._stage = wrapper, stage

    @staticmethod
    def of(module: nn.Module) -> Any:
        """Return a stage as it is, and a wrapper of a stage with the attributes of the stage."""
        inner = None if hasattr(module, "layer_range") else unwrapped(module)
        return module if inner is None else _Wrapped(module, inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(*args, **kwargs)


class _AsModule(nn.Module):
    """A stage that isn't a module, as one: torch's list of modules takes no other objects."""

    def __init__(self, stage: Any) -> None:
        super().__init__()
        self._stage = [stage]  # in a list, which no module looks into

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stage"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._stage[0](*args, **kwargs)


class Pipeline(PipelineBase, nn.Module):
    """A model made of stages. Their layer ranges tile the model: they leave no gap and don't overlap."""

    def __init__(self, stages: Sequence[Stage], *, same_weights: bool = True) -> None:
        """Check the stages and join them.

        Args:
            stages: the stages in order: stages, wrappers of stages, or objects that keep the contract of a stage
                (``splitbundle.extending``). Their layer ranges tile the model; the first embeds, the last has the head.
            same_weights: whether the fingerprints must show that all stages come from one model. Stages that were
                trained and saved separately have different fingerprints.

        Raises:
            BundleError: ``pipeline.tiling``, ``pipeline.fingerprint``.
        """
        super().__init__()
        check_tiling([_Wrapped.of(stage) for stage in stages], same_weights=same_weights)
        self.stages = nn.ModuleList(stage if isinstance(stage, nn.Module) else _AsModule(stage) for stage in stages)

    def _in_order(self) -> list[Stage]:
        return [_Wrapped.of(module) for module in self.stages]

    def token_ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return rows of equal length as a tensor for this pipeline. *Shape:* (batch, sequence), int64."""
        return torch.tensor(rows, dtype=torch.int64, device=self.first.device)

    def _enter(self, x: Tensor, stage: Stage) -> Tensor:
        device, dtype = getattr(stage, "device", None), getattr(stage, "dtype", None)
        return x.to(device=device) if stage.embeds else x.to(device=device, dtype=dtype)

    def _nested(self, array: object) -> list[list[Any]] | None:
        return array.tolist() if isinstance(array, Tensor) else None

    def _shift(self, x: Tensor, starts: Sequence[int]) -> Tensor:
        if not any(starts):
            return x
        return torch.stack([row.roll(-start, dims=0) for row, start in zip(x, starts, strict=True)])

    def _lengthen(self, x: Tensor, more: int) -> Tensor:
        return functional.pad(x, (0, 0, 0, more))

    def _draw(self, logits: Tensor, sampling: Sampling, generators: RowGenerators, history: History | None) -> Tensor:
        return draw(logits, sampling, generators, history)

    def _scores(self, logits: Tensor, token_ids: Tensor) -> Tensor:
        return log_probabilities(logits, token_ids.to(logits.device))

    def _likeliest(self, logits: Tensor, number: int) -> list[tuple[tuple[int, float], ...]]:
        return likeliest(logits, number)

    def _row(self, values: list[int], like: Tensor) -> Tensor:
        return torch.tensor(values, device=like.device)

    def _without_gradients(self) -> AbstractContextManager[Any]:
        return torch.no_grad()


def load_pipeline(
    bundle: BundleReader,
    **options: Any,
) -> Pipeline:
    """Load all shards of a bundle as one pipeline. See ``Bundle.pipeline``."""
    selections = [bundle.select(shard.name) for shard in bundle.shards]
    return Pipeline(load_stages(bundle, selections, **options))
