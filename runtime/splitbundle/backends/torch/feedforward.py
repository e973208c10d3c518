"""The feed-forward block and its activations. The equations are in ``spec/v1/decoder.md``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitbundle.backends.torch.joint import NOTHING
from splitbundle.backends.torch.kernels import can_fuse, linear_activation, linear_times
from splitbundle.backends.torch.modules import Linear, is_plain
from splitbundle.format.architecture import feedforward as facts

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
}


class Xielu(nn.Module):
    """xIELU (Huang & Schlag 2024, arXiv:2411.13010). Its two slopes are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.empty(1, device="meta"))
        self.alpha_n = nn.Parameter(torch.empty(1, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation. *Shape:* any -> the same."""
        above = functional.softplus(self.alpha_p) * x * x
        below = (torch.expm1(x.clamp(max=-1e-6)) - x) * (0.5 + functional.softplus(self.alpha_n))
        return torch.where(x > 0, above, below) + 0.5 * x


class Mlp(nn.Module):
    """The feed-forward block, with a gate (Shazeer 2020, arXiv:2002.05202) or without one."""

    def __init__(self, mlp: facts.Mlp, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(hidden, mlp.intermediate_size, bias=mlp.bias) if mlp.gated else None
        self.up = Linear(hidden, mlp.intermediate_size, bias=mlp.bias)
        self.down = Linear(mlp.intermediate_size, hidden, bias=mlp.bias)
        self.name = mlp.activation
        self.joint = NOTHING
        self.activation = Xielu() if mlp.activation == "xielu" else ACTIVATIONS[mlp.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block. *Shape:* (batch, sequence, hidden) -> the same."""
        if self.gate is None:
            return self.down(self._activated(x, self.up))  # type: ignore[no-any-return]
        joint = self.joint.product(x, self, unless_fused=True)
        if joint is not None:
            gate, other = joint.chunk(2, dim=-1)
            return self.down(self.activation(gate) * other)  # type: ignore[no-any-return]
        gate, up = self._activated(x, self.gate), self.up
        both = linear_times(x, up.weight, up.bias, gate) if can_fuse(x) and is_plain(up) else None
        return self.down(gate * up(x) if both is None else both)  # type: ignore[no-any-return]

    def _activated(self, x: Tensor, layer: Linear) -> Tensor:
        own = self.activation is ACTIVATIONS.get(self.name)  # False if the user replaced it
        both = (
            linear_activation(x, layer.weight, layer.bias, self.name)
            if own and can_fuse(x) and is_plain(layer)
            else None
        )
        return self.activation(layer(x)) if both is None else both
