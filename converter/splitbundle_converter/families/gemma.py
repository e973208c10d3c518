"""Gemma and its successors: norm weights are stored as differences from one; embeddings are multiplied by √hidden."""

from __future__ import annotations

from typing import Final

from splitbundle_converter.families.facts import layer_windows, rms_norm, root_of_hidden, rotary_by_layer_type
from splitbundle_converter.families.llama import BIASED, NAMES
from splitbundle_converter.families.row import renamed, row

GEMMA: Final = BIASED.replace(
    ignored=["cache_implementation"],
    allowed={"use_bidirectional_attention": (None, False)},
    norm=rms_norm("rms_norm_eps", weight_offset=1.0),
    embedding_multiplier=root_of_hidden,
)
# Gemma 2 and later: a window on some layers, a separate scale of the queries, a cap on the logits.
WINDOWED: Final = GEMMA.replace(
    allowed={"hidden_act": "gelu_pytorch_tanh"},  # some releases have it; the model does not use it
    activation="hidden_activation",
    window=layer_windows,
    scale=lambda sizes: sizes.config.number("query_pre_attn_scalar") ** -0.5,
    head_logit_cap="final_logit_softcapping",
)
SANDWICH: Final = renamed(
    NAMES,
    {
        "post_attention_layernorm": "attention_output_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_output_norm",
    },
)

# A family has a few lines here. With one field on each line, the table would be hard to see.
# fmt: off
GEMMA_FAMILIES: Final = (
    # Gemma (Gemma Team 2024, arXiv:2403.08295). The first releases have the allowed field; the model does not use it.
    row("gemma", NAMES, GEMMA, allowed={"hidden_activation": (None, "gelu_pytorch_tanh")}),
    # Gemma 2 (Gemma Team 2024, arXiv:2408.00118): norms before and after each block, capped scores. The first releases
    # have the ignored field; the model does not use it.
    row("gemma2", SANDWICH, WINDOWED, ignored=["sliding_window_size"], placement="sandwich",
        logit_cap="attn_logit_softcapping"),
    # Gemma 3 (Gemma Team 2025, arXiv:2503.19786): normalized queries and keys in place of capped scores, and rotary
    # positions that differ between windowed and full layers. transformers converts the ignored fields into layer_types
    # and rope_parameters. It reads the allowed field and does not use it.
    row("gemma3_text", SANDWICH, WINDOWED,
        ignored=["_sliding_window_pattern", "rope_local_base_freq", "sliding_window_pattern"],
        allowed={"attn_logit_softcapping": None}, placement="sandwich", query_key_norm="head",
        position=rotary_by_layer_type),
    # VaultGemma (Google 2025): Gemma 2 without the norms after the blocks.
    row("vaultgemma", renamed(NAMES, {"pre_feedforward_layernorm": "mlp_norm"}), WINDOWED,
        logit_cap="attn_logit_softcapping"),
)
# fmt: on
