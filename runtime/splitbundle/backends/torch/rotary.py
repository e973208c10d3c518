"""Rotary positions: the frequencies, their scaling, and the rotation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from splitbundle.format.architecture.rotary import (
    Dynamic,
    Linear,
    Llama3,
    LongRope,
    Proportional,
    Rotary,
    Yarn,
)


def rotation(rotary: Rotary, slots: Tensor, lengths: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosine and ± the sine of the angle of each rotated channel's pair.

    The cosine multiplies the channel itself, and ± the sine multiplies the other channel of the pair.

    *Shape:* slots (batch or 1, sequence), int64 -> twice (batch or 1, sequence, 1, dim), in the channel order of the
    layout.
    """
    # Angles are computed in float32, as in the original models. In float64 they would differ from the model's angles.
    angles = slots[:, :, None, None].float() * row_frequencies(rotary, lengths, slots.device)
    factor = getattr(rotary.scaling, "attention_factor", 1.0)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    sin = sin if rotary.direction is None else -sin
    join = torch.cat if rotary.layout == "half" else lambda pair, dim: torch.stack(pair, dim).flatten(-2)
    # The dtype comes last: under autocast, torch joins no tensors of a 16-bit type that isn't autocast's own.
    return join((cos, cos), -1).to(dtype), join((-sin, sin), -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """Rotate each pair of channels by the angle of its position.

    Only the first ``dim`` channels are rotated. The pairs are (i, i + dim/2) in the layout "half", and (2i, 2i + 1) in
    "interleaved".

    *Shape:* x (batch, sequence, heads, head_dim); cos, sin (batch or 1, sequence, 1, dim), as from
    ``Positions.rotary``.
    """
    dim = cos.shape[-1]
    if cos.dtype not in (x.dtype, torch.float32):  # bfloat16 and float16, under autocast
        cos, sin = cos.float(), sin.float()
    turned, rest = (x, None) if dim == x.shape[-1] else (x[..., :dim], x[..., dim:])
    if layout == "half":
        partners = turned.roll(dim // 2, dims=-1)
    else:
        partners = turned.view(*x.shape[:-1], dim // 2, 2).flip(-1).flatten(-2)
    turned = torch.addcmul(turned * cos, partners, sin)
    return turned if rest is None else torch.cat((turned, rest), dim=-1)


def row_frequencies(rotary: Rotary, lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return the frequencies for rows of the given lengths.

    *Shape:* (dim / 2), or (batch, 1, 1, dim / 2) if rows differ.
    """
    scaling = rotary.scaling
    if not isinstance(scaling, Dynamic | LongRope):
        return frequencies(rotary, 0, device)
    own = [max(length, scaling.original_positions) for length in lengths]
    if isinstance(scaling, LongRope):
        own = [min(length, scaling.original_positions + 1) for length in own]
    tables = {length: frequencies(rotary, length, device) for length in set(own)}
    return tables[own[0]] if len(tables) == 1 else torch.stack([tables[length] for length in own])[:, None, None]


def frequencies(rotary: Rotary, length: int, device: torch.device) -> Tensor:
    """Return the frequency of each pair of channels for a row of ``length``, in radians per position, float32.

    *Shape:* (dim / 2).
    """
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
        """Return the pair, as a real number, that makes this many rotations over the original positions."""
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
