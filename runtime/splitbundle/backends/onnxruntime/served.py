"""A stage of onnxruntime as a server uses it: payloads in, payloads out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy
from onnxruntime.capi import onnxruntime_pybind11_state

from splitbundle.backends.onnxruntime.payloads import decode, encode
from splitbundle.backends.onnxruntime.stage import Stage

_FAILURES: Final = tuple(
    each for each in vars(onnxruntime_pybind11_state).values() if isinstance(each, type) and issubclass(each, Exception)
)
"""The errors of onnxruntime, which have no base of their own."""


class ServedStage:
    """A stage, and the way between its arrays and payloads."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.dtype = stage.dtype

    def decode(self, payload: memoryview, encoding: str, count: Sequence[int], sequence: int) -> numpy.ndarray:
        """Return the hidden state of a payload. *Shape:* (batch, sequence, hidden), float32."""
        return decode(payload, encoding, count, sequence, self.stage.architecture.hidden_size)

    def check(self, hidden: numpy.ndarray, **given: Any) -> Any:
        """Check a call, and return its positions. See ``Stage.check``."""
        return self.stage.check(hidden, **given)

    def run(self, hidden: numpy.ndarray, positions: Any, cache: Any) -> numpy.ndarray:
        """Compute the stage. *Shape:* (batch, sequence, hidden) -> the same, float32.

        Raises:
            RuntimeError: onnxruntime can't compute it.
        """
        try:
            return self.stage(hidden, positions=positions, cache=cache)
        except _FAILURES as error:
            raise RuntimeError(f"onnxruntime: {type(error).__name__}") from error

    def encode(self, hidden: numpy.ndarray, count: Sequence[int], encoding: str) -> list[memoryview]:
        """Return the parts of the payload of a hidden state.

        Raises:
            BundleError: ``wire.value``.
        """
        return encode(hidden, count, encoding)

    def joined(self, parts: Sequence[numpy.ndarray], axis: int) -> numpy.ndarray:
        """Return hidden states as one: side by side in the batch (axis 0), or one after another (axis 1)."""
        return parts[0] if len(parts) == 1 else numpy.concatenate(parts, axis)

    def zeros(self) -> numpy.ndarray:
        """Return a hidden state of one token. *Shape:* (1, 1, hidden), float32."""
        return numpy.zeros((1, 1, self.stage.architecture.hidden_size), numpy.float32)

    def is_finite(self, hidden: numpy.ndarray) -> bool:
        """Return whether all numbers are finite."""
        return bool(numpy.isfinite(hidden).all())
