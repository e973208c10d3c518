"""Families with LayerNorm and the tensor names of GPT, OPT or MPT."""

from __future__ import annotations

from typing import Final

from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.positions import Alibi, Sinusoidal
from splitbundle.format.architecture.rotary import Rotary, Unscaled
from splitbundle_converter.families.config_reader import ConfigReader
from splitbundle_converter.families.facts import (
    TORCH_EPS,
    Facts,
    Sizes,
    either,
    four_times_hidden,
    layer_norm,
    learned,
    root_of_hidden,
)
from splitbundle_converter.families.row import QUERY_KEY_VALUE, Names, in_layers, q_k_v, renamed, row

GPT: Final = Facts(
    head_dim=None,
    kv_heads=None,
    norm=layer_norm("layer_norm_eps"),
    gated=False,
    inner=four_times_hidden("intermediate_size"),
    bias=True,
)
"""The common facts: every projection has a bias, and attention uses no positions."""
ALIBI: Final = Alibi(max_bias=8.0, multiplier=1.0)


# GPT-2, and families with the same names.

GPT2: Final = GPT.replace(
    hidden="n_embd",
    heads="n_head",
    layers="n_layer",
    inner=four_times_hidden("n_inner"),
    activation="activation_function",
    norm=layer_norm("layer_norm_epsilon"),
)
GPT2_LAYER: Final[Names] = {
    "ln_1": "attention_norm",
    "attn.c_attn": QUERY_KEY_VALUE,
    "attn.c_proj": "attention.output",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
    "attn.bias": None,
}
GPT2_NAMES: Final[Names] = {
    "transformer.wte": "embedding.token",
    "transformer.wpe": "embedding.position",
    **in_layers("transformer.h", GPT2_LAYER, {"attn.masked_bias": None}),
    "transformer.ln_f": "head.norm",
    "lm_head": "head.projection",
}
OPENAI_GPT_NAMES: Final[Names] = {
    "transformer.tokens_embed": "embedding.token",
    "transformer.positions_embed": "embedding.position",
    "transformer.position_ids": None,
    **in_layers("transformer.h", GPT2_LAYER),
    "lm_head": "head.projection",
}
BIGCODE_IGNORED: Final = (
    *("attention_softmax_in_fp32", "num_key_value_heads", "scale_attention_softmax_in_fp32"),
    # Inference servers of its time left these fields in published configurations.
    *("inference_runner", "max_batch_size", "max_sequence_length", "pad_key_length"),
    *("pre_allocate_kv_cache", "validate_runner_input"),
)
CONV1D: Final = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
"""Modules whose weight is stored as [in, out] (class Conv1D of transformers)."""
GPT_NEO_NAMES: Final[Names] = {
    "transformer.wte": "embedding.token",
    "transformer.wpe": "embedding.position",
    **in_layers(
        "transformer.h",
        {"ln_1": "attention_norm", "attn.attention.out_proj": "attention.output"},
        {"ln_2": "mlp_norm", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"},
        {"attn.attention.bias": None, "attn.attention.masked_bias": None},
    ),
    "transformer.ln_f": "head.norm",
    "lm_head": "head.projection",
    **in_layers("transformer.h", q_k_v("attn.attention")),
}
GPTJ_NAMES: Final[Names] = {
    "transformer.wte": "embedding.token",
    **in_layers(
        "transformer.h",
        {"ln_1": "attention_norm", **q_k_v("attn"), "attn.out_proj": "attention.output"},
        {"mlp.fc_in": "mlp.up", "mlp.fc_out": "mlp.down"},
        {"attn.masked_bias": None, "attn.embed_positions": None},
    ),
    "transformer.ln_f": "head.norm",
    "lm_head": "head.projection",
}


def _gpt2_scale(sizes: Sizes) -> list[float]:
    scale = sizes.head_dim**-0.5 if sizes.config.boolean("scale_attn_weights") else 1.0
    by_layer = sizes.config.boolean("scale_attn_by_inverse_layer_idx")
    return [scale / (layer + 1) if by_layer else scale for layer in range(sizes.layers)]


def _openai_activation(sizes: Sizes) -> str:
    """Return the activation. The "gelu" of this family is the "gelu_new" of GPT-2."""
    return sizes.config.choice("afn", {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"})


def _gpt_neo_windows(sizes: Sizes) -> list[int | None]:
    config, layers = sizes.config, sizes.config.raw("attention_layers")
    window = config.integer("window_size")
    if not isinstance(layers, list) or not all(kind in ("global", "local") for kind in layers):
        config.refuse("attention_layers", "global or local for each layer")
    elif len(layers) != sizes.layers:
        config.refuse("attention_layers", f"one for each of num_layers ({sizes.layers})")
    else:
        return [window if kind == "local" else None for kind in layers]
    return [None] * sizes.layers


CODEGEN_GROUPS: Final = 4
"""The number of row groups: CodeGen was trained on four cores, and stores queries, values and keys for each core."""


def _gptj_rotary(sizes: Sizes) -> Rotary:
    dim = sizes.config.integer("rotary_dim", minimum=2, maximum=max(2, sizes.head_dim))
    if dim % 2:
        sizes.config.refuse("rotary_dim", "an even number of channels, because rotary positions rotate pairs")
    return Rotary(base=10000.0, dim=dim, layout="interleaved", scaling=Unscaled())


GPTJ: Final = GPT2.replace(
    ignored=["n_ctx", "n_positions"],
    allowed={"rotary": True, "scale_attn_weights": True},
    placement="parallel",
    position=_gptj_rotary,
    qkv_bias=False,
    output_bias=False,
    head_bias=True,
)


def codegen(config: ConfigReader) -> Architecture:
    """Return the architecture of CodeGen (Nijkamp et al. 2022, arXiv:2203.13474): GPT-J with fused projections.

    One tensor has the queries, keys and values.
    """
    heads = config.integer("n_head")
    if heads % CODEGEN_GROUPS:
        config.refuse("n_head", f"a multiple of {CODEGEN_GROUPS}, as CodeGen keeps its heads in so many groups")
    return GPTJ(config)


# OPT, and families with the same names, which come from fairseq.


def _opt_names(base: str, projection: str, norm: str) -> Names:
    return {
        f"{base}.embed_tokens": "embedding.token",
        f"{base}.project_in": "embedding.projection",
        f"{base}.embed_positions": "embedding.position",
        **in_layers(
            f"{base}.layers",
            {"self_attn_layer_norm": "attention_norm", **q_k_v("self_attn"), "self_attn.out_proj": "attention.output"},
            {"final_layer_norm": "mlp_norm", "fc1": "mlp.up", "fc2": "mlp.down"},
        ),
        f"{base}.{norm}": "head.norm",
        f"{base}.project_out": "head.narrowing",
        projection: "head.projection",
    }


def _scaled_embedding(sizes: Sizes) -> float:
    return root_of_hidden(sizes) if sizes.config.boolean("scale_embedding") else 1.0


def _opt_last_norm(sizes: Sizes) -> bool:
    before, removed = sizes.config.boolean("do_layer_norm_before"), sizes.config.boolean("_remove_final_layer_norm")
    return before and not removed


# MPT, with the ALiBi of BLOOM.

MPT_IGNORED: Final = (
    *("emb_pdrop", "embedding_fraction", "init_config", "init_device", "tokenizer_name", "verbose"),
    *("learned_pos_emb", "max_seq_len"),  # ALiBi replaces learned positions, and has no maximum length
    *("expansion_ratio", "no_bias"),  # the tensors show both; the class of transformers reads neither
)
MPT_NAMES: Final[Names] = {
    "transformer.wte": "embedding.token",
    **in_layers(
        "transformer.blocks",
        {"norm_1": "attention_norm", "attn.Wqkv": QUERY_KEY_VALUE, "attn.out_proj": "attention.output"},
        {"norm_2": "mlp_norm", "ffn.up_proj": "mlp.up", "ffn.down_proj": "mlp.down"},
    ),
    "transformer.norm_f": "head.norm",
    "lm_head": "head.projection",
}
MPT: Final = GPT.replace(
    ignored=MPT_IGNORED,
    allowed={"logit_scale": None, "norm_type": ("low_precision_layernorm", "layernorm")},
    hidden="d_model",
    heads="n_heads",
    layers="n_layers",
    inner=four_times_hidden(),
    activation=lambda sizes: "gelu",
    norm=layer_norm("layer_norm_epsilon", bias=False),
    bias=False,
    position=ALIBI,
)


def mpt(config: ConfigReader) -> Architecture:
    """Return the architecture of MPT (MosaicML 2023): ALiBi, no biases.

    The transformers class ignores some options. Only the values that match its computation are allowed.
    """
    inner = config.inside("attn_config")
    inner.ignored(["attn_impl", "attn_pdrop", "chunk_size_feed_forward"])
    inner.allowed("alibi", True)
    inner.allowed("alibi_bias_max", 8)
    inner.allowed("attn_type", "multihead_attention")
    for name in ("attn_uses_sequence_id", "is_encoder_decoder", "prefix_lm", "qk_ln"):
        inner.allowed(name, False)
    clip = inner.number("clip_qkv") if inner.raw("clip_qkv") else None
    scale = inner.optional_number("softmax_scale")
    for name in inner.unread():
        inner.leave(name, "no such field")
    config.add(inner)
    return MPT.replace(clip=clip, scale=scale)(config)


# A family has a few lines here. With one field on each line, the table would be hard to see.
# fmt: off
GPT_FAMILIES: Final = (
    # GPT-2 (Radford et al. 2019).
    row("gpt2", GPT2_NAMES, GPT2, transposed=CONV1D, ignored=["n_ctx", "reorder_and_upcast_attn"],
        allowed={"add_cross_attention": False}, scale=_gpt2_scale, embedding_position=learned("n_positions")),
    # GPT (Radford et al. 2018): norms after the residual sums, no norm at the end.
    row("openai-gpt", OPENAI_GPT_NAMES, GPT2, transposed=CONV1D, ignored=["n_ctx", "predict_special_tokens"],
        allowed={"n_special": 0}, inner=four_times_hidden(),
        activation=_openai_activation,
        placement="post", embedding_position=learned("n_positions"), head_norm=False),
    # SantaCoder and StarCoder (Li et al. 2023, arXiv:2305.06161): GPT-2 with one key head, or one for each query head.
    row("gpt_bigcode", {**GPT2_NAMES, "transformer.bias": None}, GPT2, fused_by_key_head=True, ignored=BIGCODE_IGNORED,
        allowed={"add_cross_attention": False},
        kv_heads=lambda sizes: 1 if sizes.config.boolean("multi_query") else sizes.heads,
        scale=either("scale_attn_weights", None, 1.0), embedding_position=learned("n_positions")),
    # GPT-Neo (Black et al. 2021): scores aren't scaled; every second layer has a window. transformers converts
    # attention_types into attention_layers.
    row("gpt_neo", GPT_NEO_NAMES, GPT2, ignored=["attention_types"], hidden="hidden_size", heads="num_heads",
        layers="num_layers", inner=four_times_hidden("intermediate_size"), scale=1.0, qkv_bias=False,
        window=_gpt_neo_windows, embedding_position=learned("max_position_embeddings")),
    # GPT-J (Wang & Komatsuzaki 2021): one norm before both blocks; some channels are rotated in adjacent pairs.
    row("gptj", renamed(GPTJ_NAMES, {"attn.bias": None}), GPTJ),
    row("codegen",
        renamed(GPTJ_NAMES, {"attn.causal_mask": None,
                             "attn.qkv_proj": ("attention.query", "attention.value", "attention.key")}),
        codegen, fused_groups=CODEGEN_GROUPS),
    # OPT (Zhang et al. 2022, arXiv:2205.01068) and Galactica. OPT-350M has norms after the residual sums, and a token
    # table that is narrower than the hidden size.
    row("opt", _opt_names("model.decoder", "lm_head", "final_layer_norm"), GPT,
        allowed={"learned_embeddings": True, "scale_embeddings": False}, inner=four_times_hidden("ffn_dim"),
        activation="activation_function", norm=layer_norm(TORCH_EPS, affine="layer_norm_elementwise_affine"),
        placement=either("do_layer_norm_before", "pre", "post"), bias="enable_bias",
        embedding_size="word_embed_proj_dim", embedding_position=learned("max_position_embeddings", offset=2),
        head_norm=_opt_last_norm),
    # BioGPT (Luo et al. 2022, arXiv:2210.10341). Its norms do not use the configuration's layer_norm_eps.
    row("biogpt", _opt_names("biogpt", "output_projection", "layer_norm"), GPT, ignored=["layer_norm_eps"],
        norm=layer_norm(TORCH_EPS), embedding_multiplier=_scaled_embedding,
        embedding_position=learned("max_position_embeddings", offset=2)),
    # XGLM (Lin et al. 2021, arXiv:2112.10668): sinusoidal positions. If pad_token_id is two or more, transformers
    # replaces the values of one position with zeros.
    row("xglm", {**_opt_names("model", "lm_head", "layer_norm"), "model.embed_positions.weights": None}, GPT,
        ignored=["decoder_start_token_id", "max_position_embeddings"],
        allowed={"add_cross_attention": False, "pad_token_id": (None, 0, 1)}, hidden="d_model", heads="attention_heads",
        layers="num_layers", inner=four_times_hidden("ffn_dim"), activation="activation_function",
        norm=layer_norm(TORCH_EPS), embedding_multiplier=_scaled_embedding, embedding_position=Sinusoidal(offset=2)),
    row("mpt", MPT_NAMES, mpt),
)
# fmt: on
