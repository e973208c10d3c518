"""The formulas of quantized weights: codes and scales go in, and plain numbers come out.

Each formula gives the numbers that the format's own library computes, equal to the bit. So each one says where it
multiplies and where it rounds. ``dtype`` is the dtype of the result. ``tests/converter/quantized`` compares them with
the libraries.

Shapes use ``o`` for the rows of a weight (its outputs), ``i`` for its columns (its inputs), and ``g`` for the number of
columns that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The numbers of FP4 by their codes (OCP Microscaling Formats 1.0, table 5)."""
NF4: Final = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The numbers of NF4 by their codes (Dettmers et al., QLoRA, appendix E)."""
FP4: Final = (
    *(0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25),
    *(0.0, -0.005208333333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25),
)
"""The numbers of bitsandbytes' own FP4 by their codes."""
AWQ_ORDER: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word of each of eight columns, as AWQ's kernels for matrix products (gemm) want them."""

_CHUNK: Final = 2**22
"""The number of values that are computed at once, so that the temporary memory stays small."""


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Read unsigned integers of ``bits`` bits, 1 to 8, that lie one after another in words, the low bits first.

    *Shape:* (…, words), int32 or uint32 -> (…, count), uint8.
    """
    # A copy has the strides that view wants, also where a dimension has one element. Words are little-endian.
    data = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return narrow(data, count)
    if bits in (1, 2, 4):
        places = torch.arange(0, 8, bits, dtype=torch.uint8)
        values = (data.unsqueeze(-1) >> places) & (2**bits - 1)
        return narrow(values.flatten(-2), count)
    starts = torch.arange(count) * bits
    first, shift = starts // 8, (starts % 8).to(torch.int16)
    padded = torch.nn.functional.pad(data, (0, 1)).to(torch.int16)
    both = padded[..., first] | (padded[..., first + 1] << 8)
    return (both >> shift).bitwise_and(2**bits - 1).to(torch.uint8)


def narrow(values: Tensor, count: int) -> Tensor:
    """Return the first ``count`` columns."""
    return values.narrow(-1, 0, count)


def by_rows(formula: Callable[..., Tensor], codes: Tensor, *others: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``formula(codes, *others)`` in ``dtype``, computed for a few rows at a time.

    Each argument has a row for each row of the result, or is None.

    *Shape:* (rows, …) each -> (rows, columns).
    """
    rows = len(codes)
    result: Tensor | None = None
    step = max(1, _CHUNK // max(1, codes[:1].numel() * 8))
    for start in range(0, rows, step):
        chosen = slice(start, start + step)
        piece = formula(codes[chosen], *(None if other is None else other[chosen] for other in others)).to(dtype)
        if result is None:
            result = torch.empty(rows, *piece.shape[1:], dtype=dtype)
        result[chosen] = piece
    return codes.new_empty(codes.shape, dtype=dtype) if result is None else result


def blocks(
    codes: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype, zeros: Tensor | None = None
) -> Tensor:
    """Multiply codes by the scale of their block: W = (codes − zero) · scale, in float32, rounded to ``dtype``.

    The last block of a row or a column may be smaller than ``block``. A scale of a whole tensor or of a whole row is
    that of a block of this size. Codes of 8 bits and scales of 16 bits have an exact product in float32, so the result
    is also that of a library that multiplies in the dtype of the scales.

    *Shape:* codes (o, i); scales and zeros (⌈o / block₀⌉, ⌈i / block₁⌉) -> (o, i).
    """
    rows = torch.arange(len(codes)) // block[0]

    def wide(values: Tensor) -> Tensor:
        return narrow(values.repeat_interleave(block[1], -1), codes.shape[-1])

    def product(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        values = codes.float()
        return (values if zeros is None else values - wide(zeros)) * wide(scales)

    rest = None if zeros is None else zeros.float()[rows]
    return by_rows(product, codes, scale_numbers(scales)[rows], rest, dtype=dtype)


def scale_numbers(scales: Tensor) -> Tensor:
    """Return scales in float32. Bytes are exponents of two (E8M0): 2^(byte − 127)."""
    return (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()


def packed_e2m1(codes: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Read FP4, the low half of a byte first: W = number(code) · scale of its group, in float32, rounded to ``dtype``.

    *Shape:* codes (o, i / 2), uint8; scales (o, i / group), float32 -> (o, i).
    """
    numbers = torch.tensor(E2M1)

    def product(codes: Tensor, scales: Tensor) -> Tensor:
        values = numbers[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]
        return values * scales.repeat_interleave(group, -1)

    return by_rows(product, codes, scales, dtype=dtype)


def groups(codes: Tensor, bits: int, scales: Tensor, zeros: Tensor | None, group: Tensor) -> Tensor:
    """Read packed integers of compressed-tensors: W = (q − z) · scale of its group, in the dtype of the scales.

    A stored code is q + 2^(bits − 1). ``group`` is the number of the group of each column.

    *Shape:* codes (o, ⌈i · bits / 32⌉), int32; scales and zeros (o, groups); group (i) -> (o, i).
    """
    columns = len(group)

    def product(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        own = scales.index_select(-1, group)
        values = unpacked(codes, bits, columns).to(torch.int16).sub_(2 ** (bits - 1))
        return own * (values if zeros is None else values.sub_(zeros[..., group].to(torch.int16))).to(own.dtype)

    return by_rows(product, codes, scales, zeros, dtype=scales.dtype)


def gptq(codes: Tensor, bits: int, scales: Tensor, zeros: Tensor, group: Tensor) -> Tensor:
    """Read GPTQ: W[r, c] = scale[g, r] · (q − z[g, r]) with g = group[c], in the dtype of the scales.

    *Shape:* codes (i · bits / 32, o), int32, packed along the inputs; scales and zeros (groups, o); group (i)
    -> (o, i).
    """
    inputs = len(group)

    def product(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        values = unpacked(codes, bits, inputs).to(torch.int16) - zeros[:, group].to(torch.int16)
        return values * scales.index_select(1, group)

    return by_rows(product, codes.T.contiguous(), scales.T.contiguous(), zeros.T.contiguous(), dtype=scales.dtype)


def awq(codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor) -> Tensor:
    """Read AWQ of 4 bits for gemm: W[r, c] = (q − z[g, r]) · scale[g, r] with g = group[c], in the scales' dtype.

    *Shape:* codes (i, o / 8) and zeros (groups, o / 8), int32, packed along the outputs in ``AWQ_ORDER``; scales
    (groups, o); group (i) -> (o, i).
    """

    def plain(words: Tensor) -> Tensor:
        values = unpacked(words, 4, words.shape[-1] * 8).reshape(len(words), -1, 8)
        return values.index_select(2, torch.tensor(AWQ_ORDER)).flatten(1).T.contiguous()

    def product(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return (codes.to(torch.int16) - zeros[:, group].to(torch.int16)) * scales.index_select(1, group)

    return by_rows(product, plain(codes), scales.T.contiguous(), plain(zeros), dtype=scales.dtype)


def four_bit_blocks(
    codes: Tensor, numbers: Sequence[float], scales: Tensor, block: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Read bitsandbytes' 4 bits, the high half of a byte first: W = number(code) · absmax of its block, in float32.

    The blocks run through the whole tensor, row after row.

    *Shape:* codes (⌈n / 2⌉) of uint8, scales (⌈n / block⌉) of float32 -> ``shape``, of n values.
    """
    table = torch.tensor(numbers)
    whole = torch.stack((codes >> 4, codes & 15), -1).flatten()
    count = torch.Size(shape).numel()
    result = torch.empty(count, dtype=dtype)
    step = _CHUNK // block * block
    for start in range(0, count, step):
        values = table[whole[start : min(start + step, count)].int()]
        first = start // block
        own = scales[first : first + step // block].repeat_interleave(block)[: len(values)]
        result[start : start + len(values)] = (values * own).to(dtype)
    return result.reshape(shape)


def nested_scales(codes: Tensor, numbers: Tensor, scales: Tensor, block: int, offset: float) -> Tensor:
    """Read bitsandbytes' quantized scales: absmax = number(code) · absmax of the block + offset, in float32.

    *Shape:* codes (n) of uint8, numbers (256), scales (⌈n / block⌉) -> (n), float32.
    """
    return numbers[codes.int()] * scales.repeat_interleave(block)[: len(codes)] + torch.tensor(offset)


def eight_bit_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Read bitsandbytes' 8 bits: W = codes · absmax of the row · (1 / 127), in float32, in this order.

    *Shape:* codes (o, i) of int8, scales (o) of float32 -> (o, i).
    """
    return by_rows(lambda codes, scales: codes * scales[:, None] * 7.874015718698502e-3, codes, scales, dtype=dtype)


def affine(codes: Tensor, bits: int, scales: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """Read MLX's affine groups: W = scale · q + offset, each step rounded to the dtype of the scales.

    *Shape:* codes (…, i · bits / 32), uint32; scales and offsets (…, i / g) -> (…, i).
    """
    share = columns // scales.shape[-1]

    def product(codes: Tensor, scales: Tensor, offsets: Tensor) -> Tensor:
        values = unpacked(codes, bits, columns).to(scales.dtype)
        return scales.repeat_interleave(share, -1) * values + offsets.repeat_interleave(share, -1)

    lead = codes.shape[:-1]
    flat = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (codes, scales, offsets))
    return by_rows(product, *flat, dtype=scales.dtype).reshape(*lead, columns)
