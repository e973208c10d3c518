"""The decoder, assembled from the facts in ``architecture.json``. The equations are in ``spec/v1/decoder.md``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitbundle.backends.torch.attention import Attention
from splitbundle.backends.torch.cache import KVCache
from splitbundle.backends.torch.experts import feedforward
from splitbundle.backends.torch.kernels import linear
from splitbundle.backends.torch.modules import Linear, Table, through
from splitbundle.backends.torch.norms import Norm
from splitbundle.backends.torch.positions import Positions
from splitbundle.backends.torch.quantized_modules import Codes
from splitbundle.format.architecture import decoder as facts
from splitbundle.format.architecture.norms import norm_names
from splitbundle.format.architecture.positions import Learned, Sinusoidal


class Layer(nn.Module):
    """Add attention and the feed-forward block to the residual stream. The placement says where the norms are."""

    def __init__(self, kind: facts.LayerKind, hidden: int, layer: int) -> None:
        super().__init__()
        self.placement, self.multiplier, self.scales = kind.placement, kind.residual_multiplier, kind.residual_scales
        names = norm_names(kind.placement)
        self.attention_norm, self.attention_output_norm, self.mlp_norm, self.mlp_output_norm = (
            Norm(kind.norm, hidden) if name in names else None
            for name in ("attention_norm", "attention_output_norm", "mlp_norm", "mlp_output_norm")
        )
        self.attention = Attention(kind.attention, hidden, layer)
        self.mlp = feedforward(kind.mlp, hidden)
        self.dropout = 0.0, 0.0  # of what attention and the feed-forward block add

    def forward(self, x: Tensor, positions: Positions, cache: KVCache | None) -> Tensor:
        """Apply the layer. *Shape:* (batch, sequence, hidden) -> the same."""

        def attend(x: Tensor) -> Tensor:
            return self.attention(x, positions, cache)  # type: ignore[no-any-return]

        if self.placement in ("parallel", "parallel_two"):
            normed = through(self.attention_norm, x)
            other = normed if self.mlp_norm is None else self.mlp_norm(x)
            return x + self._scaled(self._dropped(attend(normed), 0) + self._dropped(self.mlp(other), 1))
        x = self._block(0, x, attend, self.attention_norm, self.attention_output_norm)
        return self._block(1, x, self.mlp, self.mlp_norm, self.mlp_output_norm)

    def _block(
        self, which: int, x: Tensor, block: Callable[[Tensor], Tensor], norm: Norm | None, after: Norm | None
    ) -> Tensor:
        if self.placement == "output":
            return self._sum(which, x, through(norm, block(x)))
        if self.placement == "post":
            return through(norm, self._sum(which, x, block(x)))
        return self._sum(which, x, through(after, block(through(norm, x))))

    def _sum(self, which: int, x: Tensor, added: Tensor) -> Tensor:
        added = self._scaled(self._dropped(added, which))
        if self.scales is None:
            return x + added
        scale = (self.scales.attention, self.scales.mlp)[which]
        return x * scale.kept + added * scale.added

    def _dropped(self, x: Tensor, which: int) -> Tensor:
        rate = self.dropout[which]
        return functional.dropout(x, rate) if rate and self.training else x

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.multiplier == 1.0 else x * self.multiplier


class Embedding(nn.Module):
    """Map token ids to the first hidden state.

    A stage with a tied head that does not embed holds only the token table (``embeds`` is False).
    """

    def __init__(self, architecture: facts.Architecture, *, embeds: bool) -> None:
        super().__init__()
        embedding, hidden = architecture.embedding, architecture.hidden_size
        self.facts, position = embedding, embedding.position
        self.token = Table(architecture.vocab_size, embedding.token_size)
        widens = embeds and embedding.token_size != hidden
        self.projection = Linear(embedding.token_size, hidden, bias=False) if widens else None
        learned = embeds and isinstance(position, Learned)
        self.position = Table(position.count + position.offset, hidden) if learned else None  # type: ignore[union-attr]
        self.norm = Norm(embedding.norm, hidden) if embeds and embedding.norm is not None else None
        self.dropout = 0.0

    def forward(self, ids: Tensor, positions: Positions) -> Tensor:
        """Embed token ids. *Shape:* (batch, sequence) -> (batch, sequence, hidden)."""
        position = self.facts.position
        x: Tensor = self.token(ids.long())  # torch accepts only int32 and int64 indices
        if self.facts.multiplier != 1.0:
            x = x * self.facts.multiplier
        x = through(self.projection, x)
        if self.position is not None and isinstance(position, Learned):
            x = x + self.position(positions.slots + position.offset)
        elif isinstance(position, Sinusoidal):
            x = x + positions.sinusoids(position.offset, x.shape[-1])
        x = through(self.norm, x)
        return functional.dropout(x, self.dropout) if self.dropout and self.training else x


class TiedProjection(nn.Module):
    """The final linear layer of a tied head. Its weight is the token table, and it may have a bias of its own."""

    def __init__(self, rows: int, *, bias: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(rows, device="meta")) if bias else None

    def forward(self, x: Tensor, table: Tensor | Codes) -> Tensor:
        """Multiply by the token table. *Shape:* (…, columns), (rows, columns) -> (…, rows)."""
        return linear(x, table, self.bias) if isinstance(table, Tensor) else table.product(x, self.bias)


class Head(nn.Module):
    """Map the last hidden state to logits."""

    def __init__(self, architecture: facts.Architecture) -> None:
        super().__init__()
        hidden, size, head = architecture.hidden_size, architecture.embedding.token_size, architecture.head
        self.facts = head
        self.norm = None if head.norm is None else Norm(head.norm, hidden)
        self.narrowing = Linear(hidden, size, bias=False) if size != hidden else None
        self.projection = (
            TiedProjection(architecture.vocab_size, bias=head.bias)
            if head.tied
            else Linear(size, architecture.vocab_size, bias=head.bias)
        )

    def forward(self, x: Tensor, tied: Tensor | Codes | None) -> Tensor:
        """Compute logits. ``tied`` is the token table of a tied head.

        *Shape:* (batch, k, hidden) -> (batch, k, vocab).
        """
        x = through(self.narrowing, through(self.norm, x))
        x = self.projection(x, tied) if self.facts.tied else self.projection(x)
        if self.facts.multiplier != 1.0:
            x = x * self.facts.multiplier
        cap = self.facts.logit_cap
        return x if cap is None else torch.tanh(x / cap) * cap
