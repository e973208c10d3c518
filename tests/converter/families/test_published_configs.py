"""Configurations as they are published: with the fields of their time, unknown ones and old names among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from splitbundle.format.architecture.positions import Learned
from splitbundle.format.architecture.rotary import Llama3, Rotary
from splitbundle.format.architecture.sizes import count
from splitbundle_converter.checkpoint.source import Checkpoint
from splitbundle_converter.families.configuration import read_configuration

COMMON = {"architectures": ["ForCausalLM"], "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True}
GPT2 = {
    "activation_function": "gelu_new",
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
LLAMA2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.31.0.dev0",
    "vocab_size": 32000,
}
LLAMA3 = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
    "vocab_size": 128256,
}
SMOLLM2 = {
    **LLAMA2,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "vocab_size": 49152,
}
MISTRAL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "transformers_version": "4.34.0.dev0",
    "vocab_size": 32000,
}
QWEN2 = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "transformers_version": "4.40.1",
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "transformers_version": "4.38.0.dev0",
    "vocab_size": 256000,
}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "gpt2": (GPT2, 124_439_808),
    "distilgpt2": ({**GPT2, "n_layer": 6, "_num_labels": 1, "id2label": {"0": "LABEL_0"}}, 81_912_576),
    "Llama-2-7b": (LLAMA2, 6_738_415_616),
    "Llama-3.2-1B": (LLAMA3, 1_235_814_400),
    "SmolLM2-135M": (SMOLLM2, 134_515_008),
    "Mistral-7B-v0.1": (MISTRAL, 7_241_732_096),
    "Qwen2-0.5B": (QWEN2, 494_032_768),
    "gemma-2b": (GEMMA, 2_506_172_416),
}


def read(tmp_path: Path, config: dict[str, Any]) -> Any:
    """Return the architecture of a configuration without weights."""
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, **config}))
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors")
    return read_configuration(Checkpoint(tmp_path, name="published").configuration()).architecture


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    """The numbers are those of the models' cards, or the sums of their published tensors."""
    config, expected = PUBLISHED[name]
    assert count(read(tmp_path, config).tensors()) == expected


def test_what_the_fields_become(tmp_path: Path) -> None:
    gpt2 = read(tmp_path, GPT2)
    assert gpt2.embedding.position == Learned(count=1024, offset=0)
    assert (gpt2.head.tied, gpt2.kind_of(11).mlp.activation) == (True, "gelu_tanh")
    llama3 = read(tmp_path, LLAMA3).kind_of(0).attention
    scaling = Llama3(factor=32.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=8192)
    assert llama3.position == Rotary(base=500000.0, dim=64, layout="half", scaling=scaling)
    mistral = read(tmp_path, MISTRAL)
    assert {kind.attention.window for kind in mistral.layer_kinds.values()} == {4096}
    qwen2 = read(tmp_path, QWEN2)
    assert (qwen2.kind_of(23).attention.window, qwen2.kind_of(23).attention.qkv_bias) == (None, True)
    gemma = read(tmp_path, GEMMA)
    assert (gemma.embedding.multiplier, gemma.head.norm.weight_offset) == (2048**0.5, 1.0)
    assert gemma.kind_of(0).mlp.activation == "gelu_tanh"  # "gelu" in gemma's first files means this one
