"""Families whose norm is RMSNorm: those that come from Llama."""

from __future__ import annotations

from typing import Any, Final

from splitbundle.architecture import Architecture, QueryTemperature, Rotary, Unpositioned, Unscaled
from splitbundle_converter.config_reader import ConfigReader
from splitbundle_converter.family import layer_count, rotary
from splitbundle_converter.llama_like import (
    Position,
    interleaved,
    layer_windows,
    llama_like,
    llama_row,
    one_window,
    rotary_by_type,
    whole_heads,
)


def biased(config: ConfigReader) -> dict[str, Any]:
    """Biases on all four projections of attention, or on none."""
    bias = config.boolean("attention_bias")
    return {"qkv_bias": bias, "output_bias": bias}


def llama(config: ConfigReader, **fields: Any) -> Architecture:
    """Llama 1 to 3; ``fields`` as for ``llama_like``."""
    config.inert(["pretraining_tp"])  # which only splits the same products
    config.only("rope_interleaved", False)  # SmolLM's, of another framework
    return llama_like(config, mlp_bias=config.boolean("mlp_bias"), **biased(config), **fields)


def internlm3(config: ConfigReader) -> Architecture:
    """InternLM3 (Shanghai AI Laboratory 2025), which transformers computes by Llama's classes."""
    config.inert(["bias", "qkv_bias"])  # other names of mlp_bias and attention_bias
    return llama(config)


def iquestcoder(config: ConfigReader) -> Architecture:
    """IQuest-Coder (2025), which transformers computes by Llama's classes."""
    config.only("clip_qkv", None)
    config.only("use_sliding_window", False)
    return llama(config)


def arcee(config: ConfigReader) -> Architecture:
    """AFM-4.5B (Arcee AI 2025): Llama without gates."""
    return llama(config, gated=False)


def cwm(config: ConfigReader) -> Architecture:
    """Code World Model (Meta FAIR 2025, arXiv:2510.02387): Llama with a window on three layers of four."""
    config.inert(["pretraining_tp"])
    return llama_like(config, mlp_bias=config.boolean("mlp_bias"), windows=layer_windows(config))


def mistral(config: ConfigReader) -> Architecture:
    """Mistral 7B (Jiang et al. 2023, arXiv:2310.06825): a window on every layer, or on none."""
    return llama_like(config, windows=one_window(config))


def ministral(config: ConfigReader) -> Architecture:
    """Ministral 8B (Mistral AI 2024): a window on the layers that ``layer_types`` names."""
    config.integer("head_dim")  # without it, transformers fails
    return llama_like(config, windows=layer_windows(config))


def ministral3(config: ConfigReader) -> Architecture:
    """Ministral 3 (Mistral AI 2025): queries of far positions made larger, as in Llama 4."""
    inner = config.inside("rope_parameters")
    inner.inert(["max_position_embeddings"])
    temperature = QueryTemperature(
        beta=inner.number("llama_4_scaling_beta"),
        original_positions=inner.integer("original_max_position_embeddings"),
        offset=0,
    )
    return llama_like(
        config,
        windows=one_window(config),
        position=lambda config, head_dim: rotary(config, head_dim, parameters=inner, partial=False),
        query_temperature=temperature,
    )


def qwen2(config: ConfigReader) -> Architecture:
    """Qwen 2 and 2.5 (Qwen Team 2024, arXiv:2407.10671): biases on queries, keys and values; a window on the layers
    that ``layer_types`` names.
    """
    config.inert(["max_window_layers", "use_sliding_window"])  # layer_types has been made of them
    config.only("use_mrope", False)
    return llama_like(config, qkv_bias=True, windows=layer_windows(config))


def qwen3(config: ConfigReader) -> Architecture:
    """Qwen 3 (Qwen Team 2025, arXiv:2505.09388): normalised queries and keys in place of biases."""
    config.inert(["max_window_layers", "use_sliding_window"])  # layer_types has been made of them
    return llama_like(config, query_key_norm="head", windows=layer_windows(config), **biased(config))


def seed_oss(config: ConfigReader) -> Architecture:
    """Seed-OSS (ByteDance 2025): as Qwen 2."""
    config.inert(["pretraining_tp", "residual_dropout"])
    return llama_like(
        config,
        mlp_bias=config.boolean("mlp_bias"),
        qkv_bias=config.boolean("attention_bias"),
        output_bias=config.boolean("attention_out_bias"),
    )


def olmo2(config: ConfigReader, **fields: Any) -> Architecture:
    """OLMo 2 (OLMo Team 2024, arXiv:2501.00656): norms on what the blocks give, and on all heads' queries and keys."""
    return llama_like(config, placement="output", query_key_norm="full", **biased(config), **fields)


def olmo3(config: ConfigReader) -> Architecture:
    """OLMo 3 (OLMo Team 2025, arXiv:2512.13961): windows on three layers of four, whose rotations aren't scaled."""
    return olmo2(config, windows=layer_windows(config), position=rotary_by_type)


def exaone4(config: ConfigReader) -> Architecture:
    """EXAONE 4.0 (LG AI Research 2025, arXiv:2507.11407): norms on what the blocks give; full layers know no position
    where others are windowed.
    """
    config.inert(["sliding_window_pattern"])  # layer_types has been made of it
    windows, hybrid = layer_windows(config), one_window(config) is not None

    def positions(config: ConfigReader, head_dim: int) -> tuple[Position, ...]:
        turned = whole_heads(config, head_dim)
        return tuple(Unpositioned() if hybrid and window is None else turned for window in windows)

    return llama_like(config, placement="output", query_key_norm="head", windows=windows, position=positions)


def smollm3(config: ConfigReader) -> Architecture:
    """SmolLM3 (Hugging Face 2025): every fourth layer knows no position."""
    # layer_types and no_rope_layers have been made of the others.
    config.inert(["max_window_layers", "no_rope_layer_interval", "pretraining_tp"])
    windows, turning = layer_windows(config), config.raw("no_rope_layers")
    if any(windows) and not config.boolean("use_sliding_window"):
        config.refuse("use_sliding_window", "true, as some layer_types are sliding_attention")
    config.inert(["use_sliding_window"])
    count = layer_count(config, "num_hidden_layers")
    if not isinstance(turning, list) or len(turning) != count or any(turns not in (0, 1) for turns in turning):
        config.refuse("no_rope_layers", f"0, or 1 for a layer that has positions, {count} times")
        turning = [1] * count

    def positions(config: ConfigReader, head_dim: int) -> tuple[Position, ...]:
        turned = whole_heads(config, head_dim)
        return tuple(turned if turns else Unpositioned() for turns in turning)

    return llama_like(
        config, mlp_bias=config.boolean("mlp_bias"), windows=windows, position=positions, **biased(config)
    )


def glm(config: ConfigReader, **fields: Any) -> Architecture:
    """GLM-4 (Team GLM 2024, arXiv:2406.12793): the first half of a head's channels turned in neighbouring pairs."""
    return llama_like(
        config,
        position=lambda config, head_dim: rotary(config, head_dim, layout="interleaved"),
        qkv_bias=config.boolean("attention_bias"),
        **fields,
    )


def glm4(config: ConfigReader) -> Architecture:
    """GLM-4-0414 (Z.ai 2025): norms after each block too."""
    return glm(config, placement="sandwich")


def _scaled(config: ConfigReader, logits: float, **fields: Any) -> Architecture:
    """Llama with a multiplier at every place (Yang et al. 2022, arXiv:2203.03466)."""
    return llama_like(
        config,
        mlp_bias=config.boolean("mlp_bias"),
        multiplier=lambda hidden: config.number("embedding_multiplier"),
        residual_multiplier=config.number("residual_multiplier"),
        scale=config.number("attention_multiplier"),
        of_head={"multiplier": logits},
        **biased(config),
        **fields,
    )


def granite(config: ConfigReader) -> Architecture:
    """Granite 3 (IBM 2024). Logits are divided."""
    return _scaled(config, 1 / config.number("logits_scaling"))


def hyperclovax(config: ConfigReader) -> Architecture:
    """HyperCLOVA X SEED (NAVER 2025): norms after each block too. Logits are multiplied."""
    placement = "sandwich" if config.boolean("use_post_norm") else "pre"
    return _scaled(config, config.number("logits_scaling"), placement=placement)


def phi3(config: ConfigReader) -> Architecture:
    """Phi-3 and Phi-4 (Microsoft 2024, arXiv:2404.14219): Mistral with fused projections and LongRoPE."""
    config.inert(["embd_pdrop", "resid_pdrop"])
    # transformers has put them into rope_parameters.
    config.inert(["original_max_position_embeddings", "partial_rotary_factor"])
    for name in ("attention_bias", "lm_head_bias", "mlp_bias"):
        config.only(name, False)
    for name in ("full_attn_mod", "interpolate_factor"):
        config.only(name, 1)
    return llama_like(config, windows=one_window(config), position=rotary)


def ernie4_5(config: ConfigReader) -> Architecture:
    """ERNIE 4.5 (Baidu 2025): Llama turned in neighbouring pairs."""
    bias = config.boolean("use_bias")
    return llama_like(config, position=interleaved, mlp_bias=bias, qkv_bias=bias, output_bias=bias)


def helium(config: ConfigReader) -> Architecture:
    """Helium (Kyutai 2025): Llama turned in neighbouring pairs."""
    return llama_like(
        config,
        position=interleaved,
        mlp_bias=config.boolean("mlp_bias"),
        qkv_bias=config.boolean("attention_bias"),
    )


def hunyuan_dense(config: ConfigReader) -> Architecture:
    """Hunyuan (Tencent 2025): queries and keys normalised after the rotation."""
    config.inert(["cla_share_factor", "eod_token_id", "im_end_id", "im_newline_id", "im_start_id", "image_token_id"])
    config.inert(["mask_init_id", "org_vocab_size", "pad_id", "pretraining_tp", "text_end_id", "text_start_id"])
    config.only("attention_head_dim", config.integer("head_dim"))  # without head_dim, transformers fails
    for name in ("add_classification_head", "mlp_bias", "use_cla"):
        config.only(name, False)
    config.only("use_qk_norm", True)
    return llama_like(
        config, query_key_norm="head", normed_after_rotation=True, position=_hunyuan_rotary, **biased(config)
    )


def _hunyuan_rotary(config: ConfigReader, head_dim: int) -> Rotary:
    """Where ``alpha`` is given, "dynamic" means another base, the same for all lengths, and nothing else counts."""
    inner = config.inside("rope_parameters")
    if inner.raw("rope_type") != "dynamic" or not inner.raw("alpha"):
        inner.only("alpha", None)
        return rotary(config, head_dim, parameters=inner, partial=False)
    inner.inert(["beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim", "type"])
    if head_dim < 4 or head_dim % 2:
        config.refuse("head_dim", "an even number of channels, at least 4")
        head_dim = 4
    base = inner.number("rope_theta") * inner.number("alpha") ** (head_dim / (head_dim - 2))
    for name in inner.unread():
        inner.refuse(name, "no such parameter with rope_type dynamic and alpha")
    config.problems += inner.problems
    return Rotary(base=base, dim=head_dim, layout="half", scaling=Unscaled())


def apertus(config: ConfigReader) -> Architecture:
    """Apertus (Swiss AI Initiative 2025, arXiv:2509.14233): no gates, and an activation that learns."""
    config.inert(["hidden_dropout"])
    config.only("mlp_bias", False)
    config.only("post_norm", False)
    config.only("qk_norm", True)
    return llama_like(config, gated=False, query_key_norm="head", **biased(config))


_OUTPUT_NORMS: Final = {"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "mlp_norm"}
_FUSED_GATE: Final = {"mlp.gate_up_proj": ("mlp.gate", "mlp.up")}
RMS_NORM_FAMILIES: Final = (
    llama_row("llama", llama),
    llama_row("internlm3", internlm3),
    llama_row("iquestcoder", iquestcoder),
    llama_row("arcee", arcee),
    llama_row("cwm", cwm),
    llama_row("mistral", mistral),
    llama_row("ministral", ministral),
    llama_row("ministral3", ministral3),
    llama_row("qwen2", qwen2),
    llama_row("qwen3", qwen3),
    llama_row("seed_oss", seed_oss),
    llama_row("olmo2", olmo2, _OUTPUT_NORMS),
    llama_row("olmo3", olmo3, _OUTPUT_NORMS),
    llama_row("exaone4", exaone4, _OUTPUT_NORMS),
    llama_row("smollm3", smollm3),
    llama_row("glm", glm, _FUSED_GATE),
    llama_row(
        "glm4",
        glm4,
        _FUSED_GATE
        | {
            "post_self_attn_layernorm": "attention_output_norm",
            "post_attention_layernorm": "mlp_norm",
            "post_mlp_layernorm": "mlp_output_norm",
        },
    ),
    llama_row("granite", granite),
    llama_row("hyperclovax", hyperclovax, {"post_norm1": "attention_output_norm", "post_norm2": "mlp_output_norm"}),
    llama_row(
        "phi3",
        phi3,
        _FUSED_GATE | {"self_attn.qkv_proj": ("attention.query", "attention.key", "attention.value")},
    ),
    llama_row("ernie4_5", ernie4_5),
    llama_row("helium", helium),
    llama_row(
        "hunyuan_v1_dense",
        hunyuan_dense,
        {"self_attn.query_layernorm": "attention.query_norm", "self_attn.key_layernorm": "attention.key_norm"},
    ),
    llama_row(
        "apertus",
        apertus,
        {"attention_layernorm": "attention_norm", "feedforward_layernorm": "mlp_norm"},
        tensors={
            "mlp.act_fn.alpha_p": "mlp.activation.alpha_p",
            "mlp.act_fn.alpha_n": "mlp.activation.alpha_n",
        },
        constants={"mlp.act_fn.beta": 0.5, "mlp.act_fn.eps": -1e-6},
    ),
)
