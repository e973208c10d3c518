"""Where the tokens of a call stand, and what the tokens before them left: positions, masks, rotations, the KV cache.

In a stage, row b's tokens come first: its positions past[b] … past[b]+count[b]−1 stand at 0 … count[b]−1 of the
sequence, and what follows is padding. So slot = position, and a causal mask keeps padding out by itself wherever all
rows have the same past.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from splitbundle.architecture import Architecture, Linear, Llama3, Rotary
from splitbundle.errors import BundleError, Problem


class Positions:
    """The positions of one call: computed once, used by every layer."""

    def __init__(
        self, past: Sequence[int], count: Sequence[int], length: int, device: torch.device, dtype: torch.dtype
    ):
        self.past, self.count, self.length = tuple(past), tuple(count), length
        self.device, self.dtype = device, dtype
        self.uniform = self.past[0] if len(set(self.past)) == 1 else None
        """The past that all rows share, or None."""
        self.padded = any(n != length for n in self.count)
        self.stop = max(p + n for p, n in zip(self.past, self.count, strict=True)) if self.past else 0
        """One above the last position."""
        self._slots: Tensor | None = None
        self._tokens: tuple[Tensor, Tensor, Tensor] | None = None
        self._masks: dict[int | None, tuple[int, Tensor | None, bool]] = {}
        self._rotations: dict[Rotary, tuple[Tensor, Tensor]] = {}

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
        """Cosine and sine of each position's angles. *Shape:* (batch or 1, 1, sequence, dim / 2)."""
        if rotary not in self._rotations:
            # Angles are taken in float32, as everyone takes them: in float64 they would differ from the model's own.
            angles = self.slots[:, None, :, None].float() * frequencies(rotary, self.device)
            self._rotations[rotary] = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        return self._rotations[rotary]

    def mask(self, window: int | None) -> tuple[int, Tensor | None, bool]:
        """What the queries may see: (first slot that any of them sees, mask or None, whether causal attention will do).

        *Shape:* of the mask, (batch or 1, 1, sequence, slots from the first on), True where attention goes.
        """
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return self._masks[window]

    def _mask(self, window: int | None) -> tuple[int, Tensor | None, bool]:
        if self.uniform is None:
            first, stop, queries = 0, self.stop, self.slots[:, :, None]
        else:
            first = 0 if window is None else max(0, self.uniform + 1 - window)
            stop = self.uniform + self.length
            if self.length == 1:
                return first, None, False
            if self.uniform == 0 and (window is None or stop <= window):
                return 0, None, True
            queries = torch.arange(self.uniform, stop, device=self.device)[None, :, None]
        keys = torch.arange(first, stop, device=self.device)
        allowed = keys <= queries
        if window is not None:
            allowed &= keys > queries - window
        return first, allowed[:, None], False


def frequencies(rotary: Rotary, device: torch.device) -> Tensor:
    """Radians per position of each pair of channels, in float32. *Shape:* (dim / 2)."""
    exponents = torch.arange(0, rotary.dim, 2, device=device, dtype=torch.float32) / rotary.dim
    base: Tensor = 1.0 / (rotary.base**exponents)
    scaling = rotary.scaling
    if isinstance(scaling, Linear):
        return base / scaling.factor
    if isinstance(scaling, Llama3):
        return _llama3(base, scaling)
    return base


def _llama3(base: Tensor, scaling: Llama3) -> Tensor:
    low, high, original = (
        scaling.low_frequency_factor,
        scaling.high_frequency_factor,
        scaling.original_positions,
    )
    wavelength = 2 * math.pi / base
    ramp = (original / wavelength - low) / (high - low)
    between = (1 - ramp) * base / scaling.factor + ramp * base
    slow, fast = wavelength > original / low, wavelength < original / high
    return torch.where(slow, base / scaling.factor, torch.where(fast, base, between))


class KVCache:
    """The keys and values of a stage's layers, ``capacity`` slots a row; slot = position.

    What lies at or above a row's past + count has no meaning: a call with a lower past forgets what lay above it.
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: tuple[int, int],
        batch_size: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.capacity, self.batch_size = capacity, batch_size
        self.layers, self.device, self.dtype = layers, device, dtype
        self.filled = [0] * batch_size
        """The slots of each row that hold a token."""
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
                start = positions.uniform
                stored[:, :, start : start + positions.length] = new
            else:
                rows, places, slots = positions.tokens
                stored[rows, :, slots] = new[rows, :, places]
        return self.keys[layer][:, :, : positions.stop], self.values[layer][:, :, : positions.stop]

    @property
    def kind(self) -> tuple[tuple[int, int], torch.dtype, torch.device]:
        """The layers whose keys these are, and what and where they are."""
        return self.layers, self.dtype, self.device

    def check(self, positions: Positions) -> None:
        """Whether this call fits.

        Raises:
            BundleError: ``session.capacity``; ``input.position`` for a past above what the cache holds.
        """
        if len(positions.past) != self.batch_size:
            rows = len(positions.past)
            raise BundleError(
                Problem(
                    code="input.shape",
                    argument="batch",
                    expected=f"{self.batch_size} rows, as the cache",
                    got=f"{rows}",
                )
            )
        if positions.stop > self.capacity:
            raise BundleError(
                Problem(
                    code="session.capacity",
                    argument="capacity",
                    expected=f"at least {positions.stop} slots",
                    got=f"{self.capacity}",
                    hint="Open a session with more capacity",
                )
            )
        for row, (past, filled) in enumerate(zip(positions.past, self.filled, strict=True)):
            if past > filled:
                raise BundleError(
                    Problem(
                        code="input.position",
                        argument=f"past[{row}]",
                        expected=f"at most {filled}, the positions that this stage's cache holds",
                        got=f"{past}",
                    )
                )

    def advance(self, positions: Positions) -> None:
        """Takes this call's tokens as stored."""
        self.filled = [past + count for past, count in zip(positions.past, positions.count, strict=True)]

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        for stored in (self.keys, self.values):
            for layer, tensor in stored.items():
                stored[layer] = tensor.index_select(0, torch.tensor(rows, device=tensor.device))
        self.filled = [self.filled[row] for row in rows]
