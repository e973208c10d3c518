"""The facts of positions in the embedding and in attention, and the span of positions that a query sees."""

from __future__ import annotations

from typing import Literal, NamedTuple

from splitbundle.format.architecture.rotary import Rotary, parse_rotary
from splitbundle.format.architecture.sizes import MAX_SIZE
from splitbundle.format.fields import Field
from splitbundle.records import record


@record(frozen=True, slots=True, kw_only=True)
class Unpositioned:
    """No position is used here."""

    kind: Literal["none"] = "none"


@record(frozen=True, slots=True, kw_only=True)
class Learned:
    """A table of ``count`` position vectors. Row p + ``offset`` is added to the token's vector at position p."""

    kind: Literal["learned"] = "learned"
    count: int
    offset: int


@record(frozen=True, slots=True, kw_only=True)
class Sinusoidal:
    """Sines and cosines of position p + ``offset`` (Vaswani et al. 2017, arXiv:1706.03762).

    They are added to the token's vector: all sines first, then all cosines.
    """

    kind: Literal["sinusoidal"] = "sinusoidal"
    offset: int


@record(frozen=True, slots=True, kw_only=True)
class Alibi:
    """Attention with linear biases (Press et al. 2021, arXiv:2108.12409). ``multiplier`` scales each head's slope."""

    kind: Literal["alibi"] = "alibi"
    max_bias: float
    multiplier: float


@record(frozen=True, slots=True, kw_only=True)
class QueryTemperature:
    """Queries at position p are multiplied by 1 + beta · ln(1 + ⌊(p + offset) / original_positions⌋).

    With ``growth`` "power", the factor is (1 + (p + offset) / original_positions) ** beta.
    """

    beta: float
    original_positions: int
    offset: int
    growth: str | None = None

    may_be_absent = ("growth",)


class AttentionSpan(NamedTuple):
    """The window or the chunk of positions that the queries of a layer see."""

    window: int | None
    chunk: int | None

    @property
    def is_whole(self) -> bool:
        """Return whether a query sees every position up to its own, at any length."""
        return self.window is None and self.chunk is None

    def first(self, position: int) -> int:
        """Return the first position that a query at ``position`` sees."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(0, position + 1 - self.window)


def parse_embedding_position(field: Field) -> Unpositioned | Learned | Sinusoidal:
    """Read the object that says how positions enter the embedding."""
    kind = field.kind(("none", "learned", "sinusoidal"))
    if kind == "learned":
        members = field.members(["kind", "count", "offset"])
        return Learned(count=members["count"].integer(1, MAX_SIZE), offset=members["offset"].integer(0, MAX_SIZE))
    if kind == "sinusoidal":
        return Sinusoidal(offset=field.members(["kind", "offset"])["offset"].integer(0, MAX_SIZE))
    if kind == "none":
        field.members(["kind"])
    return Unpositioned()


def parse_query_temperature(field: Field) -> QueryTemperature:
    """Read the object of a query temperature."""
    members = field.members(["beta", "original_positions", "offset"], QueryTemperature.may_be_absent)
    return QueryTemperature(
        beta=members["beta"].positive_number(),
        original_positions=members["original_positions"].integer(1, MAX_SIZE),
        offset=members["offset"].integer(0, MAX_SIZE),
        growth=members["growth"].choice(("power",)) if "growth" in members else None,
    )


def parse_attention_position(field: Field) -> Unpositioned | Rotary | Alibi:
    """Read the object that says how positions enter attention."""
    kind = field.kind(("none", "rotary", "alibi"))
    if kind == "rotary":
        return parse_rotary(field)
    if kind == "alibi":
        members = field.members(["kind", "max_bias", "multiplier"])
        return Alibi(max_bias=members["max_bias"].positive_number(), multiplier=members["multiplier"].positive_number())
    if kind == "none":
        field.members(["kind"])
    return Unpositioned()
