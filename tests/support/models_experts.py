"""Configurations of the families with mixtures of experts; ``models.py`` makes models of them."""

from __future__ import annotations

from typing import Any, Final

from tests.support.models_rms_norm import ROTARY

_QWEN: Final[dict[str, Any]] = ROTARY | {
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 22,
}

_ALTERNATING: Final = ["sliding_attention", "full_attention"] * 2
_SPARSE: Final = ["dense", "sparse", "sparse", "dense"]
_LINEAR: Final[dict[str, Any]] = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
_BALANCED: Final[dict[str, Any]] = ROTARY | {
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 22,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
}
_PLAIN: Final[dict[str, Any]] = {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "n_shared_experts": 1}
_GRANITE: Final[dict[str, Any]] = ROTARY | {
    "embedding_multiplier": 3.7,
    "residual_multiplier": 0.63,
    "attention_multiplier": 0.29,
    "logits_scaling": 2.3,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
}
_LOCAL: Final[dict[str, Any]] = ROTARY | {"num_local_experts": 8, "num_experts_per_tok": 3}
_EXAONE: Final[dict[str, Any]] = ROTARY | {
    "num_experts": 12,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 22,
    "sliding_window": 5,
    "sliding_window_pattern": 4,
    "routed_scaling_factor": 1.7,
}
_FLINT: Final[dict[str, Any]] = _QWEN | {
    "shared_expert_intermediate_size": 9,
    "head_dim": 10,
    "sliding_window": 5,
    "layer_types": _ALTERNATING,
    "mlp_only_layers": [0],
}
_KOLIBRI: Final[dict[str, Any]] = {
    name: value for name, value in _FLINT.items() if name not in ("intermediate_size", "mlp_only_layers")
}

CONFIGURATIONS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "mixtral": ("mixtral", ROTARY | {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "mixtral-window": (
        "mixtral",
        ROTARY | {"num_local_experts": 5, "num_experts_per_tok": 1, "sliding_window": 5, "head_dim": 10},
    ),
    "mixtral-all-tied": (
        "mixtral",
        ROTARY | {"num_local_experts": 4, "num_experts_per_tok": 4, "tie_word_embeddings": True},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        _QWEN | {"shared_expert_intermediate_size": 33, "mlp_only_layers": [1], "qkv_bias": True},
    ),
    "qwen2_moe-normalised": (
        "qwen2_moe",
        _QWEN
        | {"shared_expert_intermediate_size": 7, "norm_topk_prob": True, "qkv_bias": False}
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3},
    ),
    "qwen2_moe-steps": (
        "qwen2_moe",
        _QWEN | {"shared_expert_intermediate_size": 33, "decoder_sparse_step": 2, "num_experts_per_tok": 1},
    ),
    "qwen3_moe": ("qwen3_moe", _QWEN | {"norm_topk_prob": True, "head_dim": 10, "decoder_sparse_step": 2}),
    "qwen3_moe-biased": ("qwen3_moe", _QWEN | {"attention_bias": True, "num_experts": 40, "hidden_act": "gelu"}),
    "qwen3_moe-window": (
        "qwen3_moe",
        _QWEN | {"use_sliding_window": True, "sliding_window": 5, "mlp_only_layers": [0, 2], "norm_topk_prob": True},
    ),
    "olmoe": ("olmoe", ROTARY | {"num_experts": 8, "num_experts_per_tok": 3}),
    "olmoe-normalised": (
        "olmoe",
        ROTARY | {"num_experts": 30, "num_experts_per_tok": 5, "norm_topk_prob": True, "attention_bias": True},
    ),
    "flex_olmo": ("flex_olmo", ROTARY | {"num_experts": 8, "num_experts_per_tok": 3}),
    "flex_olmo-normalised": (
        "flex_olmo",
        ROTARY | {"num_experts": 7, "num_experts_per_tok": 5, "norm_topk_prob": True, "attention_bias": True},
    ),
    "flex_olmo-tied": (
        "flex_olmo",
        ROTARY | {"num_experts": 4, "num_experts_per_tok": 1, "tie_word_embeddings": True, "rope_parameters": _LINEAR},
    ),
    "glm4_moe": (
        "glm4_moe",
        _BALANCED | {"use_qk_norm": True, "attention_bias": True, "head_dim": 12, "partial_rotary_factor": 0.5},
    ),
    "glm4_moe-plain": ("glm4_moe", _BALANCED | _PLAIN | {"first_k_dense_replace": 2, "head_dim": 8}),
    "glm4_moe-all-tied": (
        "glm4_moe",
        _BALANCED
        | {"first_k_dense_replace": 0, "n_group": 2, "topk_group": 1, "tie_word_embeddings": True, "head_dim": 8},
    ),
    "dots1": ("dots1", _BALANCED | {"first_k_dense_replace": 1, "norm_topk_prob": False}),
    "dots1-window": (
        "dots1",
        _BALANCED | {"sliding_window": 5, "layer_types": _ALTERNATING, "attention_bias": True, "n_shared_experts": 1},
    ),
    "dots1-plain": ("dots1", _BALANCED | _PLAIN | {"head_dim": 10, "first_k_dense_replace": 3}),
    "solar_open": ("solar_open", _BALANCED | {"head_dim": 12}),
    "solar_open-plain": ("solar_open", _BALANCED | _PLAIN | {"attention_bias": True, "head_dim": 6}),
    "solar_open-tied": ("solar_open", _BALANCED | {"tie_word_embeddings": True, "n_group": 6, "topk_group": 4}),
    "exaone_moe": ("exaone_moe", _EXAONE),
    "exaone_moe-groups": (
        "exaone_moe",
        _EXAONE
        | {"n_group": 3, "topk_group": 2, "norm_topk_prob": False, "num_shared_experts": 2}
        | {"first_k_dense_replace": 2, "layer_types": ["full_attention"] * 4},
    ),
    "exaone_moe-types": ("exaone_moe", _EXAONE | {"mlp_layer_types": _SPARSE, "tie_word_embeddings": True}),
    "minimax_m2": ("minimax_m2", _LOCAL | {"head_dim": 12, "rotary_dim": 6}),
    "minimax_m2-one": ("minimax_m2", _LOCAL | {"head_dim": 8, "num_experts_per_tok": 1}),
    "minimax_m2-tied": (
        "minimax_m2",
        _LOCAL | {"head_dim": 6, "num_local_experts": 20, "tie_word_embeddings": True, "hidden_act": "gelu"},
    ),
    "granitemoe": ("granitemoe", _GRANITE),
    "granitemoe-biased": ("granitemoe", _GRANITE | {"attention_bias": True, "num_experts_per_tok": 1}),
    "granitemoe-tied": ("granitemoe", _GRANITE | {"tie_word_embeddings": True, "num_local_experts": 20}),
    "granitemoeshared": ("granitemoeshared", _GRANITE | {"shared_intermediate_size": 17}),
    "granitemoeshared-without": ("granitemoeshared", _GRANITE | {"attention_bias": True}),
    "granitemoeshared-tied": (
        "granitemoeshared",
        _GRANITE | {"shared_intermediate_size": 60, "tie_word_embeddings": True, "rope_parameters": _LINEAR},
    ),
    "granitemoe_swa": (
        "granitemoe_swa",
        _GRANITE
        | {"sliding_window": 5, "layer_types": _ALTERNATING, "layer_rope_theta": [100.0, 50.0, 0, 20.0]}
        | {"shared_intermediate_size": 9},
    ),
    "granitemoe_swa-biased": (
        "granitemoe_swa",
        _GRANITE
        | {"sliding_window": 4, "layer_types": ["sliding_attention"] * 4, "layer_rope_theta": [10.0] * 4}
        | {"attention_bias": True, "num_experts_per_tok": 1},
    ),
    "granitemoe_swa-tied": (
        "granitemoe_swa",
        _GRANITE
        | {"sliding_window": 3, "layer_types": ["full_attention"] * 4, "layer_rope_theta": [0, 9.0, 9.0, 0]}
        | {"tie_word_embeddings": True, "num_local_experts": 20},
    ),
    "gpt_oss": (
        "gpt_oss",
        _LOCAL | {"head_dim": 10, "sliding_window": 5, "layer_types": _ALTERNATING, "swiglu_limit": 0.8},
    ),
    "gpt_oss-unbiased": (
        "gpt_oss",
        _LOCAL
        | {"head_dim": 8, "sliding_window": 3, "attention_bias": False, "num_experts_per_tok": 1}
        | {"swiglu_alpha": 1.1, "swiglu_limit": 2.0, "rope_parameters": _LINEAR},
    ),
    "gpt_oss-tied": (
        "gpt_oss",
        _LOCAL | {"head_dim": 6, "sliding_window": 5, "tie_word_embeddings": True, "num_local_experts": 16},
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", ROTARY | {"num_experts": 8, "moe_topk": 3, "head_dim": 10}),
    "hunyuan_v1_moe-biased": (
        "hunyuan_v1_moe",
        ROTARY | {"num_experts": 8, "moe_topk": 1, "head_dim": 8, "attention_bias": True},
    ),
    "hunyuan_v1_moe-tied": (
        "hunyuan_v1_moe",
        ROTARY | {"num_experts": 5, "moe_topk": 5, "head_dim": 6, "tie_word_embeddings": True},
    ),
    "hy_v3": (
        "hy_v3",
        _QWEN | {"num_shared_experts": 2, "head_dim": 10, "mlp_layer_types": _SPARSE, "router_scaling_factor": 1.7},
    ),
    "hy_v3-biased": ("hy_v3", _QWEN | {"head_dim": 8, "attention_bias": True, "num_experts_per_tok": 1}),
    "hy_v3-tied": ("hy_v3", _QWEN | {"head_dim": 6, "tie_word_embeddings": True, "rope_parameters": _LINEAR}),
    "phimoe": (
        "phimoe",
        ROTARY
        | {"num_local_experts": 8, "router_jitter_noise": 0.2, "attention_bias": True, "lm_head_bias": True}
        | {"head_dim": 10},
    ),
    "phimoe-window": (
        "phimoe",
        ROTARY | {"num_local_experts": 16, "sliding_window": 5, "router_jitter_noise": 0.05, "head_dim": 6},
    ),
    "phimoe-tied": (
        "phimoe",
        ROTARY | {"num_local_experts": 4, "tie_word_embeddings": True, "router_jitter_noise": 0.4, "head_dim": 8},
    ),
    "mellum": (
        "mellum",
        _QWEN | {"head_dim": 10, "sliding_window": 5, "layer_types": _ALTERNATING, "mlp_layer_types": _SPARSE},
    ),
    "mellum-full": ("mellum", _QWEN | {"head_dim": 8, "attention_bias": True, "norm_topk_prob": False}),
    "mellum-tied": (
        "mellum",
        _QWEN | {"head_dim": 6, "sliding_window": 4, "layer_types": _ALTERNATING[::-1], "tie_word_embeddings": True},
    ),
    "llama4_text-experts": (
        "llama4_text",
        _LOCAL
        | {"intermediate_size_mlp": 45, "moe_layers": [1, 3], "head_dim": 10, "attention_chunk_size": 5}
        | {"num_experts_per_tok": 2},
    ),
    "llama4_text-all-experts": (
        "llama4_text",
        _LOCAL | {"intermediate_size_mlp": 45, "moe_layers": [0, 1, 2, 3], "head_dim": 8, "num_experts_per_tok": 1},
    ),
    "flint": ("flint", _FLINT),
    "flint-biased": (
        "flint",
        _FLINT | {"attention_bias": True, "mlp_only_layers": [1], "norm_topk_prob": False, "hidden_act": "gelu"},
    ),
    "flint-tied": (
        "flint",
        _FLINT | {"mlp_only_layers": [], "decoder_sparse_step": 2, "tie_word_embeddings": True, "num_experts": 5},
    ),
    "kolibri1": ("kolibri1", _KOLIBRI),
    "kolibri1-normalised": ("kolibri1", _KOLIBRI | {"norm_topk_prob": True, "num_experts": 20}),
    "kolibri1-tied": (
        "kolibri1",
        _KOLIBRI | {"tie_word_embeddings": True, "layer_types": ["full_attention"] * 4} | {"num_experts_per_tok": 1},
    ),
    "olmoe-one": ("olmoe", ROTARY | {"num_experts": 6, "num_experts_per_tok": 1, "tie_word_embeddings": True}),
}
ONE_PER_FAMILY: Final = (
    *(
        "mixtral-window",
        "qwen2_moe",
        "qwen3_moe",
        "olmoe-normalised",
        "flex_olmo-normalised",
        "glm4_moe",
        "dots1-window",
    ),
    *("solar_open", "exaone_moe-groups", "minimax_m2", "granitemoe", "granitemoeshared", "granitemoe_swa", "gpt_oss"),
    *("hunyuan_v1_moe", "hy_v3", "phimoe", "mellum", "flint-biased", "kolibri1"),
)
