"""The positions of a call's tokens, and the tensors that follow from them: slots, masks, rotations and biases."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from splitbundle.backends.torch.rotary import rotation
from splitbundle.format.architecture.positions import Alibi, AttentionSpan, QueryTemperature
from splitbundle.format.architecture.rotary import Rotary
from splitbundle.stages.call import Call


class Positions(Call):
    """The positions of one call. They are computed once, and every layer uses them."""

    def __init__(
        self, past: Sequence[int], count: Sequence[int], length: int, device: torch.device, dtype: torch.dtype
    ):
        super().__init__(past, count, length)
        self.device, self.dtype = device, dtype
        self._permutation: tuple[Tensor, Tensor] | None = None
        self._slots: Tensor | None = None
        self._tokens: tuple[Tensor, Tensor, Tensor] | None = None
        self._masks: dict[AttentionSpan, tuple[int, Tensor | None, bool]] = {}
        self._rotations: dict[int, tuple[Rotary, tuple[Tensor, Tensor]]] = {}
        self._biases: dict[tuple[Alibi, int, AttentionSpan], tuple[int, Tensor]] = {}

    def _like(self, past: Sequence[int], count: Sequence[int]) -> Positions:
        return Positions(past, count, self.length, self.device, self.dtype)

    @property
    def permutation(self) -> tuple[Tensor, Tensor] | None:
        """Return ``order`` as indices, and the indices that undo it; None without one. *Shape:* twice (batch)."""
        if self._permutation is None and self.order is not None:
            order = torch.tensor(self.order, device=self.device)
            self._permutation = order, order.argsort()
        return self._permutation

    @property
    def slots(self) -> Tensor:
        """Return each position, as int64. Padding repeats its row's last position, which every table contains.

        *Shape:* (batch, sequence), or (1, sequence) when all rows have the same positions.
        """
        if self._slots is None:
            offsets = torch.arange(self.length, device=self.device)
            if self.uniform is not None and not self.padded:
                self._slots = (offsets + self.uniform)[None]
            else:
                past = torch.tensor(self.past, device=self.device)[:, None]
                # A row without tokens repeats its last past position, because its next one may be beyond every table.
                last = (past + torch.tensor(self.count, device=self.device)[:, None] - 1).clamp(min=0)
                self._slots = torch.minimum(past + offsets[None], last)
        return self._slots

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the row, the index in the sequence and the slot of every token. *Shape:* each (tokens)."""
        if self._tokens is None:
            rows, places = self.valid.nonzero(as_tuple=True)
            self._tokens = rows, places, self.slots.expand(len(self.past), -1)[rows, places]
        return self._tokens

    @property
    def valid(self) -> Tensor:
        """Return True for tokens, False for padding. *Shape:* (batch, sequence)."""
        return (
            torch.arange(self.length, device=self.device)[None] < torch.tensor(self.count, device=self.device)[:, None]
        )

    def rotary(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Return the factors of ``rotation`` for the positions of this call.

        *Shape:* twice (batch or 1, sequence, 1, dim), in the channel order of the layout.
        """
        # The key is the id because every layer looks this up, and hashing all fields of ``rotary`` would take longer.
        if id(rotary) not in self._rotations or self._rotations[id(rotary)][0] is not rotary:
            lengths = [past + count for past, count in zip(self.past, self.count, strict=True)]
            self._rotations[id(rotary)] = rotary, rotation(rotary, self.slots, lengths, self.dtype)
        return self._rotations[id(rotary)][1]

    def sinusoids(self, offset: int, size: int) -> Tensor:
        """Return the sines, then the cosines, of each position. *Shape:* (batch or 1, sequence, size)."""
        half = size // 2
        rates = torch.exp(torch.arange(half, device=self.device).float() * -(math.log(10000.0) / (half - 1)))
        angles = (self.slots + offset)[:, :, None].float() * rates
        waves = torch.cat((angles.sin(), angles.cos(), angles.new_zeros(*angles.shape[:2], size % 2)), dim=-1)
        return waves.to(self.dtype)

    def temperature(self, temperature: QueryTemperature) -> Tensor:
        """Return the factor for each position's queries. *Shape:* (batch or 1, sequence, 1, 1)."""
        moved = self.slots + temperature.offset
        if temperature.growth == "power":
            factor = torch.exp(temperature.beta * torch.log1p(moved.float() / temperature.original_positions))
        else:
            factor = 1 + temperature.beta * torch.log1p((moved // temperature.original_positions).float())
        return factor.to(self.dtype)[:, :, None, None]

    def biased_mask(self, alibi: Alibi, heads: int, span: AttentionSpan) -> tuple[int, Tensor, bool]:
        """Return the result of ``mask`` with numbers: ALiBi's bias for each score in place of True, -∞ for False.

        *Shape:* mask (batch or 1, heads, sequence, slots from the first on).
        """
        key = (alibi, heads, span)
        if key not in self._biases:
            first, mask, causal = self.mask(span)
            mask = self.causal_mask() if causal else mask
            distances = torch.arange(first, self.stop, device=self.device) - self.slots[:, :, None]  # [B, S, T]
            bias = distances[:, None].float() * slopes(alibi, heads, self.device)[:, None, None]
            if mask is not None:
                bias = bias.masked_fill(~mask, float("-inf"))
            self._biases[key] = first, bias.to(self.dtype)
        return *self._biases[key], False

    def causal_mask(self) -> Tensor:
        """Return the mask for a call where ``mask`` returns only the flag for causal attention.

        *Shape:* (1, 1, sequence, sequence).
        """
        return torch.ones(self.length, self.length, dtype=torch.bool, device=self.device).tril()[None, None]

    def mask(self, span: AttentionSpan) -> tuple[int, Tensor | None, bool]:
        """Return the slots that the queries may see: (first slot, mask or None, whether to use causal attention).

        No query sees a slot before the first. Causal attention needs no mask.

        *Shape:* mask (batch or 1, 1, sequence, slots from the first on), True where a query may attend.
        """
        if span not in self._masks:
            self._masks[span] = self._mask(span)
        return self._masks[span]

    def _mask(self, span: AttentionSpan) -> tuple[int, Tensor | None, bool]:
        if self.uniform is None:
            first, stop, queries = 0, self.stop, self.slots[:, :, None]
        else:
            first, stop = span.first(self.uniform), self.uniform + self.length
            if self.length == 1:
                return first, None, False
            if self.uniform == 0 and (span.is_whole if torch.compiler.is_compiling() else span.first(stop - 1) == 0):
                return 0, None, True
            queries = torch.arange(self.uniform, stop, device=self.device)[None, :, None]
        keys = torch.arange(first, stop, device=self.device)
        allowed = keys <= queries
        if span.window is not None:
            allowed &= keys > queries - span.window
        if span.chunk is not None:
            allowed &= keys // span.chunk == queries // span.chunk
        return first, allowed[:, None], False


def slopes(alibi: Alibi, heads: int, device: torch.device) -> Tensor:
    """Return the ALiBi slope of each head: powers of 2^(-max_bias / n).

    n is the smallest power of two that is at least ``heads``. If it is more than ``heads``, every second power comes
    first.
    """
    whole = 2 ** math.ceil(math.log2(heads))
    powers: Tensor = 2.0 ** (-torch.arange(1, whole + 1, device=device).float() * alibi.max_bias / whole)
    if whole != heads:
        powers = torch.cat((powers[1::2], powers[::2]))[:heads]
    return powers * alibi.multiplier
