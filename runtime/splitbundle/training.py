"""Train stages with torch: boundaries, frozen parts, losses over micro-batches, tied weights, checkpoints and LoRA."""

from __future__ import annotations

from splitbundle.backends.torch.training.checkpoints import Checkpoints, Resumed

__all__ = ["Checkpoints", "Resumed"]
