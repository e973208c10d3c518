"""Bundles with quantized weights and graphs, of models whose widths allow every encoding."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch

import splitbundle_converter
from splitbundle import Bundle
from tests.support.models import scratch

VOCABULARY: Final = 96
_LLAMA: Final = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODELS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "untied": ("qwen2", {**_LLAMA, "tie_word_embeddings": False}),
    "biased": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 128, "n_inner": 256, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "experts": ("mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "biased-experts": (
        "gpt_oss",
        {**_LLAMA, "head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None}
        | {"layer_types": ["full_attention", "sliding_attention"]},
    ),
}
"""Name -> the family, and the fields of its configuration."""
FORMS: Final = {
    "rows8": ("int8", 32),
    "blocks4_32": ("int4", 32),
    "blocks4_64": ("int4", 64),
    "blocks4_128": ("int4", 128),
}
"""The encoding of a bundle's layers -> the arguments of ``Bundle.quantize``."""


def plain(name: str, split: tuple[int, ...] = (1,)) -> Bundle:
    """Return the named model with graphs and golden vectors, before it is quantized."""
    return _plain(name, split)


@cache
def _plain(name: str, split: tuple[int, ...]) -> Bundle:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    family, fields = MODELS[name]
    config = AutoConfig.for_model(family, bos_token_id=1, eos_token_id=2, pad_token_id=None, **fields)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            flat, router = parameter.ndim == 1, each.endswith(("gate.weight", "router.weight"))
            # Scores of experts lie far apart, so that rounding doesn't choose others.
            parameter.copy_(torch.randn_like(parameter) * (0.3 if flat else 1 if router else 0.03))
            if flat and each.endswith("weight"):
                parameter += 1
    source = scratch() / f"{name}-source"
    model.save_pretrained(source)
    output = scratch() / f"{name}-{'-'.join(map(str, split))}.splitbundle"
    return splitbundle_converter.convert(source, output, split=split, onnx=True)


def quantized(name: str, form: str, split: tuple[int, ...] = (1,)) -> Bundle:
    """Return the named model with quantized weights, its graphs, and its own golden vectors."""
    return _quantized(name, form, split)


@cache
def _quantized(name: str, form: str, split: tuple[int, ...]) -> Bundle:
    to, group = FORMS[form]
    before = plain(name, split)
    return before.quantize(scratch() / f"{before.path.stem}-{form}.splitbundle", to, group=group, method="rtn")
