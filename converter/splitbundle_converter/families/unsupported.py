"""Find the reason why a model type is not in the table of families, if its configuration shows one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from splitbundle.errors import quoted

EXPECTED: Final = "one of the families that splitbundle families lists"
_REASONS: Final = {
    "mixtures of experts like this one": (
        *("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"),
        *("moe_intermediate_size", "num_experts_per_tok", "moe_top_k"),
    ),
    "latent attention": ("kv_lora_rank", "qk_rope_head_dim"),
    "recurrent layers": (
        *("state_size", "ssm_state_size", "mamba_d_state", "mamba_d_conv", "lru_width"),
        *("linear_num_value_heads", "linear_conv_kernel_dim", "attention_hidden_size", "rescale_every"),
    ),
    "short convolutions": ("conv_L_cache",),
    "cross-attention to images": ("cross_attention_layers",),
    "layers that share keys and values, or have inputs of their own": (
        *("num_kv_shared_layers", "hidden_size_per_layer_input"),
    ),
    "encoders": ("is_encoder_decoder", "encoder_layers", "type_vocab_size"),
}
"""A feature that the decoder lacks -> the configuration fields that show this feature."""


def reason(raw: Mapping[str, Any]) -> str | None:
    """Return a sentence about a field whose feature can't be converted, or None if no field shows one.

    The field may be in an inner object, as that of the language part.
    """
    inner = [value for value in raw.values() if isinstance(value, dict)]
    for what, fields in _REASONS.items():
        for field in fields:
            value = next((each[field] for each in (raw, *inner) if each.get(field)), None)
            if value is not None:
                return f"It has {field} {quoted(value, 40)}, and {what} can't be converted yet"
    return None
