"""Families with the tensor names of Megatron-LM: BLOOM, GPT-NeoX, Persimmon and Falcon."""

from __future__ import annotations

from typing import Final

from splitbundle.format.architecture.decoder import Architecture
from splitbundle_converter.families.facts import Sizes, either, four_times_hidden, layer_norm, rotary_positions
from splitbundle_converter.families.gpt import ALIBI, GPT, GPT2
from splitbundle_converter.families.row import QUERY_KEY_VALUE, Names, OneTensor, in_layers, renamed, row


def _names(base: str, *, table: str, layers: str, attention: str, norm: str, projection: str = "lm_head") -> Names:
    return {
        f"{base}.{table}": "embedding.token",
        **in_layers(
            f"{base}.{layers}",
            {"input_layernorm": "attention_norm"},
            {f"{attention}.query_key_value": QUERY_KEY_VALUE, f"{attention}.dense": "attention.output"},
            {"post_attention_layernorm": "mlp_norm", "mlp.dense_h_to_4h": "mlp.up", "mlp.dense_4h_to_h": "mlp.down"},
        ),
        f"{base}.{norm}": "head.norm",
        projection: "head.projection",
    }


BLOOM_NAMES: Final = _names("transformer", table="word_embeddings", layers="h", attention="self_attention", norm="ln_f")
BLOOM_IGNORED: Final = (
    "pretraining_tp",  # it only splits the same matrix products
    # Fields of Megatron in published configurations.
    *("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "n_inner", "offset_alibi"),
    *("seq_length", "skip_bias_add", "skip_bias_add_qkv", "unk_token_id"),
)
PERSIMMON_NAMES: Final = renamed(
    _names("model", table="embed_tokens", layers="layers", attention="self_attn", norm="final_layernorm"),
    {"self_attn.q_layernorm": "attention.query_norm", "self_attn.k_layernorm": "attention.key_norm"},
)
NEOX: Final = {"table": "embed_in", "layers": "layers", "attention": "attention", "norm": "final_layer_norm"}
# Published checkpoints name the projection embed_out. transformers loads it as lm_head, and saves it as embed_out.
NEOX_NAMES: Final = renamed(
    _names("gpt_neox", **NEOX, projection="embed_out"),
    {"attention.bias": None, "attention.masked_bias": None, "attention.rotary_emb.inv_freq": None},
)
NEOX_JAPANESE_NAMES: Final = renamed(
    _names("gpt_neox_japanese", **NEOX, projection="embed_out"),
    {
        "attention.dense_bias": OneTensor("attention.output.bias"),
        "attention.rotary_emb.inv_freq": None,
    },
)
FALCON_NAMES: Final = renamed(BLOOM_NAMES, {"self_attention.rotary_emb.inv_freq": None})


def _bloom_placement(sizes: Sizes) -> str:
    config = sizes.config
    # Where transformers splits the products, it leaves out the biases of the two outputs.
    if config.raw("slow_but_exact") and config.raw("pretraining_tp") != 1:
        config.refuse("slow_but_exact", "false, as pretraining_tp is not 1")
    return "pre"


def _falcon_names(architecture: Architecture) -> Names:
    two = architecture.kind_of(0).placement == "parallel_two"
    return renamed(FALCON_NAMES, {"ln_attn": "attention_norm", "ln_mlp": "mlp_norm"}) if two else FALCON_NAMES


def _falcon_placement(sizes: Sizes) -> str:
    config = sizes.config
    new, parallel = config.boolean("new_decoder_architecture"), config.boolean("parallel_attn")
    if new and not parallel:
        config.refuse("parallel_attn", "true, as new_decoder_architecture is", parallel)
    # The new architecture has two norms, unless this field is 1. The old architecture always has one norm.
    norms = config.raw("num_ln_in_parallel_attn")
    if norms not in ((None, 1, 2) if new else (None, 1)):
        config.refuse("num_ln_in_parallel_attn", "1, or with new_decoder_architecture 2")
    return "parallel_two" if new and norms != 1 else "parallel" if new or parallel else "pre"


def _falcon_kv_heads(sizes: Sizes) -> int:
    config, heads = sizes.config, sizes.heads
    new, multi_query = config.boolean("new_decoder_architecture"), config.boolean("multi_query")
    count = config.integer("num_kv_heads")
    if new and heads % count:
        config.refuse("num_kv_heads", f"a divisor of num_attention_heads ({heads})")
    elif not new and not multi_query and count != heads:
        config.refuse("num_kv_heads", f"num_attention_heads ({heads}), as neither architecture groups heads")
    return count if new else 1 if multi_query else heads


def _persimmon_kv_heads(sizes: Sizes) -> int:
    sizes.config.allowed("num_key_value_heads", None, sizes.heads)
    return sizes.heads


# A family has a few lines here. With one field on each line, the table would be hard to see.
# fmt: off
MEGATRON_FAMILIES: Final = (
    # BLOOM (Le Scao et al. 2022, arXiv:2211.05100): ALiBi, and a norm after the embedding.
    row("bloom", {**BLOOM_NAMES, "transformer.word_embeddings_layernorm": "embedding.norm"}, GPT2,
        fused_by_key_head=True, ignored=BLOOM_IGNORED, allowed={"apply_residual_connection_post_layernorm": False},
        hidden="hidden_size", inner=four_times_hidden(), activation=lambda sizes: "gelu_tanh", position=ALIBI,
        embedding_norm=True, placement=_bloom_placement),
    # GPT-NeoX (Black et al. 2022, arXiv:2204.06745) and Pythia: a norm for each of the two blocks.
    row("gpt_neox", NEOX_NAMES, GPT, fused_by_key_head=True, ignored=["is_decoder", "max_position_embeddings"],
        placement=either("use_parallel_residual", "parallel_two", "pre"), qkv_bias="attention_bias",
        output_bias="attention_bias", position=rotary_positions(partial=True)),
    # GPT-NeoX-Japanese (ABEJA 2022): the only bias is in the last layer's attention.
    row("gpt_neox_japanese", NEOX_JAPANESE_NAMES, GPT, fused_by_key_head=True,
        ignored=["is_decoder", "max_position_embeddings"],
        inner=lambda sizes: sizes.hidden * sizes.config.integer("intermediate_multiple_size"), bias=False,
        output_bias=lambda sizes: [layer == sizes.layers - 1 for layer in range(sizes.layers)],
        position=rotary_positions(partial=True)),
    # Persimmon (Elsen et al. 2023): each head's queries and keys are normalized.
    row("persimmon", PERSIMMON_NAMES, GPT, fused_by_key_head=True, ignored=["max_position_embeddings"],
        kv_heads=_persimmon_kv_heads, query_key_norm=either("qk_layernorm", "head", None),
        position=rotary_positions(partial=True)),
    # Falcon (Almazrouei et al. 2023, arXiv:2311.16867): one key head and one norm; later, groups of heads, two norms.
    # ALiBi has no single correct result: transformers adds biases that are rounded to bfloat16, and adds them twice
    # if attention isn't fused. Only ffn_hidden_size has an effect; ff_factor has none.
    row("falcon", FALCON_NAMES, GPT, fused_by_key_head=True, names_of=_falcon_names,
        ignored=["ff_factor", "max_position_embeddings"],
        allowed={"alibi": False, "apply_residual_connection_post_layernorm": False},
        inner=four_times_hidden("ffn_hidden_size"), activation="activation", norm=layer_norm("layer_norm_epsilon"),
        placement=_falcon_placement, kv_heads=_falcon_kv_heads, bias="bias", position=rotary_positions()),
)
# fmt: on
