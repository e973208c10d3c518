"""Configurations of the families whose norm is LayerNorm; ``models.py`` makes models of them."""

from __future__ import annotations

from typing import Any, Final

LAYERS: Final = 4
VOCAB: Final = 61

_GPT2: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "n_embd": 35,
    "n_head": 5,
    "n_layer": LAYERS,
    "n_positions": 48,
}
_GPTJ: Final = _GPT2 | {"n_embd": 42, "n_head": 3, "rotary_dim": 4}
_CODEGEN: Final = _GPT2 | {"n_embd": 40, "n_head": 4, "rotary_dim": 4}
_NEO: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "hidden_size": 35,
    "num_heads": 5,
    "num_layers": LAYERS,
    "max_position_embeddings": 48,
    "window_size": 5,
    "attention_types": [[["global", "local"], 2]],
}
_SIZES: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
}
_ROTARY: Final = _SIZES | {"intermediate_size": 51, "max_position_embeddings": 64}
_OPT: Final = _SIZES | {"hidden_size": 35, "num_attention_heads": 5, "ffn_dim": 51, "max_position_embeddings": 48}
_BIOGPT: Final = _ROTARY | {"hidden_size": 35, "num_attention_heads": 5, "max_position_embeddings": 48}
_XGLM: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "d_model": 36,
    "attention_heads": 6,
    "num_layers": LAYERS,
    "ffn_dim": 51,
}
_BLOOM: Final[dict[str, Any]] = {"vocab_size": VOCAB, "hidden_size": 36, "n_head": 6, "n_layer": LAYERS}
_MPT: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "d_model": 36,
    "n_heads": 6,
    "n_layers": LAYERS,
    "max_seq_len": 64,
}
_LINEAR: Final[dict[str, Any]] = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
_HALF: Final[dict[str, Any]] = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
_COMPASS: Final[dict[str, Any]] = {"rope_type": "default", "rope_theta": 20.0}

CONFIGURATIONS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "openai-gpt": ("openai-gpt", _GPT2),
    "openai-gpt-relu-one-head": ("openai-gpt", _GPT2 | {"n_head": 1, "afn": "relu"}),
    "openai-gpt-silu-untied": (
        "openai-gpt",
        _GPT2 | {"n_embd": 42, "n_head": 3, "afn": "silu", "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    ),
    "gpt_bigcode": ("gpt_bigcode", _GPT2),
    "gpt_bigcode-many-keys": ("gpt_bigcode", _GPT2 | {"n_embd": 42, "n_head": 3, "multi_query": False}),
    "gpt_bigcode-unscaled-untied": (
        "gpt_bigcode",
        _GPT2
        | {"scale_attn_weights": False, "tie_word_embeddings": False, "n_inner": 50, "layer_norm_epsilon": 1e-3}
        | {"activation_function": "gelu"},
    ),
    "gpt_neo": ("gpt_neo", _NEO),
    "gpt_neo-global": ("gpt_neo", _NEO | {"attention_types": [[["global"], 4]], "num_heads": 7}),
    "gpt_neo-mixed-untied": (
        "gpt_neo",
        _NEO
        | {"attention_types": [[["local"], 1], [["global", "local"], 1], [["local"], 1]], "window_size": 3}
        | {"hidden_size": 42, "num_heads": 7, "intermediate_size": 50, "activation_function": "relu"}
        | {"layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    ),
    "opt": ("opt", _OPT),
    "opt-post-narrow": ("opt", _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 22}),
    "opt-wide-tokens-untied": (
        "opt",
        _OPT | {"word_embed_proj_dim": 51, "tie_word_embeddings": False, "activation_function": "gelu"},
    ),
    "opt-bare": (
        "opt",
        _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True},
    ),
    "biogpt": ("biogpt", _BIOGPT),
    "biogpt-unscaled": ("biogpt", _BIOGPT | {"scale_embedding": False, "hidden_act": "relu"}),
    "biogpt-untied": ("biogpt", _BIOGPT | {"tie_word_embeddings": False, "layer_norm_eps": 0.5}),
    "xglm": ("xglm", _XGLM),
    "xglm-odd-unscaled": ("xglm", _XGLM | {"d_model": 35, "attention_heads": 5, "scale_embedding": False}),
    "xglm-padding-untied": (
        "xglm",
        _XGLM | {"pad_token_id": 1, "tie_word_embeddings": False, "activation_function": "relu"},
    ),
    "bloom": ("bloom", _BLOOM | {"n_head": 4}),
    "bloom-six-heads": ("bloom", _BLOOM),
    "bloom-nine-heads-untied": (
        "bloom",
        _BLOOM | {"n_head": 9, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3, "pretraining_tp": 2},
    ),
    "mpt": ("mpt", _MPT | {"n_heads": 4}),
    "mpt-six-heads-clipped": ("mpt", _MPT | {"attn_config": {"clip_qkv": 0.7}}),
    "mpt-scaled-untied": (
        "mpt",
        _MPT
        | {"n_heads": 9, "attn_config": {"softmax_scale": 0.7, "clip_qkv": 1.1}, "tie_word_embeddings": False}
        | {"layer_norm_epsilon": 1e-3},
    ),
    "starcoder2": ("starcoder2", _ROTARY | {"num_key_value_heads": 2}),
    "starcoder2-window-unbiased": (
        "starcoder2",
        _ROTARY | {"num_key_value_heads": 3, "use_bias": False, "sliding_window": 5, "tie_word_embeddings": False},
    ),
    "starcoder2-window-linear": (
        "starcoder2",
        _ROTARY
        | {"num_key_value_heads": 1, "sliding_window": 4, "rope_parameters": _LINEAR, "hidden_act": "gelu"}
        | {"norm_epsilon": 1e-3},
    ),
    "nemotron": ("nemotron", _ROTARY | {"num_key_value_heads": 2, "head_dim": 12}),
    "nemotron-biased-tied": (
        "nemotron",
        _ROTARY
        | {"num_key_value_heads": 1, "head_dim": 8, "attention_bias": True, "mlp_bias": True}
        | {"tie_word_embeddings": True, "norm_eps": 1e-3},
    ),
    "nemotron-linear": (
        "nemotron",
        _ROTARY
        | {"num_key_value_heads": 6, "hidden_act": "gelu", "rope_parameters": _LINEAR | {"partial_rotary_factor": 1.0}},
    ),
    "jais2": ("jais2", _ROTARY),
    "jais2-grouped-unbiased": (
        "jais2",
        _ROTARY | {"num_key_value_heads": 2, "head_dim": 10, "attention_bias": False, "mlp_bias": False},
    ),
    "jais2-linear-tied": (
        "jais2",
        _ROTARY
        | {"num_key_value_heads": 1, "rope_parameters": _LINEAR, "tie_word_embeddings": True, "layer_norm_eps": 1e-3},
    ),
    "olmo": ("olmo", _ROTARY),
    "olmo-clipped-grouped": ("olmo", _ROTARY | {"num_key_value_heads": 2, "clip_qkv": 0.4}),
    "olmo-biased-tied": (
        "olmo",
        _ROTARY
        | {"num_key_value_heads": 1, "clip_qkv": 1.5, "attention_bias": True, "tie_word_embeddings": True}
        | {"rope_parameters": _LINEAR, "hidden_act": "gelu"},
    ),
    "persimmon": ("persimmon", _ROTARY | {"hidden_size": 48}),
    "persimmon-without-norm": ("persimmon", _ROTARY | {"num_attention_heads": 3, "qk_layernorm": False}),
    "persimmon-linear-tied": (
        "persimmon",
        _ROTARY
        | {"hidden_size": 40, "num_attention_heads": 5, "tie_word_embeddings": True, "layer_norm_eps": 1e-3}
        | {"rope_parameters": _LINEAR | {"partial_rotary_factor": 0.75}, "hidden_act": "gelu"},
    ),
    "gpt_neox_japanese": ("gpt_neox_japanese", _SIZES),
    "gpt_neox_japanese-partial": (
        "gpt_neox_japanese",
        _SIZES | {"hidden_size": 40, "num_attention_heads": 5, "rope_parameters": _HALF, "hidden_act": "relu"},
    ),
    "gpt_neox_japanese-untied": (
        "gpt_neox_japanese",
        _SIZES | {"intermediate_multiple_size": 3, "tie_word_embeddings": False, "layer_norm_eps": 1e-3},
    ),
    "gptj": ("gptj", _GPTJ),
    "gptj-whole": ("gptj", _GPTJ | {"n_head": 7, "rotary_dim": 6, "n_inner": 50, "activation_function": "relu"}),
    "gptj-tied": ("gptj", _GPTJ | {"rotary_dim": 2, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-3}),
    "codegen": ("codegen", _CODEGEN),
    "codegen-eight-heads": ("codegen", _CODEGEN | {"n_head": 8, "n_embd": 48, "rotary_dim": 6}),
    "codegen-tied": (
        "codegen",
        _CODEGEN
        | {"n_embd": 56, "n_inner": 50, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-3}
        | {"activation_function": "silu"},
    ),
    "gpt_neox": ("gpt_neox", _ROTARY | {"hidden_size": 48}),
    "gpt_neox-sequential-unbiased": (
        "gpt_neox",
        _ROTARY
        | {"use_parallel_residual": False, "attention_bias": False, "rope_parameters": _HALF, "hidden_size": 24},
    ),
    "gpt_neox-linear-tied": (
        "gpt_neox",
        _ROTARY
        | {"rope_parameters": _LINEAR | {"partial_rotary_factor": 1.0}, "tie_word_embeddings": True}
        | {"hidden_act": "relu", "layer_norm_eps": 1e-3},
    ),
    "falcon": ("falcon", _SIZES),
    "falcon-sequential-biased": (
        "falcon",
        _SIZES | {"parallel_attn": False, "bias": True, "multi_query": False, "ffn_hidden_size": 51},
    ),
    "falcon-parallel-many-keys": (
        "falcon",
        _SIZES
        | {"multi_query": False, "activation": "relu", "tie_word_embeddings": False, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-new": ("falcon", _SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon-new-one-norm": (
        "falcon",
        _SIZES
        | {"new_decoder_architecture": True, "num_kv_heads": 3, "num_ln_in_parallel_attn": 1}
        | {"rope_parameters": _LINEAR, "layer_norm_epsilon": 1e-3},
    ),
    "phi": ("phi", _ROTARY | {"hidden_size": 48}),
    "phi-normed-grouped": (
        "phi",
        _ROTARY | {"hidden_size": 48, "num_key_value_heads": 2, "qk_layernorm": True, "hidden_act": "gelu"},
    ),
    "phi-linear-tied": (
        "phi",
        _ROTARY
        | {"num_key_value_heads": 1, "tie_word_embeddings": True, "qk_layernorm": True, "layer_norm_eps": 1e-3}
        | {"rope_parameters": _LINEAR | {"partial_rotary_factor": 1.0}},
    ),
    "stablelm": ("stablelm", _ROTARY | {"hidden_size": 48, "num_key_value_heads": 6}),
    "stablelm-parallel-biased": (
        "stablelm",
        _ROTARY
        | {"num_key_value_heads": 2, "use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True}
        | {"rope_parameters": _LINEAR | {"partial_rotary_factor": 0.67}},
    ),
    "stablelm-one-kv-tied": (
        "stablelm",
        _ROTARY
        | {"hidden_size": 48, "num_key_value_heads": 1, "rope_parameters": _HALF, "tie_word_embeddings": True}
        | {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
    ),
    "cohere": ("cohere", _ROTARY),
    "cohere-normed": (
        "cohere",
        _ROTARY | {"num_key_value_heads": 2, "use_qk_norm": True, "logit_scale": 0.8, "layer_norm_eps": 1e-3},
    ),
    "cohere-biased-untied": (
        "cohere",
        _ROTARY
        | {"num_key_value_heads": 3, "use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False}
        | {"rope_parameters": _LINEAR, "head_dim": 10, "hidden_act": "gelu"},
    ),
    "cohere2": ("cohere2", _ROTARY | {"num_key_value_heads": 2, "sliding_window": 5}),
    "cohere2-alternating": (
        "cohere2",
        _ROTARY
        | {"num_key_value_heads": 6, "sliding_window": 3, "logit_scale": 1.3, "layer_norm_eps": 1e-3}
        | {"layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    "cohere2-biased-untied": (
        "cohere2",
        _ROTARY
        | {"num_key_value_heads": 1, "sliding_window": 4, "attention_bias": True, "tie_word_embeddings": False}
        | {"rope_parameters": _LINEAR, "head_dim": 10, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    ),
    "cohere_compass_text": (
        "cohere_compass_text",
        _ROTARY | {"num_key_value_heads": 2, "rope_parameters": {"full_attention": _COMPASS}},
    ),
    "cohere_compass_text-windows": (
        "cohere_compass_text",
        _ROTARY
        | {"num_key_value_heads": 3, "sliding_window": 5, "logit_scale": 0.4, "attention_bias": True}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"rope_parameters": {"sliding_attention": _COMPASS, "full_attention": None}},
    ),
    "cohere_compass_text-untied": (
        "cohere_compass_text",
        _ROTARY
        | {"num_key_value_heads": 1, "tie_word_embeddings": False, "layer_norm_eps": 1e-3}
        | {"rope_parameters": {"full_attention": _COMPASS | {"mrope_section": [1, 1, 1], "rope_theta": 1000.0}}},
    ),
}
"""Name -> the family, and the fields of its configuration that differ from their defaults."""
ONE_PER_FAMILY: Final = (
    "openai-gpt-silu-untied",
    "gpt_bigcode-many-keys",
    "gpt_neo-mixed-untied",
    "opt-post-narrow",
    "biogpt",
    "xglm-odd-unscaled",
    "bloom-nine-heads-untied",
    "mpt-six-heads-clipped",
    "starcoder2-window-linear",
    "nemotron-biased-tied",
    "jais2-linear-tied",
    "olmo-biased-tied",
    "persimmon-linear-tied",
    "gpt_neox_japanese-partial",
    "gptj-tied",
    "codegen-tied",
    "gpt_neox-linear-tied",
    "falcon-new",
    "phi-linear-tied",
    "stablelm-parallel-biased",
    "cohere-biased-untied",
    "cohere2-biased-untied",
    "cohere_compass_text-windows",
)
"""The configuration of each family that has the most ways to go wrong."""
WEIGHT_OFFSET_FAMILIES: Final = frozenset({"nemotron"})
"""Families whose norms are stored as differences from one."""
WITHOUT_CACHE: Final = frozenset({"openai-gpt"})
"""Families that transformers computes without a cache: they can't be driven in pieces there."""
