"""Compute with quantized weights as they are stored. ``spec/v1/bundle.md``, section "Encodings", has the equations.

``spec/decisions/0025`` says why each kernel is there. Each kernel computes the product with the same weights; they
differ in how they round its other factor:

- ``int8pack`` reads the stored bytes of ``rows8``, and rounds the input to bfloat16.
- ``columns`` multiplies the stored bytes by the input as two columns of 8-bit integers, which keep some 15 bits of it.
- ``int4pack`` reads a copy of ``blocks4`` that torch packs for this processor, and rounds the input to bfloat16.
- ``torch`` makes the numbers of the weight, and multiplies by them in the dtype of the stage. It rounds nothing else,
  has gradients, and runs on every device.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from splitbundle.backends.torch.kernel_choice import COLUMNS, INT4PACK, INT8PACK
from splitbundle.format.encodings import TABLE, Encoding

Packed = tuple[Tensor, Tensor]
"""A ``blocks4`` matrix as torch's kernel reads it, and its scales with zero points."""
FEW_ROWS: Final = 8
"""The most rows for which the two kernels of ``rows8`` that read bytes are faster than making the numbers."""
FEW_ROWS_OF_BLOCKS: Final = 16
_AMX: Final = bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
"""Whether the processor has AMX. Then ``columns`` takes no longer for 16 columns than for one."""
_FEWER_ROWS: Final = 4
"""The most rows for which ``int8pack`` is faster even with AMX, unless the weight is wide."""
_WIDE: Final = 2**22
"""The fewest numbers of a wide weight, which has at least twice as many rows as columns. ``int8pack`` reads many short
rows more slowly."""
_LARGEST: Final = 127 * 256
_PIECE: Final = 2**20
"""How many numbers are made at once, so that each step finds them in the processor's cache."""
_PACKED_ROWS: Final = 64
"""torch packs 64 rows of ``blocks4`` together, so a matrix can be packed in slices of so many rows."""
_SLICE: Final = 64 * _PACKED_ROWS


def dequantized(codes: Tensor, scale: Tensor, encoding: Encoding, dtype: torch.dtype) -> Tensor:
    """Return the numbers of a weight, each rounded once, from the exact product of its code and its scale.

    *Shape:* codes and scales as stored -> (…, rows, columns), in ``dtype``.
    """
    if encoding.block is None:
        return (codes.float() * scale.float()[..., None]).to(dtype)
    # A code has 4 bits and a scale 8, so bfloat16 rounds the product once.
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    rows, factors = codes.flatten(0, -3), scale.to(wide).flatten(0, -2)[..., None]
    out = torch.empty((*rows.shape[:2], 2 * rows.shape[2]), dtype=wide, device=codes.device)
    step = max(1, _PIECE // out[0].numel()) if out.numel() else 1
    for start in range(0, len(rows), step):
        own = slice(start, start + step)
        torch.mul(_integers(rows[own]).to(wide), factors[own], out=out[own])
    return out.view(*scale.shape[:-1], -1).to(dtype)


def _integers(codes: Tensor) -> Tensor:
    """Return the codes of bytes, less 8. *Shape:* (…, bytes) -> (…, 2 · bytes), in bfloat16.

    0x4300 is 128 in bfloat16, and the four bits below it count in ones. So each half of a word becomes 128 and a code.
    """
    words = codes.to(torch.int32).mul_(1 << 12 | 1).bitwise_and_(0x000F000F).bitwise_or_(0x43004300)
    return words.view(torch.bfloat16).sub_(128 + 8)


class _Product(torch.autograd.Function):
    """x Wᵀ, which keeps the codes for the backward pass, and not the numbers of W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, encoding: Encoding) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.encoding = encoding
        return functional.linear(x, dequantized(codes, scale, encoding, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scale = ctx.saved_tensors
        weight = dequantized(codes, scale, ctx.encoding, gradient.dtype)
        return gradient @ weight, None, None, None


def exact(x: Tensor, codes: Tensor, scale: Tensor, encoding: Encoding) -> Tensor:
    """Return x Wᵀ in the dtype of x, with gradients for x. *Shape:* (…, columns) -> (…, rows)."""
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Product.apply(x, codes, scale, encoding)  # type: ignore[no-any-return, no-untyped-call]
    if encoding.block is None and x.dtype == torch.bfloat16:
        # Codes are exact in bfloat16, and the products with them are summed in float32.
        return functional.linear(x, codes.to(x.dtype)) * scale
    return functional.linear(x, dequantized(codes, scale, encoding, x.dtype))


def int8pack(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return x Wᵀ of ``rows8`` with torch's kernel for weights of 8 bits. *Shape:* (rows, columns) -> (rows, …)."""
    rounded = x.to(torch.bfloat16).contiguous()
    if rounded.data_ptr() % 64:  # the kernel needs aligned rows
        rounded = rounded.clone()
    product: Tensor = torch.ops.aten._weight_int8pack_mm(rounded, codes, scale)
    return product.to(x.dtype)


def columns(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return x Wᵀ of ``rows8`` with products of integers. *Shape:* (rows, columns) -> (rows, …).

    Each number of x becomes s · (256 · h + l), with h from -127 to 127 and l from -128 to 127. The weight is the left
    factor, so that its bytes are read once for all columns.
    """
    rows, x32 = len(x), x.float()
    step = x32.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-30).div_(_LARGEST)
    whole = (x32 / step).round_().to(torch.int16)
    # The two bytes of whole + 128 are l + 128 and h. The second step makes l signed.
    parts = whole.add_(128).bitwise_xor_(128).t().contiguous().view(-1).view(torch.int8).view(-1, 2 * rows)
    both = torch._int_mm(codes, parts).float()
    summed = torch.add(both[:, 0::2], both[:, 1::2], alpha=256)
    product: Tensor = summed.t() * (step * scale)
    return product.to(x.dtype)


def pack(codes: Tensor, scale: Tensor, encoding: Encoding) -> Packed:
    """Return the copy of a ``blocks4`` matrix that torch's kernel reads, and its scales with zero points of 0.

    *Shape:* (rows, blocks, block / 2), (rows, blocks) -> (rows, columns / 2), (blocks, rows, 2).
    """
    scales = torch.stack((scale.t(), torch.zeros_like(scale.t())), dim=-1).contiguous()
    if len(codes) % _PACKED_ROWS == 0 and _packs_pairs_of_rows():
        return _paired(codes), scales
    return torch.cat([_packed_by_torch(part) for part in codes.split(_SLICE)]), scales  # type: ignore[no-untyped-call]


def _packed_by_torch(codes: Tensor) -> Tensor:
    whole = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).to(torch.int32)
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1)
    return packed


def _paired(codes: Tensor) -> Tensor:
    """Return what torch packs on processors with AVX-512, in a sixth of the time.

    Of each 64 rows, a byte has the codes of one column in the rows d and d + 32.
    """
    halves = codes.reshape(len(codes) // _PACKED_ROWS, 2, _PACKED_ROWS // 2, -1).transpose(2, 3).contiguous()
    first, second = halves.unbind(1)
    packed = torch.empty((*first.shape[:2], 2, first.shape[2]), dtype=torch.uint8)
    torch.bitwise_or(first & 15, second << 4, out=packed[:, :, 0])
    torch.bitwise_or(first >> 4, second & 0xF0, out=packed[:, :, 1])
    return packed.view(len(codes), -1)


@cache
def _packs_pairs_of_rows() -> bool:
    """Return whether torch packs as ``_paired`` does. It depends on the processor."""
    codes = torch.arange(2 * _PACKED_ROWS * 16).mul_(167).to(torch.uint8).view(-1, 1, 16)
    return torch.equal(_packed_by_torch(codes), _paired(codes))


def int4pack(x: Tensor, packed: Packed, encoding: Encoding) -> Tensor:
    """Return x Wᵀ of a packed ``blocks4`` matrix. *Shape:* (rows, columns) -> (rows, …)."""
    rounded = x.to(torch.bfloat16).contiguous()
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rounded, packed[0], encoding.block, packed[1])
    return product.to(x.dtype)


def key(x: Tensor, outputs: int, encoding: Encoding) -> str | None:
    """Return the key of a product in ``KERNELS``, or None if the numbers of the weight must be made.

    *Shape:* x (…, inputs), the weight (outputs, inputs).
    """
    inputs = x.shape[-1]
    rows = x.numel() // inputs
    if encoding.block is not None:
        return "blocks4/1-16" if rows <= FEW_ROWS_OF_BLOCKS else None
    if rows > FEW_ROWS:
        return None
    if x.dtype == torch.bfloat16:
        wide = outputs >= 2 * inputs and outputs * inputs >= _WIDE
        return "rows8-bfloat16-amx/1-8" if _AMX and (wide or rows > _FEWER_ROWS) else "rows8-bfloat16/1-8"
    return "rows8-float32/1-8"


@cache
def works(kernel: str) -> bool:
    """Return whether a kernel is here, and gives the right numbers for the largest codes and inputs.

    Without the instructions for it, oneDNN adds products of 8 bits in 16 bits, which saturate silently.
    """
    encoding = TABLE["blocks4_32" if kernel == INT4PACK else "rows8"]
    # The second number of each row becomes h = ±127 and l = -128, the largest parts.
    x = torch.tensor([[1.0, 1 - 128 / _LARGEST], [-1.0, -1 - 128 / _LARGEST], [0.5, 0.25]]).repeat(1, 32)
    scale = torch.full((64,) if encoding.block is None else (64, 2), 2.0, dtype=torch.bfloat16)
    try:
        if kernel == INT4PACK:
            codes = torch.tensor([0x80, 0x0F], dtype=torch.uint8).repeat(64, 2, 8)
            got = int4pack(x, pack(codes, scale, encoding), encoding)
        else:
            codes = torch.tensor([127, 127, -127, 127], dtype=torch.int8).repeat(64, 16)
            got = {INT8PACK: int8pack, COLUMNS: columns}[kernel](x, codes, scale)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    right = functional.linear(x, dequantized(codes, scale, encoding, torch.float32))
    return bool(torch.allclose(got, right, rtol=2**-7, atol=1e-3))
