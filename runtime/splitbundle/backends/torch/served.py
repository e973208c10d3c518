"""A torch stage as a server uses it: payloads in, payloads out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from splitbundle.backends.torch.payloads import decode, encode
from splitbundle.backends.torch.stage import Stage


class ServedStage:
    """A stage, and the way between its tensors and payloads."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.dtype = str(stage.dtype).removeprefix("torch.")

    def decode(self, payload: memoryview, encoding: str, count: Sequence[int], sequence: int) -> Tensor:
        """Return the hidden state of a payload for the stage. *Shape:* (batch, sequence, hidden)."""
        hidden = decode(payload, encoding, count, sequence, self.stage.architecture.hidden_size)
        return hidden.to(self.stage.device, self.stage.dtype)

    def check(self, hidden: Tensor, **given: Any) -> Any:
        """Check a call without gradients, and return its positions. See ``Stage.check``."""
        with torch.no_grad():  # with them, a stage that is trainable takes no cache
            return self.stage.check(hidden, **given)

    def run(self, hidden: Tensor, positions: Any, cache: Any) -> Tensor:
        """Compute the stage without gradients. *Shape:* (batch, sequence, hidden) -> the same."""
        if self.stage.training:  # no dropout
            self.stage.eval()
        with torch.no_grad():
            return self.stage(hidden, positions=positions, cache=cache)  # type: ignore[no-any-return]

    def encode(self, hidden: Tensor, count: Sequence[int], encoding: str) -> list[memoryview]:
        """Return the parts of the payload of a hidden state.

        Raises:
            BundleError: ``wire.value``.
        """
        return encode(hidden, count, encoding)

    def joined(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        """Return hidden states as one: side by side in the batch (axis 0), or one after another (axis 1)."""
        return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=axis)

    def zeros(self) -> Tensor:
        """Return a hidden state of one token. *Shape:* (1, 1, hidden)."""
        return torch.zeros(1, 1, self.stage.architecture.hidden_size, dtype=self.stage.dtype, device=self.stage.device)

    def is_finite(self, hidden: Tensor) -> bool:
        """Return whether all numbers are finite."""
        return bool(torch.isfinite(hidden).all())
