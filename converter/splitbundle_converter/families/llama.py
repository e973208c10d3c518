"""Families with Llama's tensor names, or similar ones, and RMSNorm. Most have rotary positions and a gated MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.norms import Norm
from splitbundle.format.architecture.positions import QueryTemperature
from splitbundle.format.architecture.rotary import Rotary, Unscaled
from splitbundle.format.architecture.sizes import MAX_LAYERS
from splitbundle_converter.families.config_reader import ConfigReader
from splitbundle_converter.families.experts import ExpertFacts, shared_block
from splitbundle_converter.families.facts import (
    Facts,
    Position,
    Sizes,
    either,
    layer_windows,
    one_window,
    rms_norm,
    rotary_by_layer_type,
    rotary_on_windowed_layers,
    rotary_positions,
)
from splitbundle_converter.families.rotary import rotary
from splitbundle_converter.families.row import (
    QUERY_KEY_VALUE,
    Names,
    OneTensor,
    Stacked,
    in_layers,
    q_k_v,
    renamed,
    row,
)

NAMES: Final[Names] = {
    "model.embed_tokens": "embedding.token",
    "model.norm": "head.norm",
    "lm_head": "head.projection",
    "model.rotary_emb.inv_freq": None,
    **in_layers(
        "model.layers",
        {"input_layernorm": "attention_norm", **q_k_v("self_attn"), "self_attn.rotary_emb.inv_freq": None},
        {"self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"},
        {"self_attn.o_proj": "attention.output"},
        {"post_attention_layernorm": "mlp_norm"},
        {"mlp.gate_proj": "mlp.gate", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"},
    ),
}
EXAONE: Final[Names] = {
    "transformer.wte": "embedding.token",
    **in_layers(
        "transformer.h",
        {"ln_1": "attention_norm", **q_k_v("attn.attention"), "attn.attention.out_proj": "attention.output"},
        {"ln_2": "mlp_norm", "mlp.c_fc_0": "mlp.gate", "mlp.c_fc_1": "mlp.up", "mlp.c_proj": "mlp.down"},
        {"attn.attention.rotary.inv_freq": None},
    ),
    "transformer.ln_f": "head.norm",
    "lm_head": "head.projection",
}
OUTPUT_NORMS: Final = renamed(
    NAMES, {"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "mlp_norm"}
)
FUSED_GATE: Final = renamed(NAMES, {"mlp.gate_up_proj": ("mlp.gate", "mlp.up")})
APERTUS: Final = renamed(
    NAMES,
    {
        "attention_layernorm": "attention_norm",
        "feedforward_layernorm": "mlp_norm",
        "mlp.act_fn.alpha_p": OneTensor("mlp.activation.alpha_p"),
        "mlp.act_fn.alpha_n": OneTensor("mlp.activation.alpha_n"),
        "mlp.act_fn.beta": 0.5,
        "mlp.act_fn.eps": -1e-6,
    },
)
QWEN: Final = ("max_window_layers", "use_sliding_window")  # transformers converts them into layer_types
HUNYUAN: Final = (
    *("cla_share_factor", "eod_token_id", "im_end_id", "im_newline_id", "im_start_id", "image_token_id"),
    *("mask_init_id", "org_vocab_size", "pad_id", "pretraining_tp", "text_end_id", "text_start_id"),
)

# Llama (Touvron et al. 2023, arXiv:2302.13971) without any option.
PLAIN: Final = Facts(
    ignored=frozenset({"attention_dropout", "max_position_embeddings"}),
    norm=rms_norm("rms_norm_eps"),
    position=rotary_positions(),
)
BIASED: Final = PLAIN.replace(qkv_bias="attention_bias", output_bias="attention_bias")
BIASED_BOTH: Final = BIASED.replace(mlp_bias="mlp_bias")
# The ignored field only splits the same matrix products. SmolLM's configuration has the allowed field, from another
# framework.
LLAMA: Final = BIASED_BOTH.replace(ignored=["pretraining_tp"], allowed={"rope_interleaved": False})
OLMO2: Final = BIASED.replace(placement="output", query_key_norm="full")
GLM: Final = PLAIN.replace(position=rotary_positions("interleaved", partial=True), qkv_bias="attention_bias")
# A multiplier in each place (Yang et al. 2022, arXiv:2203.03466).
SCALED: Final = BIASED_BOTH.replace(
    embedding_multiplier="embedding_multiplier", residual_multiplier="residual_multiplier", scale="attention_multiplier"
)


def _llama4_layers(config: ConfigReader, layers: int) -> list[bool]:
    numbers = config.raw("moe_layers")
    if not isinstance(numbers, list) or any(type(each) is not int or not 0 <= each < layers for each in numbers):
        config.refuse("moe_layers", f"numbers of layers, below {layers}")
        numbers = []
    return [i in numbers for i in range(layers)]


LLAMA4: Final = ExpertFacts(
    count="num_local_experts",
    inner="intermediate_size",
    layers=_llama4_layers,
    function="sigmoid",
    normalised=False,
    weighs="input",
    shared=shared_block("intermediate_size"),
)
PARTS: Final = ("gate", "up", "down")
LLAMA4_NAMES: Final[Names] = {
    **renamed(NAMES, {f"feed_forward.{part}_proj": f"mlp.{part}" for part in PARTS}),
    **in_layers(
        "model.layers",
        {"feed_forward.router": "mlp.router"},
        {
            "feed_forward.experts.gate_up_proj": Stacked(
                ("mlp.experts.gate.weight", "mlp.experts.up.weight"), transposed=True
            ),
            "feed_forward.experts.down_proj": Stacked(("mlp.experts.down.weight",), transposed=True),
        },
        {f"feed_forward.shared_expert.{part}_proj": f"mlp.shared.{part}" for part in PARTS},
    ),
}


def ministral3(config: ConfigReader) -> Architecture:
    """Return the architecture of Ministral 3 (Mistral AI 2025): queries grow with the position, as in Llama 4."""
    inner = config.inside("rope_parameters")
    inner.ignored(["max_position_embeddings"])
    return PLAIN.replace(
        window=one_window,
        position=lambda sizes: rotary(config, sizes.head_dim, parameters=inner),
        query_temperature=QueryTemperature(
            beta=inner.number("llama_4_scaling_beta"),
            original_positions=inner.integer("original_max_position_embeddings"),
            offset=0,
        ),
    )(config)


def exaone4_positions(sizes: Sizes) -> Rotary | list[Position]:
    """Return the positions. If some layers have a window, the layers without one use no positions."""
    return rotary_positions()(sizes) if one_window(sizes) is None else rotary_on_windowed_layers()(sizes)


def plain_rms_norm(config: ConfigReader) -> Norm:
    """Return an RMSNorm without a weight."""
    return replace(rms_norm("rms_norm_eps")(config), affine=False)


def _backward(sizes: Sizes) -> Rotary:
    return replace(rotary_positions()(sizes), direction="backward")


def _smollm3_windows(sizes: Sizes) -> list[int | None]:
    config, windows = sizes.config, layer_windows(sizes)
    if any(windows) and not config.boolean("use_sliding_window"):
        config.refuse("use_sliding_window", "true, as some layer_types are sliding_attention")
    config.ignored(["use_sliding_window"])
    return windows


def _smollm3_positions(sizes: Sizes) -> list[Position]:
    """Return the positions of each layer. A list says which layers use none; by default it is every fourth layer."""
    turning, position = sizes.config.raw("no_rope_layers"), rotary_positions()(sizes)
    if not isinstance(turning, list) or len(turning) != sizes.layers or any(turns not in (0, 1) for turns in turning):
        sizes.config.refuse(
            "no_rope_layers", f"{sizes.layers} numbers: 1 for a layer that has positions, 0 for another"
        )
        turning = [1] * sizes.layers
    return [position if turns else None for turns in turning]


def granite_swa_positions(sizes: Sizes) -> list[Position]:
    """Return the positions of each layer. Each layer has its own base; a base of 0 means no positions."""
    config, bases = sizes.config, sizes.config.raw("layer_rope_theta")
    position = rotary_positions()(sizes)
    numbers = isinstance(bases, list) and all(type(base) in (int, float) and base >= 0 for base in bases)
    if not numbers or len(bases) != sizes.layers:
        config.refuse("layer_rope_theta", f"{sizes.layers} numbers that are 0 or more")
        bases = [0] * sizes.layers
    return [replace(position, base=float(base)) if base else None for base in bases]


def llama4(config: ConfigReader) -> Architecture:
    """Return the architecture of Llama 4 (Meta 2025). ``moe_layers`` are the layers with experts.

    Layers with positions attend within one chunk, and normalize queries and keys after the rotation. On layers without
    positions, the queries grow with the position.
    """
    # transformers converts the first two fields into other fields.
    config.ignored(["interleave_moe_layer_step", "no_rope_layer_interval", "router_jitter_noise"])
    layers = config.integer("num_hidden_layers", maximum=MAX_LAYERS)
    knowing, types = config.raw("no_rope_layers"), config.raw("layer_types")
    if not isinstance(knowing, list) or len(knowing) < layers or any(knows not in (0, 1) for knows in knowing):
        config.refuse("no_rope_layers", f"{layers} numbers: 1 for a layer that has positions, 0 for another")
        knowing = [1] * layers
    if not isinstance(types, list) or len(types) != layers or not {*types} <= {"chunked_attention", "full_attention"}:
        config.refuse("layer_types", "chunked_attention or full_attention for each layer")
        types = ["full_attention"] * layers
    chunk = config.integer("attention_chunk_size") if "chunked_attention" in types else None
    tuned, normed = config.boolean("attn_temperature_tuning"), config.boolean("use_qk_norm")
    config.ignored(["attention_chunk_size", "attn_scale", "floor_scale"])
    temperature = QueryTemperature(
        beta=config.number("attn_scale"), original_positions=config.integer("floor_scale"), offset=1
    )
    turning = rotary_positions("interleaved")

    def positions(sizes: Sizes) -> list[Position]:
        position = turning(sizes)
        return [position if knows else None for knows in knowing[:layers]]

    return BIASED.replace(
        inner="intermediate_size_mlp",
        experts=LLAMA4,
        chunk=[chunk if kind == "chunked_attention" else None for kind in types],
        position=positions,
        query_key_norm=["head" if normed and knows else None for knows in knowing[:layers]],
        query_key_affine=False,
        after_rotation=True,
        query_temperature=[temperature if tuned and not knows else None for knows in knowing[:layers]],
    )(config)


def divided_by_scaling(sizes: Sizes) -> float:
    """Return the factor of the logits, which ``logits_scaling`` divides."""
    return 1 / sizes.config.number("logits_scaling")


def hunyuan_rotary(sizes: Sizes) -> Rotary:
    """Return the rotary positions. With ``alpha``, "dynamic" means another base, which is the same for all lengths.

    In this case, the other parameters have no effect.
    """
    config, head_dim = sizes.config, sizes.head_dim
    config.allowed("attention_head_dim", head_dim)
    inner = config.inside("rope_parameters")
    if inner.raw("rope_type") != "dynamic" or not inner.raw("alpha"):
        inner.allowed("alpha", None)
        return rotary(config, head_dim, parameters=inner)
    inner.ignored(["beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim", "type"])
    if head_dim < 4 or head_dim % 2:
        config.refuse("head_dim", "an even number of channels, at least 4")
        head_dim = 4
    base = inner.number("rope_theta") * inner.number("alpha") ** (head_dim / (head_dim - 2))
    for name in inner.unread():
        inner.leave(name, "no such parameter with rope_type dynamic and alpha")
    config.add(inner)
    return Rotary(base=base, dim=head_dim, layout="half", scaling=Unscaled())


# A family has a few lines here. With one field on each line, the table would be hard to see.
# fmt: off
LLAMA_FAMILIES: Final = (
    # Llama 1 to 3 (Touvron et al. 2023, arXiv:2302.13971).
    row("llama", NAMES, LLAMA),
    # InternLM3 (Shanghai AI Laboratory 2025), computed by Llama's classes. The ignored fields are other names of
    # mlp_bias and attention_bias.
    row("internlm3", NAMES, LLAMA, ignored=["bias", "qkv_bias"]),
    # IQuest-Coder (2025), computed by Llama's classes.
    row("iquestcoder", NAMES, LLAMA, allowed={"clip_qkv": None, "use_sliding_window": False}),
    # AFM-4.5B (Arcee AI 2025): Llama without gates.
    row("arcee", NAMES, LLAMA, gated=False),
    # Code World Model (Meta FAIR 2025, arXiv:2510.02387): Llama with a window on three layers of four.
    row("cwm", NAMES, PLAIN, ignored=["pretraining_tp"], mlp_bias="mlp_bias", window=layer_windows),
    # Mistral 7B (Jiang et al. 2023, arXiv:2310.06825): a window on all layers, or on none.
    row("mistral", NAMES, PLAIN, window=one_window),
    # Ministral 8B (Mistral AI 2024): a window on the layers that layer_types names.
    row("ministral", NAMES, PLAIN, required=["head_dim"], window=layer_windows),
    row("ministral3", NAMES, ministral3),
    # Qwen 2 and 2.5 (Qwen Team 2024, arXiv:2407.10671): biases on queries, keys and values; a window on some layers.
    row("qwen2", NAMES, PLAIN, ignored=QWEN, allowed={"use_mrope": False}, qkv_bias=True, window=layer_windows),
    # Qwen 3 (Qwen Team 2025, arXiv:2505.09388): normalized queries and keys in place of biases.
    row("qwen3", NAMES, BIASED, ignored=QWEN, query_key_norm="head", window=layer_windows),
    # Seed-OSS (ByteDance 2025): like Qwen 2.
    row("seed_oss", NAMES, PLAIN, ignored=["pretraining_tp", "residual_dropout"], qkv_bias="attention_bias",
        output_bias="attention_out_bias", mlp_bias="mlp_bias"),
    # OLMo 2 (OLMo Team 2024, arXiv:2501.00656): norms on the outputs of the blocks, and on all heads' queries and keys.
    row("olmo2", OUTPUT_NORMS, OLMO2),
    # OLMo 3 (OLMo Team 2025, arXiv:2512.13961): three layers of four have a window, and their rotation isn't scaled.
    row("olmo3", OUTPUT_NORMS, OLMO2, window=layer_windows, position=rotary_by_layer_type),
    # EXAONE 4.0 (LG AI Research 2025, arXiv:2507.11407): norms on the outputs of the blocks. transformers converts the
    # ignored field into layer_types.
    row("exaone4", OUTPUT_NORMS, PLAIN, ignored=["sliding_window_pattern"], placement="output", query_key_norm="head",
        window=layer_windows, position=exaone4_positions),
    # SmolLM3 (Hugging Face 2025): every fourth layer uses no positions. transformers converts the first two ignored
    # fields into layer_types and no_rope_layers.
    row("smollm3", NAMES, BIASED_BOTH, ignored=["max_window_layers", "no_rope_layer_interval", "pretraining_tp"],
        window=_smollm3_windows, position=_smollm3_positions),
    # GLM-4 (Team GLM 2024, arXiv:2406.12793): the first half of a head's channels is rotated in adjacent pairs.
    row("glm", FUSED_GATE, GLM),
    # GLM-4-0414 (Z.ai 2025): also norms after each block.
    row("glm4", renamed(FUSED_GATE, {"post_self_attn_layernorm": "attention_output_norm",
                                     "post_attention_layernorm": "mlp_norm", "post_mlp_layernorm": "mlp_output_norm"}),
        GLM, placement="sandwich"),
    # Granite 3 (IBM 2024). The logits are divided.
    row("granite", NAMES, SCALED, head_multiplier=divided_by_scaling),
    # Granite with attention sinks (IBM 2026), a window on three layers of four, and a base for each layer.
    row("granite_swa", renamed(NAMES, {"self_attn.sinks": OneTensor("attention.sinks")}), SCALED, sinks=True,
        head_multiplier=divided_by_scaling, window=layer_windows,
        position=granite_swa_positions),
    row("llama4_text", LLAMA4_NAMES, llama4),
    # HyperCLOVA X SEED (NAVER 2025): also norms after each block. The logits are multiplied.
    row("hyperclovax", renamed(NAMES, {"post_norm1": "attention_output_norm", "post_norm2": "mlp_output_norm"}), SCALED,
        head_multiplier="logits_scaling", placement=either("use_post_norm", "sandwich", "pre")),
    # Phi-3 and Phi-4 (Microsoft 2024, arXiv:2404.14219): Mistral with fused projections and LongRoPE.
    # transformers moves the last two ignored fields into rope_parameters.
    row("phi3", renamed(FUSED_GATE, {"self_attn.qkv_proj": QUERY_KEY_VALUE}),
        PLAIN, ignored=["embd_pdrop", "resid_pdrop", "original_max_position_embeddings", "partial_rotary_factor"],
        allowed={"attention_bias": False, "lm_head_bias": False, "mlp_bias": False,
              "full_attn_mod": 1, "interpolate_factor": 1},
        window=one_window, position=rotary_positions(partial=True)),
    # ERNIE 4.5 (Baidu 2025): Llama with rotation in adjacent pairs.
    row("ernie4_5", NAMES, PLAIN, bias="use_bias", position=rotary_positions("interleaved")),
    # EXAONE 3 (LG AI Research 2024, arXiv:2408.03541), computed by Llama's classes, under GPT-2's names.
    row("exaone", EXAONE, LLAMA, modules="model.layers"),
    # Helium (Kyutai 2025): Llama with rotation in adjacent pairs.
    row("helium", NAMES, PLAIN, qkv_bias="attention_bias", mlp_bias="mlp_bias",
        position=rotary_positions("interleaved")),
    # Hunyuan (Tencent 2025): queries and keys are normalized after the rotation.
    row("hunyuan_v1_dense",
        renamed(NAMES, {f"self_attn.{part}_layernorm": f"attention.{part}_norm" for part in ("query", "key")}),
        BIASED, ignored=HUNYUAN,
        allowed={"add_classification_head": False, "mlp_bias": False, "use_cla": False, "use_qk_norm": True},
        required=["head_dim"], query_key_norm="head", after_rotation=True, position=hunyuan_rotary),
    # Apertus (Swiss AI Initiative 2025, arXiv:2509.14233): no gates, and an activation with learned parameters.
    row("apertus", APERTUS, BIASED, ignored=["hidden_dropout"],
        allowed={"mlp_bias": False, "post_norm": False, "qk_norm": True}, gated=False, query_key_norm="head"),
    # Apertus 1.5's language part (Swiss AI Initiative 2026). Its head may have fewer rows than its embedding.
    row("apertus1p5_text", APERTUS, BIASED, allowed={"output_vocab_size": None}, gated=False, query_key_norm="head"),
    # nanochat (Karpathy 2025): norms without weights, one of them after the embedding, and a backward rotation.
    row("nanochat", renamed(NAMES, {"mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"}), BIASED, norm=plain_rms_norm,
        gated=False, query_key_norm="head", after_rotation=True, position=_backward, embedding_norm=True,
        head_logit_cap="final_logit_softcapping"),
)
# fmt: on
