"""The table of composite checkpoints: checkpoints of several parts, one of which is a language model.

A row describes how the class of the whole checkpoint uses its language part: the name of the class, whether the class
ties the head, and which facts of the head it applies. These facts come from the code of the class and are tested. This
module does not import transformers.
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
"""The key in the manifest's ``extensions`` that describes the converted part."""
TEXT: Final = "text_config"
"""The field in which every class of the table stores the configuration of its language part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Composite:
    """A row of the table."""

    model_type: str
    class_name: str
    """The name of the checkpoint's class in transformers."""
    text_type: str
    """The default model type of the language part, if its configuration has none."""
    whole: bool = False
    """Whether the class contains the language model with the model's own head. Other classes contain the language model
    without its head and have a plain projection as the head. This head applies only the facts in ``applies``."""
    applies: frozenset[str] = frozenset()
    """The fields of ``Head`` that the class's own head applies in the same way as the language model's class."""
    ties: bool = True
    """Whether the class can tie its own head. If it can't, ``tie_word_embeddings`` has no effect."""
    texts: frozenset[str] = frozenset()
    """The model types of language parts for which this row is valid. If empty, it is valid for all."""
    ignored: frozenset[str] = frozenset()
    """More fields that change no number of the language part."""
    text_ignored: frozenset[str] = frozenset()
    """Fields that the class adds to the configuration of the language part, and that change no number of it."""
    same: tuple[str, ...] = ()
    """Fields that must have the same value as in the configuration of the language part."""


IGNORED: Final = frozenset(
    [
        # Ids that mark images or sounds. In a text without them, their rows of the embedding are ordinary rows.
        *("audio_token_id", "audio_token_index", "audio_bos_token_id", "audio_eos_token_id", "timestamp_token_id"),
        *("image_token_id", "image_token_index", "boi_token_index", "eoi_token_index", "visual_indicator_token_ids"),
        *("video_token_id", "video_token_index", "image_seq_length", "video_seq_length", "mm_tokens_per_image"),
        # Fields about the cutting, encoding and projecting of images and sounds.
        *("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio", "vision_use_cls_token"),
        *("image_grid_pinpoints", "image_text_hidden_size", "image_size", "patch_size", "num_channels"),
        *("projector_hidden_act", "projector_bias", "projector_layernorm_eps", "projector_pooling_ratio"),
        *("multimodal_projector_bias", "projection_dim", "alignment_intermediate_size", "adapter_layer_norm_eps"),
        *("spatial_merge_size", "spatial_pool_mode", "spatial_pool_stride", "scale_factor", "num_query_tokens"),
        *("downsample_factor", "downsample_ratio", "downsample_rate", "window_size", "audio_merge_size"),
        *("audio_chunk_size", "acoustic_tokenizer_chunk_size", "token_classification_bias"),
        # Fields for training, for fetching, and for older classes.
        *("initializer_factor", "ignore_index", "use_image_newline_parameter", "_pad_token_id"),
    ]
)
"""Fields of composite configurations that change no number of the language part for text input."""


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
        # The language part has an adapter in a separate file. The class applies it only for sound input.
        _generating("granite_speech", "GraniteSpeech", "granite", ignored=frozenset(["has_lora_adapter"])),
        _generating("granite_speech_plus", "GraniteSpeechPlus", "granite", ignored=frozenset(["has_lora_adapter"])),
        _generating(
            "hyperclovax_vision_v2",
            "HyperCLOVAXVisionV2",
            "hyperclovax",
            applies=frozenset(["multiplier"]),
            # Another type divides the logits by the value that this class multiplies by.
            texts=frozenset(["hyperclovax"]),
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
            # Fields about the positions of sounds.
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
    """Return the model type of a configuration's language part, or None if it has no language part."""
    composite = COMPOSITES.get(raw["model_type"]) if isinstance(raw.get("model_type"), str) else None
    text = raw.get(TEXT)
    if isinstance(text, dict) and "model_type" in text:
        return text["model_type"] if isinstance(text["model_type"], str) else None
    return composite.text_type if composite is not None else None


def family_hint(raw: Mapping[str, Any], families: Collection[str]) -> str:
    """Return a hint for a model type that is not in the table of families."""
    text, model_type = text_type(raw), raw.get("model_type")
    if isinstance(model_type, str) and model_type in COMPOSITES and text in families:
        if not isinstance(raw.get(TEXT), dict):
            return (
                f"It has no {TEXT}, which transformers' {COMPOSITES[model_type].class_name} needs. Convert a copy of "
                "the model in the layout of transformers"
            )
        return f'This checkpoint\'s language part is {text}: convert it with part="{LANGUAGE}"'
    only = reason(raw) or _kind(raw) or "Other families can't be converted; splitbundle never guesses at one"
    if text is None:
        return only
    return f"{only}. This checkpoint's language part is {text[:40]!a}, and can't be converted alone either"


def _kind(raw: Mapping[str, Any]) -> str | None:
    """Return a sentence about a model that is no decoder of text alone, or None."""
    if isinstance(raw.get("vision_config"), dict) and raw.get("model_type") not in COMPOSITES:
        return "It has a vision_config, and the place of its language part beside images is unknown"
    classes = raw.get("architectures")
    if isinstance(classes, list) and any(isinstance(name, str) and name.endswith("ForMaskedLM") for name in classes):
        return "It is an encoder that fills gaps in a text, and encoders can't be converted yet"
    return None
