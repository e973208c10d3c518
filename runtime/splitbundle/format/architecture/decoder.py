"""``architecture.json``: a decoder, as facts. The equations are in ``spec/v1/decoder.md``.

The records below have the fields of the file under their names. They are closed: an unknown field is refused, as it
could change numbers unnoticed.
"""

from __future__ import annotations

from typing import Any, Final

from splitbundle.format import strict_json
from splitbundle.format.architecture.attention import Attention, attention_tensors
from splitbundle.format.architecture.experts import EXTENSION as EXPERTS
from splitbundle.format.architecture.experts import Experts, experts_tensors
from splitbundle.format.architecture.feedforward import Mlp, mlp_tensors
from splitbundle.format.architecture.norms import NORMS, Norm, norm_tensors
from splitbundle.format.architecture.positions import Learned, Sinusoidal, Unpositioned
from splitbundle.format.architecture.rotary import Rotary
from splitbundle.format.architecture.sizes import Shapes, linear_tensors
from splitbundle.records import as_dict, record
from splitbundle.version import ARCHITECTURE_VERSION

FILE: Final = "architecture.json"
RESIDUAL_SCALES: Final = "residual_scales"
QUERY_GROWTH: Final = "query_growth"
ROTARY_DIRECTION: Final = "rotary_direction"
EXTENSIONS: Final = (EXPERTS, *Attention.may_be_absent, RESIDUAL_SCALES, QUERY_GROWTH, ROTARY_DIRECTION)
"""The names in ``requires`` of bundles with fields that the first readers don't know."""


@record(frozen=True, slots=True, kw_only=True)
class ResidualScale:
    """The factors of a sum: of the residual stream, and of what is added to it."""

    kept: float
    added: float


@record(frozen=True, slots=True, kw_only=True)
class ResidualScales:
    """The factors of a layer's two sums. Without them, both are plain."""

    attention: ResidualScale
    mlp: ResidualScale


@record(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """The facts that all layers of one kind share."""

    placement: str
    norm: Norm
    residual_multiplier: float
    """The factor of the outputs of attention and the feed-forward block, before they are added."""
    attention: Attention
    mlp: Mlp | Experts
    residual_scales: ResidualScales | None = None

    may_be_absent = ("residual_scales",)


@record(frozen=True, slots=True, kw_only=True)
class Embedding:
    """The step from token ids to the first hidden state."""

    token_size: int
    """The width of the token table. If it isn't the hidden size, one projection follows it, and another precedes
    the logits."""
    multiplier: float
    position: Unpositioned | Learned | Sinusoidal
    norm: Norm | None


@record(frozen=True, slots=True, kw_only=True)
class Head:
    """The step from the last hidden state to logits."""

    norm: Norm | None
    tied: bool
    """Whether the projection is the token embedding."""
    bias: bool
    multiplier: float
    """The factor of the logits."""
    logit_cap: float | None
    """Logits z become cap · tanh(z / cap), after the multiplier."""


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
        """Return the kind of a global layer."""
        return self.layer_kinds[self.layers[layer]]

    @property
    def extensions(self) -> tuple[str, ...]:
        """Return what a reader must understand beside the fields of the first readers: names for ``requires``."""
        found = set()
        for kind in self.layer_kinds.values():
            temperature, position = kind.attention.query_temperature, kind.attention.position
            found |= {EXPERTS} if isinstance(kind.mlp, Experts) else set()
            found |= {name for name in Attention.may_be_absent if getattr(kind.attention, name) is not None}
            found |= {RESIDUAL_SCALES} if kind.residual_scales is not None else set()
            found |= {QUERY_GROWTH} if temperature is not None and temperature.growth is not None else set()
            found |= {ROTARY_DIRECTION} if isinstance(position, Rotary) and position.direction is not None else set()
        return tuple(name for name in EXTENSIONS if name in found)

    @property
    def position_limit(self) -> int | None:
        """Return the number of positions if the embedding bounds it, or None."""
        position = self.embedding.position
        return position.count if isinstance(position, Learned) else None

    def as_json(self) -> dict[str, Any]:
        """Return the document with every field."""
        return {"kind": "decoder", "version": ARCHITECTURE_VERSION, **as_dict(self)}

    def to_bytes(self) -> bytes:
        """Return the bytes of the file in its canonical form."""
        return strict_json.dump(self.as_json())

    # Logical tensors that the facts imply: name -> shape, in order of use.

    def embedding_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of the embedding unit."""
        embedding, hidden = self.embedding, self.hidden_size
        tensors: Shapes = {"embedding.token.weight": (self.vocab_size, embedding.token_size)}
        if embedding.token_size != hidden:
            tensors |= linear_tensors("embedding.projection", hidden, embedding.token_size, False)
        if isinstance(embedding.position, Learned):
            tensors["embedding.position.weight"] = (embedding.position.count + embedding.position.offset, hidden)
        return tensors | norm_tensors("embedding.norm", embedding.norm, hidden)

    def layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the tensors of one layer, under their global names."""
        kind, hidden, name = self.kind_of(layer), self.hidden_size, f"layers.{layer}"
        norms = NORMS[kind.placement]

        def norm_of(names: tuple[str, ...]) -> Shapes:
            return {
                n: shape for norm in names for n, shape in norm_tensors(f"{name}.{norm}", kind.norm, hidden).items()
            }

        return {
            **norm_of(norms.before_attention),
            **attention_tensors(f"{name}.attention", kind.attention, hidden),
            **norm_of(norms.before_mlp),
            **(
                experts_tensors(f"{name}.mlp", kind.mlp, hidden)
                if isinstance(kind.mlp, Experts)
                else mlp_tensors(f"{name}.mlp", kind.mlp, hidden)
            ),
            **norm_of(norms.after_mlp),
        }

    def head_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors of the head unit. A tied projection belongs to the embedding unit."""
        size, hidden = self.embedding.token_size, self.hidden_size
        tensors = norm_tensors("head.norm", self.head.norm, hidden)
        if size != hidden:
            tensors |= linear_tensors("head.narrowing", size, hidden, False)
        if not self.head.tied:
            tensors["head.projection.weight"] = (self.vocab_size, size)
        return tensors | ({"head.projection.bias": (self.vocab_size,)} if self.head.bias else {})

    def units(self) -> tuple[str, ...]:
        """Return the names of all units, in order of use."""
        return ("embedding", *(self.layer_unit(i) for i in range(len(self.layers))), "head")

    def layer_unit(self, layer: int) -> str:
        """Return the unit of a global layer. Its number has as many digits as the last one needs, at least three."""
        return f"layer-{layer:0{max(3, len(str(len(self.layers) - 1)))}d}"

    def tensors_of(self, unit: str) -> dict[str, tuple[int, ...]]:
        """Return the tensors of a unit."""
        if unit == "embedding":
            return self.embedding_tensors()
        return self.head_tensors() if unit == "head" else self.layer_tensors(int(unit.removeprefix("layer-")))

    def unit_tensors(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return all logical tensors, unit by unit."""
        return {unit: self.tensors_of(unit) for unit in self.units()}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return all logical tensors."""
        return {name: shape for tensors in self.unit_tensors().values() for name, shape in tensors.items()}

    def units_of(self, layers: tuple[int, int], *, embeds: bool, head: bool) -> tuple[str, ...]:
        """Return the units that a range of layers needs, with the embedding and the head if the range has them.

        A tied head needs the unit of the embedding too, as no tensor is stored twice.
        """
        first = ("embedding",) if embeds or (head and self.head.tied) else ()
        return (*first, *(self.layer_unit(i) for i in range(*layers)), *(("head",) if head else ()))
