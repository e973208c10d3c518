"""A torch stage among stages that take and give numpy arrays. numpy itself isn't imported: torch knows it."""

from __future__ import annotations

from typing import Any

import torch

from splitbundle.calls import Call
from splitbundle.stages import LogitsWanted, StageSurface
from splitbundle.torch_stage import Stage


class StageOverNumpy(StageSurface):
    """Takes and gives arrays in float32, whatever the torch stage inside computes in, and wherever."""

    backend = "torch"

    def __init__(self, stage: Stage) -> None:
        self.inner = stage
        self.name, self.fingerprint, self.layer_range = stage.name, stage.fingerprint, stage.layer_range
        self.architecture, self.embeds, self.has_head = stage.architecture, stage.embeds, stage.has_head

    def _tensor(self, array: Any) -> Any:
        if type(array).__module__ != "numpy":
            return array  # the torch stage says what it is
        # torch warns of memory that it can't protect from being written.
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.inner.device)
        return tensor if self.embeds else tensor.to(self.inner.dtype)

    def cache(self, batch_size: int, capacity: int) -> Any:
        """The torch stage's cache."""
        return self.inner.cache(batch_size, capacity)

    def check(self, inputs: Any, **given: Any) -> Any:
        """As the torch stage does."""
        return self.inner.check(self._tensor(inputs), **given)

    def check_call(self, inputs: Any, call: Call, cache: Any, logits: LogitsWanted = "all") -> None:
        """As the torch stage does."""
        with torch.no_grad():
            self.inner.check_call(self._tensor(inputs), self.inner.adopt(call), cache, logits)

    def __call__(
        self, inputs: Any, *, positions: Call | None = None, logits: LogitsWanted = "all", **given: Any
    ) -> Any:
        """*Shape:* as the torch stage's, in float32."""
        call = None if positions is None else self.inner.adopt(positions)
        with torch.no_grad():
            result = self.inner(self._tensor(inputs), positions=call, logits=logits, **given)
        return result.float().cpu().numpy()
