"""The facts of causal self-attention, and its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from splitbundle.format.architecture.norms import Norm, norm_tensors, parse_norm
from splitbundle.format.architecture.positions import (
    Alibi,
    QueryTemperature,
    Unpositioned,
    parse_attention_position,
    parse_query_temperature,
)
from splitbundle.format.architecture.rotary import Rotary, check_rotary
from splitbundle.format.architecture.sizes import MAX_SIZE, Shapes, linear_tensors
from splitbundle.format.fields import Field
from splitbundle.records import record, types

QUERY_KEY_WIDTHS: Final = ("head", "heads", "full")


@record(frozen=True, slots=True, kw_only=True)
class QueryKeyNorm:
    """Normalization of queries and keys, before or after the rotation.

    ``width`` is "head" if all heads share one weight, "heads" if each head has its own weight, and "full" if the norm
    goes over all heads together.
    """

    norm: Norm
    width: str
    after_rotation: bool


@record(frozen=True, slots=True, kw_only=True)
class OutputGate:
    """A learned factor of what the heads give, before the output projection (Qiu et al. 2025, arXiv:2505.06708)."""

    width: str
    """``"head"`` or ``"channel"``: what has a factor of its own."""
    function: str
    """``"sigmoid"`` or ``"softplus"``."""
    bias: bool
    """Whether each head has a learned number that is added before the function."""


@record(frozen=True, slots=True, kw_only=True)
class Attention:
    """Causal self-attention with ``heads / kv_heads`` query heads for each key head."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool
    output_bias: bool
    clip: float | None
    """Queries, keys and values are clipped to ± this value."""
    query_key_norm: QueryKeyNorm | None
    query_temperature: QueryTemperature | None
    logit_cap: float | None
    """Scores s become cap · tanh(s / cap)."""
    window: int | None
    """A token sees itself and the ``window - 1`` tokens before it; ``None``: all tokens before it."""
    chunk: int | None
    """A token sees only the tokens of its own chunk of ``chunk`` positions; ``None``: there are no chunks."""
    sinks: bool
    """Whether each head has a learned extra score, which takes part in the softmax and has no value."""
    position: Unpositioned | Rotary | Alibi
    output_gate: OutputGate | None = None
    value_dim: int | None = None
    """The channels of a value, if they aren't as many as those of a query and a key."""
    value_multiplier: float | None = None
    """The factor of values."""

    may_be_absent = ("output_gate", "value_dim", "value_multiplier")

    @property
    def value_size(self) -> int:
        """Return the channels of a value."""
        return self.head_dim if self.value_dim is None else self.value_dim


def query_key_shape(norm: QueryKeyNorm, heads: int, head_dim: int) -> tuple[int, ...]:
    """Return the shape of the weight of a query or key norm."""
    return {"head": (head_dim,), "heads": (heads, head_dim), "full": (heads * head_dim,)}[norm.width]


def parse_attention(field: Field) -> Attention:
    """Read the object of an attention."""
    required = [name for name in types(Attention) if name not in Attention.may_be_absent]
    members = field.members(required, Attention.may_be_absent)
    temperature = members["query_temperature"]
    return Attention(
        heads=members["heads"].integer(1, MAX_SIZE),
        kv_heads=members["kv_heads"].integer(1, MAX_SIZE),
        head_dim=members["head_dim"].integer(1, MAX_SIZE),
        scale=members["scale"].positive_number(),
        qkv_bias=members["qkv_bias"].boolean(),
        output_bias=members["output_bias"].boolean(),
        clip=members["clip"].optional_positive_number(),
        query_key_norm=None if members["query_key_norm"].is_null else _query_key_norm(members["query_key_norm"]),
        query_temperature=None if temperature.is_null else parse_query_temperature(temperature),
        logit_cap=members["logit_cap"].optional_positive_number(),
        window=members["window"].optional_integer(1, MAX_SIZE),
        chunk=members["chunk"].optional_integer(1, MAX_SIZE),
        sinks=members["sinks"].boolean(),
        position=parse_attention_position(members["position"]),
        output_gate=_output_gate(members["output_gate"]) if "output_gate" in members else None,
        value_dim=members["value_dim"].integer(1, MAX_SIZE) if "value_dim" in members else None,
        value_multiplier=members["value_multiplier"].positive_number() if "value_multiplier" in members else None,
    )


def _output_gate(field: Field) -> OutputGate:
    members = field.members(["width", "function", "bias"])
    return OutputGate(
        width=members["width"].choice(("head", "channel")),
        function=members["function"].choice(("sigmoid", "softplus")),
        bias=members["bias"].boolean(),
    )


def _query_key_norm(field: Field) -> QueryKeyNorm:
    members = field.members(["norm", "width", "after_rotation"])
    return QueryKeyNorm(
        norm=parse_norm(members["norm"]),
        width=members["width"].choice(QUERY_KEY_WIDTHS),
        after_rotation=members["after_rotation"].boolean(),
    )


def attention_tensors(name: str, attention: Attention, hidden: int) -> Shapes:
    """Return the tensors of an attention by name, in order of use.

    Args:
        name: the attention's name, such as ``layers.3.attention``.
        attention: its facts.
        hidden: the hidden size.
    """
    heads, kv_heads, size = attention.heads, attention.kv_heads, attention.head_dim
    mixed, gate = heads * attention.value_size, attention.output_gate
    tensors: Shapes = {}
    for part, rows in (("query", heads * size), ("key", kv_heads * size), ("value", kv_heads * attention.value_size)):
        tensors |= linear_tensors(f"{name}.{part}", rows, hidden, attention.qkv_bias)
    if attention.query_key_norm is not None:
        for part, number in (("query_norm", heads), ("key_norm", kv_heads)):
            shape = query_key_shape(attention.query_key_norm, number, size)
            tensors |= norm_tensors(f"{name}.{part}", attention.query_key_norm.norm, *shape)
    if attention.sinks:
        tensors[f"{name}.sinks"] = (heads,)
    if gate is not None:
        tensors |= linear_tensors(f"{name}.gate", heads if gate.width == "head" else mixed, hidden, False)
        tensors |= {f"{name}.gate_bias": (heads,)} if gate.bias else {}
    return tensors | linear_tensors(f"{name}.output", hidden, mixed, attention.output_bias)


def check_attention(attention: Attention, at: str, add: Callable[[str, str, object], None]) -> None:
    """Note with ``add`` the fields of the attention at pointer ``at`` that contradict each other."""
    norm = attention.query_key_norm
    if norm is not None and norm.width == "full" and norm.after_rotation:
        add(f"{at}/query_key_norm/after_rotation", "false, as width is full", True)
    if isinstance(attention.position, Alibi) and attention.logit_cap is not None:
        add(f"{at}/logit_cap", "null, as position is alibi", attention.logit_cap)
    if isinstance(attention.position, Alibi) and attention.sinks:
        add(f"{at}/sinks", "false, as position is alibi", attention.sinks)
    if attention.window is not None and attention.chunk is not None:
        add(f"{at}/chunk", "null, as there is a window", attention.chunk)
    if attention.heads % attention.kv_heads:
        add(f"{at}/kv_heads", f"a divisor of heads ({attention.heads})", attention.kv_heads)
    if isinstance(attention.position, Rotary):
        check_rotary(attention.position, attention.head_dim, f"{at}/position", add)
