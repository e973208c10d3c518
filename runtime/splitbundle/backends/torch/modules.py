"""The small modules that the others consist of: linear layers and tables that start without weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from splitbundle.backends.torch.kernels import linear


class Linear(nn.Linear):
    """An ``nn.Linear`` that starts without weights. A stage maps them in."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias, device="meta")

    def reset_parameters(self) -> None:
        """Do nothing: the meta device holds no values to initialize."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b. *Shape:* (…, inputs) -> (…, outputs)."""
        return linear(x, self.weight, self.bias)


def is_plain(layer: nn.Module) -> bool:
    """Return False for a replaced or hooked layer (LoRA adapters do this), which must be called as a module."""
    return is_own(layer) and not has_global_hooks()


def is_own(layer: nn.Module, kind: type[nn.Module] = Linear) -> bool:
    """Return False for a layer that was replaced or compiled, and for one with hooks of its own."""
    own, hooks = layer.__dict__, layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is kind and not (hooks or "forward" in own or "_compiled_call_impl" in own)


def has_global_hooks() -> bool:
    """Return whether every module has hooks."""
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


class Table(nn.Embedding):
    """An ``nn.Embedding`` that starts without weights. A stage maps them in."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(rows, width, device="meta")

    def reset_parameters(self) -> None:
        """Do nothing: the meta device holds no values to initialize."""


def through(step: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    """Return ``step(x)``, or x if there is no step."""
    return x if step is None else step(x)
