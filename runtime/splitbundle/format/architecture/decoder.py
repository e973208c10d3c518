"""``architecture.json``: what a decoder is, as facts. The equations are in ``spec/v1/decoder.md``.

The records below are the file's fields under the file's names. They are closed: a field that isn't known here would
change numbers without anyone noticing, so it is refused.
"""

from __future__ import annotations

import math
from typing import Any, Final, Literal

from splitbundle.format import strict_json
from splitbundle.records import as_dict, record
from splitbundle.version import ARCHITECTURE_VERSION

FILE: Final = "architecture.json"
MAX_SIZE: Final = 2**31 - 1
"""The largest vocabulary, width or count of heads: a product of two still fits 63 bits."""
MAX_LAYERS: Final = 10_000
"""A hundred times the deepest models; ten times more would take a reader seconds and hundreds of MB to describe."""

NORM_KINDS: Final = ("layer_norm", "rms_norm")
PLACEMENTS: Final = ("pre", "output", "sandwich", "post", "parallel", "parallel_two")
ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared", "xielu")
ROTARY_LAYOUTS: Final = ("half", "interleaved")
QUERY_KEY_WIDTHS: Final = ("head", "heads", "full")


@record(frozen=True, slots=True, kw_only=True)
class Norm:
    """Normalisation over the last dimension."""

    kind: str
    eps: float
    affine: bool
    """Whether there is a weight."""
    weight_offset: float
    """Added to the stored weight: 0, or 1 where the weight is stored as a difference from one."""
    bias: bool


@record(frozen=True, slots=True, kw_only=True)
class Unpositioned:
    """No position enters here."""

    kind: Literal["none"] = "none"


@record(frozen=True, slots=True, kw_only=True)
class Learned:
    """A table of position vectors, added to the token's: position p has row p + ``offset``, and there are ``count``."""

    kind: Literal["learned"] = "learned"
    count: int
    offset: int


@record(frozen=True, slots=True, kw_only=True)
class Sinusoidal:
    """Sines and cosines (Vaswani et al. 2017, arXiv:1706.03762) of position p + ``offset``, added to the token's
    vector: all sines first, then all cosines.
    """

    kind: Literal["sinusoidal"] = "sinusoidal"
    offset: int


@record(frozen=True, slots=True, kw_only=True)
class Unscaled:
    """Rotary frequencies as they are."""

    kind: Literal["none"] = "none"


@record(frozen=True, slots=True, kw_only=True)
class Linear:
    """Every rotary frequency divided by ``factor``."""

    kind: Literal["linear"] = "linear"
    factor: float


@record(frozen=True, slots=True, kw_only=True)
class Llama3:
    """Low rotary frequencies divided by ``factor``, high ones kept, a ramp between."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int


@record(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """The base grows with the length of the row, once that is above ``original_positions`` (NTK-aware scaling)."""

    kind: Literal["dynamic"] = "dynamic"
    factor: float
    original_positions: int


@record(frozen=True, slots=True, kw_only=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over the pairs from kept to divided frequencies."""

    kind: Literal["yarn"] = "yarn"
    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    """Whether the ends of the ramp are whole numbers."""
    attention_factor: float
    """What cosine and sine are multiplied by."""


@record(frozen=True, slots=True, kw_only=True)
class LongRope:
    """LongRoPE (Ding et al. 2024, arXiv:2402.13753): a divisor for each pair, others once a row is longer than
    ``original_positions``.
    """

    kind: Literal["longrope"] = "longrope"
    original_positions: int
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    attention_factor: float
    """What cosine and sine are multiplied by."""


@record(frozen=True, slots=True, kw_only=True)
class Proportional:
    """Only the first ``pairs`` are turned, by frequencies divided by ``factor``."""

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


@record(frozen=True, slots=True, kw_only=True)
class Alibi:
    """Attention with linear biases (Press et al. 2021, arXiv:2108.12409): ``multiplier`` times each head's slope."""

    kind: Literal["alibi"] = "alibi"
    max_bias: float
    multiplier: float


@record(frozen=True, slots=True, kw_only=True)
class QueryKeyNorm:
    """Normalisation of queries and keys: of each head by one weight ("head") or by its own ("heads"), or of all heads
    together ("full"); before the rotation, or after it.
    """

    norm: Norm
    width: str
    after_rotation: bool


@record(frozen=True, slots=True, kw_only=True)
class QueryTemperature:
    """Queries of far positions are made larger: 1 + beta · ln(1 + ⌊(p + offset) / original_positions⌋)."""

    beta: float
    original_positions: int
    offset: int


@record(frozen=True, slots=True, kw_only=True)
class Attention:
    """Causal self-attention with ``heads / kv_heads`` query heads to each key head."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool
    output_bias: bool
    clip: float | None
    """Queries, keys and values are held within ± this."""
    query_key_norm: QueryKeyNorm | None
    query_temperature: QueryTemperature | None
    logit_cap: float | None
    """Scores s become cap · tanh(s / cap)."""
    window: int | None
    """A token sees itself and the ``window - 1`` before it; ``None``: all before it."""
    chunk: int | None
    """A token sees only what is in its own chunk of so many positions; ``None``: there are no chunks."""
    sinks: bool
    """Whether each head has a learned score of nothing, which takes part in the softmax and gives no value."""
    position: Unpositioned | Rotary | Alibi


@record(frozen=True, slots=True, kw_only=True)
class Mlp:
    """The feed-forward block."""

    gated: bool
    activation: str
    intermediate_size: int
    bias: bool


@record(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Everything that layers of one kind have in common."""

    placement: str
    norm: Norm
    residual_multiplier: float
    """What attention and the feed-forward block give is multiplied by, before it is added."""
    attention: Attention
    mlp: Mlp


@record(frozen=True, slots=True, kw_only=True)
class Embedding:
    """How token ids become the first hidden state."""

    token_size: int
    """The width of the token table. If it isn't the hidden size, a projection follows, and one precedes the logits."""
    multiplier: float
    position: Unpositioned | Learned | Sinusoidal
    norm: Norm | None


@record(frozen=True, slots=True, kw_only=True)
class Head:
    """How the last hidden state becomes logits."""

    norm: Norm | None
    tied: bool
    """Whether the projection is the token embedding."""
    bias: bool
    multiplier: float
    """What logits are multiplied by."""
    logit_cap: float | None
    """Logits z become cap · tanh(z / cap), after the multiplier."""


@record(frozen=True, slots=True, kw_only=True)
class Norms:
    """The norms of a layer of some placement, in order of use."""

    before_attention: tuple[str, ...] = ()
    before_mlp: tuple[str, ...] = ()
    """After attention, or before the feed-forward block."""
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
    """The names of a placement's norms."""
    norms = NORMS[placement]
    return (*norms.before_attention, *norms.before_mlp, *norms.after_mlp)


Shapes = dict[str, tuple[int, ...]]


@record(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder. ``layers[i]`` names the kind of global layer ``i``."""

    vocab_size: int
    hidden_size: int
    embedding: Embedding
    layer_kinds: dict[str, LayerKind]
    layers: tuple[str, ...]
    head: Head

    def kind_of(self, layer: int) -> LayerKind:
        """The kind of a global layer."""
        return self.layer_kinds[self.layers[layer]]

    @property
    def position_limit(self) -> int | None:
        """How many positions there are, where the embedding bounds them."""
        position = self.embedding.position
        return position.count if isinstance(position, Learned) else None

    def as_json(self) -> dict[str, Any]:
        """The document, every field written."""
        return {"kind": "decoder", "version": ARCHITECTURE_VERSION, **as_dict(self)}

    def to_bytes(self) -> bytes:
        """The file, in its canonical form."""
        return strict_json.dump(self.as_json())

    # Logical tensors: what the facts imply must be stored, name -> shape, in order of use.

    def embedding_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the embedding unit."""
        embedding, hidden = self.embedding, self.hidden_size
        tensors: Shapes = {"embedding.token.weight": (self.vocab_size, embedding.token_size)}
        if embedding.token_size != hidden:
            tensors |= _linear_tensors("embedding.projection", hidden, embedding.token_size, False)
        if isinstance(embedding.position, Learned):
            tensors["embedding.position.weight"] = (embedding.position.count + embedding.position.offset, hidden)
        return tensors | _norm_tensors("embedding.norm", embedding.norm, hidden)

    def layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer, under their global names."""
        kind, hidden, name = self.kind_of(layer), self.hidden_size, f"layers.{layer}"
        attention, mlp = kind.attention, kind.mlp
        queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        norms = NORMS[kind.placement]
        tensors: Shapes = {}
        for norm in norms.before_attention:
            tensors |= _norm_tensors(f"{name}.{norm}", kind.norm, hidden)
        for part, rows in (("query", queries), ("key", keys), ("value", keys)):
            tensors |= _linear_tensors(f"{name}.attention.{part}", rows, hidden, attention.qkv_bias)
        if attention.query_key_norm is not None:
            for part, heads in (("query_norm", attention.heads), ("key_norm", attention.kv_heads)):
                shape = query_key_shape(attention.query_key_norm, heads, attention.head_dim)
                tensors |= _norm_tensors(f"{name}.attention.{part}", attention.query_key_norm.norm, *shape)
        if attention.sinks:
            tensors[f"{name}.attention.sinks"] = (attention.heads,)
        tensors |= _linear_tensors(f"{name}.attention.output", hidden, queries, attention.output_bias)
        for norm in norms.before_mlp:
            tensors |= _norm_tensors(f"{name}.{norm}", kind.norm, hidden)
        for part in ("gate", "up") if mlp.gated else ("up",):
            tensors |= _linear_tensors(f"{name}.mlp.{part}", mlp.intermediate_size, hidden, mlp.bias)
        if mlp.activation == "xielu":
            tensors |= {f"{name}.mlp.activation.{part}": (1,) for part in ("alpha_p", "alpha_n")}
        tensors |= _linear_tensors(f"{name}.mlp.down", hidden, mlp.intermediate_size, mlp.bias)
        for norm in norms.after_mlp:
            tensors |= _norm_tensors(f"{name}.{norm}", kind.norm, hidden)
        return tensors

    def head_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the head unit. A tied projection belongs to the embedding unit."""
        size, hidden = self.embedding.token_size, self.hidden_size
        tensors = _norm_tensors("head.norm", self.head.norm, hidden)
        if size != hidden:
            tensors |= _linear_tensors("head.narrowing", size, hidden, False)
        if not self.head.tied:
            tensors["head.projection.weight"] = (self.vocab_size, size)
        return tensors | ({"head.projection.bias": (self.vocab_size,)} if self.head.bias else {})

    def units(self) -> tuple[str, ...]:
        """The names of all units, in order of use."""
        return ("embedding", *(self.layer_unit(i) for i in range(len(self.layers))), "head")

    def layer_unit(self, layer: int) -> str:
        """The unit that holds a global layer; the number has as many digits as the last one needs, at least three."""
        return f"layer-{layer:0{max(3, len(str(len(self.layers) - 1)))}d}"

    def tensors_of(self, unit: str) -> dict[str, tuple[int, ...]]:
        """The tensors of a unit."""
        if unit == "embedding":
            return self.embedding_tensors()
        return self.head_tensors() if unit == "head" else self.layer_tensors(int(unit.removeprefix("layer-")))

    def unit_tensors(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """All logical tensors, unit by unit."""
        return {unit: self.tensors_of(unit) for unit in self.units()}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """All logical tensors."""
        return {name: shape for tensors in self.unit_tensors().values() for name, shape in tensors.items()}

    def units_of(self, layers: tuple[int, int], *, embeds: bool, head: bool) -> tuple[str, ...]:
        """The units that a layer range needs, with the embedding and the head where it has them.

        A tied head needs the embedding's unit too: nothing is stored twice.
        """
        first = ("embedding",) if embeds or (head and self.head.tied) else ()
        return (*first, *(self.layer_unit(i) for i in range(*layers)), *(("head",) if head else ()))


def _norm_tensors(name: str, norm: Norm | None, *shape: int) -> Shapes:
    if norm is None:
        return {}
    tensors: Shapes = {f"{name}.weight": shape} if norm.affine else {}
    return tensors | ({f"{name}.bias": shape} if norm.bias else {})


def query_key_shape(norm: QueryKeyNorm, heads: int, head_dim: int) -> tuple[int, ...]:
    """The shape of a query or key norm's weight."""
    return {"head": (head_dim,), "heads": (heads, head_dim), "full": (heads * head_dim,)}[norm.width]


def _linear_tensors(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """The number of parameters of some logical tensors."""
    return sum(math.prod(shape) for shape in shapes.values())
