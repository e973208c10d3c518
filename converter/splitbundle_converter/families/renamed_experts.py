"""Families with mixtures of experts whose tensor names, or whose configurations, are their own."""

from __future__ import annotations

from typing import Final

from splitbundle.errors import quoted
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.experts import Shared
from splitbundle.format.architecture.sizes import MAX_LAYERS
from splitbundle_converter.families.config_reader import ConfigReader
from splitbundle_converter.families.experts import ExpertFacts, shared_experts
from splitbundle_converter.families.facts import (
    ACTIVATIONS,
    TORCH_EPS,
    Facts,
    Position,
    Sizes,
    either,
    layer_norm,
    layer_types,
    layer_windows,
    rms_norm,
    rotary_positions,
)
from splitbundle_converter.families.llama import BIASED, NAMES, PLAIN
from splitbundle_converter.families.llama_experts import BALANCED, DEEPSEEK, SHARED_EXPERTS, sparse_types
from splitbundle_converter.families.llama_layer_norm import COHERE
from splitbundle_converter.families.row import QUERY_KEY_VALUE, Names, OneTensor, Stacked, in_layers, renamed, row

SARVAM: Final[Names] = {
    source.replace("model.embed_tokens", "model.word_embeddings"): target
    for source, target in renamed(
        DEEPSEEK,
        {
            "attention.query_key_value": QUERY_KEY_VALUE,
            "attention.dense": "attention.output",
            "attention.query_layernorm": "attention.query_norm",
            "attention.key_layernorm": "attention.key_norm",
            "mlp.gate.expert_bias": OneTensor("mlp.router.correction"),
        },
    ).items()
}
ARIA: Final[Names] = {
    **NAMES,
    **in_layers(
        "model.layers",
        {"mlp.router": "mlp.router"},
        {
            "mlp.experts.fc1.weight": Stacked(("mlp.experts.gate.weight", "mlp.experts.up.weight"), transposed=True),
            "mlp.experts.fc2.weight": Stacked(("mlp.experts.down.weight",), transposed=True),
        },
        SHARED_EXPERTS,
    ),
}
DBRX: Final[Names] = {
    "transformer.wte": "embedding.token",
    **in_layers(
        "transformer.blocks",
        {"norm_attn_norm.norm_1": "attention_norm", "norm_attn_norm.norm_2": "mlp_norm"},
        {"norm_attn_norm.attn.Wqkv": QUERY_KEY_VALUE, "norm_attn_norm.attn.out_proj": "attention.output"},
        {"ffn.router.layer": "mlp.router"},
        {
            f"ffn.experts.mlp.{source}": Stacked(
                (f"mlp.experts.{part}.weight",), transposed=part == "down", merged=True
            )
            for source, part in (("w1", "gate"), ("v1", "up"), ("w2", "down"))
        },
    ),
    "transformer.norm_f": "head.norm",
    "lm_head": "head.projection",
}


def _ernie_layers(config: ConfigReader, layers: int) -> list[bool]:
    """Return which layers have experts: every ``moe_layer_interval``-th one within a range."""
    step, start = config.integer("moe_layer_interval"), config.integer("moe_layer_start_index", minimum=0)
    end = config.integer("moe_layer_end_index", minimum=0)
    # transformers divides by this number where the sum of the chosen scores is smaller. Only a correction that chose
    # experts with scores near 0 could make such a sum, so up to the default it changes nothing.
    if not config.raw("moe_norm_min") or config.number("moe_norm_min") > 1e-12:
        config.refuse("moe_norm_min", "a number from above 0 to 1e-12")
    return [(i + 1) % step == 0 and start <= i <= end for i in range(layers)]


ERNIE: Final = ExpertFacts(
    count="moe_num_experts",
    per_token="moe_k",  # noqa: S106  # the name of a field
    correction="score",
    layers=_ernie_layers,
    shared=shared_experts("moe_num_shared_experts"),
)


def cohere2_moe(config: ConfigReader) -> Architecture:
    """Return the architecture of Command A with experts (Cohere 2026): one norm before both blocks.

    Layers with a window use positions, and dense layers too if all of them see everything.
    """
    config.ignored(["sliding_window_pattern", "layer_norm_eps"])
    rms = config.raw("rms_norm_eps") is not None
    dense = [not sparse for sparse in sparse_types(config, config.integer("num_hidden_layers", maximum=MAX_LAYERS))]
    turning = config.integer("prefix_dense_sliding_window_pattern") == 1
    average = config.choice("shared_expert_combination_strategy", {"sum": "sum", "average": "average"}) == "average"
    function = config.choice("expert_selection_fn", {"softmax": "softmax", "sigmoid": "sigmoid"})
    config.ignored(["norm_topk_prob", "prefix_dense_intermediate_size"])
    shared = config.integer("num_shared_experts", minimum=0) * config.integer("intermediate_size")

    def positions(sizes: Sizes) -> list[Position]:
        position, types = rotary_positions("interleaved")(sizes), layer_types(sizes)
        return [
            position if types[i] == "sliding_attention" or (turning and dense[i]) else None for i in range(sizes.layers)
        ]

    return COHERE.replace(
        norm=rms_norm("rms_norm_eps") if rms else layer_norm("layer_norm_eps", bias=False),
        inner="prefix_dense_intermediate_size" if config.raw("prefix_dense_intermediate_size") else "intermediate_size",
        window=layer_windows,
        position=positions,
        experts=ExpertFacts(
            inner="intermediate_size",
            layers=sparse_types,
            function=function,
            normalised=True if function == "softmax" else config.boolean("norm_topk_prob"),
            shared=lambda config: Shared(intermediate_size=shared, gate=False, average=average) if shared else None,
        ),
    )(config)


def dbrx(config: ConfigReader) -> Architecture:
    """Return the architecture of DBRX (Databricks 2024). Its objects for attention and experts have the facts."""
    attention, block = config.inside("attn_config"), config.inside("ffn_config")
    attention.ignored(["attn_pdrop"])
    base = config.inside("rope_parameters").raw("rope_theta")
    if attention.raw("rope_theta") not in (None, base):  # transformers computes with that of rope_parameters
        hint = "If this is the base of the model's training, write it into rope_parameters of config.json too"
        attention.refuse("rope_theta", f"the base in rope_parameters, {quoted(base)}", hint=hint)
    block.ignored(["moe_jitter_eps", "moe_loss_weight", "hidden_size", "uniform_expert_assignment"])
    function = block.inside("ffn_act_fn")
    activation = function.choice("name", ACTIVATIONS)
    block.add(function)
    block.allowed("moe_normalize_expert_weights", 1, None)
    normalised = block.raw("moe_normalize_expert_weights") is not None
    count, per_token, size = (block.integer(name) for name in ("moe_num_experts", "moe_top_k", "ffn_hidden_size"))
    kv_heads, clip = attention.integer("kv_n_heads"), attention.optional_number("clip_qkv")
    for inner in (attention, block):
        for name in inner.unread():
            inner.leave(name, "no such field")
        config.add(inner)
    return Facts(
        ignored=frozenset({"emb_pdrop", "max_seq_len", "resid_pdrop", "num_key_value_heads"}),
        hidden="d_model",
        heads="n_heads",
        layers="n_layers",
        head_dim=None,
        norm=layer_norm(TORCH_EPS, bias=False),
        kv_heads=lambda sizes: kv_heads,
        clip=clip,
        position=rotary_positions(),
        activation=lambda sizes: activation,
        inner=lambda sizes: size,
        experts=ExpertFacts(count=count, per_token=per_token, inner=size, normalised=normalised),
    )(config)


# fmt: off
RENAMED_EXPERT_FAMILIES: Final = (
    # Sarvam (Sarvam AI 2026), computed by GLM 4.5's classes.
    row("sarvam_moe", SARVAM, PLAIN, ignored=["num_nextn_predict_layers"], qkv_bias="attention_bias",
        query_key_norm=either("use_qk_norm", "head", None), position=rotary_positions(partial=True),
        further=["model.layers.{further}."], experts=BALANCED),
    # ERNIE 4.5 with experts (Baidu 2025).
    row("ernie4_5_moe",
        renamed(DEEPSEEK, {"mlp.moe_statics.e_score_correction_bias":
                           OneTensor("mlp.router.correction", one_row=True)}),
        PLAIN, allowed={"use_bias": False}, position=rotary_positions("interleaved"),
        experts=ERNIE),
    # Aria's language part (Li et al. 2024, arXiv:2410.05993).
    row("aria_text", ARIA, BIASED, allowed={"hidden_act": ("silu", "swish"), "mlp_bias": False},
        ignored=["pretraining_tp"],
        experts=ExpertFacts(count="moe_num_experts", per_token="moe_topk",  # noqa: S106  # the name of a field
                            inner="intermediate_size",
                            shared=shared_experts("moe_num_shared_experts", "intermediate_size"))),
    row("cohere2_moe", DEEPSEEK, cohere2_moe),
    row("dbrx", DBRX, dbrx),
)
# fmt: on
