"""Train stages with torch: boundaries, frozen parts, losses over micro-batches, tied weights, checkpoints and LoRA.

The first use of a name imports torch.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

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

_MODULES = {
    "checkpoints": ("Checkpoints", "Resumed"),
    "lora_files": ("load_lora", "merge_adapters", "save_lora"),
}
"""A module -> the names that it defines. The helpers define the others."""


if not TYPE_CHECKING:  # otherwise a type checker would accept every name

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from splitbundle.backends import registry

        module = next((module for module, own in _MODULES.items() if name in own), "helpers")
        found = globals()[name] = getattr(registry.module("torch", f"training.{module}"), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
