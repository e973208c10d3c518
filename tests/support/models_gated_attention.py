"""Configurations of the families whose attention has gates, or values that aren't as wide as keys."""

from __future__ import annotations

from typing import Any, Final

from tests.support.models_rms_norm import ROTARY

_ROTARY: Final[dict[str, Any]] = ROTARY | {
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 22,
    "head_dim": 10,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_EXPERTS: Final[dict[str, Any]] = _ROTARY | {"num_experts": 12}
_SPARSE: Final = ["dense", "sparse", "sparse", "dense"]


def _rope(base: float, fraction: float | None = None, **scaling: Any) -> dict[str, Any]:
    own = {} if fraction is None else {"partial_rotary_factor": fraction}
    return {"rope_type": "default", "rope_theta": base, **own, **scaling}


_BY_TYPE: Final[dict[str, Any]] = {"full_attention": _rope(50.0, 0.6), "sliding_attention": _rope(10.0, 1.0)}
_BEAM: Final[dict[str, Any]] = {"rope_parameters": {"full_attention": None, "sliding_attention": _rope(10.0)}}
_GROUPS: Final[dict[str, Any]] = {"n_group": 4, "topk_group": 2}
_NO_GROUPS: Final[dict[str, Any]] = {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}

CONFIGURATIONS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "afmoe": ("afmoe", _EXPERTS),
    "afmoe-scaled": (
        "afmoe",
        _EXPERTS | {"num_dense_layers": 2, "mup_enabled": True, "attention_bias": True, "route_scale": 1.7},
    ),
    "afmoe-tied": (
        "afmoe",
        _EXPERTS
        | {"num_dense_layers": 0, "num_shared_experts": 1, "tie_word_embeddings": True, "num_experts_per_tok": 1},
    ),
    "laguna": ("laguna", _EXPERTS | {"rope_parameters": _BY_TYPE, "shared_expert_intermediate_size": 9}),
    "laguna-heads": (
        "laguna",
        _EXPERTS
        | {"rope_parameters": _BY_TYPE, "shared_expert_intermediate_size": 40, "mlp_layer_types": _SPARSE}
        | {"num_attention_heads_per_layer": [6, 4, 2, 8], "moe_router_logit_softcapping": 1.5}
        | {"moe_routed_scaling_factor": 1.3, "attention_bias": True},
    ),
    "laguna-channels": (
        "laguna",
        _EXPERTS
        | {"rope_parameters": {"full_attention": _rope(30.0, 0.4, rope_type="linear", factor=2.5)}}
        | {"layer_types": ["full_attention"] * 4, "gating": "per-element", "tie_word_embeddings": True}
        | {"shared_expert_intermediate_size": 5},
    ),
    "beam": ("beam", _EXPERTS | _BEAM | _GROUPS),
    "beam-experts": (
        "beam",
        _EXPERTS | _BEAM | _NO_GROUPS | {"mlp_layer_types": ["sparse"] * 4, "final_logit_softcapping": 2.0},
    ),
    "beam-tied": (
        "beam",
        _EXPERTS
        | _BEAM
        | {"tie_word_embeddings": True, "mlp_layer_types": _SPARSE, "attention_bias": True, "n_group": 2}
        | {"topk_group": 1, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        _ROTARY | {"n_routed_experts": 12, "num_key_value_heads": 1, "v_head_dim": 6, "rope_parameters": _BY_TYPE},
    ),
    "mimo_v2_flash-groups": (
        "mimo_v2_flash",
        _ROTARY
        | _GROUPS
        | {"n_routed_experts": 12, "num_key_value_heads": 3, "v_head_dim": 14, "rope_parameters": _BY_TYPE}
        | {"attention_bias": True, "routed_scaling_factor": 1.7, "mlp_layer_types": _SPARSE},
    ),
    "mimo_v2_flash-tied": (
        "mimo_v2_flash",
        _ROTARY
        | {"n_routed_experts": 8, "num_key_value_heads": 1, "v_head_dim": 10, "attention_value_scale": None}
        | {"rope_parameters": _BY_TYPE, "tie_word_embeddings": True, "norm_topk_prob": False},
    ),
}
ONE_PER_FAMILY: Final = ("afmoe-scaled", "laguna-heads", "beam-tied", "mimo_v2_flash-groups")
