"""Checkpoints of several parts, one of which is a language model: what their own classes make of that part.

A row is what was read in the class's code and is tested: which class it is, whether it ties the head, and which facts
of the head it applies. Nothing here imports transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from splitbundle_converter.families.unsupported import reason

LANGUAGE: Final = "language"
PARTS: Final = (LANGUAGE,)
"""The parts of a checkpoint that can be converted alone."""
EXTENSION: Final = "part"
"""The name under which the manifest says what a bundle is a part of."""
TEXT: Final = "text_config"
"""Where every class of the table keeps the configuration of its language part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """A row of the table."""

    model_type: str
    class_name: str
    """The class of transformers that the checkpoint is of."""
    text_type: str
    """The type of the language part where its configuration doesn't say."""
    whole: bool = False
    """Whether the class holds the language model with its own head. Others hold it without, and have a head themselves:
    a bare projection, which applies nothing but what ``applies`` names."""
    applies: frozenset[str] = frozenset()
    """The fields of ``Head`` that a head of the class's own applies, as the language model's class does."""
    ties: bool = True
    """Whether the class can tie a head of its own; one that can't doesn't, whatever ``tie_word_embeddings`` says."""
    texts: frozenset[str] = frozenset()
    """The only types of language part that the rest holds for; empty where it holds for all."""
    ignored: frozenset[str] = frozenset()
    """Further fields that have no say in the language part."""
    text_ignored: frozenset[str] = frozenset()
    """Fields that the class adds to the language part's configuration, and that have no say in it."""
    same: tuple[str, ...] = ()
    """Fields that must be the language part's."""


IGNORED: Final = frozenset(
    [
        # Ids that stand for what isn't text. Where none of it is given, their rows of the embedding are as any.
        *("audio_token_id", "audio_token_index", "audio_bos_token_id", "audio_eos_token_id", "timestamp_token_id"),
        *("image_token_id", "image_token_index", "boi_token_index", "eoi_token_index", "visual_indicator_token_ids"),
        *("video_token_id", "video_token_index", "image_seq_length", "video_seq_length", "mm_tokens_per_image"),
        # How images and sounds are cut, encoded and projected.
        *("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio", "vision_use_cls_token"),
        *("image_grid_pinpoints", "image_text_hidden_size", "image_size", "patch_size", "num_channels"),
        *("projector_hidden_act", "projector_bias", "projector_layernorm_eps", "projector_pooling_ratio"),
        *("multimodal_projector_bias", "projection_dim", "alignment_intermediate_size", "adapter_layer_norm_eps"),
        *("spatial_merge_size", "spatial_pool_mode", "spatial_pool_stride", "scale_factor", "num_query_tokens"),
        *("downsample_factor", "downsample_ratio", "downsample_rate", "window_size", "audio_merge_size"),
        *("audio_chunk_size", "acoustic_tokenizer_chunk_size", "token_classification_bias"),
        # Of training, of fetching, and of older classes.
        *("initializer_factor", "ignore_index", "use_image_newline_parameter", "_pad_token_id"),
    ]
)
"""Fields of composite configurations that have no say in what the language part computes of text."""


def _row(model_type: str, class_name: str, text_type: str, **fields: Any) -> Composite:
    return Composite(model_type=model_type, class_name=class_name, text_type=text_type, **fields)


def _generating(model_type: str, stem: str, text_type: str, **fields: Any) -> Composite:
    return _row(model_type, f"{stem}ForConditionalGeneration", text_type, **fields)


_UNUSED_SIZES: Final = frozenset(["hidden_size", "vocab_size"])
_QUERYING: Final[dict[str, Any]] = {"whole": True, "ignored": frozenset(["tie_word_embeddings"])}

COMPOSITES: Final[Mapping[str, Composite]] = {
    row.model_type: row
    for row in (
        _generating("audioflamingo3", "AudioFlamingo3", "qwen2", ties=False),
        _generating("aya_vision", "AyaVision", "cohere2"),
        _generating("blip-2", "Blip2", "opt", **_QUERYING),
        _generating("cohere2_vision", "Cohere2Vision", "cohere2"),
        _generating("deepseek_vl", "DeepseekVL", "llama"),
        _generating("deepseek_vl_hybrid", "DeepseekVLHybrid", "llama"),
        _generating("exaone4_5", "Exaone4_5_", "exaone4"),
        _generating("fast_vlm", "FastVlm", "qwen2"),
        _generating("fun_asr_nano", "FunAsrNano", "qwen3"),
        _row("fuyu", "FuyuForCausalLM", "persimmon"),
        _generating("gemma3", "Gemma3", "gemma3_text"),
        _generating("glmasr", "GlmAsr", "llama"),
        _generating("got_ocr2", "GotOcr2", "qwen2"),
        # The adapter of its language part, a file of its own, is on for sound alone.
        _generating("granite_speech", "GraniteSpeech", "granite", ignored=frozenset(["has_lora_adapter"])),
        _generating("granite_speech_plus", "GraniteSpeechPlus", "granite", ignored=frozenset(["has_lora_adapter"])),
        _generating(
            "hyperclovax_vision_v2",
            "HyperCLOVAXVisionV2",
            "hyperclovax",
            applies=frozenset(["multiplier"]),
            texts=frozenset(["hyperclovax"]),  # of another type, it would multiply by what that type divides by
        ),
        _generating("idefics2", "Idefics2", "mistral"),
        _generating("idefics3", "Idefics3", "llama"),
        _generating("instructblip", "InstructBlip", "opt", **_QUERYING),
        _generating("instructblipvideo", "InstructBlipVideo", "opt", **_QUERYING),
        _generating("internvl", "InternVL", "qwen2"),
        _generating("janus", "Janus", "llama"),
        _generating("lighton_ocr", "LightOnOcr", "qwen3"),
        _generating("llava", "Llava", "llama", ignored=_UNUSED_SIZES),
        _generating("llava_next", "LlavaNext", "llama", ignored=_UNUSED_SIZES),
        _generating("llava_next_video", "LlavaNextVideo", "llama", ignored=_UNUSED_SIZES),
        _generating("llava_onevision", "LlavaOnevision", "qwen2", ignored=_UNUSED_SIZES),
        _generating("mistral3", "Mistral3", "mistral"),
        _generating("moss_transcribe_diarize", "MossTranscribeDiarize", "qwen3"),
        _generating(
            "musicflamingo",
            "MusicFlamingo",
            "qwen2",
            ties=False,
            # Of the positions of sounds.
            ignored=frozenset(["audio_frame_step", "rope_parameters", "max_position_embeddings", "head_dim"]),
        ),
        _generating("ovis2", "Ovis2", "qwen2", same=("hidden_size", "vocab_size")),
        _generating(
            "paligemma",
            "PaliGemma",
            "gemma",
            applies=frozenset(["logit_cap"]),
            ignored=_UNUSED_SIZES,
            text_ignored=frozenset(["num_image_tokens"]),
        ),
        _generating("perception_lm", "PerceptionLM", "llama"),
        _row("pp_chart2table", "GotOcr2ForConditionalGeneration", "qwen2"),
        _generating("qianfan_ocr", "QianfanOCR", "qwen3"),
        _generating("qwen2_audio", "Qwen2Audio", "qwen2", ties=False, ignored=frozenset(["vocab_size"])),
        _generating("qwen3_asr", "Qwen3ASR", "qwen3"),
        _generating("smolvlm", "SmolVLM", "llama"),
        _generating(
            "vibevoice", "VibeVoice", "qwen2", ignored=frozenset(["diffusion_loss_weight"]), same=("vocab_size",)
        ),
        _generating("vibevoice_asr", "VibeVoiceAsr", "qwen2", ties=False),
        _generating("video_llama_3", "VideoLlama3", "qwen2"),
        _generating("video_llava", "VideoLlava", "llama", ignored=_UNUSED_SIZES),
        _generating("vipllava", "VipLlava", "llama", ignored=_UNUSED_SIZES),
        _generating("voxtral", "Voxtral", "llama", ties=False, ignored=_UNUSED_SIZES),
    )
}


def text_type(raw: Mapping[str, Any]) -> str | None:
    """The type of a configuration's language part, or None where it has none."""
    composite = COMPOSITES.get(raw["model_type"]) if isinstance(raw.get("model_type"), str) else None
    text = raw.get(TEXT)
    if isinstance(text, dict) and "model_type" in text:
        return text["model_type"] if isinstance(text["model_type"], str) else None
    return composite.text_type if composite is not None else None


def family_hint(raw: Mapping[str, Any], families: Collection[str]) -> str:
    """What to do about a model type that isn't in the table of families."""
    text, model_type = text_type(raw), raw.get("model_type")
    only = reason(raw) or "Other families can't be converted; splitbundle never guesses at one"
    if text is None:
        return only
    if isinstance(model_type, str) and model_type in COMPOSITES and text in families:
        return f"This checkpoint's language part is {text}: convert it with --part {LANGUAGE}"
    return f"{only}. This checkpoint's language part is {text[:40]!a}, and can't be converted alone either"
