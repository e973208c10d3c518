"""Families whose norm is LayerNorm and whose positions are rotary; many have their two blocks beside each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from splitbundle.architecture import Architecture, QueryKeyNorm, Rotary, Unpositioned, Unscaled
from splitbundle.manifest import SourceName
from splitbundle_converter.config_reader import ConfigReader
from splitbundle_converter.families_layer_norm import BLOOM_MODULES, GPT2_FIELDS
from splitbundle_converter.family import fixed, head, layer_norm, rotary
from splitbundle_converter.gpt_like import (
    QUERY_KEY_VALUE,
    TORCH_EPS,
    TRAINING,
    basics,
    build,
    fused,
    megatron_modules,
    row,
)
from splitbundle_converter.llama_like import (
    interleaved,
    layer_types,
    layer_windows,
    llama_like,
    llama_row,
    one_window,
    optional_number,
    whole_heads,
)

# GPT-J and CodeGen.

GPTJ_MODULES: Final = {
    "transformer.wte": "embedding.token",
    "transformer.h.{layer}.ln_1": "layers.{layer}.attention_norm",
    "transformer.h.{layer}.attn.q_proj": "layers.{layer}.attention.query",
    "transformer.h.{layer}.attn.k_proj": "layers.{layer}.attention.key",
    "transformer.h.{layer}.attn.v_proj": "layers.{layer}.attention.value",
    "transformer.h.{layer}.attn.out_proj": "layers.{layer}.attention.output",
    "transformer.h.{layer}.mlp.fc_in": "layers.{layer}.mlp.up",
    "transformer.h.{layer}.mlp.fc_out": "layers.{layer}.mlp.down",
    "transformer.ln_f": "head.norm",
    "lm_head": "head.projection",
}
CODEGEN_GROUPS: Final = 4
"""CodeGen was trained on four cores, and keeps each one's queries, values and keys together."""
_QUERY, _KEY, _VALUE = QUERY_KEY_VALUE
CODEGEN_MODULES: Final = {
    source: canonical for source, canonical in GPTJ_MODULES.items() if canonical not in QUERY_KEY_VALUE
} | {"transformer.h.{layer}.attn.qkv_proj": (_QUERY, _VALUE, _KEY)}


def gptj(config: ConfigReader) -> Architecture:
    """GPT-J (Wang & Komatsuzaki 2021): one norm before both blocks; of some channels, neighbouring pairs are turned."""
    config.inert(["n_ctx", "n_positions"])
    config.only("rotary", True)
    config.only("scale_attn_weights", True)
    basic = basics(config, **GPT2_FIELDS)
    dim = config.integer("rotary_dim", minimum=2, maximum=max(2, basic.head_dim))
    if dim % 2:
        config.refuse("rotary_dim", "an even number of channels, as rotary positions turn pairs")
    return build(
        config,
        basic,
        placement="parallel",
        position=Rotary(base=10000.0, dim=dim, layout="interleaved", scaling=Unscaled()),
        of_head=head(basic.norm, tied=config.boolean("tie_word_embeddings"), bias=True),
    )


def codegen(config: ConfigReader) -> Architecture:
    """CodeGen (Nijkamp et al. 2022, arXiv:2203.13474): GPT-J with queries, keys and values in one tensor."""
    heads = config.integer("n_head")
    if heads % CODEGEN_GROUPS:
        config.refuse("n_head", f"a multiple of {CODEGEN_GROUPS}, as CodeGen keeps its heads in so many groups")
    return gptj(config)


# GPT-NeoX and others under Megatron's names.

_NEOX: Final = {"table": "embed_in", "layers": "layers", "attention": "attention", "last": "final_layer_norm"}
# The name that is published; transformers calls it lm_head, and turns it back when it saves.
GPT_NEOX_MODULES: Final = megatron_modules("gpt_neox", **_NEOX, projection="embed_out")
PERSIMMON_MODULES: Final = megatron_modules(
    "model", table="embed_tokens", layers="layers", attention="self_attn", last="final_layernorm"
) | {
    "model.layers.{layer}.self_attn.q_layernorm": "layers.{layer}.attention.query_norm",
    "model.layers.{layer}.self_attn.k_layernorm": "layers.{layer}.attention.key_norm",
}


def gpt_neox(config: ConfigReader) -> Architecture:
    """GPT-NeoX (Black et al. 2022, arXiv:2204.06745) and Pythia: a norm for each of the two blocks."""
    config.inert(["is_decoder", "max_position_embeddings"])
    basic = basics(config)
    bias = config.boolean("attention_bias")
    return build(
        config,
        basic,
        placement="parallel_two" if config.boolean("use_parallel_residual") else "pre",
        position=rotary(config, basic.head_dim),
        qkv_bias=bias,
        output_bias=bias,
    )


def gpt_neox_japanese(config: ConfigReader) -> Architecture:
    """GPT-NeoX-Japanese (ABEJA 2022): no biases but one, of the last layer's attention."""
    config.inert(["is_decoder", "max_position_embeddings"])
    basic = basics(config, inner=None, mlp_bias=False)
    width = basic.hidden * config.integer("intermediate_multiple_size")
    return build(
        config,
        replace(basic, mlp=replace(basic.mlp, intermediate_size=width)),
        of_layer=lambda layer: {"output_bias": layer == basic.layers - 1},
        position=rotary(config, basic.head_dim),
    )


def _gpt_neox_japanese_names(architecture: Architecture) -> tuple[SourceName, ...]:
    base = "gpt_neox_japanese"
    modules = megatron_modules(base, **_NEOX, projection="embed_out")
    bias = SourceName(
        source=f"{base}.layers.{{layer}}.attention.dense_bias",
        tensors=("layers.{layer}.attention.output.bias",),
        groups=1,
        transposed=False,
    )
    return (*(entry for entry in fused(modules)(architecture) if entry.tensors != bias.tensors), bias)


def persimmon(config: ConfigReader) -> Architecture:
    """Persimmon (Elsen et al. 2023): each head's queries and keys are normalised."""
    config.inert(["max_position_embeddings"])
    basic = basics(config)
    config.only("num_key_value_heads", None, basic.heads)
    own = QueryKeyNorm(norm=basic.norm, width="head", after_rotation=False)
    return build(
        config,
        basic,
        position=rotary(config, basic.head_dim),
        query_key_norm=own if config.boolean("qk_layernorm") else None,
        qkv_bias=True,
        output_bias=True,
    )


def falcon(config: ConfigReader) -> Architecture:
    """Falcon (Almazrouei et al. 2023, arXiv:2311.16867): one key head and one norm; later, groups of heads, two norms.

    With ALiBi there is no one answer: transformers adds biases that are rounded to bfloat16, and adds them twice where
    attention isn't fused.
    """
    config.inert(["ff_factor", "max_position_embeddings"])  # ffn_hidden_size is what counts
    config.only("alibi", False)
    config.only("apply_residual_connection_post_layernorm", False)
    fields = {"inner": "ffn_hidden_size", "activation": "activation", "eps": "layer_norm_epsilon"}
    bias, new = config.boolean("bias"), config.boolean("new_decoder_architecture")
    multi_query, parallel = config.boolean("multi_query"), config.boolean("parallel_attn")
    basic = basics(config, **fields, mlp_bias=bias)
    count = config.integer("num_kv_heads")
    if new and basic.heads % count:
        config.refuse("num_kv_heads", f"a divisor of num_attention_heads ({basic.heads})")
    elif not new and not multi_query and count != basic.heads:
        config.refuse("num_kv_heads", f"num_attention_heads ({basic.heads}), as neither architecture groups heads")
    if new and not parallel:
        config.refuse("parallel_attn", "true, as new_decoder_architecture is", parallel)
    # The new architecture has two norms unless this says one; the old one has no choice.
    norms = config.raw("num_ln_in_parallel_attn")
    if norms not in ((None, 1, 2) if new else (None, 1)):
        config.refuse("num_ln_in_parallel_attn", "1, or with new_decoder_architecture 2")
    two = new and norms != 1
    return build(
        config,
        basic,
        placement="parallel_two" if two else "parallel" if new or parallel else "pre",
        kv_heads=count if new else 1 if multi_query else basic.heads,
        position=whole_heads(config, basic.head_dim),
        qkv_bias=bias,
        output_bias=bias,
    )


def _falcon_names(architecture: Architecture) -> tuple[SourceName, ...]:
    modules = dict(BLOOM_MODULES)
    if architecture.kind_of(0).placement == "parallel_two":
        del modules["transformer.h.{layer}.input_layernorm"], modules["transformer.h.{layer}.post_attention_layernorm"]
        modules |= {
            "transformer.h.{layer}.ln_attn": "layers.{layer}.attention_norm",
            "transformer.h.{layer}.ln_mlp": "layers.{layer}.mlp_norm",
        }
    return fused(modules)(architecture)


# Under Llama's names, or nearly.

PHI_MODULES: Final = {
    "model.embed_tokens": "embedding.token",
    "model.layers.{layer}.input_layernorm": "layers.{layer}.attention_norm",
    "model.layers.{layer}.self_attn.q_proj": "layers.{layer}.attention.query",
    "model.layers.{layer}.self_attn.k_proj": "layers.{layer}.attention.key",
    "model.layers.{layer}.self_attn.v_proj": "layers.{layer}.attention.value",
    "model.layers.{layer}.self_attn.q_layernorm": "layers.{layer}.attention.query_norm",
    "model.layers.{layer}.self_attn.k_layernorm": "layers.{layer}.attention.key_norm",
    "model.layers.{layer}.self_attn.dense": "layers.{layer}.attention.output",
    "model.layers.{layer}.mlp.fc1": "layers.{layer}.mlp.up",
    "model.layers.{layer}.mlp.fc2": "layers.{layer}.mlp.down",
    "model.final_layernorm": "head.norm",
    "lm_head": "head.projection",
}


def phi(config: ConfigReader) -> Architecture:
    """Phi 1 to 2 (Li et al. 2023, arXiv:2309.05463): one norm before both blocks."""
    config.inert(TRAINING)
    return llama_like(
        config,
        norm=layer_norm(config.number("layer_norm_eps")),
        placement="parallel",
        position=rotary,
        query_key_norm="head" if config.boolean("qk_layernorm") else None,
        gated=False,
        mlp_bias=True,
        of_head={"bias": True},
        qkv_bias=True,
        output_bias=True,
    )


def stablelm(config: ConfigReader) -> Architecture:
    """StableLM (Bellagente et al. 2024, arXiv:2402.17834); of the 12B one, the norms of single heads can't be named."""
    config.inert(TRAINING)
    config.only("head_dim", None)
    config.only("qk_layernorm", False)
    return llama_like(
        config,
        norm=layer_norm(config.number("layer_norm_eps")),
        placement="parallel" if config.boolean("use_parallel_residual") else "pre",
        position=rotary,
        qkv_bias=config.boolean("use_qkv_bias"),
    )


def cohere(config: ConfigReader) -> Architecture:
    """Command R and Aya (Cohere 2024): norms without a bias; each head may have its own for queries and keys."""
    config.inert(["model_max_length", "pretraining_tp"])
    own = "heads" if config.boolean("use_qk_norm") else None
    return _cohere(config, position=interleaved, query_key_norm=own)


def cohere2(config: ConfigReader) -> Architecture:
    """Command R7B and A (Cohere 2025, arXiv:2504.00698): layers with a window are turned, layers without one aren't."""
    # layer_types has been made of the next two; the others are of generation and of several devices.
    config.inert(["layer_switch", "sliding_window_pattern", "cache_implementation", "use_parallel_embedding"])
    config.only("order_of_interleaved_layers", "local_attn_first")
    config.only("position_embedding_type", "rope_gptj")
    config.only("rotary_pct", 1.0)
    config.only("use_qk_norm", False)
    for name in ("use_embedding_sharing", "use_gated_activation", "use_parallel_block"):
        config.only(name, True)
    return _cohere(config, position=_turned_in_windows, windows=layer_windows(config))


def _turned_in_windows(config: ConfigReader, head_dim: int) -> tuple[Rotary | Unpositioned, ...]:
    position = interleaved(config, head_dim)
    return tuple(position if kind == "sliding_attention" else Unpositioned() for kind in layer_types(config))


def _cohere(config: ConfigReader, **other: Any) -> Architecture:
    bias = config.boolean("attention_bias")
    return llama_like(
        config,
        norm=layer_norm(config.number("layer_norm_eps"), bias=False),
        placement="parallel",
        of_head={"multiplier": config.number("logit_scale")},
        qkv_bias=bias,
        output_bias=bias,
        **other,
    )


def starcoder2(config: ConfigReader) -> Architecture:
    """StarCoder 2 (Lozhkov et al. 2024, arXiv:2402.19173): a window on every layer, or on none."""
    config.inert(TRAINING)
    config.inert(["activation_function", "layer_norm_epsilon"])  # published beside hidden_act and norm_epsilon
    config.only("mlp_type", "default")
    config.only("norm_type", "layer_norm")
    norm, bias = layer_norm(config.number("norm_epsilon")), config.boolean("use_bias")
    windows = one_window(config)
    return llama_like(config, norm=norm, gated=False, mlp_bias=bias, windows=windows, qkv_bias=bias, output_bias=bias)


def nemotron(config: ConfigReader) -> Architecture:
    """Nemotron-4 and Minitron (Parmar et al. 2024, arXiv:2402.16819): norm weights as differences from one."""
    norm = layer_norm(config.number("norm_eps"), weight_offset=1.0)
    mlp_bias, bias = config.boolean("mlp_bias"), config.boolean("attention_bias")
    return llama_like(
        config, norm=norm, position=rotary, gated=False, mlp_bias=mlp_bias, qkv_bias=bias, output_bias=bias
    )


def jais2(config: ConfigReader) -> Architecture:
    """Jais 2 (Inception and MBZUAI 2025)."""
    norm = layer_norm(config.number("layer_norm_eps"))
    mlp_bias, bias = config.boolean("mlp_bias"), config.boolean("attention_bias")
    return llama_like(config, norm=norm, gated=False, mlp_bias=mlp_bias, qkv_bias=bias, output_bias=bias)


def olmo(config: ConfigReader) -> Architecture:
    """OLMo 1 (Groeneveld et al. 2024, arXiv:2402.00838): norms that have no parameters."""
    config.inert(["pretraining_tp"])
    norm, bias = layer_norm(TORCH_EPS, affine=False), config.boolean("attention_bias")
    return llama_like(config, norm=norm, clip=optional_number(config, "clip_qkv"), qkv_bias=bias, output_bias=bias)


LAYER_NORM_ROTARY_FAMILIES: Final = (
    row(
        "gptj",
        gptj,
        fixed(GPTJ_MODULES),
        "transformer.h.{layer}.attn.bias",
        "transformer.h.{layer}.attn.masked_bias",
        "transformer.h.{layer}.attn.embed_positions",
    ),
    row(
        "codegen",
        codegen,
        fused(CODEGEN_MODULES, groups=CODEGEN_GROUPS),
        "transformer.h.{layer}.attn.causal_mask",
        "transformer.h.{layer}.attn.masked_bias",
        "transformer.h.{layer}.attn.embed_positions",
    ),
    row(
        "gpt_neox",
        gpt_neox,
        fused(GPT_NEOX_MODULES),
        "gpt_neox.layers.{layer}.attention.bias",
        "gpt_neox.layers.{layer}.attention.masked_bias",
        "gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq",
        base="gpt_neox",
        layers="layers",
    ),
    row(
        "gpt_neox_japanese",
        gpt_neox_japanese,
        _gpt_neox_japanese_names,
        "gpt_neox_japanese.layers.{layer}.attention.rotary_emb.inv_freq",
        base="gpt_neox_japanese",
        layers="layers",
    ),
    row("persimmon", persimmon, fused(PERSIMMON_MODULES), base="model", layers="layers"),
    row("falcon", falcon, _falcon_names, "transformer.h.{layer}.self_attention.rotary_emb.inv_freq"),
    row("phi", phi, fixed(PHI_MODULES), base="model", layers="layers"),
    llama_row("starcoder2", starcoder2, {"mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}),
    llama_row("nemotron", nemotron),
    llama_row("jais2", jais2),
    llama_row("olmo", olmo),
    llama_row("stablelm", stablelm),
    llama_row("cohere", cohere),
    llama_row("cohere2", cohere2),
)
