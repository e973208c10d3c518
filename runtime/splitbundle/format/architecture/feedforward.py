"""The facts of a feed-forward block, and its tensors."""

from __future__ import annotations

from typing import Final

from splitbundle.format.architecture.sizes import MAX_SIZE, Shapes, linear_tensors
from splitbundle.format.fields import Field
from splitbundle.records import record

ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared", "xielu")


@record(frozen=True, slots=True, kw_only=True)
class Mlp:
    """The feed-forward block."""

    gated: bool
    activation: str
    intermediate_size: int
    bias: bool


def parse_mlp(field: Field) -> Mlp:
    """Read the object of a feed-forward block."""
    members = field.members(["gated", "activation", "intermediate_size", "bias"])
    return Mlp(
        gated=members["gated"].boolean(),
        activation=members["activation"].choice(ACTIVATIONS),
        intermediate_size=members["intermediate_size"].integer(1, MAX_SIZE),
        bias=members["bias"].boolean(),
    )


def mlp_tensors(name: str, mlp: Mlp, hidden: int) -> Shapes:
    """Return the tensors of a feed-forward block by name, in order of use.

    Args:
        name: the block's name, such as ``layers.3.mlp``.
        mlp: its facts.
        hidden: the hidden size.
    """
    tensors: Shapes = {}
    for part in ("gate", "up") if mlp.gated else ("up",):
        tensors |= linear_tensors(f"{name}.{part}", mlp.intermediate_size, hidden, mlp.bias)
    if mlp.activation == "xielu":
        tensors |= {f"{name}.activation.{part}": (1,) for part in ("alpha_p", "alpha_n")}
    return tensors | linear_tensors(f"{name}.down", hidden, mlp.intermediate_size, mlp.bias)
