"""The facts of rotary positions, and of the scaling of their frequencies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

from splitbundle.format.architecture.sizes import MAX_SIZE
from splitbundle.format.fields import Field
from splitbundle.records import record, types

ROTARY_LAYOUTS: Final = ("half", "interleaved")


@record(frozen=True, slots=True, kw_only=True)
class Unscaled:
    """Rotary frequencies without scaling."""

    kind: Literal["none"] = "none"


@record(frozen=True, slots=True, kw_only=True)
class Linear:
    """Every rotary frequency is divided by ``factor``."""

    kind: Literal["linear"] = "linear"
    factor: float


@record(frozen=True, slots=True, kw_only=True)
class Llama3:
    """Low rotary frequencies are divided by ``factor``, high ones are kept, and a ramp joins the two."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int


@record(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """The base grows with the length of a row that is longer than ``original_positions`` (NTK-aware scaling)."""

    kind: Literal["dynamic"] = "dynamic"
    factor: float
    original_positions: int


@record(frozen=True, slots=True, kw_only=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over the pairs, from kept frequencies to divided ones."""

    kind: Literal["yarn"] = "yarn"
    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    """Whether the ends of the ramp are rounded to integers."""
    attention_factor: float
    """The factor of cosine and sine."""


@record(frozen=True, slots=True, kw_only=True)
class LongRope:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): each pair's frequency has its own divisor.

    The divisors are ``short_factors``, or ``long_factors`` if the row is longer than ``original_positions``.
    """

    kind: Literal["longrope"] = "longrope"
    original_positions: int
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    attention_factor: float
    """The factor of cosine and sine."""


@record(frozen=True, slots=True, kw_only=True)
class Proportional:
    """Only the first ``pairs`` pairs are rotated, with frequencies divided by ``factor``."""

    kind: Literal["proportional"] = "proportional"
    factor: float
    pairs: int


Scaling = Unscaled | Linear | Llama3 | Dynamic | Yarn | LongRope | Proportional
SCALINGS: Final[dict[str, type[Any]]] = {
    "none": Unscaled,
    "linear": Linear,
    "llama3": Llama3,
    "dynamic": Dynamic,
    "yarn": Yarn,
    "longrope": LongRope,
    "proportional": Proportional,
}


@record(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of the first ``dim`` channels of queries and keys."""

    kind: Literal["rotary"] = "rotary"
    base: float
    dim: int
    layout: str
    scaling: Scaling
    direction: str | None = None
    """``"backward"`` if pairs are rotated by the negative angle."""

    may_be_absent = ("direction",)


def parse_rotary(field: Field) -> Rotary:
    """Read the object of a rotary position."""
    members = field.members(["kind", "base", "dim", "layout", "scaling"], Rotary.may_be_absent)
    return Rotary(
        base=members["base"].positive_number(),
        dim=members["dim"].integer(2, MAX_SIZE),
        layout=members["layout"].choice(ROTARY_LAYOUTS),
        scaling=_scaling(members["scaling"]),
        direction=members["direction"].choice(("backward",)) if "direction" in members else None,
    )


def _scaling(field: Field) -> Scaling:
    """Read a scaling. Its members have the types of its record's fields."""
    kind = field.kind(tuple(SCALINGS))
    if kind is None:
        return Unscaled()
    scaling_class = SCALINGS[kind]
    members = field.members(types(scaling_class))
    values: dict[str, Any] = {}
    for name, written in types(scaling_class).items():
        item = members[name]
        if written == "float":
            values[name] = item.positive_number()
        elif written == "int":
            values[name] = item.integer(1, MAX_SIZE)
        elif written == "bool":
            values[name] = item.boolean()
        elif written == "tuple[float, ...]":
            values[name] = tuple(each.positive_number() for each in item.items(minimum=1))
    scaling: Scaling = scaling_class(**values)
    return scaling


def check_rotary(rotary: Rotary, head_dim: int, at: str, add: Callable[[str, str, object], None]) -> None:
    """Note with ``add`` the fields of the rotary position at pointer ``at`` that contradict each other."""
    scaling = rotary.scaling
    if rotary.dim % 2 or rotary.dim > head_dim:
        add(f"{at}/dim", f"an even number up to head_dim ({head_dim})", rotary.dim)
    if isinstance(scaling, Llama3) and not scaling.low_frequency_factor < scaling.high_frequency_factor:
        expected = f"more than low_frequency_factor ({scaling.low_frequency_factor})"
        add(f"{at}/scaling/high_frequency_factor", expected, scaling.high_frequency_factor)
    if isinstance(scaling, Yarn) and not rotary.base > 1:
        add(f"{at}/base", "more than 1, as scaling is yarn", rotary.base)
    if isinstance(scaling, Yarn) and not scaling.beta_slow < scaling.beta_fast:
        add(f"{at}/scaling/beta_fast", f"more than beta_slow ({scaling.beta_slow})", scaling.beta_fast)
    if isinstance(scaling, Dynamic) and rotary.dim < 4:
        add(f"{at}/dim", "at least 4, as scaling is dynamic", rotary.dim)
    if isinstance(scaling, Proportional) and scaling.pairs > rotary.dim // 2:
        add(f"{at}/scaling/pairs", f"at most dim / 2 ({rotary.dim // 2})", scaling.pairs)
    if isinstance(scaling, LongRope):
        for name in ("short_factors", "long_factors"):
            factors = getattr(scaling, name)
            if len(factors) != rotary.dim // 2:
                add(f"{at}/scaling/{name}", f"dim / 2 ({rotary.dim // 2}) numbers", f"{len(factors)} numbers")
