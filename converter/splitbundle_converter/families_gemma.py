"""Gemma and its successors: norm weights stored as differences from one, embeddings multiplied by √hidden."""

from __future__ import annotations

from typing import Any, Final

from splitbundle.architecture import Architecture
from splitbundle_converter.config_reader import ConfigReader
from splitbundle_converter.family import rms_norm
from splitbundle_converter.llama_like import layer_windows, llama_like, llama_row, optional_number, rotary_by_type


def gemma_like(config: ConfigReader, **fields: Any) -> Architecture:
    """What all of them are; ``fields`` as for ``llama_like``."""
    config.only("use_bidirectional_attention", None, False)
    config.inert(["cache_implementation"])
    bias = config.boolean("attention_bias")
    return llama_like(
        config,
        norm=rms_norm(config.number("rms_norm_eps"), weight_offset=1.0),
        multiplier=lambda hidden: hidden**0.5,
        qkv_bias=bias,
        output_bias=bias,
        **fields,
    )


def gemma(config: ConfigReader) -> Architecture:
    """Gemma (Gemma Team 2024, arXiv:2403.08295)."""
    config.only("hidden_activation", None, "gelu_pytorch_tanh")  # in the first releases, unused by the model
    return gemma_like(config)


def _windowed(config: ConfigReader, **fields: Any) -> Architecture:
    """Gemma 2 and later: a window on some layers, a scale of the queries' own, a cap on the logits."""
    config.only("hidden_act", "gelu_pytorch_tanh")  # in some releases, unused by the model
    return gemma_like(
        config,
        activation="hidden_activation",
        windows=layer_windows(config),
        scale=config.number("query_pre_attn_scalar") ** -0.5,
        of_head={"logit_cap": optional_number(config, "final_logit_softcapping")},
        **fields,
    )


def gemma2(config: ConfigReader) -> Architecture:
    """Gemma 2 (Gemma Team 2024, arXiv:2408.00118): norms before and after each block, capped scores."""
    config.inert(["sliding_window_size"])  # in the first releases, unused by the model
    return _windowed(config, placement="sandwich", logit_cap=optional_number(config, "attn_logit_softcapping"))


def gemma3(config: ConfigReader) -> Architecture:
    """Gemma 3 (Gemma Team 2025, arXiv:2503.19786): normalised queries and keys in place of capped scores, and rotary
    positions that differ between windowed and full layers.
    """
    config.only("attn_logit_softcapping", None)  # which transformers reads and doesn't use
    # transformers has made layer_types and rope_parameters of them.
    config.inert(["_sliding_window_pattern", "rope_local_base_freq", "sliding_window_pattern"])
    return _windowed(config, placement="sandwich", query_key_norm="head", position=rotary_by_type)


def vaultgemma(config: ConfigReader) -> Architecture:
    """VaultGemma (Google 2025): Gemma 2 without the norms after the blocks."""
    return _windowed(config, logit_cap=optional_number(config, "attn_logit_softcapping"))


_SANDWICH: Final = {
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_output_norm",
}
GEMMA_FAMILIES: Final = (
    llama_row("gemma", gemma),
    llama_row("gemma2", gemma2, _SANDWICH),
    llama_row("gemma3_text", gemma3, _SANDWICH),
    llama_row("vaultgemma", vaultgemma, {"pre_feedforward_layernorm": "mlp_norm"}),
)
