"""The families: for each, how its configuration becomes facts, and its tensors' names canonical ones.

A row is data and one function of the configuration. Nothing else in the converter, and nothing in the runtime, asks
what a model is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from splitbundle.architecture import (
    MAX_LAYERS,
    Architecture,
    Attention,
    Embedding,
    Head,
    LayerKind,
    Learned,
    Linear,
    Llama3,
    Mlp,
    Norm,
    Rotary,
    Scaling,
    Unpositioned,
    Unscaled,
)
from splitbundle.manifest import SourceName
from splitbundle_converter.config_reader import ConfigReader

ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
}
"""transformers' names of activations -> ours; several are one function computed in different ways."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A row of the table."""

    model_type: str
    facts: Callable[[ConfigReader], Architecture]
    names: tuple[SourceName, ...]
    """Every tensor that some configuration has; those that an architecture doesn't imply don't apply to it."""
    prefix: str
    """What stands before the names of the base model, and is missing where the base model was saved alone."""
    layers: str
    """The module list of the layers, as ``names`` has it."""
    dropped: tuple[str, ...] = ()
    """Tensors of old checkpoints that hold nothing that was learned."""


def names(pairs: dict[str, str | tuple[str, ...]], transposed: tuple[str, ...] = ()) -> tuple[SourceName, ...]:
    """A name table from pairs of modules: the weight and the bias of each."""

    def expand() -> Iterator[SourceName]:
        for source, canonical in pairs.items():
            modules = (canonical,) if isinstance(canonical, str) else canonical
            for kind in ("weight", "bias"):
                yield SourceName(
                    source=f"{source}.{kind}",
                    tensors=tuple(f"{module}.{kind}" for module in modules),
                    transposed=kind == "weight" and source in transposed,
                )

    return tuple(expand())


LLAMA_NAMES: Final = names(
    {
        "model.embed_tokens": "embedding.token",
        "model.layers.{layer}.input_layernorm": "layers.{layer}.attention_norm",
        "model.layers.{layer}.self_attn.q_proj": "layers.{layer}.attention.query",
        "model.layers.{layer}.self_attn.k_proj": "layers.{layer}.attention.key",
        "model.layers.{layer}.self_attn.v_proj": "layers.{layer}.attention.value",
        "model.layers.{layer}.self_attn.o_proj": "layers.{layer}.attention.output",
        "model.layers.{layer}.post_attention_layernorm": "layers.{layer}.mlp_norm",
        "model.layers.{layer}.mlp.gate_proj": "layers.{layer}.mlp.gate",
        "model.layers.{layer}.mlp.up_proj": "layers.{layer}.mlp.up",
        "model.layers.{layer}.mlp.down_proj": "layers.{layer}.mlp.down",
        "model.norm": "head.norm",
        "lm_head": "head.projection",
    }
)
GPT2_CONV1D: Final = tuple(
    f"transformer.h.{{layer}}.{module}" for module in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
)
"""GPT-2 keeps these as [in, out] (its class Conv1D), the others of the family as [out, in]."""
GPT2_NAMES: Final = names(
    {
        "transformer.wte": "embedding.token",
        "transformer.wpe": "embedding.position",
        "transformer.h.{layer}.ln_1": "layers.{layer}.attention_norm",
        "transformer.h.{layer}.attn.c_attn": (
            "layers.{layer}.attention.query",
            "layers.{layer}.attention.key",
            "layers.{layer}.attention.value",
        ),
        "transformer.h.{layer}.attn.c_proj": "layers.{layer}.attention.output",
        "transformer.h.{layer}.ln_2": "layers.{layer}.mlp_norm",
        "transformer.h.{layer}.mlp.c_fc": "layers.{layer}.mlp.up",
        "transformer.h.{layer}.mlp.c_proj": "layers.{layer}.mlp.down",
        "transformer.ln_f": "head.norm",
        "lm_head": "head.projection",
    },
    transposed=GPT2_CONV1D,
)


def assemble(
    config: ConfigReader,
    *,
    vocab_size: int,
    hidden_size: int,
    embedding: Embedding,
    layers: list[tuple[str, LayerKind]],
    norm: Norm,
) -> Architecture:
    """The architecture from each layer's kind, under a name for it; layers that are alike are one kind."""
    return Architecture(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        embedding=embedding,
        layer_kinds=dict(layers),
        layers=tuple(name for name, _ in layers),
        head=Head(norm=norm, tied=config.boolean("tie_word_embeddings")),
    )


def gpt2(config: ConfigReader) -> Architecture:
    """GPT-2 (Radford et al. 2019)."""
    config.inert(
        [
            "attn_pdrop",
            "embd_pdrop",
            "resid_pdrop",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
            "reorder_and_upcast_attn",
            "n_ctx",
        ]
    )
    config.only("add_cross_attention", False)
    hidden, heads = config.integer("n_embd"), config.integer("n_head")
    head_dim = _divide(config, "n_embd", hidden, "n_head", heads)
    inner = 4 * hidden if config.raw("n_inner") is None else config.integer("n_inner")
    norm = Norm(kind="layer_norm", eps=config.number("layer_norm_epsilon"), weight_offset=0.0, bias=True)
    scale = head_dim**-0.5 if config.boolean("scale_attn_weights") else 1.0
    by_layer = config.boolean("scale_attn_by_inverse_layer_idx")
    mlp = Mlp(
        gated=False,
        activation=config.choice("activation_function", ACTIVATIONS),
        intermediate_size=inner,
        bias=True,
    )

    def layer(index: int) -> tuple[str, LayerKind]:
        attention = Attention(
            heads=heads,
            kv_heads=heads,
            head_dim=head_dim,
            scale=scale / (index + 1) if by_layer else scale,
            qkv_bias=True,
            output_bias=True,
            window=None,
            position=Unpositioned(),
        )
        kind = LayerKind(placement="pre", norm=norm, attention=attention, mlp=mlp)
        return f"full_{index}" if by_layer else "full", kind

    return assemble(
        config,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        embedding=Embedding(multiplier=1.0, position=Learned(count=config.integer("n_positions"))),
        layers=[layer(i) for i in range(config.integer("n_layer", maximum=MAX_LAYERS))],
        norm=norm,
    )


def llama_like(
    config: ConfigReader,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    windows: Callable[[int], int | None] = lambda layer: None,
    weight_offset: float = 0.0,
    multiplier: Callable[[int], float] = lambda hidden: 1.0,
) -> Architecture:
    """RMSNorm first, rotary positions, grouped heads, a gated MLP (Touvron et al. 2023, arXiv:2302.13971)."""
    config.inert(["attention_dropout", "max_position_embeddings"])
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if config.raw("head_dim") is None:
        head_dim = _divide(config, "hidden_size", hidden, "num_attention_heads", heads)
    else:
        head_dim = config.integer("head_dim")
    norm = Norm(kind="rms_norm", eps=config.number("rms_norm_eps"), weight_offset=weight_offset, bias=False)
    mlp = Mlp(
        gated=True,
        activation=config.choice("hidden_act", ACTIVATIONS),
        intermediate_size=config.integer("intermediate_size"),
        bias=mlp_bias,
    )
    kv_heads = config.integer("num_key_value_heads")
    if heads % kv_heads:
        config.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if head_dim % 2:
        config.refuse("head_dim", "an even number, as rotary positions turn pairs", head_dim)
    position = rotary(config, head_dim)

    def layer(index: int) -> tuple[str, LayerKind]:
        attention = Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            window=windows(index),
            position=position,
        )
        name = "full" if attention.window is None else "sliding"
        return name, LayerKind(placement="pre", norm=norm, attention=attention, mlp=mlp)

    return assemble(
        config,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        embedding=Embedding(multiplier=multiplier(hidden), position=Unpositioned()),
        layers=[layer(i) for i in range(config.integer("num_hidden_layers", maximum=MAX_LAYERS))],
        norm=norm,
    )


def rotary(config: ConfigReader, head_dim: int) -> Rotary:
    """Rotary positions from ``rope_parameters``."""
    inner = config.inside("rope_parameters")
    inner.inert(["type"])  # an old name of rope_type, which transformers keeps beside it
    scalings = ("default", "linear", "llama3")
    kind = inner.choice("rope_type", dict(zip(scalings, scalings, strict=True)))
    known = not inner.problems
    scaling: Scaling = Unscaled()
    if kind == "linear":
        scaling = Linear(factor=inner.number("factor"))
    elif kind == "llama3":
        scaling = Llama3(
            factor=inner.number("factor"),
            low_frequency_factor=inner.number("low_freq_factor"),
            high_frequency_factor=inner.number("high_freq_factor"),
            original_positions=inner.integer("original_max_position_embeddings"),
        )
        if not scaling.low_frequency_factor < scaling.high_frequency_factor:
            inner.refuse("high_freq_factor", f"more than low_freq_factor ({scaling.low_frequency_factor})")
    inner.only("partial_rotary_factor", 1.0, None)
    base = inner.number("rope_theta")
    if known:  # what another rope_type means by its parameters isn't known here
        for name in inner.unread():
            inner.refuse(name, f"no such parameter with rope_type {kind}")
    config.problems += inner.problems
    return Rotary(base=base, dim=head_dim, layout="half", scaling=scaling)


def llama(config: ConfigReader) -> Architecture:
    """Llama 1 to 3. ``pretraining_tp`` only splits the same products."""
    config.inert(["pretraining_tp"])
    config.only("rope_interleaved", False)  # SmolLM's, of another framework
    bias = config.boolean("attention_bias")
    return llama_like(config, qkv_bias=bias, output_bias=bias, mlp_bias=config.boolean("mlp_bias"))


def mistral(config: ConfigReader) -> Architecture:
    """Mistral 7B: a window on every layer, or on none."""
    window = None if config.raw("sliding_window") is None else config.integer("sliding_window")
    return llama_like(config, windows=lambda layer: window)


def qwen2(config: ConfigReader) -> Architecture:
    """Qwen 2 and 2.5: biases on queries, keys and values; a window on the layers that ``layer_types`` names."""
    config.inert(["max_window_layers", "use_sliding_window"])  # layer_types has been made of them
    config.only("use_mrope", False)
    types = config.raw("layer_types") or []
    sliding = [kind == "sliding_attention" for kind in types]
    if not set(types) <= {"full_attention", "sliding_attention"}:
        config.refuse("layer_types", "full_attention or sliding_attention for each layer")
    if len(types) != config.raw("num_hidden_layers"):
        config.refuse("layer_types", "one for each of num_hidden_layers", len(types))
    window = None if config.raw("sliding_window") is None else config.integer("sliding_window")
    if any(sliding) and window is None:
        config.refuse("sliding_window", "a window, as some layer_types are sliding_attention")
    return llama_like(
        config,
        qkv_bias=True,
        windows=lambda layer: window if layer < len(sliding) and sliding[layer] else None,
    )


def gemma(config: ConfigReader) -> Architecture:
    """Gemma 1: norm weights stored as differences from one, embeddings multiplied by √hidden."""
    config.only("use_bidirectional_attention", None, False)
    config.only("hidden_activation", None, "gelu_pytorch_tanh")  # in the first releases, unused by the model
    bias = config.boolean("attention_bias")
    return llama_like(
        config,
        qkv_bias=bias,
        output_bias=bias,
        weight_offset=1.0,
        multiplier=lambda hidden: hidden**0.5,
    )


def _divide(config: ConfigReader, name: str, value: int, by: str, parts: int) -> int:
    if value % parts:
        config.refuse(name, f"a multiple of {by} ({parts})")
    return max(1, value // parts)


_GPT2_MASKS: Final = ("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias")
_ROTARY_BUFFERS: Final = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


def _llama_row(model_type: str, facts: Callable[[ConfigReader], Architecture]) -> Family:
    return Family(
        model_type=model_type,
        facts=facts,
        names=LLAMA_NAMES,
        prefix="model.",
        layers="model.layers",
        dropped=_ROTARY_BUFFERS,
    )


FAMILIES: Final = {
    row.model_type: row
    for row in (
        Family(
            model_type="gpt2",
            facts=gpt2,
            names=GPT2_NAMES,
            prefix="transformer.",
            layers="transformer.h",
            dropped=_GPT2_MASKS,
        ),
        _llama_row("llama", llama),
        _llama_row("mistral", mistral),
        _llama_row("qwen2", qwen2),
        _llama_row("gemma", gemma),
    )
}
