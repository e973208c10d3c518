"""Configurations of the families with experts whose tensor names, or whose configurations, are their own."""

from __future__ import annotations

from typing import Any, Final

from tests.support.models_rms_norm import ROTARY

_WINDOWS: Final[dict[str, Any]] = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
_SARVAM: Final[dict[str, Any]] = ROTARY | {
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 22,
    "head_dim": 10,
}
_ERNIE: Final[dict[str, Any]] = ROTARY | {"moe_num_experts": 12, "moe_k": 3, "moe_intermediate_size": 22}
_ARIA: Final[dict[str, Any]] = ROTARY | {"moe_num_experts": 8, "moe_topk": 3}
_COHERE: Final[dict[str, Any]] = ROTARY | _WINDOWS | {"num_experts": 8, "num_experts_per_tok": 3, "head_dim": 10}
_DBRX: Final[dict[str, Any]] = {"vocab_size": 61, "d_model": 36, "n_heads": 6, "n_layers": 4, "max_seq_len": 64}
_BASE: Final[dict[str, Any]] = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
_EXPERTS: Final[dict[str, Any]] = {"ffn_hidden_size": 22, "moe_num_experts": 8, "moe_top_k": 3}

CONFIGURATIONS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "sarvam_moe": ("sarvam_moe", _SARVAM),
    "sarvam_moe-groups": (
        "sarvam_moe",
        _SARVAM | {"n_group": 4, "topk_group": 2, "attention_bias": True, "n_shared_experts": 2},
    ),
    "sarvam_moe-tied": (
        "sarvam_moe",
        _SARVAM
        | {"use_qk_norm": False, "norm_topk_prob": False, "tie_word_embeddings": True, "first_k_dense_replace": 0},
    ),
    "ernie4_5_moe": ("ernie4_5_moe", _ERNIE),
    "ernie4_5_moe-steps": (
        "ernie4_5_moe",
        _ERNIE | {"moe_layer_interval": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
    ),
    "ernie4_5_moe-untied": (
        "ernie4_5_moe",
        _ERNIE
        | {"tie_word_embeddings": False, "moe_num_shared_experts": 0, "moe_layer_end_index": 2, "moe_k": 1}
        | {"head_dim": 10},
    ),
    "aria_text": ("aria_text", _ARIA),
    "aria_text-biased": ("aria_text", _ARIA | {"attention_bias": True, "moe_num_shared_experts": 1, "head_dim": 10}),
    "aria_text-tied": ("aria_text", _ARIA | {"tie_word_embeddings": True, "moe_topk": 1, "moe_num_experts": 5}),
    "cohere2_moe": ("cohere2_moe", _COHERE),
    "cohere2_moe-dense": (
        "cohere2_moe",
        _COHERE
        | {"num_shared_experts": 2, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"]}
        | {"prefix_dense_intermediate_size": 31, "expert_selection_fn": "sigmoid", "attention_bias": True},
    ),
    "cohere2_moe-sum": (
        "cohere2_moe",
        _COHERE
        | {"num_shared_experts": 1, "shared_expert_combination_strategy": "sum", "expert_selection_fn": "sigmoid"}
        | {"norm_topk_prob": False, "rms_norm_eps": 1e-3, "tie_word_embeddings": False}
        | {"prefix_dense_sliding_window_pattern": 2, "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]},
    ),
    "dbrx": (
        "dbrx",
        _DBRX
        | _BASE
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 100.0}, "ffn_config": _EXPERTS},
    ),
    "dbrx-clipped": (
        "dbrx",
        _DBRX
        | _BASE
        | {"attn_config": {"kv_n_heads": 3, "clip_qkv": 0.9, "rope_theta": 100.0}}
        | {"ffn_config": _EXPERTS | {"moe_normalize_expert_weights": None}},
    ),
    "dbrx-one": (
        "dbrx",
        _DBRX
        | _BASE
        | {"attn_config": {"kv_n_heads": 1, "clip_qkv": 2.5, "rope_theta": 100.0}}
        | {"ffn_config": _EXPERTS | {"moe_top_k": 1, "ffn_act_fn": {"name": "gelu"}}},
    ),
}
ONE_PER_FAMILY: Final = (
    *("sarvam_moe-groups", "ernie4_5_moe-steps", "aria_text-biased", "cohere2_moe-dense", "dbrx-clipped"),
)
