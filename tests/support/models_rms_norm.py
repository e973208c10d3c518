"""Configurations of the families whose norm is RMSNorm; ``models.py`` makes models of them."""

from __future__ import annotations

from typing import Any, Final

ROTARY: Final[dict[str, Any]] = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 51,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_LINEAR: Final[dict[str, Any]] = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
_LLAMA3: Final[dict[str, Any]] = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So small that some of the five frequencies are kept, some divided, and some lie on the ramp in between.
    "original_max_position_embeddings": 16,
}
_YARN: Final[dict[str, Any]] = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
_FACTORS: Final[dict[str, Any]] = {
    "short_factor": [1.0, 1.1, 1.3, 1.2, 1.7],
    "long_factor": [1.0, 1.6, 2.5, 4.0, 7.0],
}
_DYNAMIC: Final[dict[str, Any]] = {"rope_type": "dynamic", "rope_theta": 50.0, "factor": 3.0}
_ALTERNATING: Final = ["full_attention", "sliding_attention"] * 2
_ALL_FULL: Final = ["full_attention"] * 4
_GRANITE: Final[dict[str, Any]] = {
    "embedding_multiplier": 3.7,
    "residual_multiplier": 0.63,
    "attention_multiplier": 0.29,
    "logits_scaling": 2.3,
}
_LLAMA4: Final[dict[str, Any]] = ROTARY | {"intermediate_size_mlp": 45, "moe_layers": []}
_GEMMA: Final[dict[str, Any]] = ROTARY | {"head_dim": 10, "query_pre_attn_scalar": 7, "sliding_window": 5}

CONFIGURATIONS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    # Every scaling of rotary positions.
    "llama-yarn": ("llama", ROTARY | {"head_dim": 10, "rope_parameters": _YARN}),
    "llama-yarn-all": (
        "llama",
        ROTARY
        | {"head_dim": 14}
        | {
            "rope_parameters": _YARN
            | {"attention_factor": 0.7, "truncate": False, "beta_fast": 1.5, "beta_slow": 0.1}
            | {"mscale": 2.0, "mscale_all_dim": 3.0}  # which the attention factor overrules
        },
    ),
    "llama-yarn-mscale": (
        "llama",
        ROTARY | {"head_dim": 10, "rope_parameters": _YARN | {"mscale": 2.0, "mscale_all_dim": 0.5, "beta_fast": 2}},
    ),
    "llama-longrope-short": (
        "llama",
        ROTARY
        | {"head_dim": 10}
        | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0} | _FACTORS}
        | {"max_position_embeddings": 48},
    ),
    "llama-longrope": (
        "llama",
        ROTARY
        | {"head_dim": 10}
        | {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 9}
            | _FACTORS
        },
    ),
    "llama-longrope-factor": (
        "llama",
        ROTARY
        | {"head_dim": 10}
        | {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 9}
            | {"attention_factor": 0.8, "factor": 5.0}
            | _FACTORS
        },
    ),
    "llama-dynamic-short": (
        "llama",
        ROTARY | {"head_dim": 10, "max_position_embeddings": 48, "rope_parameters": _DYNAMIC},
    ),
    "llama-dynamic": ("llama", ROTARY | {"head_dim": 10, "max_position_embeddings": 9, "rope_parameters": _DYNAMIC}),
    "llama-proportional": (
        "llama",
        ROTARY
        | {"head_dim": 14}
        | {"rope_parameters": {"rope_type": "proportional", "rope_theta": 50.0, "partial_rotary_factor": 0.6}},
    ),
    "llama-proportional-divided": (
        "llama",
        ROTARY
        | {"head_dim": 10}
        | {
            "rope_parameters": {"rope_type": "proportional", "rope_theta": 50.0, "partial_rotary_factor": 0.8}
            | {"factor": 1.7}
        },
    ),
    # The families.
    "internlm3": ("internlm3", ROTARY | {"head_dim": 6}),
    "internlm3-biased": (
        "internlm3",
        ROTARY | {"head_dim": 10, "qkv_bias": True, "bias": True, "rope_parameters": _DYNAMIC | {"factor": 6.0}},
    ),
    "internlm3-one-kv-tied": (
        "internlm3",
        ROTARY | {"head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "iquestcoder": ("iquestcoder", ROTARY | {"head_dim": 6}),
    "iquestcoder-biased": (
        "iquestcoder",
        ROTARY | {"head_dim": 10, "attention_bias": True, "mlp_bias": True, "rope_parameters": _YARN},
    ),
    "iquestcoder-tied": ("iquestcoder", ROTARY | {"head_dim": None, "tie_word_embeddings": True}),
    "arcee": ("arcee", ROTARY),
    "arcee-biased": (
        "arcee",
        ROTARY | {"head_dim": 10, "attention_bias": True, "mlp_bias": True, "rope_parameters": _YARN},
    ),
    "arcee-one-kv-tied": (
        "arcee",
        ROTARY | {"num_key_value_heads": 1, "tie_word_embeddings": True, "hidden_act": "gelu"},
    ),
    "cwm": ("cwm", ROTARY | {"head_dim": 6, "sliding_window": 5, "rope_parameters": _LLAMA3}),
    "cwm-alternating": (
        "cwm",
        ROTARY
        | {"head_dim": 10, "sliding_window": 3, "mlp_bias": True, "layer_types": _ALTERNATING}
        | {"rope_parameters": _LINEAR},
    ),
    "cwm-llama3-tied": (
        "cwm",
        ROTARY
        | {"head_dim": 10, "sliding_window": 5, "tie_word_embeddings": True, "rope_parameters": _LLAMA3}
        | {"num_key_value_heads": 6, "layer_types": _ALTERNATING[::-1]},
    ),
    "ministral": ("ministral", ROTARY | {"head_dim": 6, "sliding_window": 5}),
    "ministral-alternating": (
        "ministral",
        ROTARY | {"head_dim": 10, "sliding_window": 4, "layer_types": _ALTERNATING, "tie_word_embeddings": True},
    ),
    "ministral-full": (
        "ministral",
        ROTARY | {"head_dim": 14, "layer_types": _ALL_FULL, "rope_parameters": _LINEAR},
    ),
    "ministral3": (
        "ministral3",
        ROTARY
        | {"head_dim": 10}
        | {"rope_parameters": _YARN | {"llama_4_scaling_beta": 0.7, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "ministral3-window": (
        "ministral3",
        ROTARY
        | {"head_dim": 10, "sliding_window": 5, "tie_word_embeddings": True}
        | {
            "rope_parameters": _YARN
            | {"llama_4_scaling_beta": 0.7, "original_max_position_embeddings": 3, "max_position_embeddings": 64}
        },
    ),
    "ministral3-unscaled": (
        "ministral3",
        ROTARY
        | {"head_dim": 6, "num_key_value_heads": 1}
        | {
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "llama_4_scaling_beta": 0.4}
            | {"original_max_position_embeddings": 4}
        },
    ),
    "qwen3": ("qwen3", ROTARY | {"head_dim": 6}),
    "qwen3-mixed-biased": (
        "qwen3",
        ROTARY
        | {"head_dim": 10, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
        | {"rms_norm_eps": 1e-3, "attention_bias": True, "rope_parameters": _YARN},
    ),
    "qwen3-one-kv-tied": ("qwen3", ROTARY | {"head_dim": 14, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "seed_oss": ("seed_oss", ROTARY | {"head_dim": 6}),
    "seed_oss-biased": (
        "seed_oss",
        ROTARY | {"head_dim": 10, "attention_out_bias": True, "mlp_bias": True, "rope_parameters": _YARN},
    ),
    "seed_oss-output-biased-tied": (
        "seed_oss",
        ROTARY
        | {"head_dim": 8, "attention_bias": False, "attention_out_bias": True}
        | {"tie_word_embeddings": True, "num_key_value_heads": 6},
    ),
    "olmo2": ("olmo2", ROTARY),
    "olmo2-biased": (
        "olmo2",
        ROTARY | {"attention_bias": True, "num_key_value_heads": 3, "rms_norm_eps": 1e-3, "rope_parameters": _LINEAR},
    ),
    "olmo2-one-kv-tied": ("olmo2", ROTARY | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "olmo3": ("olmo3", ROTARY | {"sliding_window": 5}),
    "olmo3-yarn-biased": (
        "olmo3",
        ROTARY
        | {"hidden_size": 60, "sliding_window": 4, "attention_bias": True, "rms_norm_eps": 1e-3}
        | {
            "rope_parameters": {"full_attention": _YARN | {"attention_factor": 1.3}}
            | {"sliding_attention": {"rope_type": "default", "rope_theta": 40.0}}
        },
    ),
    "olmo3-full-tied": (
        "olmo3",
        ROTARY | {"layer_types": _ALL_FULL, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "exaone4": ("exaone4", ROTARY | {"sliding_window": 5}),
    "exaone4-alternating": (
        "exaone4",
        ROTARY
        | {"hidden_size": 60, "sliding_window": 4, "layer_types": _ALTERNATING, "rms_norm_eps": 1e-3}
        | {"rope_parameters": _LLAMA3},
    ),
    "exaone4-full-tied": (
        "exaone4",
        ROTARY
        | {"sliding_window": None, "layer_types": _ALL_FULL, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "exaone4-one-window": (
        "exaone4",
        ROTARY
        | {"sliding_window": 3, "num_key_value_heads": 6}
        | {"layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"]},
    ),
    "smollm3": ("smollm3", ROTARY),
    "smollm3-mixed-biased": (
        "smollm3",
        ROTARY
        | {"hidden_size": 60, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5}
        | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "rope_parameters": _YARN},
    ),
    "smollm3-listed": (
        "smollm3",
        ROTARY
        | {"no_rope_layers": [0, 1, 1, 0], "num_key_value_heads": 1}
        | {"use_sliding_window": True, "sliding_window": 4, "layer_types": _ALTERNATING},
    ),
    "glm": ("glm", ROTARY | {"head_dim": 12}),
    "glm-odd-unbiased-tied": (
        "glm",
        ROTARY
        | {"head_dim": 14, "attention_bias": False, "tie_word_embeddings": True, "num_key_value_heads": 1}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.72}},
    ),
    "glm-linear": (
        "glm",
        ROTARY
        | {"head_dim": 8, "num_key_value_heads": 6, "rms_norm_eps": 1e-3, "hidden_act": "gelu"}
        | {"rope_parameters": _LINEAR | {"partial_rotary_factor": 1.0}},
    ),
    "glm4": ("glm4", ROTARY | {"head_dim": 12}),
    "glm4-unbiased-tied": (
        "glm4",
        ROTARY | {"head_dim": 8, "attention_bias": False, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "glm4-yarn": (
        "glm4",
        ROTARY
        | {"head_dim": 14, "num_key_value_heads": 6, "rms_norm_eps": 1e-3}
        | {"rope_parameters": _YARN | {"partial_rotary_factor": 0.72}},
    ),
    "granite": ("granite", ROTARY | {"attention_multiplier": 0.4}),
    "granite-scaled-biased": (
        "granite",
        ROTARY | _GRANITE | {"attention_bias": True, "mlp_bias": True, "rope_parameters": _LINEAR},
    ),
    "granite-scaled-tied": (
        "granite",
        ROTARY | _GRANITE | {"hidden_size": 60, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "hyperclovax": ("hyperclovax", ROTARY),
    "hyperclovax-scaled-biased": (
        "hyperclovax",
        ROTARY | _GRANITE | {"head_dim": 10, "attention_bias": True, "mlp_bias": True, "rope_parameters": _YARN},
    ),
    "hyperclovax-pre-tied": (
        "hyperclovax",
        ROTARY | _GRANITE | {"use_post_norm": False, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "phi3": ("phi3", ROTARY),
    "phi3-window-tied": (
        "phi3",
        ROTARY
        | {"hidden_size": 60, "sliding_window": 5, "num_key_value_heads": 1, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.6}},
    ),
    "phi3-longrope-short": (
        "phi3",
        ROTARY
        | {"hidden_size": 84, "num_key_value_heads": 3, "original_max_position_embeddings": 48}
        | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 50.0, "partial_rotary_factor": 0.72} | _FACTORS},
    ),
    "phi3-longrope": (
        "phi3",
        ROTARY
        | {"hidden_size": 60, "original_max_position_embeddings": 9}
        | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 50.0} | _FACTORS},
    ),
    "ernie4_5": ("ernie4_5", ROTARY | {"head_dim": 10}),
    "ernie4_5-biased": (
        "ernie4_5",
        ROTARY | {"head_dim": 6, "use_bias": True, "tie_word_embeddings": False, "rope_parameters": _LINEAR},
    ),
    "ernie4_5-one-kv": (
        "ernie4_5",
        ROTARY | {"head_dim": 14, "num_key_value_heads": 1, "rope_parameters": _YARN, "rms_norm_eps": 1e-3},
    ),
    "helium": ("helium", ROTARY | {"head_dim": 6}),
    "helium-biased": (
        "helium",
        ROTARY | {"head_dim": 6, "attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3},
    ),
    "helium-one-kv-tied": (
        "helium",
        ROTARY | {"hidden_size": 60, "head_dim": 10, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", ROTARY | {"head_dim": 6}),
    "hunyuan_v1_dense-alpha": (
        "hunyuan_v1_dense",
        ROTARY
        | {"head_dim": 10, "max_position_embeddings": 9, "attention_bias": True, "rms_norm_eps": 1e-3}
        | {"rope_parameters": _DYNAMIC | {"alpha": 20.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}},
    ),
    "hunyuan_v1_dense-yarn-tied": (
        "hunyuan_v1_dense",
        ROTARY | {"head_dim": 14, "num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": _YARN},
    ),
    "apertus": ("apertus", ROTARY | {"rope_parameters": _LLAMA3}),
    "apertus-biased": (
        "apertus",
        ROTARY | {"hidden_size": 60, "attention_bias": True, "rms_norm_eps": 1e-3, "rope_parameters": _LLAMA3},
    ),
    "apertus-relu-tied": (
        "apertus",
        ROTARY
        | {"num_key_value_heads": 1, "tie_word_embeddings": True, "hidden_act": "relu2", "rope_parameters": _YARN},
    ),
    "gemma2": ("gemma2", _GEMMA),
    "gemma2-capped-biased": (
        "gemma2",
        _GEMMA
        | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5, "attention_bias": True}
        | {"rope_parameters": _LINEAR, "rms_norm_eps": 1e-3},
    ),
    "gemma2-uncapped-untied": (
        "gemma2",
        _GEMMA
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}
        | {"num_key_value_heads": 1, "head_dim": 14, "layer_types": _ALTERNATING, "hidden_activation": "silu"},
    ),
    "gemma3_text": ("gemma3_text", _GEMMA),
    "gemma3_text-linear-biased": (
        "gemma3_text",
        _GEMMA
        | {"layer_types": _ALTERNATING, "attention_bias": True, "final_logit_softcapping": 2.5, "rms_norm_eps": 1e-3}
        | {
            "rope_parameters": {"full_attention": _LINEAR}
            | {"sliding_attention": {"rope_type": "default", "rope_theta": 40.0}}
        },
    ),
    "gemma3_text-untied": (
        "gemma3_text",
        _GEMMA
        | {"num_key_value_heads": 1, "head_dim": 14, "tie_word_embeddings": False, "sliding_window": 3}
        | {"layer_types": _ALTERNATING[::-1]},
    ),
    # No window is as wide as the tokens that are run. Full layers rotate by another base, or not at all.
    "granite_swa": (
        "granite_swa",
        ROTARY | {"num_key_value_heads": 2, "sliding_window": 5, "tie_word_embeddings": False},
    ),
    "granite_swa-bases-biased": (
        "granite_swa",
        ROTARY
        | {"num_key_value_heads": 1, "sliding_window": 4, "layer_types": _ALTERNATING, "attention_bias": True}
        | {"layer_rope_theta": [0, 500.0, 10000, 0.0], "mlp_bias": True}
        | _GRANITE,
    ),
    "granite_swa-yarn": (
        "granite_swa",
        ROTARY
        | {"num_key_value_heads": 6, "sliding_window": 3, "layer_rope_theta": [100.0, 0, 5000.0, 5000.0]}
        | {"rope_parameters": _YARN},
    ),
    "llama4_text": (
        "llama4_text",
        _LLAMA4 | {"num_key_value_heads": 2, "head_dim": 10, "attention_chunk_size": 5},
    ),
    "llama4_text-tuned-biased": (
        "llama4_text",
        _LLAMA4
        | {"num_key_value_heads": 1, "head_dim": 14, "attention_chunk_size": 3, "attention_bias": True}
        | {"no_rope_layers": [0, 1, 0, 1], "floor_scale": 4, "attn_scale": 0.5, "tie_word_embeddings": True},
    ),
    "llama4_text-without-norm": (
        "llama4_text",
        _LLAMA4
        | {"num_key_value_heads": 6, "head_dim": 8, "attention_chunk_size": 7, "use_qk_norm": False}
        | {"attn_temperature_tuning": False, "no_rope_layers": [1, 1, 1, 0], "rope_parameters": _LLAMA3}
        | {"layer_types": ["full_attention", "chunked_attention"] * 2},
    ),
    "vaultgemma": ("vaultgemma", _GEMMA),
    "vaultgemma-capped-biased": (
        "vaultgemma",
        _GEMMA
        | {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5, "attention_bias": True}
        | {"rope_parameters": _LLAMA3, "rms_norm_eps": 1e-3},
    ),
    "vaultgemma-uncapped-untied": (
        "vaultgemma",
        _GEMMA
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False}
        | {"num_key_value_heads": 6, "head_dim": 14, "layer_types": _ALTERNATING},
    ),
    "exaone": ("exaone", ROTARY),
    "exaone-biased": (
        "exaone",
        ROTARY | {"head_dim": 10, "attention_bias": True, "mlp_bias": True, "rope_parameters": _LINEAR},
    ),
    "exaone-tied": ("exaone", ROTARY | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "nanochat": ("nanochat", ROTARY),
    "nanochat-biased": (
        "nanochat",
        ROTARY | {"attention_bias": True, "final_logit_softcapping": 2.0, "rms_norm_eps": 1e-3},
    ),
    "nanochat-tied": (
        "nanochat",
        ROTARY | {"tie_word_embeddings": True, "final_logit_softcapping": None, "rope_parameters": _LINEAR},
    ),
    "apertus1p5_text": ("apertus1p5_text", ROTARY | {"rope_parameters": _LLAMA3}),
    "apertus1p5_text-biased": ("apertus1p5_text", ROTARY | {"attention_bias": True, "rope_parameters": _LLAMA3}),
    "apertus1p5_text-tied": (
        "apertus1p5_text",
        ROTARY
        | {"num_key_value_heads": 1, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    ),
}
"""Name -> the family, and the fields of its configuration that differ from their defaults."""

ONE_PER_FAMILY: Final = (
    "internlm3-biased",
    "iquestcoder-biased",
    "arcee-biased",
    "cwm-alternating",
    "ministral-alternating",
    "ministral3-window",
    "qwen3-mixed-biased",
    "seed_oss-biased",
    "olmo2-biased",
    "olmo3-yarn-biased",
    "exaone4-alternating",
    "smollm3-mixed-biased",
    "glm-odd-unbiased-tied",
    "glm4-yarn",
    "granite-scaled-biased",
    "hyperclovax-scaled-biased",
    "phi3-window-tied",
    "ernie4_5-biased",
    "helium-biased",
    "hunyuan_v1_dense-alpha",
    "apertus-biased",
    "gemma2-capped-biased",
    "gemma3_text-linear-biased",
    "vaultgemma-capped-biased",
    "granite_swa-bases-biased",
    "llama4_text-tuned-biased",
    "exaone-biased",
    "nanochat-biased",
    "apertus1p5_text-biased",
)
"""The configuration of each family that has the most ways to go wrong."""

BY_PIECES: Final = frozenset({"llama-longrope", "llama-longrope-factor", "llama-dynamic", "phi3-longrope"})
"""Models whose rows become longer than the scaling's threshold: the reference is a new model driven with the
same pieces."""

WEIGHT_OFFSET_FAMILIES: Final = frozenset({"gemma", "gemma2", "gemma3_text", "vaultgemma"})
"""Families that store a norm's weight as a difference from one."""
