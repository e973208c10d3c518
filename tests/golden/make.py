"""Make the golden bundles of a format version that is still a draft. See README.md."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2MoeConfig

import splitbundle_converter

HERE = Path(__file__).resolve().parent
CONFIGS: dict[str, tuple[PreTrainedConfig, list[int], str]] = {
    # Learned positions, LayerNorm, biases, tied head.
    "gpt2": (GPT2Config(n_layer=3, n_embd=48, n_head=4, n_positions=64, vocab_size=97, n_inner=72), [1, 2], "float32"),
    # Rotary positions with scaling, grouped heads, head of its own, cuts at both ends.
    "llama": (
        LlamaConfig(
            num_hidden_layers=3,
            hidden_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            intermediate_size=56,
            vocab_size=89,
            attention_bias=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
        [0, 1, 3],
        "float32",
    ),
    # A window, one key head, 16 bits.
    "mistral-bfloat16": (
        MistralConfig(
            num_hidden_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=1,
            intermediate_size=48,
            vocab_size=83,
            sliding_window=5,
        ),
        [1],
        "bfloat16",
    ),
    # A dense layer, and one with experts and a shared block.
    "experts": (
        Qwen2MoeConfig(
            num_hidden_layers=2,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            num_experts=6,
            num_experts_per_tok=2,
            mlp_only_layers=[0],
            vocab_size=71,
        ),
        [1],
        "float32",
    ),
    # Matrices in 4 bits, and the token table in 8.
    "int4": (GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=64, vocab_size=96), [1], "float32"),
}
QUANTIZED = ("int4",)


def main() -> None:
    """Write every golden bundle under the directory of a version."""
    from transformers import AutoModelForCausalLM

    for name, (config, cuts, dtype) in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)  # so no bias is zero and no norm is one
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory, f"golden-{name}")
            model.save_pretrained(source)
            output = HERE / sys.argv[1] / f"{name}.splitbundle"
            quantize = name if name in QUANTIZED else None
            splitbundle_converter.convert(
                source, output, split=cuts, dtype=dtype, onnx=True, quantize=quantize, force=True
            )


if __name__ == "__main__":
    main()
