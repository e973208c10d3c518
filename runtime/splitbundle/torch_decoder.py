"""The decoder, assembled from the facts of ``architecture.json``. Each equation is in ``spec/v1/decoder.md``.

Shapes in comments: B rows, S positions of this call, T slots of keys, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitbundle import architecture as facts
from splitbundle.torch_positions import KVCache, Positions

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
}


class Linear(nn.Linear):
    """``nn.Linear`` that is born without weights: a stage maps them in."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias, device="meta")

    def reset_parameters(self) -> None:
        """Nothing: there is nothing to initialise on the meta device, and no reason to spend the time."""


class Table(nn.Module):
    """Rows by index."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, device="meta"))

    def forward(self, index: Tensor) -> Tensor:
        """*Shape:* any -> (any, width)."""
        return functional.embedding(index, self.weight)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) or RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, norm: facts.Norm, size: int) -> None:
        super().__init__()
        self.facts = norm
        self.weight = nn.Parameter(torch.empty(size, device="meta"))
        self.bias = nn.Parameter(torch.empty(size, device="meta")) if norm.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """*Shape:* (..., size) -> (..., size)."""
        weight, bias, eps = self.weight, self.bias, self.facts.eps
        if self.facts.weight_offset:
            # In 16 bits, 1 + w would lose what little w says: the sum and the product are taken in float32.
            wide = None if bias is None else bias.float()
            return self._normalise(x.float(), weight.float() + self.facts.weight_offset, wide, eps).to(x.dtype)
        return self._normalise(x, weight, bias, eps)

    def _normalise(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        if self.facts.kind == "layer_norm":
            return functional.layer_norm(x, weight.shape, weight, bias, eps)
        return functional.rms_norm(x, weight.shape, weight, eps)


class Attention(nn.Module):
    """Causal self-attention over what came before in the cache and what comes now."""

    def __init__(self, attention: facts.Attention, hidden: int, layer: int) -> None:
        super().__init__()
        self.facts, self.layer = attention, layer
        queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        self.query = Linear(hidden, queries, bias=attention.qkv_bias)
        self.key = Linear(hidden, keys, bias=attention.qkv_bias)
        self.value = Linear(hidden, keys, bias=attention.qkv_bias)
        self.output = Linear(queries, hidden, bias=attention.output_bias)

    def forward(self, x: Tensor, positions: Positions, cache: KVCache | None) -> Tensor:
        """*Shape:* (batch, sequence, hidden) -> the same."""
        facts_, (batch, length, _) = self.facts, x.shape
        queries = self.query(x).view(batch, length, facts_.heads, facts_.head_dim).transpose(1, 2)  # [B, H, S, D]
        keys = self.key(x).view(batch, length, facts_.kv_heads, facts_.head_dim).transpose(1, 2)
        values = self.value(x).view(batch, length, facts_.kv_heads, facts_.head_dim).transpose(1, 2)
        if isinstance(facts_.position, facts.Rotary):
            cos, sin = positions.rotary(facts_.position)
            queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        if cache is not None:
            keys, values = cache.extend(self.layer, keys, values, positions)
        first, mask, causal = positions.mask(facts_.window)
        if first:
            keys, values = keys[:, :, first:], values[:, :, first:]
        mixed = attend(queries, keys, values, mask=mask, causal=causal, scale=facts_.scale)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pair of channels (i, i + dim/2) of the first ``dim`` by the angle of its position (layout "half").

    *Shape:* x (batch, heads, sequence, head_dim); cos, sin (batch or 1, 1, sequence, dim / 2).
    """
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def attend(queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V, each key head serving ``heads / kv_heads`` query heads in a row.

    *Shape:* (batch, heads, S, head_dim), twice (batch, kv_heads, T, head_dim) -> (batch, heads, S, head_dim).
    """
    batch, heads, length, width = queries.shape
    kv_heads = keys.shape[1]
    if heads != kv_heads and length == 1:
        # The heads of a group see the same keys, so they can stand as positions, and no key is repeated in memory.
        grouped = queries.reshape(batch, kv_heads, heads // kv_heads, width)
        mixed = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        return mixed.reshape(batch, heads, 1, width)
    return functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=heads != kv_heads
    )


class Mlp(nn.Module):
    """The feed-forward block, gated (Shazeer 2020, arXiv:2002.05202) or not."""

    def __init__(self, mlp: facts.Mlp, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(hidden, mlp.intermediate_size, bias=mlp.bias) if mlp.gated else None
        self.up = Linear(hidden, mlp.intermediate_size, bias=mlp.bias)
        self.down = Linear(mlp.intermediate_size, hidden, bias=mlp.bias)
        self.activation = ACTIVATIONS[mlp.activation]

    def forward(self, x: Tensor) -> Tensor:
        """*Shape:* (batch, sequence, hidden) -> the same."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]
        return self.down(self.activation(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention, then the feed-forward block, each normalised before and added to the stream (placement "pre")."""

    def __init__(self, kind: facts.LayerKind, hidden: int, layer: int) -> None:
        super().__init__()
        self.attention_norm = Norm(kind.norm, hidden)
        self.attention = Attention(kind.attention, hidden, layer)
        self.mlp_norm = Norm(kind.norm, hidden)
        self.mlp = Mlp(kind.mlp, hidden)

    def forward(self, x: Tensor, positions: Positions, cache: KVCache | None) -> Tensor:
        """*Shape:* (batch, sequence, hidden) -> the same."""
        x = x + self.attention(self.attention_norm(x), positions, cache)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class Embedding(nn.Module):
    """Token ids to the first hidden state. A head that is tied to it, in a stage of its own, has its table alone."""

    def __init__(self, architecture: facts.Architecture, *, embeds: bool) -> None:
        super().__init__()
        self.facts = architecture.embedding
        self.token = Table(architecture.vocab_size, architecture.hidden_size)
        position = architecture.embedding.position
        learned = embeds and isinstance(position, facts.Learned)
        self.position = Table(position.count, architecture.hidden_size) if learned else None  # type: ignore[union-attr]

    def forward(self, ids: Tensor, positions: Positions) -> Tensor:
        """*Shape:* (batch, sequence) -> (batch, sequence, hidden)."""
        x: Tensor = self.token(ids.long())  # torch looks up by 32 and 64 bits alone
        if self.facts.multiplier != 1.0:
            x = x * self.facts.multiplier
        return x if self.position is None else x + self.position(positions.slots)


class Head(nn.Module):
    """The last hidden state to logits."""

    def __init__(self, architecture: facts.Architecture) -> None:
        super().__init__()
        hidden = architecture.hidden_size
        self.norm = Norm(architecture.head.norm, hidden)
        self.projection = None if architecture.head.tied else Linear(hidden, architecture.vocab_size, bias=False)

    def forward(self, x: Tensor, tied: Tensor | None) -> Tensor:
        """*Shape:* (batch, k, hidden) -> (batch, k, vocab). ``tied`` is the token table of a tied head."""
        x = self.norm(x)
        if self.projection is not None:
            return self.projection(x)  # type: ignore[no-any-return]
        if tied is None:
            raise ValueError("a tied head needs the token table")
        return functional.linear(x, tied)
