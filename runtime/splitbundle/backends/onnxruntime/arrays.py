"""A stage over numpy arrays: the checks that every such stage shares, wherever it computes."""

from __future__ import annotations

import numpy

from splitbundle.stages.stage import ArrayInfo, StageBase


class ArrayStage(StageBase):
    """The half of a stage that looks at its arrays. Hidden states are in float32."""

    backend = "onnxruntime"
    array = "a numpy.ndarray"
    integer_dtypes = frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
    dtype = "float32"
    device = "cpu"

    def _info(self, array: object) -> ArrayInfo | None:
        if not isinstance(array, numpy.ndarray):
            return None
        return ArrayInfo(shape=array.shape, dtype=str(array.dtype), device=self.device)

    def _min_max(self, array: numpy.ndarray) -> tuple[int, int]:
        return int(array.min()), int(array.max())

    def _expected(self) -> ArrayInfo:
        return ArrayInfo(shape=(), dtype=self.dtype, device=self.device)

    def _other_dtype(self) -> str:
        return "Convert it with .astype(numpy.float32)"
