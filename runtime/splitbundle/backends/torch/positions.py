"""Where the tokens of a call stand, and what the tokens before them left, in torch: masks, rotations, the KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from splitbundle.format.architecture.decoder import (
    Alibi,
    Architecture,
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    Proportional,
    QueryTemperature,
    Rotary,
    Yarn,
)
from splitbundle.stages.call import Call, Slots


class Reach(NamedTuple):
    """How far back the queries of a layer see."""

    window: int | None
    chunk: int | None

    def first(self, position: int) -> int:
        """The first position that one sees."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(0, position + 1 - self.window)


class Positions(Call):
    """The positions of one call: computed once, used by every layer."""

    def __init__(
        self, past: Sequence[int], count: Sequence[int], length: int, device: torch.device, dtype: torch.dtype
    ):
        super().__init__(past, count, length)
        self.device, self.dtype = device, dtype
        self._slots: Tensor | None = None
        self._tokens: tuple[Tensor, Tensor, Tensor] | None = None
        self._masks: dict[Reach, tuple[int, Tensor | None, bool]] = {}
        self._rotations: dict[int, tuple[Rotary, tuple[Tensor, Tensor]]] = {}
        self._biases: dict[tuple[Alibi, int, Reach], tuple[int, Tensor]] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> Positions:
        """The same positions for a stage that computes elsewhere or otherwise."""
        if device == self.device and dtype == self.dtype:
            return self
        return Positions(self.past, self.count, self.length, device, dtype)

    @property
    def slots(self) -> Tensor:
        """Each position, as int64. Padding repeats its row's last one, so that every table has it.

        *Shape:* (batch, sequence), or (1, sequence) when all rows are alike.
        """
        if self._slots is None:
            offsets = torch.arange(self.length, device=self.device)
            if self.uniform is not None and not self.padded:
                self._slots = (offsets + self.uniform)[None]
            else:
                past = torch.tensor(self.past, device=self.device)[:, None]
                # A row without tokens repeats the one before them: its next position may be beyond every table.
                last = (past + torch.tensor(self.count, device=self.device)[:, None] - 1).clamp(min=0)
                self._slots = torch.minimum(past + offsets[None], last)
        return self._slots

    @property
    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """The row, the place in the sequence and the slot of every token. *Shape:* each (tokens)."""
        if self._tokens is None:
            rows, places = self.valid.nonzero(as_tuple=True)
            self._tokens = rows, places, self.slots.expand(len(self.past), -1)[rows, places]
        return self._tokens

    @property
    def valid(self) -> Tensor:
        """True for tokens, False for padding. *Shape:* (batch, sequence)."""
        return (
            torch.arange(self.length, device=self.device)[None] < torch.tensor(self.count, device=self.device)[:, None]
        )

    def rotary(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """For each channel that turns, the cosine of its pair's angle, and what its partner's share is: ± the sine.

        *Shape:* (batch or 1, sequence, 1, dim), in the order of the layout.
        """
        # Every layer asks, and hashing all of its fields would take longer.
        if id(rotary) not in self._rotations or self._rotations[id(rotary)][0] is not rotary:
            # Angles are taken in float32, as everyone takes them: in float64 they would differ from the model's own.
            lengths = [past + count for past, count in zip(self.past, self.count, strict=True)]
            angles = self.slots[:, :, None, None].float() * row_frequencies(rotary, lengths, self.device)
            factor = getattr(rotary.scaling, "attention_factor", 1.0)
            cos, sin = (angles.cos() * factor).to(self.dtype), (angles.sin() * factor).to(self.dtype)
            if rotary.layout == "half":
                turns = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
            else:
                turns = torch.stack((cos, cos), dim=-1).flatten(-2), torch.stack((-sin, sin), dim=-1).flatten(-2)
            self._rotations[id(rotary)] = rotary, turns
        return self._rotations[id(rotary)][1]

    def sinusoids(self, offset: int, size: int) -> Tensor:
        """Sines, then cosines, of each position. *Shape:* (batch or 1, sequence, size)."""
        half = size // 2
        rates = torch.exp(torch.arange(half, device=self.device).float() * -(math.log(10000.0) / (half - 1)))
        angles = (self.slots + offset)[:, :, None].float() * rates
        waves = torch.cat((angles.sin(), angles.cos(), angles.new_zeros(*angles.shape[:2], size % 2)), dim=-1)
        return waves.to(self.dtype)

    def temperature(self, temperature: QueryTemperature) -> Tensor:
        """What each position's queries are multiplied by. *Shape:* (batch or 1, sequence, 1, 1)."""
        whole = (self.slots + temperature.offset) // temperature.original_positions
        return (1 + temperature.beta * torch.log1p(whole.float())).to(self.dtype)[:, :, None, None]

    def biased_mask(self, alibi: Alibi, heads: int, reach: Reach) -> tuple[int, Tensor, bool]:
        """``mask``, with what ALiBi adds to each score in place of True, and -∞ in place of False.

        *Shape:* of the mask, (batch or 1, heads, sequence, slots from the first on).
        """
        key = (alibi, heads, reach)
        if key not in self._biases:
            first, mask, causal = self.mask(reach)
            mask = self.causal_mask() if causal else mask
            distances = torch.arange(first, self.stop, device=self.device) - self.slots[:, :, None]  # [B, S, T]
            bias = distances[:, None].float() * slopes(alibi, heads, self.device)[:, None, None]
            if mask is not None:
                bias = bias.masked_fill(~mask, float("-inf"))
            self._biases[key] = first, bias.to(self.dtype)
        return *self._biases[key], False

    def causal_mask(self) -> Tensor:
        """The mask itself where ``mask`` says that causal attention will do. *Shape:* (1, 1, sequence, sequence)."""
        return torch.ones(self.length, self.length, dtype=torch.bool, device=self.device).tril()[None, None]

    def mask(self, reach: Reach) -> tuple[int, Tensor | None, bool]:
        """What the queries may see: (first slot that any of them sees, mask or None, whether causal attention will do).

        *Shape:* of the mask, (batch or 1, 1, sequence, slots from the first on), True where attention goes.
        """
        if reach not in self._masks:
            self._masks[reach] = self._mask(reach)
        return self._masks[reach]

    def _mask(self, reach: Reach) -> tuple[int, Tensor | None, bool]:
        if self.uniform is None:
            first, stop, queries = 0, self.stop, self.slots[:, :, None]
        else:
            first, stop = reach.first(self.uniform), self.uniform + self.length
            if self.length == 1:
                return first, None, False
            if self.uniform == 0 and reach.first(stop - 1) == 0:
                return 0, None, True
            queries = torch.arange(self.uniform, stop, device=self.device)[None, :, None]
        keys = torch.arange(first, stop, device=self.device)
        allowed = keys <= queries
        if reach.window is not None:
            allowed &= keys > queries - reach.window
        if reach.chunk is not None:
            allowed &= keys // reach.chunk == queries // reach.chunk
        return first, allowed[:, None], False


def slopes(alibi: Alibi, heads: int, device: torch.device) -> Tensor:
    """Each head's slope: powers of 2^(-max_bias / n) for n the power of two from ``heads`` up, every second first."""
    whole = 2 ** math.ceil(math.log2(heads))
    powers: Tensor = 2.0 ** (-torch.arange(1, whole + 1, device=device).float() * alibi.max_bias / whole)
    if whole != heads:
        powers = torch.cat((powers[1::2], powers[::2]))[:heads]
    return powers * alibi.multiplier


def row_frequencies(rotary: Rotary, lengths: Sequence[int], device: torch.device) -> Tensor:
    """The frequencies of rows of some lengths. *Shape:* (dim / 2), or (batch, 1, 1, dim / 2) where rows differ."""
    scaling = rotary.scaling
    if not isinstance(scaling, Dynamic | LongRope):
        return frequencies(rotary, 0, device)
    own = [max(length, scaling.original_positions) for length in lengths]
    if isinstance(scaling, LongRope):
        own = [min(length, scaling.original_positions + 1) for length in own]
    tables = {length: frequencies(rotary, length, device) for length in set(own)}
    return tables[own[0]] if len(tables) == 1 else torch.stack([tables[length] for length in own])[:, None, None]


def frequencies(rotary: Rotary, length: int, device: torch.device) -> Tensor:
    """Radians per position of each pair of channels, in float32, in rows of some length. *Shape:* (dim / 2)."""
    scaling, dim, base = rotary.scaling, rotary.dim, rotary.base
    exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
    if isinstance(scaling, Dynamic):
        longest = max(length, scaling.original_positions)
        growth = scaling.factor * longest / scaling.original_positions - (scaling.factor - 1)
        base = base * growth ** (dim / (dim - 2))
    if isinstance(scaling, LongRope):
        long = length > scaling.original_positions
        divisors = torch.tensor(
            scaling.long_factors if long else scaling.short_factors, device=device, dtype=torch.float32
        )
        return 1.0 / (divisors * base**exponents)
    plain: Tensor = 1.0 / (base**exponents)
    if isinstance(scaling, Linear):
        return plain / scaling.factor
    if isinstance(scaling, Proportional):
        turned = torch.arange(dim // 2, device=device) < scaling.pairs
        return torch.where(turned, plain, 0.0) / scaling.factor
    if isinstance(scaling, Llama3):
        return _llama3(plain, scaling)
    return _yarn(plain, rotary, scaling) if isinstance(scaling, Yarn) else plain


def _llama3(base: Tensor, scaling: Llama3) -> Tensor:
    low, high, original = scaling.low_frequency_factor, scaling.high_frequency_factor, scaling.original_positions
    wavelength = 2 * math.pi / base
    ramp = (original / wavelength - low) / (high - low)
    between = (1 - ramp) * base / scaling.factor + ramp * base
    slow, fast = wavelength > original / low, wavelength < original / high
    return torch.where(slow, base / scaling.factor, torch.where(fast, base, between))


def _yarn(base: Tensor, rotary: Rotary, scaling: Yarn) -> Tensor:
    def pair(rotations: float) -> float:
        """The pair (as a real number) that turns so many times over the original positions."""
        turns = scaling.original_positions / (rotations * 2 * math.pi)
        return rotary.dim * math.log(turns) / (2 * math.log(rotary.base))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    high = high + 0.001 if low == high else high
    index = torch.arange(rotary.dim // 2, device=base.device, dtype=torch.float32)
    ramp = ((index - low) / (high - low)).clamp(0, 1)
    return base / scaling.factor * ramp + base * (1 - ramp)


class KVCache(Slots):
    """The keys and values of a stage's layers; slot = position."""

    def __init__(
        self,
        architecture: Architecture,
        layers: tuple[int, int],
        batch_size: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(architecture, layers, batch_size, capacity)
        self.device, self.dtype = device, dtype
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        for layer in range(*layers):
            attention = architecture.kind_of(layer).attention
            shape = (batch_size, attention.kv_heads, capacity, attention.head_dim)
            # Zeros, not whatever memory held: a masked slot still takes part in a product, and 0 · NaN is NaN.
            self.keys[layer] = torch.zeros(shape, device=device, dtype=dtype)
            self.values[layer] = torch.zeros(shape, device=device, dtype=dtype)

    def extend(self, layer: int, keys: Tensor, values: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Stores this call's keys and values; gives those of all slots up to the last position.

        *Shape:* twice (batch, kv_heads, sequence, head_dim) -> twice (batch, kv_heads, slots, head_dim).
        """
        for stored, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if positions.uniform is not None:
                stored.narrow(2, positions.uniform, positions.length).copy_(new)
            else:
                rows, places, slots = positions.tokens
                stored[rows, :, slots] = new[rows, :, places]
        return self.keys[layer].narrow(2, 0, positions.stop), self.values[layer].narrow(2, 0, positions.stop)

    @property
    def kind(self) -> tuple[tuple[int, int], torch.dtype, torch.device]:
        """The layers whose keys these are, and what and where they are."""
        return self.layers, self.dtype, self.device

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        for stored in (self.keys, self.values):
            for layer, tensor in stored.items():
                stored[layer] = tensor.index_select(0, torch.tensor(rows, device=tensor.device))
        super().reorder(rows)
