"""LayerNorm and RMSNorm. The equations are in ``spec/v1/decoder.md``."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitbundle.backends.torch.rms_norms import rms_norm
from splitbundle.format.architecture import norms as facts


class Norm(nn.Module):
    """Normalize the last dimension. The weight may have one more dimension, for heads.

    LayerNorm: Ba et al. 2016, arXiv:1607.06450. RMSNorm: Zhang & Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, norm: facts.Norm, *shape: int) -> None:
        super().__init__()
        self.facts, self.size = norm, shape[-1:]
        self.weight = nn.Parameter(torch.empty(shape, device="meta")) if norm.affine else None
        self.bias = nn.Parameter(torch.empty(shape, device="meta")) if norm.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x. *Shape:* (..., size) -> (..., size)."""
        weight, bias = self.weight, self.bias
        if weight is not None and (self.facts.weight_offset or weight.dtype not in (x.dtype, torch.float32)):
            # In 16 bits, 1 + w would round away a small w. Under autocast, torch refuses x in the other short dtype.
            bias_32 = None if bias is None else bias.float()
            return self._normalize(x.float(), weight.float() + self.facts.weight_offset, bias_32).to(x.dtype)
        return self._normalize(x, weight, bias)

    def _normalize(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if weight is not None and weight.ndim > 1:
            x = self._normalize(x, None, None) * weight
            return x if bias is None else x + bias
        if self.facts.kind == "layer_norm":
            return functional.layer_norm(x, self.size, weight, bias, self.facts.eps)
        return rms_norm(x, self.size, weight, self.facts.eps)
