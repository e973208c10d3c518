"""Makes the bundles that the kit's whole directories are changes of: small, with a file of every kind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig

import splitbundle_converter

HERE = Path(__file__).resolve().parent
WORDS = ("<|end|>", "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "road", "and")


def main() -> None:
    """Writes ``tiny.splitbundle``: one layer, cut before it, with graphs, golden vectors and a tokenizer.

    Then writes ``quantized.splitbundle``, which is wider, and whose matrices are stored in 4 and 8 bits.
    """
    torch.set_num_threads(1)
    make("tiny", 8, 24)
    make("quantized", 32, 32)


def make(name: str, width: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=width,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=width,
        vocab_size=vocabulary,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # so that no norm is one
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[("<|end|>", 0)])
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, name)
        model.save_pretrained(source)
        tokenizer.save(str(source / "tokenizer.json"))
        output, quantize = HERE / f"{name}.splitbundle", "int4" if name == "quantized" else None
        splitbundle_converter.convert(source, output, split=[0], onnx=True, quantize=quantize, force=True)


if __name__ == "__main__":
    main()
