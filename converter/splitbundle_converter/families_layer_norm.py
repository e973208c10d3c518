"""Families whose norm is LayerNorm and whose positions are learned, sinusoidal or ALiBi: GPT, OPT, BLOOM and theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from splitbundle.architecture import Alibi, Architecture, Embedding, Learned, Sinusoidal
from splitbundle_converter.config_reader import INERT, ConfigReader
from splitbundle_converter.family import Modules, embedding, fixed, head
from splitbundle_converter.gpt_like import QUERY_KEY_VALUE, Basics, basics, build, fused, megatron_modules, row

# GPT-2 and what shares its names.

GPT2_FIELDS: Final[dict[str, Any]] = {
    "hidden": "n_embd",
    "heads": "n_head",
    "layers": "n_layer",
    "inner": "n_inner",
    "activation": "activation_function",
    "eps": "layer_norm_epsilon",
}
GPT2_MODULES: Final[Modules] = {
    "transformer.wte": "embedding.token",
    "transformer.wpe": "embedding.position",
    "transformer.h.{layer}.ln_1": "layers.{layer}.attention_norm",
    "transformer.h.{layer}.attn.c_attn": QUERY_KEY_VALUE,
    "transformer.h.{layer}.attn.c_proj": "layers.{layer}.attention.output",
    "transformer.h.{layer}.ln_2": "layers.{layer}.mlp_norm",
    "transformer.h.{layer}.mlp.c_fc": "layers.{layer}.mlp.up",
    "transformer.h.{layer}.mlp.c_proj": "layers.{layer}.mlp.down",
    "transformer.ln_f": "head.norm",
    "lm_head": "head.projection",
}
OPENAI_GPT_MODULES: Final[Modules] = {
    "transformer.tokens_embed": "embedding.token",
    "transformer.positions_embed": "embedding.position",
    **{source: canonical for source, canonical in GPT2_MODULES.items() if source.startswith("transformer.h.")},
    "lm_head": "head.projection",
}
# Kept as [in, out] (transformers' class Conv1D).
CONV1D: Final = tuple(f"transformer.h.{{layer}}.{m}" for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
GPT_NEO_MODULES: Final[Modules] = {
    source.replace("attn.c_proj", "attn.attention.out_proj"): canonical
    for source, canonical in GPT2_MODULES.items()
    if canonical is not QUERY_KEY_VALUE
} | {
    f"transformer.h.{{layer}}.attn.attention.{part[0]}_proj": f"layers.{{layer}}.attention.{part}"
    for part in ("query", "key", "value")
}


def gpt2(config: ConfigReader) -> Architecture:
    """GPT-2 (Radford et al. 2019)."""
    config.inert(["n_ctx", "reorder_and_upcast_attn"])
    config.only("add_cross_attention", False)
    basic = basics(config, **GPT2_FIELDS)
    scale = basic.head_dim**-0.5 if config.boolean("scale_attn_weights") else 1.0
    by_layer = config.boolean("scale_attn_by_inverse_layer_idx")
    return build(
        config,
        basic,
        of_embedding=_learned(config, basic, "n_positions"),
        of_layer=lambda layer: {"scale": scale / (layer + 1) if by_layer else scale},
        qkv_bias=True,
        output_bias=True,
    )


def openai_gpt(config: ConfigReader) -> Architecture:
    """GPT (Radford et al. 2018): norms after the sums, none at the end. Its "gelu" is GPT-2's "gelu_new"."""
    config.inert(["n_ctx", "predict_special_tokens"])
    config.only("n_special", 0)
    basic = basics(config, **(GPT2_FIELDS | {"inner": None, "activation": None}))
    activation = config.choice("afn", {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"})
    return build(
        config,
        replace(basic, mlp=replace(basic.mlp, activation=activation)),
        placement="post",
        of_embedding=_learned(config, basic, "n_positions"),
        of_head=head(None, tied=config.boolean("tie_word_embeddings")),
        qkv_bias=True,
        output_bias=True,
    )


def gpt_bigcode(config: ConfigReader) -> Architecture:
    """SantaCoder and StarCoder (Li et al. 2023, arXiv:2305.06161): GPT-2 with one key head, or as many as queries."""
    config.inert(["attention_softmax_in_fp32", "num_key_value_heads", "scale_attention_softmax_in_fp32"])
    # What inference servers of its time left in published configurations.
    config.inert(["inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length"])
    config.inert(["pre_allocate_kv_cache", "validate_runner_input"])
    config.only("add_cross_attention", False)
    basic = basics(config, **GPT2_FIELDS)
    return build(
        config,
        basic,
        of_embedding=_learned(config, basic, "n_positions"),
        kv_heads=1 if config.boolean("multi_query") else basic.heads,
        scale=None if config.boolean("scale_attn_weights") else 1.0,
        qkv_bias=True,
        output_bias=True,
    )


_NEO_FIELDS: Final = GPT2_FIELDS | {
    "hidden": "hidden_size",
    "heads": "num_heads",
    "layers": "num_layers",
    "inner": "intermediate_size",
}


def gpt_neo(config: ConfigReader) -> Architecture:
    """GPT-Neo (Black et al. 2021): scores aren't scaled; every second layer sees a window."""
    config.inert(["attention_types"])  # attention_layers has been made of them
    basic = basics(config, **_NEO_FIELDS)
    window = config.integer("window_size")
    layers = config.raw("attention_layers")
    if not isinstance(layers, list) or not all(kind in ("global", "local") for kind in layers):
        config.refuse("attention_layers", "global or local for each layer")
        layers = []
    elif len(layers) != basic.layers:
        config.refuse("attention_layers", f"one for each of num_layers ({basic.layers})")
    return build(
        config,
        basic,
        of_embedding=_learned(config, basic, "max_position_embeddings"),
        of_layer=lambda layer: {"window": window if layers[layer : layer + 1] == ["local"] else None},
        scale=1.0,
        output_bias=True,
    )


def _learned(config: ConfigReader, basic: Basics, count: str, *, offset: int = 0, multiplier: float = 1.0) -> Embedding:
    return embedding(basic.hidden, position=Learned(count=config.integer(count), offset=offset), multiplier=multiplier)


# OPT and what shares its names, which are fairseq's.


def _opt_modules(base: str, projection: str, norm: str) -> Modules:
    return {
        f"{base}.embed_tokens": "embedding.token",
        f"{base}.project_in": "embedding.projection",
        f"{base}.embed_positions": "embedding.position",
        f"{base}.layers.{{layer}}.self_attn_layer_norm": "layers.{layer}.attention_norm",
        f"{base}.layers.{{layer}}.self_attn.q_proj": "layers.{layer}.attention.query",
        f"{base}.layers.{{layer}}.self_attn.k_proj": "layers.{layer}.attention.key",
        f"{base}.layers.{{layer}}.self_attn.v_proj": "layers.{layer}.attention.value",
        f"{base}.layers.{{layer}}.self_attn.out_proj": "layers.{layer}.attention.output",
        f"{base}.layers.{{layer}}.final_layer_norm": "layers.{layer}.mlp_norm",
        f"{base}.layers.{{layer}}.fc1": "layers.{layer}.mlp.up",
        f"{base}.layers.{{layer}}.fc2": "layers.{layer}.mlp.down",
        f"{base}.{norm}": "head.norm",
        f"{base}.project_out": "head.narrowing",
        projection: "head.projection",
    }


def opt(config: ConfigReader) -> Architecture:
    """OPT (Zhang et al. 2022, arXiv:2205.01068) and Galactica. OPT-350M has norms after the sums, and narrow tokens."""
    config.only("learned_embeddings", True)
    config.only("scale_embeddings", False)
    bias, first = config.boolean("enable_bias"), config.boolean("do_layer_norm_before")
    affine = config.boolean("layer_norm_elementwise_affine")
    basic = basics(config, inner="ffn_dim", activation="activation_function", eps=None, mlp_bias=bias, affine=affine)
    last = first and not config.boolean("_remove_final_layer_norm")
    position = Learned(count=config.integer("max_position_embeddings"), offset=2)
    return build(
        config,
        basic,
        placement="pre" if first else "post",
        of_embedding=embedding(basic.hidden, position=position, token_size=config.integer("word_embed_proj_dim")),
        of_head=head(basic.norm if last else None, tied=config.boolean("tie_word_embeddings")),
        qkv_bias=bias,
        output_bias=bias,
    )


def biogpt(config: ConfigReader) -> Architecture:
    """BioGPT (Luo et al. 2022, arXiv:2210.10341). Its norms don't take the configuration's ``layer_norm_eps``."""
    config.inert(["layer_norm_eps"])
    basic = basics(config, eps=None)
    multiplier = basic.hidden**0.5 if config.boolean("scale_embedding") else 1.0
    return build(
        config,
        basic,
        of_embedding=_learned(config, basic, "max_position_embeddings", offset=2, multiplier=multiplier),
        qkv_bias=True,
        output_bias=True,
    )


_XGLM_FIELDS: Final[dict[str, Any]] = {
    "hidden": "d_model",
    "heads": "attention_heads",
    "layers": "num_layers",
    "inner": "ffn_dim",
    "activation": "activation_function",
    "eps": None,
}


def xglm(config: ConfigReader) -> Architecture:
    """XGLM (Lin et al. 2021, arXiv:2112.10668): sinusoidal positions."""
    config.inert(["decoder_start_token_id", "max_position_embeddings"])
    config.only("add_cross_attention", False)
    config.only("pad_token_id", None, 0, 1)  # from two on, transformers takes the waves of one position for zeros
    basic = basics(config, **_XGLM_FIELDS)
    multiplier = basic.hidden**0.5 if config.boolean("scale_embedding") else 1.0
    return build(
        config,
        basic,
        of_embedding=embedding(basic.hidden, position=Sinusoidal(offset=2), multiplier=multiplier),
        qkv_bias=True,
        output_bias=True,
    )


# ALiBi.

BLOOM_MODULES: Final = megatron_modules(
    "transformer", table="word_embeddings", layers="h", attention="self_attention", last="ln_f"
) | {"transformer.word_embeddings_layernorm": "embedding.norm"}
MPT_MODULES: Final[Modules] = {
    "transformer.wte": "embedding.token",
    "transformer.blocks.{layer}.norm_1": "layers.{layer}.attention_norm",
    "transformer.blocks.{layer}.attn.Wqkv": QUERY_KEY_VALUE,
    "transformer.blocks.{layer}.attn.out_proj": "layers.{layer}.attention.output",
    "transformer.blocks.{layer}.norm_2": "layers.{layer}.mlp_norm",
    "transformer.blocks.{layer}.ffn.up_proj": "layers.{layer}.mlp.up",
    "transformer.blocks.{layer}.ffn.down_proj": "layers.{layer}.mlp.down",
    "transformer.norm_f": "head.norm",
    "lm_head": "head.projection",
}


def bloom(config: ConfigReader) -> Architecture:
    """BLOOM (Le Scao et al. 2022, arXiv:2211.05100): ALiBi, and a norm after the embedding."""
    config.inert(["pretraining_tp", "slow_but_exact"])  # they only split the same products
    # Megatron's, in published configurations.
    config.inert(["attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "n_inner"])
    config.inert(["offset_alibi", "seq_length", "skip_bias_add", "skip_bias_add_qkv", "unk_token_id"])
    config.only("apply_residual_connection_post_layernorm", False)
    basic = basics(config, **(GPT2_FIELDS | {"hidden": "hidden_size", "inner": None, "activation": None}))
    return build(
        config,
        replace(basic, mlp=replace(basic.mlp, activation="gelu_tanh")),
        of_embedding=embedding(basic.hidden, norm=basic.norm),
        position=Alibi(max_bias=8.0, multiplier=1.0),
        qkv_bias=True,
        output_bias=True,
    )


_MPT_FIELDS: Final[dict[str, Any]] = {
    "hidden": "d_model",
    "heads": "n_heads",
    "layers": "n_layers",
    "inner": None,
    "activation": None,
    "eps": "layer_norm_epsilon",
}


def mpt(config: ConfigReader) -> Architecture:
    """MPT (MosaicML 2023): ALiBi, no biases. Of the options that transformers' class ignores, only what it computes."""
    config.inert(["emb_pdrop", "embedding_fraction", "init_config", "init_device", "tokenizer_name", "verbose"])
    config.inert(["learned_pos_emb", "max_seq_len"])  # ALiBi takes the place of the first, and has no end
    config.only("expansion_ratio", 4)
    config.only("logit_scale", None)
    config.only("no_bias", True)
    config.only("norm_type", "low_precision_layernorm", "layernorm")
    inner = config.inside("attn_config")
    inner.inert(["attn_impl", "attn_pdrop", "chunk_size_feed_forward"])
    inner.only("alibi", True)
    inner.only("alibi_bias_max", 8)
    inner.only("attn_type", "multihead_attention")
    for name in ("attn_uses_sequence_id", "is_encoder_decoder", "prefix_lm", "qk_ln"):
        inner.only(name, False)
    clip = inner.number("clip_qkv") if inner.raw("clip_qkv") else None
    scale = None if inner.raw("softmax_scale") is None else inner.number("softmax_scale")
    for name in sorted(set(inner.unread()) - INERT):
        inner.refuse(name, "a field that this family is known to have", inner.raw(name))
    config.problems += inner.problems
    basic = basics(config, **_MPT_FIELDS, mlp_bias=False, bias=False)
    return build(config, basic, position=Alibi(max_bias=8.0, multiplier=1.0), clip=clip, scale=scale)


_MASKS: Final = ("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias")
_NEO_MASKS: Final = tuple(name.replace(".attn.", ".attn.attention.") for name in _MASKS)

LAYER_NORM_FAMILIES: Final = (
    row("gpt2", gpt2, fixed(GPT2_MODULES, transposed=CONV1D), *_MASKS),
    row("openai-gpt", openai_gpt, fixed(OPENAI_GPT_MODULES, transposed=CONV1D), _MASKS[0], "transformer.position_ids"),
    row("gpt_bigcode", gpt_bigcode, fused(GPT2_MODULES), *_MASKS, "transformer.bias"),
    row("gpt_neo", gpt_neo, fixed(GPT_NEO_MODULES), *_NEO_MASKS),
    row(
        "opt",
        opt,
        fixed(_opt_modules("model.decoder", "lm_head", "final_layer_norm")),
        base="model",
        layers="decoder.layers",
    ),
    row(
        "biogpt",
        biogpt,
        fixed(_opt_modules("biogpt", "output_projection", "layer_norm")),
        base="biogpt",
        layers="layers",
    ),
    row(
        "xglm",
        xglm,
        fixed(_opt_modules("model", "lm_head", "layer_norm")),
        "model.embed_positions.weights",
        base="model",
        layers="layers",
    ),
    row("bloom", bloom, fused(BLOOM_MODULES)),
    row("mpt", mpt, fixed(MPT_MODULES), layers="blocks"),
)
