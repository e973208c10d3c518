"""Causal self-attention. The equations are in ``spec/v1/decoder.md``.

Shapes in comments: B rows, S positions of this call, T key slots, H heads, D channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitbundle.backends.torch.cache import KVCache
from splitbundle.backends.torch.joint import NOTHING
from splitbundle.backends.torch.modules import Linear
from splitbundle.backends.torch.norms import Norm
from splitbundle.backends.torch.positions import Positions
from splitbundle.backends.torch.rotary import rotate
from splitbundle.format.architecture import attention as facts
from splitbundle.format.architecture.positions import Alibi, AttentionSpan
from splitbundle.format.architecture.rotary import Rotary


class Attention(nn.Module):
    """Causal self-attention over the cached positions and the positions of this call."""

    def __init__(self, attention: facts.Attention, hidden: int, layer: int) -> None:
        super().__init__()
        self.facts, self.layer, self.span = attention, layer, AttentionSpan(attention.window, attention.chunk)
        size, mixed = attention.head_dim, attention.heads * attention.value_size
        self.query = Linear(hidden, attention.heads * size, bias=attention.qkv_bias)
        self.key = Linear(hidden, attention.kv_heads * size, bias=attention.qkv_bias)
        self.value = Linear(hidden, attention.kv_heads * attention.value_size, bias=attention.qkv_bias)
        self.query_norm, self.key_norm = (
            self._norm(attention, heads) for heads in (attention.heads, attention.kv_heads)
        )
        self.sinks = nn.Parameter(torch.empty(attention.heads, device="meta")) if attention.sinks else None
        gate = attention.output_gate
        rows = attention.heads if gate is not None and gate.width == "head" else mixed
        self.gate = None if gate is None else Linear(hidden, rows, bias=False)
        biased = gate is not None and gate.bias
        self.gate_bias = nn.Parameter(torch.empty(attention.heads, device="meta")) if biased else None
        self.output = Linear(mixed, hidden, bias=attention.output_bias)
        self.joint = NOTHING
        self.dropout = 0.0

    @staticmethod
    def _norm(attention: facts.Attention, heads: int) -> Norm | None:
        norm = attention.query_key_norm
        return None if norm is None else Norm(norm.norm, *facts.query_key_shape(norm, heads, attention.head_dim))

    def forward(self, x: Tensor, positions: Positions, cache: KVCache | None) -> Tensor:
        """Attend from each position to the positions it may see. *Shape:* (batch, sequence, hidden) -> the same."""
        facts_ = self.facts
        queries, keys, values = self.project(x, positions)  # [B, S, H, D]
        if facts_.query_temperature is not None:
            queries = queries * positions.temperature(facts_.query_temperature)
        # All else is computed in the order of the call, and gives the same bits wherever the rows lie in a cache.
        permutation, positions = positions.permutation, positions.placed
        if permutation is not None:
            queries, keys, values = (part.index_select(0, permutation[0]) for part in (queries, keys, values))
        queries, keys, values = (part.transpose(1, 2) for part in (queries, keys, values))  # [B, H, S, D]
        if cache is not None:
            keys, values = cache.extend(self.layer, keys, values, positions)
        mask: Tensor | None
        if isinstance(facts_.position, Alibi):
            first, mask, causal = positions.biased_mask(facts_.position, facts_.heads, self.span)
        else:
            first, mask, causal = positions.mask(self.span)
        if first:
            keys, values = keys[:, :, first:], values[:, :, first:]
        dropout = self.dropout if self.training else 0.0
        if facts_.logit_cap is None and self.sinks is None:
            mixed = attend(queries, keys, values, mask=mask, causal=causal, scale=facts_.scale, dropout=dropout)
        else:
            mask = positions.causal_mask() if causal else mask
            cap, sinks = facts_.logit_cap, self.sinks
            mixed = attend_unfused(
                queries, keys, values, mask=mask, scale=facts_.scale, cap=cap, sinks=sinks, dropout=dropout
            )
        mixed = mixed.transpose(1, 2)  # [B, S, H, D]
        mixed = mixed if permutation is None else mixed.index_select(0, permutation[1])
        if facts_.output_gate is not None and self.gate is not None:
            gate = self.gate(x).unflatten(-1, (facts_.heads, -1))
            gate = gate if self.gate_bias is None else gate + self.gate_bias[:, None]
            function = torch.sigmoid if facts_.output_gate.function == "sigmoid" else functional.softplus
            mixed = mixed * function(gate)
        return self.output(mixed.flatten(2))  # type: ignore[no-any-return]

    def project(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Return the heads' queries, keys and values. *Shape:* (B, S, hidden) -> thrice (B, S, heads, head_dim)."""
        size, heads, kv_heads = self.facts.head_dim, self.facts.heads, self.facts.kv_heads
        wide = kv_heads * self.facts.value_size
        joint = self.joint.product(x, self)
        if joint is None:
            queries, keys, values = self.query(x), self.key(x), self.value(x)
        elif self.facts.query_key_norm is None:
            both, values = torch.split(joint, [(heads + kv_heads) * size, wide], dim=-1)
            queries, keys = torch.split(self.heads(both, None, positions), [heads, kv_heads], dim=2)
            return queries, keys, self.values(values)
        else:
            queries, keys, values = torch.split(joint, [heads * size, kv_heads * size, wide], dim=-1)
        queries, keys = self.heads(queries, self.query_norm, positions), self.heads(keys, self.key_norm, positions)
        return queries, keys, self.values(values)

    def values(self, x: Tensor) -> Tensor:
        """Clip and scale the values of the heads. *Shape:* (B, S, kv_heads · value_dim) -> (…, kv_heads, value_dim)."""
        x = split_heads(self._clip(x), self.facts.value_size)
        return x if self.facts.value_multiplier is None else x * self.facts.value_multiplier

    def heads(self, x: Tensor, norm: Norm | None, positions: Positions) -> Tensor:
        """Clip, normalize and rotate the heads.

        *Shape:* (batch, sequence, heads · head_dim) -> (…, heads, head_dim).
        """
        position, kind = self.facts.position, self.facts.query_key_norm
        x = self._clip(x)
        if norm is not None and kind is not None and kind.width == "full":
            x, norm = norm(x), None
        x = split_heads(x, self.facts.head_dim)
        if norm is not None and kind is not None and not kind.after_rotation:
            x, norm = norm(x), None
        if isinstance(position, Rotary):
            x = rotate(x, *positions.rotary(position), position.layout)
        return x if norm is None else norm(x)

    def _clip(self, x: Tensor) -> Tensor:
        return x if self.facts.clip is None else x.clamp(-self.facts.clip, self.facts.clip)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Give each head a dimension of its own.

    *Shape:* (batch, sequence, heads · head_dim) -> (batch, sequence, heads, head_dim).
    """
    return x.view(*x.shape[:2], x.shape[2] // head_dim, head_dim)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(scale · Q Kᵀ + mask) V.

    Each key head serves ``heads / kv_heads`` consecutive query heads. ``dropout`` is the share of the softmax's numbers
    that are dropped.

    *Shape:* (batch, heads, S, head_dim), (batch, kv_heads, T, head_dim), (batch, kv_heads, T, value_dim) -> (batch,
    heads, S, value_dim).
    """
    batch, heads, length, width = queries.shape
    kv_heads = keys.shape[1]
    if heads != kv_heads and length == 1 and not dropout and (mask is None or mask.shape[1] == 1):
        # The query heads of a group see the same keys. Treat them as positions, so that memory holds each key once.
        grouped = queries.reshape(batch, kv_heads, heads // kv_heads, width)
        mixed = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        return mixed.reshape(batch, heads, 1, values.shape[-1])
    # Under torch.jit.trace, sizes are tensors, and a comparison of sizes is one too: hence bool().
    return functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=bool(heads != kv_heads),
    )


def attend_unfused(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    cap: float | None,
    sinks: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Do the same as ``attend``, with score capping and attention sinks, which no fused kernel supports.

    With ``cap``, each score s becomes cap · tanh(s / cap) before the mask. With ``sinks``, each head has one extra
    score in the softmax that belongs to no key.

    *Shape:* as for ``attend``; mask is True where a query may attend; sinks (heads).
    """
    kv_heads = keys.shape[1]
    batch, heads, length, width = queries.shape
    grouped = queries.reshape(batch, kv_heads, heads // kv_heads, length, width)
    scores = grouped @ keys[:, :, None].transpose(-1, -2) * scale
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    if sinks is not None:
        nothing = sinks.to(scores.dtype).reshape(1, kv_heads, heads // kv_heads, 1, 1)
        scores = torch.cat((scores, nothing.expand(*scores.shape[:-1], 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)[..., : keys.shape[2]]
    weights = functional.dropout(weights, dropout) if dropout else weights
    return (weights @ values[:, :, None]).flatten(1, 2)
