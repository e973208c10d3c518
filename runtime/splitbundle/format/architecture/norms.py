"""The norms of a decoder, and their places in a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from splitbundle.format.architecture.sizes import Shapes
from splitbundle.format.fields import Field
from splitbundle.records import record

NORM_KINDS: Final = ("layer_norm", "rms_norm")
PLACEMENTS: Final = ("pre", "output", "sandwich", "post", "parallel", "parallel_two")


@record(frozen=True, slots=True, kw_only=True)
class Norm:
    """Normalization over the last dimension."""

    kind: str
    eps: float
    affine: bool
    """Whether there is a weight."""
    weight_offset: float
    """The number that is added to the stored weight: 0, or 1 if the weight is stored as a difference from one."""
    bias: bool


@record(frozen=True, slots=True, kw_only=True)
class Norms:
    """The norms of a layer of one placement, in order of use."""

    before_attention: tuple[str, ...] = ()
    before_mlp: tuple[str, ...] = ()
    """The norms after attention or before the feed-forward block."""
    after_mlp: tuple[str, ...] = ()


NORMS: Final = {
    "pre": Norms(before_attention=("attention_norm",), before_mlp=("mlp_norm",)),
    "output": Norms(before_mlp=("attention_norm",), after_mlp=("mlp_norm",)),
    "post": Norms(before_mlp=("attention_norm",), after_mlp=("mlp_norm",)),
    "sandwich": Norms(
        before_attention=("attention_norm",),
        before_mlp=("attention_output_norm", "mlp_norm"),
        after_mlp=("mlp_output_norm",),
    ),
    "parallel": Norms(before_attention=("attention_norm",)),
    "parallel_two": Norms(before_attention=("attention_norm", "mlp_norm")),
}
"""Placement -> the names of its norms."""


def norm_names(placement: str) -> tuple[str, ...]:
    """Return the names of the norms of a placement."""
    norms = NORMS[placement]
    return (*norms.before_attention, *norms.before_mlp, *norms.after_mlp)


def norm_tensors(name: str, norm: Norm | None, *shape: int) -> Shapes:
    """Return the tensors of a norm by name; an empty dict for None."""
    if norm is None:
        return {}
    tensors: Shapes = {f"{name}.weight": shape} if norm.affine else {}
    return tensors | ({f"{name}.bias": shape} if norm.bias else {})


def parse_norm(field: Field) -> Norm:
    """Read the object of a norm."""
    members = field.members(["kind", "eps", "affine", "weight_offset", "bias"])
    return Norm(
        kind=members["kind"].choice(NORM_KINDS),
        eps=members["eps"].positive_number(),
        affine=members["affine"].boolean(),
        weight_offset=members["weight_offset"].number((0.0, 1.0)),
        bias=members["bias"].boolean(),
    )


def parse_optional_norm(field: Field) -> Norm | None:
    """Read the object of a norm, or null."""
    return None if field.is_null else parse_norm(field)


def check_norm(norm: Norm | None, at: str, add: Callable[[str, str, object], None]) -> None:
    """Note with ``add`` the fields of the norm at pointer ``at`` that contradict each other."""
    if norm is not None and norm.kind == "rms_norm" and norm.bias:
        add(f"{at}/bias", "false, as kind is rms_norm", norm.bias)
    if norm is not None and not norm.affine and (norm.bias or norm.weight_offset):
        add(f"{at}/affine", "true, as there is a bias or an offset", norm.affine)
