"""The facts of a family: where a configuration has each fact of a decoder, and how to read it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias, TypeVar

from splitbundle.format.architecture.attention import Attention, OutputGate, QueryKeyNorm
from splitbundle.format.architecture.decoder import Architecture, Embedding, Head, LayerKind, ResidualScales
from splitbundle.format.architecture.experts import Experts
from splitbundle.format.architecture.feedforward import Mlp
from splitbundle.format.architecture.norms import Norm
from splitbundle.format.architecture.positions import Alibi, Learned, QueryTemperature, Sinusoidal, Unpositioned
from splitbundle.format.architecture.rotary import Rotary
from splitbundle.format.architecture.sizes import MAX_LAYERS
from splitbundle_converter.families.config_reader import ConfigReader
from splitbundle_converter.families.experts import ExpertFacts
from splitbundle_converter.families.rotary import rotary

ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "xielu": "xielu",
}
"""A transformers name of an activation -> our name. Some names mean the same function, computed differently."""
LAYER_TYPES: Final = ("full_attention", "sliding_attention")
TORCH_EPS: Final = 1e-5
"""The default value that ``torch.nn.LayerNorm`` adds to the variance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The configuration and the sizes of a model. They are read before the other facts."""

    config: ConfigReader
    hidden: int
    heads: int
    head_dim: int
    layers: int


T = TypeVar("T")
Fact: TypeAlias = T | Callable[[Sizes], T]
PerLayer: TypeAlias = Fact[T | list[T]]
Position: TypeAlias = Rotary | Alibi | None
"""A position of attention. None means that attention uses no position."""


def rms_norm(eps: str, *, weight_offset: float = 0.0) -> Callable[[ConfigReader], Norm]:
    """Return a reader of an RMSNorm with a weight. ``eps`` is the name of a field."""
    return lambda config: Norm(
        kind="rms_norm", eps=config.number(eps), affine=True, weight_offset=weight_offset, bias=False
    )


def layer_norm(
    eps: str | float, *, affine: bool | str = True, bias: bool = True, weight_offset: float = 0.0
) -> Callable[[ConfigReader], Norm]:
    """Return a reader of a LayerNorm, by default with weight and bias. ``eps`` and ``affine`` are values or fields."""

    def read(config: ConfigReader) -> Norm:
        weight = config.boolean(affine) if isinstance(affine, str) else affine
        number = config.number(eps) if isinstance(eps, str) else eps
        return Norm(kind="layer_norm", eps=number, affine=weight, weight_offset=weight_offset, bias=bias and weight)

    return read


def rotary_positions(layout: str = "half", *, partial: bool = False) -> Callable[[Sizes], Rotary]:
    """Return a reader of rotary positions. The arguments are those of ``rotary``."""
    return lambda sizes: rotary(sizes.config, sizes.head_dim, layout=layout, partial=partial)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The facts of a decoder. A fact is a value, the name of a configuration field, or a function.

    A string is the name of a field. But for the facts ``placement`` and ``query_key_norm``, a string is the value. A
    function gets the sizes, which include the configuration. A fact of attention may be a list with a value for each
    layer. By default, the fields have Llama's names.
    """

    ignored: frozenset[str] = frozenset()
    """Names of fields that change no number."""
    allowed: Mapping[str, object] = field(default_factory=dict)
    """The name of a field -> the only value that it may have, or a tuple of such values. The field may be absent."""
    required: tuple[str, ...] = ()
    """Fields that transformers needs. The converter could read a configuration without them, but transformers fails."""

    # The sizes are always names of fields, because messages quote these names.
    hidden: str = "hidden_size"
    heads: str = "num_attention_heads"
    layer_heads: Callable[[Sizes], list[int]] | None = None
    """Reads the number of heads of each layer, if layers differ."""
    layers: str = "num_hidden_layers"
    head_dim: str | None = "head_dim"
    """Without this field, or if it is null, the hidden size is divided among the heads."""

    norm: Callable[[ConfigReader], Norm]
    """Reads the norm that the model uses in all places."""
    placement: Fact[str] = "pre"
    residual_multiplier: Fact[float] | str = 1.0
    residual_scales: Callable[[int], ResidualScales] | None = None
    """Returns the factors of the sums of a layer."""
    bias: PerLayer[bool] | str = False
    """Whether the projections of a layer have a bias. ``qkv_bias``, ``output_bias`` and ``mlp_bias`` override it."""

    # Attention.
    kv_heads: PerLayer[int] | str | None = "num_key_value_heads"
    """None means as many key heads as query heads."""
    scale: PerLayer[float | None] | str = None
    """The scale of the scores. None means 1/√head_dim."""
    qkv_bias: PerLayer[bool] | str | None = None
    output_bias: PerLayer[bool] | str | None = None
    clip: Fact[float | None] | str = None
    query_key_norm: PerLayer[str | None] = None
    """The width of the norm of queries and keys, or None if they have no norm."""
    query_key_affine: bool = True
    """Whether the norm of queries and keys has weights, if the model's norms have weights."""
    query_key_bias: bool = True
    """Whether the norm of queries and keys has biases, if the model's norms have biases."""
    after_rotation: bool = False
    """Whether the norm of queries and keys is applied after the rotation."""
    query_temperature: PerLayer[QueryTemperature | None] = None
    logit_cap: Fact[float | None] | str = None
    window: PerLayer[int | None] = None
    chunk: PerLayer[int | None] = None
    sinks: PerLayer[bool] = False
    output_gate: Fact[OutputGate | None] = None
    value_dim: str | None = None
    """The field with the channels of a value, if they aren't ``head_dim``."""
    value_multiplier: Fact[float | None] | str = None
    position: PerLayer[Position] = None

    # The feed-forward block.
    gated: bool = True
    activation: Fact[str] = "hidden_act"
    inner: Fact[int] | str = "intermediate_size"
    mlp_bias: bool | str | None = None
    experts: ExpertFacts | None = None
    """The facts of a mixture of experts, which some or all layers have in place of the feed-forward block."""

    # The embedding and the head.
    embedding_size: str | None = None
    """The field with the width of the token table, if this is not the hidden size."""
    embedding_multiplier: Fact[float] | str = 1.0
    embedding_position: Fact[Learned | Sinusoidal | None] = None
    embedding_norm: bool = False
    head_norm: Fact[bool] = True
    head_bias: bool | str = False
    head_multiplier: Fact[float] | str = 1.0
    head_logit_cap: Fact[float | None] | str = None

    def replace(self, **changes: Any) -> Facts:
        """Return the facts with ``changes``. Items of ``ignored`` and ``allowed`` are added to the present ones."""
        ignored, allowed = frozenset(changes.pop("ignored", ())), changes.pop("allowed", {})
        return replace(self, ignored=self.ignored | ignored, allowed={**self.allowed, **allowed}, **changes)

    def __call__(self, config: ConfigReader) -> Architecture:
        """Return the architecture that a configuration describes. The reader notes the problems."""
        config.ignored(self.ignored)
        for name, values in self.allowed.items():
            config.allowed(name, *(values if isinstance(values, tuple) else (values,)))
        for name in self.required:
            config.integer(name)
        sizes = self._sizes(config)
        norm = self.norm(config)
        mlp = Mlp(
            gated=self.gated,
            activation=_read(self.activation, sizes, lambda name: config.choice(name, ACTIVATIONS)),
            intermediate_size=_read(self.inner, sizes, config.integer),
            bias=self._bias(self.mlp_bias, sizes),
        )
        placement = _read(self.placement, sizes)
        residual_multiplier = _read(self.residual_multiplier, sizes, config.number)
        attention = self._attention(sizes, norm)
        blocks = [mlp] * sizes.layers if self.experts is None else self.experts.read(config, mlp, sizes.layers)

        def layer(index: int) -> LayerKind:
            own = {name: fact[index] if isinstance(fact, list) else fact for name, fact in attention.items()}
            own["position"] = own["position"] or Unpositioned()
            return LayerKind(
                placement=placement,
                norm=norm,
                residual_multiplier=residual_multiplier,
                attention=Attention(head_dim=sizes.head_dim, **own),
                mlp=blocks[index],
                residual_scales=None if self.residual_scales is None else self.residual_scales(index),
            )

        kinds, layers = _name([layer(index) for index in range(sizes.layers)])
        return Architecture(
            vocab_size=config.integer("vocab_size"),
            hidden_size=sizes.hidden,
            embedding=Embedding(
                token_size=sizes.hidden if self.embedding_size is None else config.integer(self.embedding_size),
                multiplier=_read(self.embedding_multiplier, sizes, config.number),
                position=_read(self.embedding_position, sizes) or Unpositioned(),
                norm=norm if self.embedding_norm else None,
            ),
            layer_kinds=kinds,
            layers=layers,
            head=Head(
                norm=norm if _read(self.head_norm, sizes) else None,
                tied=config.boolean("tie_word_embeddings"),
                bias=_read(self.head_bias, sizes, config.boolean),
                multiplier=_read(self.head_multiplier, sizes, config.number),
                logit_cap=_read(self.head_logit_cap, sizes, config.optional_number),
            ),
        )

    def _sizes(self, config: ConfigReader) -> Sizes:
        hidden, heads = config.integer(self.hidden), config.integer(self.heads)
        if self.head_dim is not None and config.raw(self.head_dim) is not None:
            head_dim = config.integer(self.head_dim)
        else:
            head_dim = max(1, hidden // heads)
            if hidden % heads:
                config.refuse(self.hidden, f"a multiple of {self.heads} ({heads})")
        layers = config.integer(self.layers, maximum=MAX_LAYERS)  # the limit bounds the lists that have this length
        return Sizes(config=config, hidden=hidden, heads=heads, head_dim=head_dim, layers=layers)

    def _attention(self, sizes: Sizes, norm: Norm) -> dict[str, Any]:
        """Return the fields of ``Attention`` that are not sizes. A list has one item for each layer."""
        config = sizes.config
        heads = sizes.heads if self.layer_heads is None else self.layer_heads(sizes)
        kv_heads = _read(self.kv_heads, sizes, config.integer)
        if isinstance(self.kv_heads, str) and (wrong := [h for h in _each(heads) if h % kv_heads]):
            config.refuse(self.kv_heads, f"a divisor of {self.heads} ({wrong[0]})")
        value_dim = None if self.value_dim is None else config.integer(self.value_dim)
        scale, widths = _read(self.scale, sizes, config.number), _read(self.query_key_norm, sizes)
        plain = Norm(kind=norm.kind, eps=norm.eps, affine=False, weight_offset=0.0, bias=False)

        def own_norm(width: str | None) -> QueryKeyNorm | None:
            if width is None:
                return None
            own = replace(norm, bias=norm.bias and self.query_key_bias) if self.query_key_affine else plain
            return QueryKeyNorm(norm=own, width=width, after_rotation=self.after_rotation)

        return {
            "heads": heads,
            "kv_heads": sizes.heads if kv_heads is None else kv_heads,
            "scale": sizes.head_dim**-0.5 if scale is None else scale,
            "qkv_bias": self._bias(self.qkv_bias, sizes),
            "output_bias": self._bias(self.output_bias, sizes),
            "clip": _read(self.clip, sizes, config.optional_number),
            "query_key_norm": [own_norm(each) for each in widths] if isinstance(widths, list) else own_norm(widths),
            "query_temperature": _read(self.query_temperature, sizes),
            "logit_cap": _read(self.logit_cap, sizes, config.optional_number),
            "window": _read(self.window, sizes),
            "chunk": _read(self.chunk, sizes),
            "sinks": _read(self.sinks, sizes),
            "position": _read(self.position, sizes),
            "output_gate": _read(self.output_gate, sizes),
            "value_dim": None if value_dim == sizes.head_dim else value_dim,
            "value_multiplier": _unless_one(_read(self.value_multiplier, sizes, config.optional_number)),
        }

    def _bias(self, fact: Any, sizes: Sizes) -> Any:
        return _read(self.bias if fact is None else fact, sizes, sizes.config.boolean)


def _read(fact: Any, sizes: Sizes, of_field: Callable[[str], Any] = str) -> Any:
    """Return the value of a fact. ``of_field`` reads the field that a string names, or returns the string itself."""
    if callable(fact):
        return fact(sizes)
    return of_field(fact) if isinstance(fact, str) else fact


def _each(fact: int | list[int]) -> list[int]:
    return fact if isinstance(fact, list) else [fact]


def _unless_one(factor: float | None) -> float | None:
    return None if factor == 1 else factor


def _name(layers: list[LayerKind]) -> tuple[dict[str, LayerKind], tuple[str, ...]]:
    """Return the different kinds of layers by name, and the name of each layer's kind. Equal layers share a kind.

    A kind is named after its attention: full or sliding, with or without positions. If there are dense layers too, a
    kind with experts is named so.
    """
    mixed = len({type(kind.mlp) for kind in layers}) > 1
    turned = any(not isinstance(kind.attention.position, Unpositioned) for kind in layers)
    kinds: dict[str, LayerKind] = {}
    order: list[str] = []
    for kind in layers:
        stem = "full" if kind.attention.window is None else "sliding"
        if turned and isinstance(kind.attention.position, Unpositioned):
            stem += "_unpositioned"
        if mixed and isinstance(kind.mlp, Experts):
            stem += "_experts"
        name, number = stem, 1
        while kinds.setdefault(name, kind) != kind:
            number += 1
            name = f"{stem}_{number}"
        order.append(name)
    return kinds, tuple(order)


# Readers of facts that several families share.


def either(name: str, yes: T, no: T) -> Callable[[Sizes], T]:
    """Return a reader that selects one of two values by a boolean field."""
    return lambda sizes: yes if sizes.config.boolean(name) else no


def four_times_hidden(name: str | None = None) -> Callable[[Sizes], int]:
    """Return a reader of the width of a feed-forward block: a field, or 4 × hidden if it is absent or null."""
    return lambda sizes: (
        4 * sizes.hidden if name is None or sizes.config.raw(name) is None else sizes.config.integer(name)
    )


def root_of_hidden(sizes: Sizes) -> float:
    """Return √hidden, the multiplier of some embeddings."""
    return float(sizes.hidden**0.5)


def learned(count: str, *, offset: int = 0) -> Callable[[Sizes], Learned]:
    """Return a reader of a learned table of positions. ``count`` is the name of a field."""
    return lambda sizes: Learned(count=sizes.config.integer(count), offset=offset)


def one_window(sizes: Sizes) -> int | None:
    """Return the window of all layers, or None if they have no window."""
    return None if sizes.config.raw("sliding_window") is None else sizes.config.integer("sliding_window")


def layer_types(sizes: Sizes) -> list[str]:
    """Return the attention type of each layer."""
    config, types = sizes.config, sizes.config.raw("layer_types")
    if not isinstance(types, list) or not all(kind in LAYER_TYPES for kind in types):
        config.refuse("layer_types", "full_attention or sliding_attention for each layer")
    elif len(types) != sizes.layers:
        config.refuse("layer_types", f"one for each of num_hidden_layers ({sizes.layers})", len(types))
    else:
        return types
    return ["full_attention"] * sizes.layers


def layer_windows(sizes: Sizes) -> list[int | None]:
    """Return the window of each layer: ``sliding_window`` for sliding layers, None for the others."""
    types, window = layer_types(sizes), one_window(sizes)
    if window is None and "sliding_attention" in types:
        sizes.config.refuse("sliding_window", "a window, as some layer_types are sliding_attention", "none")
    return [window if kind == "sliding_attention" else None for kind in types]


def rotary_on_windowed_layers(layout: str = "half") -> Callable[[Sizes], list[Position]]:
    """Return a reader of rotary positions for layers with a window. The other layers use no positions."""

    def read(sizes: Sizes) -> list[Position]:
        position = rotary_positions(layout)(sizes)
        return [position if kind == "sliding_attention" else None for kind in layer_types(sizes)]

    return read


def rotary_by_layer_type(
    sizes: Sizes, *, partial: bool | float = False, unpositioned: bool = False, ignored: Collection[str] = ()
) -> list[Position]:
    """Return the rotary positions of each layer, if ``rope_parameters`` has an object for each layer type.

    Args:
        sizes: The sizes.
        partial: As for ``rotary``.
        unpositioned: Whether a layer type may have null in place of an object: its layers use no positions.
        ignored: Names of parameters that change no number.
    """
    types, inner = layer_types(sizes), sizes.config.inside("rope_parameters")
    of_type: dict[str, Position] = {}
    for kind in dict.fromkeys(types):
        if unpositioned and inner.raw(kind) is None:
            of_type[kind] = None
            continue
        parameters = inner.inside(kind)
        parameters.ignored(ignored)
        parameters.allowed("truncate", True)  # transformers looks for it outside this object, and so uses true
        of_type[kind] = rotary(sizes.config, sizes.head_dim, parameters=parameters, partial=partial)
    inner.ignored(LAYER_TYPES)
    for name in inner.unread():
        inner.leave(name, "only an object for each layer type")
    sizes.config.add(inner)
    return [of_type[kind] for kind in types]
