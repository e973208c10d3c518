"""A torch stage for a pipeline of numpy arrays. This module does not import numpy: torch converts the arrays."""

from __future__ import annotations

from typing import Any

import torch

from splitbundle.errors import BundleError, Problem
from splitbundle.stages.call import Call
from splitbundle.stages.stage import LogitsWanted, StageBase


class NumpyStage(StageBase):
    """Take and return float32 arrays. The torch stage inside may have any dtype and device."""

    backend = "torch"
    takes_rows = True

    inner: Any
    """The torch stage. Its module imports this one, for ``over_numpy``, so this one can't import its class."""

    def __init__(self, stage: StageBase) -> None:
        self.inner = stage
        self.name, self.fingerprint, self.layer_range = stage.name, stage.fingerprint, stage.layer_range
        self.architecture, self.embeds, self.has_head = stage.architecture, stage.embeds, stage.has_head

    def _tensor(self, array: Any) -> Any:
        known = any((base.__module__, base.__name__) == ("numpy", "ndarray") for base in type(array).__mro__)
        if not known or array.dtype.kind not in "iuf":
            name = "token ids" if self.embeds else f"hidden at layer {self.layer_range[0]}"
            got = str(getattr(array, "dtype", type(array).__name__))
            raise BundleError(Problem(code="input.type", argument=name, expected="a numpy.ndarray of numbers", got=got))
        # torch refuses negative strides and a foreign byte order, and warns about read-only memory.
        if not (array.flags.writeable and array.flags.c_contiguous and array.dtype.isnative):
            array = array.astype(array.dtype.newbyteorder("="), order="C", copy=True)
        tensor = torch.from_numpy(array).to(self.inner.device)
        return tensor if self.embeds else tensor.to(self.inner.dtype)

    def cache(self, batch_size: int, capacity: int) -> Any:
        """Return a cache for the torch stage."""
        return self.inner.cache(batch_size, capacity)

    def check(self, inputs: Any, **given: Any) -> Any:
        """Check a call as the torch stage does."""
        return self.inner.check(self._tensor(inputs), **given)

    def check_call(self, inputs: Any, call: Call, cache: Any, logits: LogitsWanted = "all") -> None:
        """Check what each stage of a pipeline must check itself, as the torch stage does."""
        with torch.no_grad():
            self.inner.check_call(self._tensor(inputs), self.inner.convert_call(call), cache, logits)

    def __call__(
        self, inputs: Any, *, positions: Call | None = None, logits: LogitsWanted = "all", **given: Any
    ) -> Any:
        """Compute the torch stage without gradients. *Shape:* as for the torch stage, in float32."""
        call = None if positions is None else self.inner.convert_call(positions)
        with torch.no_grad():
            result = self.inner(self._tensor(inputs), positions=call, logits=logits, **given)
        return result.float().cpu().numpy()
