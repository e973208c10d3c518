"""Turn the numbers of a matrix into codes and scales. ``spec/v1/bundle.md``, section "Encodings", has the equations."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from splitbundle.format.encodings import Encoding

TRIED: Final = tuple(1.25 - 0.015 * i for i in range(41))
"""The shares of m / 8 that the search tries as a scale, with either sign; m is the extreme of a block."""
TINY: Final = 1e-36
"""A block whose scale is smaller becomes zeros: no product of it could be told from them."""
_CHUNK: Final = 2**17
"""The numbers that are searched at once. Their copies fit in the cache of a processor."""
DAMPING: Final = 0.01
"""The share of the mean of the diagonal that is added to it, so that the matrix of inputs has an inverse."""


def quantized(weight: Tensor, encoding: Encoding, method: str, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the codes and the scales of a matrix, or of a stack of matrices.

    *Shape:* (…, rows, columns) -> those of ``Encoding.stored``.

    Args:
        weight: finite numbers of any floating dtype.
        encoding: the encoding, which fits the shape.
        method: "rtn", "search" or "gptq". They differ for ``blocks4`` alone.
        moments: for "gptq": Xᵀ X of the inputs X that the matrix multiplies, in float32 (columns, columns), or a stack
            of them. None means "search".
    """
    if encoding.block is None:
        return _rows(weight.float())
    if weight.ndim == 3:
        own = [None] * len(weight) if moments is None else list(moments)
        pairs = [quantized(matrix, encoding, method, each) for matrix, each in zip(weight, own, strict=True)]
        return torch.stack([codes for codes, _ in pairs]), torch.stack([scale for _, scale in pairs])
    if method == "gptq" and moments is not None and bool(moments.any()):
        return _gptq(weight.float(), moments.float(), encoding)
    codes, scales = [], []
    for part in weight.split(max(1, _CHUNK // weight.shape[1])):  # type: ignore[no-untyped-call]
        blocks = part.float().unflatten(-1, (-1, encoding.block))
        scale = _extreme(blocks) if method == "rtn" else searched(blocks)
        codes.append(_packed(_nearest(blocks, scale)))
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def _rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to ±127 steps. The step is rounded to bfloat16 first, so that the codes make up for it."""
    scale = (weight.abs().amax(dim=-1) / 127).to(torch.bfloat16)
    scale = torch.where(scale < TINY, torch.ones_like(scale), scale)
    return (weight / scale.float()[..., None]).round_().clamp_(-127, 127).to(torch.int8), scale


def _extreme(blocks: Tensor) -> Tensor:
    """Return the scale with which the extreme of each block is the code -8. *Shape:* (…, block) -> (…)."""
    extreme = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))[..., 0]
    scale = (extreme / -8).to(torch.bfloat16)
    return torch.where(scale.abs() < TINY, torch.ones_like(scale), scale)


def searched(blocks: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return the scale of each block with the least squared error among those tried. *Shape:* (…, block) -> (…).

    Args:
        blocks: the numbers.
        importance: the factor of each squared error; None for the number's magnitude, with which SmolLM2-135M came out
            a little better than with 1. *Shape:* (block).
    """
    first, size = _extreme(blocks), blocks.abs()
    best, least = first, torch.full(first.shape, torch.inf)
    for share in TRIED:
        for sign in (1.0, -1.0):
            scale = (first.float() * (sign * share)).to(torch.bfloat16)
            numbers = (blocks / scale.float()[..., None]).round_().clamp_(-8, 7).mul_(scale.float()[..., None])
            off = numbers.sub_(blocks).square_()
            now = off.mul_(size).sum(dim=-1) if importance is None else off @ importance
            better = now < least
            best, least = torch.where(better, scale, best), torch.where(better, now, least)
    return best


def _nearest(blocks: Tensor, scale: Tensor) -> Tensor:
    """Return the nearest code of each number, from 0 to 15. *Shape:* (…, block), (…) -> (…, block)."""
    return (blocks / scale.float()[..., None]).round_().clamp_(-8, 7).add_(8).to(torch.uint8)


def _packed(codes: Tensor) -> Tensor:
    """Put two codes into each byte, the first one in the low bits. *Shape:* (…, block) -> (…, block / 2)."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def _gptq(weight: Tensor, moments: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """Round a matrix column by column, and let later columns make up for each rounding (arXiv:2210.17323).

    *Shape:* (rows, columns), (columns, columns) -> codes and scales.
    """
    rows, width = weight.shape
    block = encoding.block or width
    weight, diagonal = weight.clone(), moments.diagonal()
    unused = diagonal == 0
    damped = moments + torch.diag(DAMPING * diagonal.mean() + unused.float())
    lower = torch.linalg.cholesky(damped)
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    codes = torch.empty(rows, width // block, block, dtype=torch.uint8)
    scales = torch.empty(rows, width // block, dtype=torch.bfloat16)
    for number in range(width // block):
        start, end = number * block, (number + 1) * block
        part, errors = weight[:, start:end].clone(), torch.empty(rows, block)
        scale = searched(part, diagonal[start:end])
        own = inverse[start:end, start:end]
        for column in range(block):
            value = part[:, column]
            code = _nearest(value[:, None], scale)[:, 0]
            codes[:, number, column] = code
            off = (value - (code.float() - 8) * scale.float()) / own[column, column]
            part[:, column:] -= off[:, None] * own[column, column:][None]
            errors[:, column] = off
        scales[:, number] = scale
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return _packed(codes), scales
