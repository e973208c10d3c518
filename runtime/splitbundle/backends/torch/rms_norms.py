"""RMSNorm, which takes fewer steps for one row. The equation is in ``spec/v1/decoder.md``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from splitbundle.backends.torch.kernels import is_plain_call, takes_few_steps


def rms_norm(x: Tensor, size: Sequence[int], weight: Tensor | None, eps: float) -> Tensor:
    """Return x / √(mean(x²) + eps) · w, with the mean over the last dimension. *Shape:* (…, size), (size) -> (…, size).

    torch computes eight steps, and two more in bfloat16. For a single position on the CPU, three and five are enough.
    """
    if (
        weight is not None
        and not torch.compiler.is_compiling()
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() == size[0]
        and takes_few_steps()
        and is_plain_call(x, weight)
    ):
        return rms_norm_of_one_row(x.reshape(-1), weight, eps).view(x.shape)
    return functional.rms_norm(x, size, weight, eps)


def rms_norm_of_one_row(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Do the same as ``rms_norm`` for one row, in fewer steps. *Shape:* (size), (size) -> (size)."""
    dtype = x.dtype
    wide = x if dtype == torch.float32 else x.float()
    square = torch.dot(wide, wide).item() / wide.shape[0] + eps
    if square > 0:
        normed = (wide / math.sqrt(square)).mul_(weight)
        return normed if dtype == torch.float32 else normed.to(dtype)
    return functional.rms_norm(x, weight.shape, weight, eps)  # of numbers so small that their squares are 0, or of NaN
