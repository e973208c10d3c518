"""Tensors as GGUF stores them: codes and scales become blocks of 32, and numbers stay as they are.

A block of ``Q8_0`` is a scale in float16 and 32 codes in two's complement. A block of ``Q4_0`` is a scale in float16
and 16 bytes. The low four bits of byte j are code j plus 8, and the high four bits code j + 16 plus 8
(https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from splitbundle.format import dtypes
from splitbundle.format.encodings import TABLE

BLOCK: Final = 32


def block_type(encoding: str | None, shape: tuple[int, ...], scales: Tensor | None) -> str | None:
    """Return the type of blocks that hold a quantized tensor exactly, or None if there is none.

    Args:
        encoding: The name of the tensor's encoding, or None.
        shape: The shape of the tensor.
        scales: Its scales. bfloat16 has a wider range than the float16 of a block.
    """
    if encoding is None or scales is None or len(shape) != 2 or shape[1] % BLOCK:
        return None
    if not torch.equal(scales.to(torch.float16).float(), scales.float()):
        return None
    return "Q8_0" if TABLE[encoding].block is None else "Q4_0"


def plain_type(dtype: str, shape: tuple[int, ...]) -> str:
    """Return the type of a tensor of numbers. llama.cpp wants vectors in float32."""
    return dtypes.TABLE[dtype].safetensors if len(shape) > 1 else "F32"  # both formats have the same names


def blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the blocks of a quantized matrix.

    *Shape:* ``rows8``: codes (rows, columns), scales (rows). ``blocks4``: codes (rows, groups, block / 2), scales
    (rows, groups) -> (rows, columns / 32 · bytes of a block), uint8.
    """
    rows = len(codes)
    if codes.ndim == 2:
        own = codes.view(torch.uint8).reshape(rows, -1, BLOCK)
        scales = scales[:, None]
    else:
        pairs = codes.reshape(rows, -1, BLOCK // 2)
        both = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(2)
        own = both[..., : BLOCK // 2] | both[..., BLOCK // 2 :] << 4
    count = own.shape[1]
    factors = scales.to(torch.float16).repeat_interleave(count // scales.shape[1], dim=1)
    return torch.cat((factors[..., None].view(torch.uint8), own), dim=-1).flatten(1)


def rotated(stored: Tensor, heads: int) -> Tensor:
    """Return rows in llama.cpp's order: the halves of a head become neighbors. *Shape:* (heads · head_dim, …)."""
    size = len(stored) // heads // 2
    return stored.reshape(heads, 2, size, *stored.shape[1:]).transpose(1, 2).reshape(stored.shape).contiguous()
