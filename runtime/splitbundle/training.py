"""Train stages with torch: boundaries, frozen parts, losses over micro-batches, tied weights, checkpoints and LoRA.

This module imports torch. ``splitbundle`` alone doesn't.
"""

from __future__ import annotations

from splitbundle.backends.torch.training.checkpoints import Checkpoints, Resumed
from splitbundle.backends.torch.training.helpers import (
    Boundary,
    boundary,
    freeze,
    label_count,
    next_labels,
    sum_tied_gradients,
    tied_gradient,
    token_loss,
)
from splitbundle.backends.torch.training.lora_files import load_lora, merge_adapters, save_lora

__all__ = [
    "Boundary",
    "Checkpoints",
    "Resumed",
    "boundary",
    "freeze",
    "label_count",
    "load_lora",
    "merge_adapters",
    "next_labels",
    "save_lora",
    "sum_tied_gradients",
    "tied_gradient",
    "token_loss",
]
