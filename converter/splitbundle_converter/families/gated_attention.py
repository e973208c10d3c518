"""Families with experts whose attention has gates, or values that aren't as wide as keys."""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import Final

from splitbundle.format.architecture.attention import OutputGate
from splitbundle.format.architecture.decoder import ResidualScale, ResidualScales
from splitbundle.format.architecture.positions import QueryTemperature
from splitbundle_converter.families.config_reader import ConfigReader
from splitbundle_converter.families.experts import ExpertFacts, shared_block, shared_experts
from splitbundle_converter.families.facts import (
    Sizes,
    layer_types,
    layer_windows,
    root_of_hidden,
    rotary_by_layer_type,
    rotary_on_windowed_layers,
)
from splitbundle_converter.families.llama import BIASED
from splitbundle_converter.families.llama_experts import BALANCED, DEEPSEEK, ROUTED, sparse_types
from splitbundle_converter.families.row import Names, OneTensor, in_layers, renamed, row

CHANNEL_GATE: Final = OutputGate(width="channel", function="sigmoid", bias=False)


def _afmoe_layers(config: ConfigReader, layers: int) -> list[bool]:
    """Return which layers have experts: all but the first ``num_dense_layers``."""
    return [i >= config.integer("num_dense_layers", minimum=0) for i in range(layers)]


def _afmoe_multiplier(sizes: Sizes) -> float:
    return root_of_hidden(sizes) if sizes.config.boolean("mup_enabled") else 1.0


def _laguna_gate(sizes: Sizes) -> OutputGate:
    gating = sizes.config.raw("gating")
    if gating not in (True, "per-head", "per-element"):
        sizes.config.refuse("gating", "true, per-head or per-element")
    return OutputGate(width="channel" if gating == "per-element" else "head", function="softplus", bias=False)


def _laguna_heads(sizes: Sizes) -> list[int]:
    heads = sizes.config.raw("num_attention_heads_per_layer")
    if not isinstance(heads, list) or len(heads) != sizes.layers or any(type(each) is not int for each in heads):
        sizes.config.refuse("num_attention_heads_per_layer", f"{sizes.layers} numbers of heads")
    elif any(not 0 < each < 2**16 for each in heads):
        sizes.config.refuse("num_attention_heads_per_layer", "numbers from 1 to 65535")
    else:
        return heads
    return [sizes.heads] * sizes.layers


def _beam_scales(layer: int) -> ResidualScales:
    """Return the factors of a layer's sums. After n terms, the embedding among them, each has the factor 1/√n."""

    def scale(n: int) -> ResidualScale:
        return ResidualScale(kept=sqrt((n - 1) / n), added=1 / sqrt(n))

    return ResidualScales(attention=scale(2 * layer + 2), mlp=scale(2 * layer + 3))


def _beam_temperature(sizes: Sizes) -> list[QueryTemperature | None]:
    """Return how queries grow: on layers without positions, with the power 0.1 of the position."""
    growing = QueryTemperature(beta=0.1, original_positions=2048, offset=1, growth="power")
    parameters = sizes.config.inside("rope_parameters")
    return [growing if parameters.raw(kind) is None else None for kind in layer_types(sizes)]


def _doubled_heads(sizes: Sizes) -> list[int]:
    """Return the key heads of each layer: twice as many on layers with a window."""
    heads = sizes.config.integer("num_key_value_heads")
    found = [2 * heads if kind == "sliding_attention" else heads for kind in layer_types(sizes)]
    if any(sizes.heads % each for each in found):
        sizes.config.refuse("num_key_value_heads", f"a divisor of num_attention_heads ({sizes.heads}), twice too")
        return [1] * sizes.layers
    return found


SANDWICH: Final[Names] = {
    "post_attention_layernorm": "attention_output_norm",
    "post_mlp_layernorm": "mlp_output_norm",
    "pre_mlp_layernorm": "mlp_norm",
    "self_attn.gate_proj": "attention.gate",
}
BEAM: Final[Names] = {
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_output_norm",
    "self_attn.gate_proj": "attention.gate",
    "self_attn.gate_bias": OneTensor("attention.gate_bias"),
}
LAGUNA: Final[Names] = {
    "mlp.experts.e_score_correction_bias": OneTensor("mlp.router.correction"),
    "self_attn.g_proj": "attention.gate",
    **{f"mlp.shared_expert.{part}_proj": f"mlp.shared.{part}" for part in ("gate", "up", "down")},
}

# fmt: off
GATED_ATTENTION_FAMILIES: Final = (
    # AFM and Trinity (Arcee AI 2025): positions on layers with a window alone.
    row("afmoe", renamed(DEEPSEEK, {"mlp.expert_bias": OneTensor("mlp.router.correction"),
                                    "mlp.router.gate": "mlp.router", **SANDWICH}),
        BIASED, ignored=["global_attn_every_n_layers"], placement="sandwich", query_key_norm="head",
        window=layer_windows, position=rotary_on_windowed_layers(), output_gate=CHANNEL_GATE,
        embedding_multiplier=_afmoe_multiplier,
        experts=BALANCED.replace(count="num_experts", groups=None, normalised=True, scale="route_scale",
                                 layers=_afmoe_layers, shared=shared_experts("num_shared_experts"))),
    # Laguna (Poolside 2026): layers may differ in their number of heads.
    row("laguna", renamed(DEEPSEEK, LAGUNA), BIASED, allowed={"moe_apply_router_weight_on_input": False},
        query_key_norm="head", layer_heads=_laguna_heads, window=layer_windows, output_gate=_laguna_gate,
        position=partial(rotary_by_layer_type, partial=1.0),
        experts=ExpertFacts(function="sigmoid", correction="score", scale="moe_routed_scaling_factor",
                            logit_cap="moe_router_logit_softcapping", layers=sparse_types,
                            shared=shared_block("shared_expert_intermediate_size"))),
    # Beam (2026): each sum of the residual stream is a weighted one.
    row("beam", renamed({**DEEPSEEK, **in_layers("model.layers", {"self_attn.gate_proj": "attention.gate"})}, BEAM),
        BIASED, placement="sandwich", query_key_norm="head", window=layer_windows,
        position=partial(rotary_by_layer_type, unpositioned=True), query_temperature=_beam_temperature,
        output_gate=OutputGate(width="channel", function="sigmoid", bias=True), residual_scales=_beam_scales,
        head_logit_cap="final_logit_softcapping",
        experts=BALANCED.replace(count="num_experts", layers=sparse_types, shared=None)),
    # MiMo V2 Flash (Xiaomi 2025): narrow values, and sinks and more key heads on layers with a window.
    row("mimo_v2_flash",
        {**ROUTED, **in_layers("model.layers",
                               {"mlp.gate.e_score_correction_bias": OneTensor("mlp.router.correction"),
                                "self_attn.attention_sink_bias": OneTensor("attention.sinks")})},
        BIASED, ignored=["sliding_window_size"], output_bias=False, kv_heads=_doubled_heads, window=layer_windows,
        sinks=lambda sizes: [kind == "sliding_attention" for kind in layer_types(sizes)],
        position=partial(rotary_by_layer_type, partial=0.334), value_dim="v_head_dim",
        value_multiplier="attention_value_scale",
        experts=BALANCED.replace(layers=sparse_types, shared=None)),
)
# fmt: on
