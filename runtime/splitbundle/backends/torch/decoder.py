"""The decoder, assembled from the facts of ``architecture.json``. Each equation is in ``spec/v1/decoder.md``.

Shapes in comments: B rows, S positions of this call, T slots of keys, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from splitbundle.backends.torch.kernels import activated, fuses, linear, multiplied
from splitbundle.backends.torch.positions import KVCache, Positions, Reach
from splitbundle.format.architecture import decoder as facts

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu_squared": lambda x: functional.relu(x).square(),
}


class Xielu(nn.Module):
    """xIELU (Huang & Schlag 2024, arXiv:2411.13010), whose two slopes are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.empty(1, device="meta"))
        self.alpha_n = nn.Parameter(torch.empty(1, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """*Shape:* any -> the same."""
        above = functional.softplus(self.alpha_p) * x * x
        below = (torch.expm1(x.clamp(max=-1e-6)) - x) * (0.5 + functional.softplus(self.alpha_n))
        return torch.where(x > 0, above, below) + 0.5 * x


class Linear(nn.Linear):
    """``nn.Linear`` that is born without weights: a stage maps them in."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias, device="meta")

    def reset_parameters(self) -> None:
        """Nothing: there is nothing to initialise on the meta device, and no reason to spend the time."""

    def forward(self, x: Tensor) -> Tensor:
        """*Shape:* (…, inputs) -> (…, outputs)."""
        return linear(x, self.weight, self.bias)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is what was loaded: one that was replaced or has a hook, as adapters do it, has its own say."""
    changed = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is Linear and not changed and not _has_any_global_hook()  # type: ignore[no-untyped-call]


class Table(nn.Module):
    """Rows by index."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width, device="meta"))

    def forward(self, index: Tensor) -> Tensor:
        """*Shape:* any -> (any, width)."""
        return functional.embedding(index, self.weight)


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) or RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) over the last
    dimension; the weight may have a dimension more, of heads.
    """

    def __init__(self, norm: facts.Norm, *shape: int) -> None:
        super().__init__()
        self.facts, self.size = norm, shape[-1:]
        self.weight = nn.Parameter(torch.empty(shape, device="meta")) if norm.affine else None
        self.bias = nn.Parameter(torch.empty(shape, device="meta")) if norm.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """*Shape:* (..., size) -> (..., size)."""
        weight, bias = self.weight, self.bias
        if weight is not None and self.facts.weight_offset:
            # In 16 bits, 1 + w would lose what little w says: the sum and the product are taken in float32.
            wide = None if bias is None else bias.float()
            return self._normalise(x.float(), weight.float() + self.facts.weight_offset, wide).to(x.dtype)
        return self._normalise(x, weight, bias)

    def _normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is not None and weight.ndim > 1:
            x = self._normalise(x, None, None) * weight
            return x if bias is None else x + bias
        if self.facts.kind == "layer_norm":
            return functional.layer_norm(x, self.size, weight, bias, self.facts.eps)
        return functional.rms_norm(x, self.size, weight, self.facts.eps)


class Attention(nn.Module):
    """Causal self-attention over what came before in the cache and what comes now."""

    def __init__(self, attention: facts.Attention, hidden: int, layer: int) -> None:
        super().__init__()
        self.facts, self.layer, self.reach = attention, layer, Reach(attention.window, attention.chunk)
        queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        self.query = Linear(hidden, queries, bias=attention.qkv_bias)
        self.key = Linear(hidden, keys, bias=attention.qkv_bias)
        self.value = Linear(hidden, keys, bias=attention.qkv_bias)
        self.query_norm, self.key_norm = (
            self._norm(attention, heads) for heads in (attention.heads, attention.kv_heads)
        )
        self.sinks = nn.Parameter(torch.empty(attention.heads, device="meta")) if attention.sinks else None
        self.output = Linear(queries, hidden, bias=attention.output_bias)

    @staticmethod
    def _norm(attention: facts.Attention, heads: int) -> Norm | None:
        norm = attention.query_key_norm
        return None if norm is None else Norm(norm.norm, *facts.query_key_shape(norm, heads, attention.head_dim))

    def forward(self, x: Tensor, positions: Positions, cache: KVCache | None) -> Tensor:
        """*Shape:* (batch, sequence, hidden) -> the same."""
        facts_ = self.facts
        queries = self._heads(self.query(x), self.query_norm, positions)  # [B, S, H, D]
        keys = self._heads(self.key(x), self.key_norm, positions)
        values = split_heads(self._clip(self.value(x)), facts_.head_dim)
        if facts_.query_temperature is not None:
            queries = queries * positions.temperature(facts_.query_temperature)
        queries, keys, values = (part.transpose(1, 2) for part in (queries, keys, values))  # [B, H, S, D]
        if cache is not None:
            keys, values = cache.extend(self.layer, keys, values, positions)
        mask: Tensor | None
        if isinstance(facts_.position, facts.Alibi):
            first, mask, causal = positions.biased_mask(facts_.position, facts_.heads, self.reach)
        else:
            first, mask, causal = positions.mask(self.reach)
        if first:
            keys, values = keys[:, :, first:], values[:, :, first:]
        if facts_.logit_cap is None and self.sinks is None:
            mixed = attend(queries, keys, values, mask=mask, causal=causal, scale=facts_.scale)
        else:
            mask = positions.causal_mask() if causal else mask
            cap, sinks = facts_.logit_cap, self.sinks
            mixed = attend_unfused(queries, keys, values, mask=mask, scale=facts_.scale, cap=cap, sinks=sinks)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor, norm: Norm | None, positions: Positions) -> Tensor:
        """Clipped, normalised and turned. *Shape:* (batch, sequence, heads · head_dim) -> (…, heads, head_dim)."""
        position, kind = self.facts.position, self.facts.query_key_norm
        x = self._clip(x)
        if norm is not None and kind is not None and kind.width == "full":
            x, norm = norm(x), None
        x = split_heads(x, self.facts.head_dim)
        if norm is not None and kind is not None and not kind.after_rotation:
            x, norm = norm(x), None
        if isinstance(position, facts.Rotary):
            x = rotate(x, *positions.rotary(position), position.layout)
        return x if norm is None else norm(x)

    def _clip(self, x: Tensor) -> Tensor:
        return x if self.facts.clip is None else x.clamp(-self.facts.clip, self.facts.clip)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """*Shape:* (batch, sequence, heads · head_dim) -> (batch, sequence, heads, head_dim)."""
    return x.view(*x.shape[:2], x.shape[2] // head_dim, head_dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Turns each pair of channels by the angle of its position: of the first ``dim``, the pairs (i, i + dim/2) in the
    layout "half", and (2i, 2i + 1) in "interleaved".

    *Shape:* x (batch, sequence, heads, head_dim); cos, sin (batch or 1, sequence, 1, dim), as ``Positions.rotary``
    gives them.
    """
    dim = cos.shape[-1]
    turned, rest = (x, None) if dim == x.shape[-1] else (x[..., :dim], x[..., dim:])
    if layout == "half":
        partners = turned.roll(dim // 2, dims=-1)
    else:
        partners = turned.view(*x.shape[:-1], dim // 2, 2).flip(-1).flatten(-2)
    turned = torch.addcmul(turned * cos, partners, sin)
    return turned if rest is None else torch.cat((turned, rest), dim=-1)


def attend(queries: Tensor, keys: Tensor, values: Tensor, *, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ + mask) V, each key head serving ``heads / kv_heads`` query heads in a row.

    *Shape:* (batch, heads, S, head_dim), twice (batch, kv_heads, T, head_dim) -> (batch, heads, S, head_dim).
    """
    batch, heads, length, width = queries.shape
    kv_heads = keys.shape[1]
    if heads != kv_heads and length == 1 and (mask is None or mask.shape[1] == 1):
        # The heads of a group see the same keys, so they can stand as positions, and no key is repeated in memory.
        grouped = queries.reshape(batch, kv_heads, heads // kv_heads, width)
        mixed = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
        return mixed.reshape(batch, heads, 1, width)
    # torch.jit.trace makes tensors of sizes, and of what is found by comparing them.
    return functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=bool(heads != kv_heads)
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
) -> Tensor:
    """``attend`` with what no fused kernel does: every score s made cap · tanh(s / cap) before the mask, and one score
    more a head, of nothing.

    *Shape:* as for ``attend``; mask True where attention goes; sinks (heads).
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
    return (weights @ values[:, :, None]).flatten(1, 2)


class Mlp(nn.Module):
    """The feed-forward block, gated (Shazeer 2020, arXiv:2002.05202) or not."""

    def __init__(self, mlp: facts.Mlp, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(hidden, mlp.intermediate_size, bias=mlp.bias) if mlp.gated else None
        self.up = Linear(hidden, mlp.intermediate_size, bias=mlp.bias)
        self.down = Linear(mlp.intermediate_size, hidden, bias=mlp.bias)
        self.name = mlp.activation
        self.activation = Xielu() if mlp.activation == "xielu" else ACTIVATIONS[mlp.activation]

    def forward(self, x: Tensor) -> Tensor:
        """*Shape:* (batch, sequence, hidden) -> the same."""
        if self.gate is None:
            return self.down(self._activated(x, self.up))  # type: ignore[no-any-return]
        gate, up = self._activated(x, self.gate), self.up
        both = multiplied(x, up.weight, up.bias, gate) if fuses(x) and _is_plain(up) else None
        return self.down(gate * up(x) if both is None else both)  # type: ignore[no-any-return]

    def _activated(self, x: Tensor, layer: Linear) -> Tensor:
        own = self.activation is ACTIVATIONS.get(self.name)  # and none that somebody put in its place
        both = activated(x, layer.weight, layer.bias, self.name) if own and fuses(x) and _is_plain(layer) else None
        return self.activation(layer(x)) if both is None else both


class Layer(nn.Module):
    """Attention and the feed-forward block, added to the stream; the placement says where norms stand."""

    def __init__(self, kind: facts.LayerKind, hidden: int, layer: int) -> None:
        super().__init__()
        self.placement, self.multiplier = kind.placement, kind.residual_multiplier
        names = facts.norm_names(kind.placement)
        self.attention_norm, self.attention_output_norm, self.mlp_norm, self.mlp_output_norm = (
            Norm(kind.norm, hidden) if name in names else None
            for name in ("attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm")
        )
        self.attention = Attention(kind.attention, hidden, layer)
        self.mlp = Mlp(kind.mlp, hidden)

    def forward(self, x: Tensor, positions: Positions, cache: KVCache | None) -> Tensor:
        """*Shape:* (batch, sequence, hidden) -> the same."""

        def attend(x: Tensor) -> Tensor:
            return self.attention(x, positions, cache)  # type: ignore[no-any-return]

        if self.placement in ("parallel", "parallel_two"):
            normed = _through(self.attention_norm, x)
            other = normed if self.mlp_norm is None else self.mlp_norm(x)
            return x + self._scaled(attend(normed) + self.mlp(other))
        x = self._block(x, attend, self.attention_norm, self.attention_output_norm)
        return self._block(x, self.mlp, self.mlp_norm, self.mlp_output_norm)

    def _block(self, x: Tensor, block: Callable[[Tensor], Tensor], norm: Norm | None, after: Norm | None) -> Tensor:
        if self.placement == "output":
            return x + self._scaled(_through(norm, block(x)))
        if self.placement == "post":
            return _through(norm, x + self._scaled(block(x)))
        return x + self._scaled(_through(after, block(_through(norm, x))))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.multiplier == 1.0 else x * self.multiplier


def _through(step: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    return x if step is None else step(x)


class Embedding(nn.Module):
    """Token ids to the first hidden state. A head that is tied to it, in a stage of its own, has its table alone."""

    def __init__(self, architecture: facts.Architecture, *, embeds: bool) -> None:
        super().__init__()
        embedding, hidden = architecture.embedding, architecture.hidden_size
        self.facts, position = embedding, embedding.position
        self.token = Table(architecture.vocab_size, embedding.token_size)
        widens = embeds and embedding.token_size != hidden
        self.projection = Linear(embedding.token_size, hidden, bias=False) if widens else None
        learned = embeds and isinstance(position, facts.Learned)
        self.position = Table(position.count + position.offset, hidden) if learned else None  # type: ignore[union-attr]
        self.norm = Norm(embedding.norm, hidden) if embeds and embedding.norm is not None else None

    def forward(self, ids: Tensor, positions: Positions) -> Tensor:
        """*Shape:* (batch, sequence) -> (batch, sequence, hidden)."""
        position = self.facts.position
        x: Tensor = self.token(ids.long())  # torch looks up by 32 and 64 bits alone
        if self.facts.multiplier != 1.0:
            x = x * self.facts.multiplier
        x = _through(self.projection, x)
        if self.position is not None and isinstance(position, facts.Learned):
            x = x + self.position(positions.slots + position.offset)
        elif isinstance(position, facts.Sinusoidal):
            x = x + positions.sinusoids(position.offset, x.shape[-1])
        return _through(self.norm, x)


class Projection(nn.Module):
    """The last product, whose weight may be the token table."""

    def __init__(self, rows: int, columns: int, *, weight: bool, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, device="meta")) if weight else None
        self.bias = nn.Parameter(torch.empty(rows, device="meta")) if bias else None

    def forward(self, x: Tensor, tied: Tensor | None) -> Tensor:
        """*Shape:* (…, columns) -> (…, rows)."""
        weight = self.weight if tied is None else tied
        if weight is None:
            raise ValueError("a tied head needs the token table")
        return linear(x, weight, self.bias)


class Head(nn.Module):
    """The last hidden state to logits."""

    def __init__(self, architecture: facts.Architecture) -> None:
        super().__init__()
        hidden, size, head = architecture.hidden_size, architecture.embedding.token_size, architecture.head
        self.facts = head
        self.norm = None if head.norm is None else Norm(head.norm, hidden)
        self.narrowing = Linear(hidden, size, bias=False) if size != hidden else None
        self.projection = Projection(architecture.vocab_size, size, weight=not head.tied, bias=head.bias)

    def forward(self, x: Tensor, tied: Tensor | None) -> Tensor:
        """*Shape:* (batch, k, hidden) -> (batch, k, vocab). ``tied`` is the token table of a tied head."""
        x = self.projection(_through(self.narrowing, _through(self.norm, x)), tied if self.facts.tied else None)
        if self.facts.multiplier != 1.0:
            x = x * self.facts.multiplier
        cap = self.facts.logit_cap
        return x if cap is None else torch.tanh(x / cap) * cap
