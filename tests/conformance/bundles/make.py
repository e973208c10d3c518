"""Makes the bundle that the kit's whole directories are changes of: small, with a file of every kind."""

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
    """Writes ``tiny.splitbundle``: one layer, cut before it, with graphs, golden vectors and a tokenizer."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        num_hidden_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=8,
        vocab_size=24,
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
        source = Path(directory, "tiny")
        model.save_pretrained(source)
        tokenizer.save(str(source / "tokenizer.json"))
        output = HERE / "tiny.splitbundle"
        splitbundle_converter.convert(source, output, split=[0], onnx=True, force=True)


if __name__ == "__main__":
    main()
