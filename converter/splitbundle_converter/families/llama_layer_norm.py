"""Families with Llama's tensor names, or similar ones, and LayerNorm."""

from __future__ import annotations

from typing import Final

from splitbundle_converter.families.facts import (
    TORCH_EPS,
    Position,
    Sizes,
    either,
    layer_norm,
    layer_windows,
    one_window,
    rotary_by_layer_type,
    rotary_on_windowed_layers,
    rotary_positions,
)
from splitbundle_converter.families.llama import BIASED, BIASED_BOTH, NAMES, PLAIN
from splitbundle_converter.families.row import Names, in_layers, q_k_v, renamed, row

PHI_NAMES: Final[Names] = {
    "model.embed_tokens": "embedding.token",
    **in_layers(
        "model.layers",
        {"input_layernorm": "attention_norm", **q_k_v("self_attn")},
        {"self_attn.q_layernorm": "attention.query_norm", "self_attn.k_layernorm": "attention.key_norm"},
        {"self_attn.dense": "attention.output", "mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"},
    ),
    "model.final_layernorm": "head.norm",
    "lm_head": "head.projection",
}
COHERE: Final = BIASED.replace(
    norm=layer_norm("layer_norm_eps", bias=False), placement="parallel", head_multiplier="logit_scale"
)


def _logit_scale(sizes: Sizes) -> float:
    return 1.0 if sizes.config.raw("logit_scale") is None else sizes.config.number("logit_scale")


def _compass_positions(sizes: Sizes) -> list[Position]:
    return rotary_by_layer_type(sizes, unpositioned=True, ignored=("mrope_interleaved", "mrope_section"))


# fmt: off
LAYER_NORM_FAMILIES: Final = (
    # Phi 1 to 2 (Li et al. 2023, arXiv:2309.05463): one norm before both blocks.
    row("phi", PHI_NAMES, PLAIN, norm=layer_norm("layer_norm_eps"), placement="parallel", bias=True,
        query_key_norm=either("qk_layernorm", "head", None), position=rotary_positions(partial=True), gated=False,
        head_bias=True),
    # StableLM (Bellagente et al. 2024, arXiv:2402.17834). The 12B model has a norm for each head, without a bias.
    row("stablelm", renamed(NAMES, {"self_attn.q_layernorm.norms.{row}": "attention.query_norm",
                                    "self_attn.k_layernorm.norms.{row}": "attention.key_norm"}),
        PLAIN, allowed={"head_dim": None}, norm=layer_norm("layer_norm_eps"),
        query_key_norm=either("qk_layernorm", "heads", None), query_key_bias=False, qkv_bias="use_qkv_bias",
        placement=either("use_parallel_residual", "parallel", "pre"), position=rotary_positions(partial=True)),
    # StarCoder 2 (Lozhkov et al. 2024, arXiv:2402.19173): a window on all layers, or on none. Published configurations
    # have the last two ignored fields in addition to hidden_act and norm_epsilon.
    row("starcoder2", renamed(NAMES, {"mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}), PLAIN,
        ignored=["activation_function", "layer_norm_epsilon"],
        allowed={"mlp_type": "default", "norm_type": "layer_norm"}, norm=layer_norm("norm_epsilon"), bias="use_bias",
        window=one_window, gated=False),
    # Nemotron-4 and Minitron (Parmar et al. 2024, arXiv:2402.16819): norm weights are stored as differences from one.
    row("nemotron", NAMES, BIASED_BOTH, norm=layer_norm("norm_eps", weight_offset=1.0),
        position=rotary_positions(partial=True),
        gated=False),
    # Jais 2 (Inception and MBZUAI 2025).
    row("jais2", NAMES, BIASED_BOTH, norm=layer_norm("layer_norm_eps"), gated=False),
    # OLMo 1 (Groeneveld et al. 2024, arXiv:2402.00838): norms without parameters.
    row("olmo", NAMES, BIASED, ignored=["pretraining_tp"], norm=layer_norm(TORCH_EPS, affine=False), clip="clip_qkv"),
    # Command R and Aya (Cohere 2024): norms without a bias; each head may have its own norm for queries and keys.
    row("cohere", NAMES, COHERE, ignored=["model_max_length", "pretraining_tp"],
        query_key_norm=either("use_qk_norm", "heads", None), position=rotary_positions("interleaved")),
    # Command R7B and A (Cohere 2025, arXiv:2504.00698): only layers with a window have rotary positions. transformers
    # converts the first two ignored fields into layer_types; the others are for generation and for several devices.
    row("cohere2", NAMES, COHERE,
        ignored=["layer_switch", "sliding_window_pattern", "cache_implementation", "use_parallel_embedding"],
        allowed={"order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
              "rotary_pct": 1.0, "use_qk_norm": False, "use_embedding_sharing": True, "use_gated_activation": True,
              "use_parallel_block": True},
        window=layer_windows, position=rotary_on_windowed_layers("interleaved")),
    # North's language part (Cohere 2026). Text has equal positions in all axes of its rotation.
    row("cohere_compass_text", NAMES, COHERE, ignored=["pooling"], head_multiplier=_logit_scale, window=layer_windows,
        position=_compass_positions),
)
# fmt: on
