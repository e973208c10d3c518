"""What a row of the family table is, and the parts that rows share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from splitbundle.architecture import (
    MAX_LAYERS,
    Architecture,
    Attention,
    Dynamic,
    Embedding,
    Head,
    LayerKind,
    Linear,
    Llama3,
    LongRope,
    Mlp,
    Norm,
    Proportional,
    Rotary,
    Scaling,
    Unpositioned,
    Unscaled,
    Yarn,
)
from splitbundle.manifest import SourceName
from splitbundle_converter.config_reader import ConfigReader

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
"""transformers' names of activations -> ours; several are one function computed in different ways."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A row of the table."""

    model_type: str
    facts: Callable[[ConfigReader], Architecture]
    names: Callable[[Architecture], tuple[SourceName, ...]]
    """Every tensor that some configuration has; those that an architecture doesn't imply don't apply to it."""
    prefix: str
    """What stands before the names of the base model, and is missing where the base model was saved alone."""
    layers: str
    """The module list of the layers, as ``names`` has it."""
    dropped: tuple[str, ...] = ()
    """Tensors of old checkpoints that hold nothing that was learned."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """Tensors that hold one number, which the decoder takes for granted: dropped, if it is that one."""


Modules = Mapping[str, str | tuple[str, ...]]
"""Source module -> the canonical module that it holds, or those that are fused in it, in order."""


def names(modules: Modules, *, groups: int = 1, transposed: Iterable[str] = ()) -> tuple[SourceName, ...]:
    """A name table from pairs of modules: the weight and the bias of each.

    Args:
        modules: source module -> canonical module, or several for a fused one.
        groups: of the rows of every fused module; see ``SourceName``.
        transposed: the source modules whose weight is kept as [in, out].
    """
    turned = frozenset(transposed)

    def expand() -> Iterator[SourceName]:
        for source, canonical in modules.items():
            parts = (canonical,) if isinstance(canonical, str) else canonical
            for kind in ("weight", "bias"):
                yield SourceName(
                    source=f"{source}.{kind}",
                    tensors=tuple(f"{part}.{kind}" for part in parts),
                    groups=groups if len(parts) > 1 else 1,
                    transposed=kind == "weight" and source in turned,
                )

    return tuple(expand())


def fixed(modules: Modules, *, transposed: Iterable[str] = ()) -> Callable[[Architecture], tuple[SourceName, ...]]:
    """A name table that is the same for every architecture of the family."""
    table = names(modules, transposed=transposed)
    return lambda architecture: table


def rms_norm(eps: float, *, weight_offset: float = 0.0) -> Norm:
    """RMSNorm with a weight."""
    return Norm(kind="rms_norm", eps=eps, affine=True, weight_offset=weight_offset, bias=False)


def layer_norm(eps: float, *, affine: bool = True, bias: bool = True, weight_offset: float = 0.0) -> Norm:
    """LayerNorm, by default with weight and bias."""
    return Norm(kind="layer_norm", eps=eps, affine=affine, weight_offset=weight_offset, bias=bias and affine)


def attention(
    *,
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
    scale: float | None = None,
    position: Any = None,
    **other: Any,
) -> Attention:
    """Attention with the defaults that most families have: no biases, no window, scale 1/√head_dim.

    ``other`` are further fields of ``Attention``.
    """
    defaults: dict[str, Any] = {
        "qkv_bias": False,
        "output_bias": False,
        "clip": None,
        "query_key_norm": None,
        "query_temperature": None,
        "logit_cap": None,
        "window": None,
        "chunk": None,
        "sinks": False,
    }
    return Attention(
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if scale is None else scale,
        position=Unpositioned() if position is None else position,
        **(defaults | other),
    )


def layer_kind(
    attention: Attention, mlp: Mlp, norm: Norm, *, placement: str = "pre", residual_multiplier: float = 1.0
) -> LayerKind:
    """A layer, by default with norms before its blocks."""
    return LayerKind(
        placement=placement, norm=norm, residual_multiplier=residual_multiplier, attention=attention, mlp=mlp
    )


def embedding(
    hidden_size: int,
    *,
    position: Any = None,
    multiplier: float = 1.0,
    norm: Norm | None = None,
    token_size: int | None = None,
) -> Embedding:
    """An embedding, by default the token table alone."""
    return Embedding(
        token_size=hidden_size if token_size is None else token_size,
        multiplier=multiplier,
        position=Unpositioned() if position is None else position,
        norm=norm,
    )


def head(
    norm: Norm | None, *, tied: bool, bias: bool = False, multiplier: float = 1.0, logit_cap: float | None = None
) -> Head:
    """A head, by default a norm and a projection."""
    return Head(norm=norm, tied=tied, bias=bias, multiplier=multiplier, logit_cap=logit_cap)


def assemble(
    *, vocab_size: int, hidden_size: int, embedding: Embedding, layers: list[LayerKind], head: Head
) -> Architecture:
    """The architecture from each layer's kind; layers that are alike are one kind, named after what it attends to."""
    kinds: dict[str, LayerKind] = {}
    order: list[str] = []
    for kind in layers:
        stem = "full" if kind.attention.window is None else "sliding"
        if isinstance(kind.attention.position, Unpositioned) and any(
            not isinstance(other.attention.position, Unpositioned) for other in layers
        ):
            stem += "_unpositioned"
        name, number = stem, 1
        while kinds.setdefault(name, kind) != kind:
            number += 1
            name = f"{stem}_{number}"
        order.append(name)
    return Architecture(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        embedding=embedding,
        layer_kinds=kinds,
        layers=tuple(order),
        head=head,
    )


def layer_count(config: ConfigReader, name: str) -> int:
    """The number of layers, which bounds what is made of it."""
    return config.integer(name, maximum=MAX_LAYERS)


def divide(config: ConfigReader, name: str, value: int, by: str, parts: int) -> int:
    """``value / parts``, where the fields ``name`` and ``by`` divide."""
    if value % parts:
        config.refuse(name, f"a multiple of {by} ({parts})")
    return max(1, value // parts)


def rotary(
    config: ConfigReader,
    head_dim: int,
    *,
    parameters: ConfigReader | None = None,
    layout: str = "half",
    fraction: float = 1.0,
    partial: bool = True,
) -> Rotary:
    """Rotary positions from ``rope_parameters``, or from the object of a layer type inside of it.

    Args:
        config: of the model; its ``max_position_embeddings`` is what scalings fall back to.
        head_dim: channels of a head.
        parameters: the object, if it isn't ``rope_parameters`` itself.
        layout: which channels are a pair.
        fraction: the fraction of the channels that are turned where ``partial_rotary_factor`` doesn't say.
        partial: whether the model can turn a part of the channels; others ignore ``partial_rotary_factor``, or fail.
    """
    inner = config.inside("rope_parameters") if parameters is None else parameters
    inner.inert(["type"])  # an old name of rope_type, which transformers keeps beside it
    kind = inner.choice("rope_type", {name: name for name in ("default", *_SCALINGS)})
    known = not inner.problems
    if not partial and kind != "proportional":
        inner.only("partial_rotary_factor", 1.0, None)
    elif inner.raw("partial_rotary_factor") is not None:
        fraction = inner.number("partial_rotary_factor")
    whole = kind == "proportional"  # which turns a fraction of the pairs, not pairs of a fraction of the channels
    dim = head_dim if whole else int(head_dim * fraction)
    if dim % 2 or not 2 <= dim <= head_dim:
        config.refuse("head_dim", "an even number of channels to turn, as rotary positions turn pairs", dim)
        dim = max(2, dim - dim % 2)
    scaling = _SCALINGS[kind](config, inner, dim, fraction) if kind in _SCALINGS else Unscaled()
    base = inner.number("rope_theta")
    if known:  # what another rope_type means by its parameters isn't known here
        for name in inner.unread():
            inner.refuse(name, f"no such parameter with rope_type {kind}")
    config.problems += inner.problems
    return Rotary(base=base, dim=dim, layout=layout, scaling=scaling)


def _linear(config: ConfigReader, inner: ConfigReader, dim: int, fraction: float) -> Scaling:
    return Linear(factor=inner.number("factor"))


def _llama3(config: ConfigReader, inner: ConfigReader, dim: int, fraction: float) -> Scaling:
    scaling = Llama3(
        factor=inner.number("factor"),
        low_frequency_factor=inner.number("low_freq_factor"),
        high_frequency_factor=inner.number("high_freq_factor"),
        original_positions=inner.integer("original_max_position_embeddings"),
    )
    if not scaling.low_frequency_factor < scaling.high_frequency_factor:
        inner.refuse("high_freq_factor", f"more than low_freq_factor ({scaling.low_frequency_factor})")
    return scaling


def _dynamic(config: ConfigReader, inner: ConfigReader, dim: int, fraction: float) -> Scaling:
    inner.inert(["original_max_position_embeddings"])  # transformers takes max_position_embeddings
    if dim < 4:
        config.refuse("head_dim", "at least 4 channels to turn, for rope_type dynamic", dim)
    return Dynamic(factor=inner.number("factor"), original_positions=config.integer("max_position_embeddings"))


def _yarn(config: ConfigReader, inner: ConfigReader, dim: int, fraction: float) -> Scaling:
    original = inner.integer("original_max_position_embeddings")
    if inner.raw("factor") is None:
        factor = config.integer("max_position_embeddings") / original
    else:
        factor = inner.number("factor")
    numerator, denominator = inner.raw("mscale"), inner.raw("mscale_all_dim")
    if inner.raw("attention_factor") is not None:
        attention_factor = inner.number("attention_factor")
    elif numerator and denominator:
        attention_factor = _mscale(factor, inner.number("mscale")) / _mscale(factor, inner.number("mscale_all_dim"))
    else:
        attention_factor = _mscale(factor, 1.0)
    return Yarn(
        factor=factor,
        original_positions=original,
        beta_fast=inner.number("beta_fast") if inner.raw("beta_fast") else 32.0,
        beta_slow=inner.number("beta_slow") if inner.raw("beta_slow") else 1.0,
        truncate=True if inner.raw("truncate") is None else inner.boolean("truncate"),
        attention_factor=attention_factor,
    )


def _mscale(factor: float, multiplier: float) -> float:
    """YaRN's growth of the scores with the length (Peng et al. 2023, arXiv:2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0


def _longrope(config: ConfigReader, inner: ConfigReader, dim: int, fraction: float) -> Scaling:
    original = inner.integer("original_max_position_embeddings", minimum=2)
    if inner.raw("factor") is None:
        factor = config.integer("max_position_embeddings") / original
    else:
        factor = inner.number("factor")
    if inner.raw("attention_factor") is not None:
        attention_factor = inner.number("attention_factor")
    else:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRope(
        original_positions=original,
        short_factors=inner.numbers("short_factor", dim // 2),
        long_factors=inner.numbers("long_factor", dim // 2),
        attention_factor=attention_factor,
    )


def _proportional(config: ConfigReader, inner: ConfigReader, dim: int, fraction: float) -> Scaling:
    factor = 1.0 if inner.raw("factor") is None else inner.number("factor")
    return Proportional(factor=factor, pairs=int(fraction * dim // 2))


_SCALINGS: Final[dict[str, Callable[[ConfigReader, ConfigReader, int, float], Scaling]]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
"""transformers' rope_type -> what it says of the frequencies."""
