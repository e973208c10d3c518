"""``architecture.json``: what a decoder is, as facts. The equations are in ``spec/v1/decoder.md``.

The records below are the file's fields under the file's names. They are closed: a field that isn't known here would
change numbers without anyone noticing, so it is refused.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from splitbundle import strict_json
from splitbundle.version import ARCHITECTURE_VERSION

FILE: Final = "architecture.json"
MAX_SIZE: Final = 2**31 - 1
"""The largest vocabulary, width or count of heads: a product of two still fits 63 bits."""
MAX_LAYERS: Final = 10_000
"""A hundred times the deepest models; ten times more would take a reader seconds and hundreds of MB to describe."""

NORM_KINDS: Final = ("layer_norm", "rms_norm")
PLACEMENTS: Final = ("pre",)
ACTIVATIONS: Final = ("silu", "gelu", "gelu_tanh", "relu")
ROTARY_LAYOUTS: Final = ("half",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """Normalisation over the hidden dimension."""

    kind: str
    eps: float
    weight_offset: float
    """Added to the stored weight: 0, or 1 where the weight is stored as a difference from one."""
    bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpositioned:
    """No position enters here."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """A table of ``count`` position vectors, added to the token's."""

    kind: Literal["learned"] = "learned"
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Unscaled:
    """Rotary frequencies as they are."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Every rotary frequency divided by ``factor``."""

    kind: Literal["linear"] = "linear"
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3:
    """Low rotary frequencies divided by ``factor``, high ones kept, a ramp between."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int


Scaling = Unscaled | Linear | Llama3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864) of the first ``dim`` channels of queries and keys."""

    kind: Literal["rotary"] = "rotary"
    base: float
    dim: int
    layout: str
    scaling: Scaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Causal self-attention with ``heads / kv_heads`` query heads to each key head."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool
    output_bias: bool
    window: int | None
    """A token sees itself and the ``window - 1`` before it; ``None``: all before it."""
    position: Unpositioned | Rotary


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """The feed-forward block."""

    gated: bool
    activation: str
    intermediate_size: int
    bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Everything that layers of one kind have in common."""

    placement: str
    norm: Norm
    attention: Attention
    mlp: Mlp


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """How token ids become the first hidden state."""

    multiplier: float
    position: Unpositioned | Learned


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How the last hidden state becomes logits."""

    norm: Norm
    tied: bool
    """Whether the projection is the token embedding."""


@dataclass(frozen=True, slots=True, kw_only=True)
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
        return {"kind": "decoder", "version": ARCHITECTURE_VERSION, **asdict(self)}

    def to_bytes(self) -> bytes:
        """The file, in its canonical form."""
        return strict_json.dump(self.as_json())

    # Logical tensors: what the facts imply must be stored, name -> shape, in order of use.

    def embedding_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the embedding unit."""
        tensors: dict[str, tuple[int, ...]] = {"embedding.token.weight": (self.vocab_size, self.hidden_size)}
        if isinstance(self.embedding.position, Learned):
            tensors["embedding.position.weight"] = (self.embedding.position.count, self.hidden_size)
        return tensors

    def layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer, under their global names."""
        kind, hidden, name = self.kind_of(layer), self.hidden_size, f"layers.{layer}"
        attention, mlp = kind.attention, kind.mlp
        queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        tensors = _norm_tensors(f"{name}.attention_norm", kind.norm, hidden)
        for part, rows in (("query", queries), ("key", keys), ("value", keys)):
            tensors |= _linear_tensors(f"{name}.attention.{part}", rows, hidden, attention.qkv_bias)
        tensors |= _linear_tensors(f"{name}.attention.output", hidden, queries, attention.output_bias)
        tensors |= _norm_tensors(f"{name}.mlp_norm", kind.norm, hidden)
        for part in ("gate", "up") if mlp.gated else ("up",):
            tensors |= _linear_tensors(f"{name}.mlp.{part}", mlp.intermediate_size, hidden, mlp.bias)
        return tensors | _linear_tensors(f"{name}.mlp.down", hidden, mlp.intermediate_size, mlp.bias)

    def head_tensors(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the head unit. A tied projection belongs to the embedding unit."""
        tensors = _norm_tensors("head.norm", self.head.norm, self.hidden_size)
        if not self.head.tied:
            tensors["head.projection.weight"] = (self.vocab_size, self.hidden_size)
        return tensors

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


def _norm_tensors(name: str, norm: Norm, size: int) -> dict[str, tuple[int, ...]]:
    tensors: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,)}
    return tensors | ({f"{name}.bias": (size,)} if norm.bias else {})


def _linear_tensors(name: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """The number of parameters of some logical tensors."""
    return sum(math.prod(shape) for shape in shapes.values())
