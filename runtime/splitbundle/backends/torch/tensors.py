"""A stage over tensors: the checks that every such stage shares, wherever it computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from splitbundle.backends.torch.positions import Positions
from splitbundle.stages.call import Call
from splitbundle.stages.stage import ArrayInfo, StageBase

_FEW_IDS: Final = 64
"""The ids that Python looks at sooner than torch."""


class TensorStage(StageBase):
    """The half of a stage that looks at its tensors. A stage has a ``device`` and a ``dtype`` beside it."""

    backend = "torch"
    array = "a torch.Tensor"
    integer_dtypes = frozenset(f"torch.{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))

    @property
    def device(self) -> torch.device:
        """Return the device on which this stage takes tensors."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in which this stage takes hidden states."""
        raise NotImplementedError

    def _info(self, array: object) -> ArrayInfo | None:
        if not isinstance(array, Tensor):
            return None
        return ArrayInfo(shape=tuple(array.shape), dtype=str(array.dtype), device=str(array.device))

    def _min_max(self, array: Tensor) -> tuple[int, int]:
        if torch.compiler.is_compiling():
            return 0, 0  # an exported or compiled stage has no ids yet; its embedding refuses those that are too large
        if array.numel() <= _FEW_IDS:
            ids = array.flatten().tolist()
            return min(ids), max(ids)
        # torch finds no minimum of wide unsigned integers. As int64, ids of 2^63 and above are negative, and refused.
        low, high = array.long().aminmax()
        return int(low), int(high)

    def _expected(self) -> ArrayInfo:
        return ArrayInfo(shape=(), dtype=str(self.dtype), device=str(self.device))

    def _other_dtype(self) -> str:
        return "Convert it with .to(stage.dtype), or open the stage with dtype="

    def _call(self, past: Sequence[int], count: Sequence[int], length: int) -> Positions:
        return Positions(past, count, length, self.device, self.dtype)

    def convert_call(self, call: Call) -> Positions:
        """Return a call of another stage with the device and the dtype of this one."""
        if isinstance(call, Positions) and call.device == self.device and call.dtype == self.dtype:
            return call
        converted = self._call(call.past, call.count, call.length)
        converted.rows = call.rows
        return converted
