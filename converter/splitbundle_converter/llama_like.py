"""What the families that come from Llama share: the facts by Llama's field names, and a table of tensor names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from splitbundle.architecture import Architecture, LayerKind, Mlp, Norm, QueryKeyNorm, Rotary, Unpositioned
from splitbundle.manifest import SourceName
from splitbundle_converter.config_reader import ConfigReader
from splitbundle_converter.family import (
    ACTIVATIONS,
    Family,
    assemble,
    attention,
    divide,
    embedding,
    head,
    layer_count,
    layer_kind,
    names,
    rms_norm,
    rotary,
)

Position = Rotary | Unpositioned
LAYER_TYPES: Final = ("full_attention", "sliding_attention")
MODULES: Final = {
    "model.embed_tokens": "embedding.token",
    "model.norm": "head.norm",
    "lm_head": "head.projection",
}
LAYER_MODULES: Final = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
    "self_attn.o_proj": "attention.output",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}


def llama_row(
    model_type: str,
    facts: Callable[[ConfigReader], Architecture],
    changes: Mapping[str, str | tuple[str, ...]] = {},
    *,
    tensors: Mapping[str, str] = {},
    constants: Mapping[str, float] = {},
) -> Family:
    """A row whose tensors have Llama's names but for ``changes``; inside of a layer, all of them.

    Args:
        model_type: of the configuration.
        facts: of the configuration.
        changes: source module -> canonical module, or those that are fused in it; Llama's names of these go.
        tensors: source tensor -> canonical tensor, where they are neither a weight nor a bias.
        constants: tensors that hold one number, which the decoder takes for granted.
    """
    changed = {part for value in changes.values() for part in ((value,) if isinstance(value, str) else value)}
    parts: dict[str, str | tuple[str, ...]] = {
        source: part for source, part in LAYER_MODULES.items() if part not in changed
    }
    modules: dict[str, str | tuple[str, ...]] = dict(MODULES)
    for source, value in (parts | dict(changes)).items():
        modules[f"{_LAYERS}.{source}"] = _of_layer(value) if isinstance(value, str) else tuple(map(_of_layer, value))
    table = (
        *names(modules),
        *(
            SourceName(source=f"{_LAYERS}.{source}", tensors=(_of_layer(name),), groups=1, transposed=False)
            for source, name in tensors.items()
        ),
    )
    return Family(
        model_type=model_type,
        facts=facts,
        names=lambda architecture: table,
        prefix="model.",
        layers="model.layers",
        dropped=("model.rotary_emb.inv_freq", f"{_LAYERS}.self_attn.rotary_emb.inv_freq"),
        constants={f"{_LAYERS}.{name}": value for name, value in constants.items()},
    )


_LAYERS: Final = "model.layers.{layer}"


def _of_layer(name: str) -> str:
    return f"layers.{{layer}}.{name}"


def whole_heads(config: ConfigReader, head_dim: int) -> Rotary:
    """Rotary positions that turn every channel, in halves."""
    return rotary(config, head_dim, partial=False)


def interleaved(config: ConfigReader, head_dim: int) -> Rotary:
    """Rotary positions that turn every channel, in neighbouring pairs."""
    return rotary(config, head_dim, partial=False, layout="interleaved")


def llama_like(
    config: ConfigReader,
    *,
    activation: str = "hidden_act",
    gated: bool = True,
    mlp_bias: bool = False,
    norm: Norm | None = None,
    placement: str = "pre",
    residual_multiplier: float = 1.0,
    multiplier: Callable[[int], float] = lambda hidden: 1.0,
    query_key_norm: str | None = None,
    normed_after_rotation: bool = False,
    windows: int | tuple[int | None, ...] | None = None,
    position: Callable[[ConfigReader, int], Position | tuple[Position, ...]] = whole_heads,
    of_head: Mapping[str, Any] = {},
    **of_attention: Any,
) -> Architecture:
    """RMSNorm, rotary positions, grouped heads, a gated MLP (Touvron et al. 2023, arXiv:2302.13971).

    Args:
        config: the configuration, with Llama's field names.
        activation: the field that names the activation.
        gated: whether the MLP has a gate.
        mlp_bias: whether the MLP has biases.
        norm: of everything; by default RMSNorm with ``rms_norm_eps``.
        placement: of the layers.
        residual_multiplier: of the layers.
        multiplier: of the embedding, from the hidden size.
        query_key_norm: the width of the norm of queries and keys, if they have one.
        normed_after_rotation: whether that norm comes after the rotation.
        windows: of all layers, or of each.
        position: of all layers, or of each, from the configuration and the channels of a head.
        of_head: further fields of ``Head``.
        of_attention: further fields of ``Attention``.
    """
    config.inert(["attention_dropout", "max_position_embeddings"])
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.raw("head_dim") is None:
        head_dim = divide(config, "hidden_size", hidden, "num_attention_heads", heads)
    else:
        head_dim = config.integer("head_dim")
    kv_heads = config.integer("num_key_value_heads")
    if heads % kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    norm = norm or rms_norm(config.number("rms_norm_eps"))
    mlp = Mlp(
        gated=gated,
        activation=config.choice(activation, ACTIVATIONS),
        intermediate_size=config.integer("intermediate_size"),
        bias=mlp_bias,
    )
    if query_key_norm is not None:
        of_attention["query_key_norm"] = QueryKeyNorm(
            norm=norm, width=query_key_norm, after_rotation=normed_after_rotation
        )
    positions = position(config, head_dim)

    def layer(index: int) -> LayerKind:
        return layer_kind(
            attention(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                position=positions[index] if isinstance(positions, tuple) else positions,
                window=windows[index] if isinstance(windows, tuple) else windows,
                **of_attention,
            ),
            mlp,
            norm,
            placement=placement,
            residual_multiplier=residual_multiplier,
        )

    return assemble(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        embedding=embedding(hidden, multiplier=multiplier(hidden)),
        layers=[layer(i) for i in range(layer_count(config, "num_hidden_layers"))],
        head=head(norm, tied=config.boolean("tie_word_embeddings"), **of_head),
    )


def optional_number(config: ConfigReader, name: str) -> float | None:
    """A number, or None where it isn't given."""
    return None if config.raw(name) is None else config.number(name)


def one_window(config: ConfigReader) -> int | None:
    """The window of all layers, if they have one."""
    return None if config.raw("sliding_window") is None else config.integer("sliding_window")


def layer_types(config: ConfigReader) -> tuple[str, ...]:
    """What each layer attends to."""
    count, types = layer_count(config, "num_hidden_layers"), config.raw("layer_types")
    if not isinstance(types, list) or not all(kind in LAYER_TYPES for kind in types):
        config.refuse("layer_types", "full_attention or sliding_attention for each layer")
    elif len(types) != count:
        config.refuse("layer_types", f"one for each of num_hidden_layers ({count})", len(types))
    else:
        return tuple(types)
    return ("full_attention",) * count


def layer_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """The window of each layer: that of the configuration where ``layer_types`` says so."""
    types, window = layer_types(config), one_window(config)
    if window is None and "sliding_attention" in types:
        config.refuse("sliding_window", "a window, as some layer_types are sliding_attention", "none")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def rotary_by_type(config: ConfigReader, head_dim: int) -> tuple[Rotary, ...]:
    """Rotary positions of each layer, where ``rope_parameters`` has an object for each layer type."""
    types, inner = layer_types(config), config.inside("rope_parameters")
    of_type: dict[str, Rotary] = {}
    for kind in dict.fromkeys(types):
        parameters = inner.inside(kind)
        parameters.only("truncate", True)  # transformers looks for it outside of this object, and takes true
        of_type[kind] = rotary(config, head_dim, parameters=parameters, partial=False)
    inner.inert(LAYER_TYPES)
    for name in inner.unread():
        inner.refuse(name, "only an object for each layer type")
    config.problems += inner.problems
    return tuple(of_type[kind] for kind in types)
