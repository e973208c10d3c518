"""Families with Llama's tensor names and mixtures of experts."""

from __future__ import annotations

from typing import Final

from splitbundle_converter.families.config_reader import ConfigReader
from splitbundle_converter.families.experts import (
    ExpertFacts,
    all_layers,
    block_groups,
    first_dense,
    shared_block,
    shared_experts,
    sparse_steps,
)
from splitbundle_converter.families.facts import (
    Sizes,
    either,
    layer_norm,
    layer_types,
    layer_windows,
    one_window,
    rotary_by_layer_type,
    rotary_on_windowed_layers,
    rotary_positions,
)
from splitbundle_converter.families.llama import (
    BIASED,
    BIASED_BOTH,
    NAMES,
    OLMO2,
    PLAIN,
    SCALED,
    divided_by_scaling,
    exaone4_positions,
    granite_swa_positions,
    hunyuan_rotary,
)
from splitbundle_converter.families.row import Names, OneTensor, Stacked, in_layers, renamed, row

ROUTED: Final[Names] = {
    **NAMES,
    **in_layers(
        "model.layers",
        {"mlp.gate": "mlp.router"},
        {f"mlp.experts.{{row}}.{part}_proj": f"mlp.experts.{part}" for part in ("gate", "up", "down")},
    ),
}
"""The names of mixtures of experts that most families use."""
SHARED_EXPERT: Final[Names] = {
    **ROUTED,
    **in_layers(
        "model.layers", {f"mlp.shared_expert.{part}_proj": f"mlp.shared.{part}" for part in ("gate", "up", "down")}
    ),
}
QWEN_NAMES: Final[Names] = {
    **SHARED_EXPERT,
    **in_layers("model.layers", {"mlp.shared_expert_gate": "mlp.shared_gate"}),
}
MIXTRAL: Final[Names] = {
    **NAMES,
    **in_layers(
        "model.layers",
        {"block_sparse_moe.gate": "mlp.router"},
        {
            f"block_sparse_moe.experts.{{row}}.w{number}": f"mlp.experts.{part}"
            for number, part in ((1, "gate"), (3, "up"), (2, "down"))
        },
    ),
}
QWEN: Final = ExpertFacts(layers=sparse_steps, normalised="norm_topk_prob")


def _qwen2_windows(sizes: Sizes) -> list[int | None]:
    """Return the window of each layer. Without windows, transformers writes a window of 0."""
    if "sliding_attention" in layer_types(sizes):
        return layer_windows(sizes)
    sizes.config.ignored(["sliding_window"])
    return [None] * sizes.layers


def _stacked(module: str, *, gate_up: str, down: str) -> Names:
    return {
        f"{module}.{gate_up}": Stacked(("mlp.experts.gate.weight", "mlp.experts.up.weight")),
        f"{module}.{down}": Stacked(("mlp.experts.down.weight",)),
    }


def sparse_types(config: ConfigReader, layers: int) -> list[bool]:
    """Return which layers have experts, by a list of types."""
    types = config.raw("mlp_layer_types")
    if not isinstance(types, list) or len(types) != layers or any(kind not in ("dense", "sparse") for kind in types):
        config.refuse("mlp_layer_types", "dense or sparse for each layer")
        return [True] * layers
    return [kind == "sparse" for kind in types]


GRANITE_SHARED: Final[Names] = {
    "shared_mlp.input_linear": ("mlp.shared.gate", "mlp.shared.up"),
    "shared_mlp.output_linear": "mlp.shared.down",
}
GRANITE_BLOCK: Final = shared_block("shared_intermediate_size")
GRANITE: Final[Names] = {
    **NAMES,
    **in_layers(
        "model.layers",
        {"block_sparse_moe.router.layer": "mlp.router"},
        _stacked("block_sparse_moe", gate_up="input_linear.weight", down="output_linear.weight"),
        GRANITE_SHARED,
    ),
}
GRANITE_SWA: Final[Names] = {
    **NAMES,
    **in_layers(
        "model.layers",
        {"self_attn.sinks": OneTensor("attention.sinks"), "block_sparse_moe.router": "mlp.router"},
        _stacked("block_sparse_moe.experts", gate_up="gate_up_proj", down="down_proj"),
        GRANITE_SHARED,
    ),
}
SHARED_EXPERTS: Final = {f"mlp.shared_experts.{part}_proj": f"mlp.shared.{part}" for part in ("gate", "up", "down")}
DEEPSEEK: Final[Names] = {
    **ROUTED,
    **in_layers(
        "model.layers",
        {"mlp.gate.e_score_correction_bias": OneTensor("mlp.router.correction")},
        SHARED_EXPERTS,
    ),
}
"""The names of DeepSeek's mixtures of experts, and of many others."""
GPT_OSS: Final[Names] = {
    **NAMES,
    **in_layers(
        "model.layers",
        {"self_attn.sinks": OneTensor("attention.sinks"), "mlp.router": "mlp.router"},
        {
            f"mlp.experts.{source}": Stacked(
                tuple(f"mlp.experts.{part}.{kind}" for part in parts),
                transposed=kind == "weight",
                interleaved=len(parts) > 1,
            )
            for source, kind, parts in (
                ("gate_up_proj", "weight", ("gate", "up")),
                ("gate_up_proj_bias", "bias", ("gate", "up")),
                ("down_proj", "weight", ("down",)),
                ("down_proj_bias", "bias", ("down",)),
            )
        },
    ),
}
# DeepSeek V3's router (DeepSeek-AI 2024, arXiv:2412.19437): a correction balances the load.
BALANCED: Final = ExpertFacts(
    count="n_routed_experts",
    function="sigmoid",
    correction="score",
    groups=block_groups,
    normalised="norm_topk_prob",
    epsilon=1e-20,
    scale="routed_scaling_factor",
    shared=shared_experts("n_shared_experts"),
    layers=first_dense,
)


# fmt: off
EXPERT_FAMILIES: Final = (
    # Mixtral (Jiang et al. 2024, arXiv:2401.04088).
    row("mixtral", MIXTRAL, PLAIN, ignored=["router_jitter_noise"], window=one_window,
        experts=ExpertFacts(count="num_local_experts", inner="intermediate_size")),
    # Qwen 1.5 and 2 with experts (Yang et al. 2024, arXiv:2407.10671): a shared block with a gate.
    row("qwen2_moe", QWEN_NAMES, PLAIN, ignored=["max_window_layers", "use_sliding_window"], qkv_bias="qkv_bias",
        window=_qwen2_windows, experts=QWEN.replace(shared=shared_block("shared_expert_intermediate_size", gate=True))),
    # Qwen 3 with experts (Yang et al. 2025, arXiv:2505.09388).
    row("qwen3_moe", ROUTED, BIASED, ignored=["use_sliding_window"], window=one_window, query_key_norm="head",
        experts=QWEN.replace(count="num_local_experts")),
    # OLMoE (Muennighoff et al. 2024, arXiv:2409.02060).
    row("olmoe", ROUTED, BIASED, allowed={"clip_qkv": None}, query_key_norm="full",
        experts=ExpertFacts(inner="intermediate_size", normalised="norm_topk_prob")),
    # FlexOlmo (Shi et al. 2025, arXiv:2507.07024).
    row("flex_olmo", renamed(ROUTED, {"post_attention_layernorm": "attention_norm",
                                      "post_feedforward_layernorm": "mlp_norm"}),
        OLMO2, experts=ExpertFacts(inner="intermediate_size", normalised="norm_topk_prob")),
    # GLM 4.5 (Zhipu AI 2025, arXiv:2508.06471). Layers above the last one predict further tokens.
    row("glm4_moe", DEEPSEEK, PLAIN, ignored=["num_nextn_predict_layers"], qkv_bias="attention_bias",
        query_key_norm=either("use_qk_norm", "head", None), position=rotary_positions(partial=True),
        further=["model.layers.{further}."], experts=BALANCED),
    # dots.llm1 (rednote 2025, arXiv:2506.05767).
    row("dots1", DEEPSEEK, BIASED, ignored=["max_window_layers"], query_key_norm="head", window=layer_windows,
        experts=BALANCED),
    # Solar Open (Upstage 2026).
    row("solar_open", DEEPSEEK, PLAIN, ignored=["intermediate_size"], inner="moe_intermediate_size",
        qkv_bias="attention_bias",
        experts=BALANCED.replace(layers=all_layers)),
    # K-EXAONE (LG AI Research 2026).
    row("exaone_moe", renamed(DEEPSEEK, {"mlp.e_score_correction_bias": OneTensor("mlp.router.correction")}), PLAIN,
        ignored=["first_k_dense_replace", "sliding_window_pattern"], query_key_norm="head", window=layer_windows,
        position=exaone4_positions, further=["mtp."],
        experts=BALANCED.replace(count="num_experts", layers=sparse_types,
                                 shared=shared_experts("num_shared_experts"))),
    # MiniMax M2 (MiniMax 2025).
    row("minimax_m2",
        {**MIXTRAL, **in_layers("model.layers",
                                {"block_sparse_moe.e_score_correction_bias": OneTensor("mlp.router.correction")})},
        PLAIN, ignored=["rotary_dim", "router_jitter_noise"], query_key_norm="full",
        position=rotary_positions(partial=True),
        experts=ExpertFacts(count="num_local_experts", inner="intermediate_size", function="sigmoid",
                            correction="score")),
    # Granite 3 with experts (IBM 2024), and with a shared block.
    *(row(name, GRANITE, SCALED.replace(mlp_bias=False), head_multiplier=divided_by_scaling,
          experts=ExpertFacts(count="num_local_experts", inner="intermediate_size", shared=shared))
      for name, shared in (("granitemoe", None), ("granitemoeshared", GRANITE_BLOCK))),
    # Granite with attention sinks and experts (IBM 2026).
    row("granitemoe_swa", GRANITE_SWA,
        SCALED.replace(mlp_bias=False), sinks=True, head_multiplier=divided_by_scaling, window=layer_windows,
        position=granite_swa_positions,
        experts=ExpertFacts(count="num_local_experts", inner="intermediate_size", shared=GRANITE_BLOCK)),
    # gpt-oss (OpenAI 2025, arXiv:2508.10925).
    row("gpt_oss", GPT_OSS, BIASED, window=layer_windows, sinks=True,
        experts=ExpertFacts(count="num_local_experts", inner="intermediate_size", bias=True, router_bias=True,
                            clamp="swiglu_limit", gate_slope="swiglu_alpha", up_offset=1.0)),
    # Hunyuan A13B (Tencent 2025).
    row("hunyuan_v1_moe",
        {**renamed(ROUTED, {f"self_attn.{part}_layernorm": f"attention.{part}_norm" for part in ("query", "key")}
                   | {"mlp.gate.wg": "mlp.router"}),
         **in_layers("model.layers",
                     {f"mlp.shared_mlp.{part}_proj": f"mlp.shared.{part}" for part in ("gate", "up", "down")})},
        BIASED, ignored=["eod_token_id", "pretraining_tp", "sep_token_id"], query_key_norm="head", after_rotation=True,
        position=hunyuan_rotary,
        experts=ExpertFacts(per_token="moe_topk", inner="intermediate_size",  # noqa: S106  # the name of a field
                            shared=shared_block("intermediate_size"))),
    # Hy3 (Tencent 2026).
    row("hy_v3",
        renamed(DEEPSEEK, {"mlp.expert_bias": OneTensor("mlp.router.correction"), "mlp.router.gate": "mlp.router",
                           **{f"mlp.shared_mlp.{part}_proj": f"mlp.shared.{part}" for part in ("gate", "up", "down")}}),
        BIASED_BOTH, ignored=["enable_moe_fp32_combine"], query_key_norm="head",
        experts=ExpertFacts(count="num_experts", function="sigmoid", correction="score", epsilon=1e-20,
                            scale="router_scaling_factor", layers=sparse_types,
                            shared=shared_experts("num_shared_experts"))),
    # Phi 3.5 with experts (Microsoft 2024, arXiv:2404.14219).
    row("phimoe", MIXTRAL, PLAIN, ignored=["input_jitter_noise"], norm=layer_norm("rms_norm_eps"), window=one_window,
        qkv_bias="attention_bias", output_bias="attention_bias", head_bias="lm_head_bias",
        experts=ExpertFacts(count="num_local_experts", inner="intermediate_size", function="sparsemixer",
                            normalised=False, epsilon="router_jitter_noise")),
    # Mellum 2 (JetBrains 2026).
    row("mellum", ROUTED, BIASED, query_key_norm="head", window=layer_windows, position=rotary_by_layer_type,
        ignored=["mtp_layer_types", "mtp_mlp_layer_types", "num_mtp_layers", "num_nextn_predict_layers"],
        further=["mtp."], experts=QWEN.replace(count="num_local_experts", layers=sparse_types)),
    # Flint (2026): sinks, and positions on layers with a window alone.
    row("flint", renamed(SHARED_EXPERT, {"self_attn.softmax_offset": OneTensor("attention.sinks")}), BIASED,
        query_key_norm="head", window=layer_windows, sinks=True, position=rotary_on_windowed_layers(),
        experts=QWEN.replace(function="sigmoid", shared=shared_block("shared_expert_intermediate_size"))),
    # Kolibri (2026): the correction is added to the logits.
    row("kolibri1", renamed(DEEPSEEK, {"moe.router.expert_bias": OneTensor("mlp.router.correction"),
                                       "post_attn_norm": "attention_output_norm",
                                       "post_ffn_norm": "mlp_output_norm"}),
        PLAIN, inner="moe_intermediate_size", placement="sandwich", query_key_norm="head", window=layer_windows,
        position=exaone4_positions,
        experts=ExpertFacts(count="num_local_experts", function="sigmoid", correction="logit",
                            normalised="norm_topk_prob", shared=shared_block("shared_expert_intermediate_size"))),
)
# fmt: on
