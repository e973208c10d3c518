"""The models that are measured: their sizes, their configurations, and what computing with them must at least do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

ITEM: Final = {"float32": 4, "bfloat16": 2}
"""Bytes of a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder whose head is its embedding: GPT-2 (``gpt2``), Llama (``llama``) or Qwen 2 (``qwen2``)."""

    family: str
    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    positions: int
    end: int
    """The id that ends a text."""

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def config(self) -> dict[str, Any]:
        """The fields of its configuration, as transformers names them."""
        common = {"vocab_size": self.vocabulary, "eos_token_id": self.end, "tie_word_embeddings": True}
        if self.family == "gpt2":
            sizes = {"n_embd": self.hidden, "n_layer": self.layers, "n_head": self.heads, "n_positions": self.positions}
            return common | sizes | {"n_inner": None if self.inner == 4 * self.hidden else self.inner}
        return common | {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "max_position_embeddings": self.positions,
        }

    def products(self) -> list[tuple[int, int]]:
        """The matrices of a layer: what comes out of each, and what goes in."""
        keys = self.key_heads * self.head_size
        mlp = [(self.inner, self.hidden)] * (1 if self.family == "gpt2" else 2) + [(self.hidden, self.inner)]
        return [(self.hidden, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, self.hidden), *mlp]

    def layer_parameters(self) -> int:
        """Of one layer: matrices, biases, and two norms."""
        matrices = sum(rows * columns for rows, columns in self.products())
        if self.family == "gpt2":
            return matrices + sum(rows for rows, _ in self.products()) + 4 * self.hidden
        biases = sum(rows for rows, _ in self.products()[:3]) if self.family == "qwen2" else 0
        return matrices + biases + 2 * self.hidden

    def parameters(self) -> int:
        """Of the whole model."""
        gpt2 = self.family == "gpt2"
        tables = (self.vocabulary + (self.positions if gpt2 else 0)) * self.hidden
        return tables + self.layers * self.layer_parameters() + (2 if gpt2 else 1) * self.hidden

    def cache_bytes(self, slots: int, dtype: str) -> int:
        """Of the keys and values of one row."""
        return 2 * slots * self.layers * self.key_heads * self.head_size * ITEM[dtype]

    def moved(self, context: int, tokens: int, batch: int, dtype: str) -> int:
        """Bytes that a call must read or write: each weight once (of the tables that aren't the head, the rows in use),
        the cache that is there once, and what is new in it."""
        rows = batch * tokens * self.hidden * (2 if self.family == "gpt2" else 1)
        norm = (2 if self.family == "gpt2" else 1) * self.hidden
        weights = self.layers * self.layer_parameters() + self.vocabulary * self.hidden + norm + rows
        return weights * ITEM[dtype] + batch * self.cache_bytes(context + tokens, dtype)

    def operations(self, context: int, tokens: int, batch: int) -> int:
        """Multiplications and additions that a call must do in its matrix products, with the last position's logits."""
        layer = 2 * tokens * sum(rows * columns for rows, columns in self.products())
        seen = tokens * context + tokens * (tokens + 1) // 2  # positions that the tokens attend to, all in all
        attention = 2 * 2 * seen * self.heads * self.head_size
        return batch * (self.layers * (layer + attention) + 2 * self.vocabulary * self.hidden)


SHAPES: Final[dict[str, Shape]] = {
    "gpt2": Shape(
        family="gpt2",
        vocabulary=50257,
        hidden=768,
        inner=3072,
        layers=12,
        heads=12,
        key_heads=12,
        positions=1024,
        end=50256,
    ),
    "llama-124m": Shape(
        family="llama",
        vocabulary=50257,
        hidden=768,
        inner=2048,
        layers=12,
        heads=12,
        key_heads=12,
        positions=8192,
        end=2,
    ),
    "qwen2-0.5b": Shape(
        family="qwen2",
        vocabulary=151936,
        hidden=896,
        inner=4864,
        layers=24,
        heads=14,
        key_heads=2,
        positions=32768,
        end=151643,
    ),
    "qwen2-1.5b": Shape(
        family="qwen2",
        vocabulary=151936,
        hidden=1536,
        inner=8960,
        layers=28,
        heads=12,
        key_heads=2,
        positions=32768,
        end=151643,
    ),
    "tiny": Shape(
        family="llama",
        vocabulary=1024,
        hidden=64,
        inner=96,
        layers=3,
        heads=4,
        key_heads=2,
        positions=8192,
        end=2,
    ),
}
"""Llama is there because onnxruntime-genai doesn't know GPT-2; ``tiny`` shows that everything runs, and no more."""
