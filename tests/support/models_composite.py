"""Small multimodal models. The weights of their language parts make every mistake visible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from splitbundle_converter.families.composites import COMPOSITES
from splitbundle_converter.quiet_transformers import quiet
from tests.support.models import VOCAB

LAYERS: Final = 2
TEXT: Final[dict[str, Any]] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Fields of every language part, if its class has them."""
_TEXT_OF: Final[dict[str, dict[str, Any]]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma": {"use_bidirectional_attention": False},
    "gemma3_text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 5},
}
_ABSENT_OF: Final[dict[str, tuple[str, ...]]] = {
    "opt": ("intermediate_size", "num_key_value_heads", "head_dim"),
    "persimmon": ("num_key_value_heads", "head_dim"),
}
_FIELDS: Final[dict[str, dict[str, Any]]] = {
    # Their default towers need a library that the tests don't install.
    "fast_vlm": {"vision_config": {"model_type": "clip_vision_model"}},
    "perception_lm": {"vision_config": {"model_type": "timm_wrapper", "model_args": {"embed_dim": 16}}},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 4}},
    "vibevoice": {"vocab_size": VOCAB},
    "ovis2": {"hidden_size": 32, "vocab_size": VOCAB},
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
}


def text_fields(text_type: str) -> dict[str, Any]:
    """The fields of a small language part."""
    absent = _ABSENT_OF.get(text_type, ())
    fields = {name: value for name, value in TEXT.items() if name not in absent}
    return {"model_type": text_type} | fields | _TEXT_OF.get(text_type, {})


def make_config(model_type: str, text: dict[str, Any] | None = None, **fields: Any) -> Any:
    """Return a configuration of the type, with a small language part and one layer of every other part.

    ``text`` has fields of the language part, and ``fields`` the other fields.
    """
    from transformers import AutoConfig

    text = text or text_fields(COMPOSITES[model_type].text_type)
    config = AutoConfig.for_model(model_type, text_config=text, **(_FIELDS.get(model_type, {}) | fields))
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if name == "text_config" or part is None:
            continue
        for field in ("num_hidden_layers", "encoder_layers", "num_layers", "depth"):
            if type(getattr(part, field, None)) is int:
                setattr(part, field, 1)
    return config


def make_composite(config: Any, seed: int = 0) -> Any:
    """Make a model whose language part has significant weights. The other parts' memory isn't even touched."""
    import transformers
    from transformers.initialization import no_init_weights

    config._attn_implementation = config._experts_implementation = "eager"
    with quiet(), no_init_weights():
        model = getattr(transformers, COMPOSITES[config.model_type].class_name)(config).float().eval()
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in language_parameters(model).items():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * values if "norm" in name and name.endswith("weight") else 0.2 * values)
    return model


def language_parameters(model: Any) -> dict[str, Tensor]:
    """Return the parameters of the language part, by their names in memory."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(part in name.split(".") for part in ("language_model", "text_model", "lm_head"))
    }


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """Return the tensors that transformers would save, under its names.

    Tensors of other parts have only one number.
    """
    from transformers.core_model_loading import revert_weight_conversion

    kept = {id(parameter) for parameter in language_parameters(model).values()}
    named = revert_weight_conversion(model, dict(model.state_dict(keep_vars=True)))
    if model.config.model_type == "qianfan_ocr":  # 5.23 saves names that are neither the published ones nor its own
        named = {name.replace("language_model.model.encoder.", "language_model.model."): t for name, t in named.items()}
    return {name: (tensor.detach().clone() if id(tensor) in kept else torch.zeros(1)) for name, tensor in named.items()}


def save(path: Path, config: Any, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """Write a checkpoint. ``changes`` are fields of config.json; ``...`` removes one."""
    path.mkdir()
    config.save_pretrained(path)
    fields = json.loads((path / "config.json").read_text()) | changes
    fields = {name: value for name, value in fields.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(fields))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path
