"""The measured models: their sizes, their configurations, and the minimum of bytes and operations of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

ITEM: Final = {"float32": 4, "bfloat16": 2}
"""The name of a dtype -> the bytes of one number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder with a tied head: GPT-2 (``gpt2``), Llama (``llama``), Qwen 2 (``qwen2``) or Qwen 3 with experts."""

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
    experts: int = 0
    """The experts of a layer, each of the width ``inner``. 0 means that the feed-forward block is dense."""
    chosen: int = 0
    """The experts of a token."""

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def config(self) -> dict[str, Any]:
        """Return the fields of the configuration with their names in transformers."""
        common = {"vocab_size": self.vocabulary, "eos_token_id": self.end, "tie_word_embeddings": True}
        if self.family == "gpt2":
            sizes = {"n_embd": self.hidden, "n_layer": self.layers, "n_head": self.heads, "n_positions": self.positions}
            return common | sizes | {"n_inner": None if self.inner == 4 * self.hidden else self.inner}
        if self.experts:
            common |= {
                "moe_intermediate_size": self.inner,
                "num_experts": self.experts,
                "num_experts_per_tok": self.chosen,
                "norm_topk_prob": True,
                "head_dim": self.head_size,
            }
        return common | {
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "max_position_embeddings": self.positions,
        }

    def products(self, experts: int | None = None) -> list[tuple[int, int]]:
        """Return the shapes of a layer's matrices. *Shape:* each (out, in).

        Args:
            experts: The number of experts that are read, by default those of a token.
        """
        keys = self.key_heads * self.head_size
        mlp = [(self.inner, self.hidden)] * (1 if self.family == "gpt2" else 2) + [(self.hidden, self.inner)]
        if self.experts:
            mlp = mlp * (self.chosen if experts is None else experts) + [(self.experts, self.hidden)]
        return [(self.hidden, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, self.hidden), *mlp]

    def layer_parameters(self, experts: int | None = None) -> int:
        """Return the number of parameters in one layer: matrices, biases, and norms. ``experts`` of them are counted.

        By default, all experts are counted.
        """
        matrices = sum(rows * columns for rows, columns in self.products(self.experts if experts is None else experts))
        if self.experts:
            return matrices + 2 * self.hidden + 2 * self.head_size
        if self.family == "gpt2":
            return matrices + sum(rows for rows, _ in self.products()) + 4 * self.hidden
        biases = sum(rows for rows, _ in self.products()[:3]) if self.family == "qwen2" else 0
        return matrices + biases + 2 * self.hidden

    def parameters(self) -> int:
        """Return the number of parameters in the whole model."""
        gpt2 = self.family == "gpt2"
        tables = (self.vocabulary + (self.positions if gpt2 else 0)) * self.hidden
        return tables + self.layers * self.layer_parameters() + (2 if gpt2 else 1) * self.hidden

    def cache_bytes(self, slots: int, dtype: str) -> int:
        """Return the bytes of the keys and values of one row."""
        return 2 * slots * self.layers * self.key_heads * self.head_size * ITEM[dtype]

    def moved(self, context: int, tokens: int, batch: int, dtype: str) -> int:
        """Return the bytes that a call must read or write.

        These are each weight once, the present cache once, and the new keys and values. Of the tables that aren't the
        head, only the used rows count.
        """
        rows = batch * tokens * self.hidden * (2 if self.family == "gpt2" else 1)
        norm = (2 if self.family == "gpt2" else 1) * self.hidden
        used = min(self.experts, batch * tokens * self.chosen)
        weights = self.layers * self.layer_parameters(used) + self.vocabulary * self.hidden + norm + rows
        return weights * ITEM[dtype] + batch * self.cache_bytes(context + tokens, dtype)

    def operations(self, context: int, tokens: int, batch: int) -> int:
        """Return the number of multiplications and additions in a call's matrix products, with the last logits only."""
        layer = 2 * tokens * sum(rows * columns for rows, columns in self.products())
        seen = tokens * context + tokens * (tokens + 1) // 2  # the sum of all tokens' attended positions
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
    "smollm2-135m": Shape(
        family="llama",
        vocabulary=49152,
        hidden=576,
        inner=1536,
        layers=30,
        heads=9,
        key_heads=3,
        positions=8192,
        end=0,
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
    "qwen3-moe-48": Shape(
        family="qwen3_moe",
        vocabulary=8192,
        hidden=1024,
        inner=768,
        layers=4,
        heads=16,
        key_heads=4,
        positions=8192,
        end=2,
        experts=48,
        chosen=8,
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
"""The measured models by name. onnxruntime-genai does not support GPT-2, so there is also a Llama. ``tiny`` only tests
that everything runs."""
