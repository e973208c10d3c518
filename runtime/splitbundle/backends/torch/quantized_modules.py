"""The modules of a stage whose weights are quantized. They hold codes and scales under their stored names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_
from typing import Any, Final

import torch
from torch import Tensor, nn

from splitbundle.backends.torch import quantized
from splitbundle.backends.torch.kernel_choice import COLUMNS, INT4PACK, INT8PACK
from splitbundle.backends.torch.kernels import quantized_kernel
from splitbundle.backends.torch.modules import Linear, Table, is_own
from splitbundle.format.encodings import Encoding
from splitbundle.format.weight_layout import SCALE

_SCALE: Final = f"weight{SCALE}"
_version: Final = attrgetter("_version")


class _Packed:
    """The packed copy of a matrix, and what the tensors of its numbers were when it was made."""

    __slots__ = ("_kept", "_places", "_tensors", "_versions", "copy")

    def __init__(self, tensors: Sequence[Tensor], made: quantized.Packed) -> None:
        self.copy, self._tensors = made, tensors
        self._places, self._versions = list(map(Tensor.data_ptr, tensors)), _versions(tensors)
        self._kept = [tensor.detach() for tensor in tensors]  # so that no other memory comes to lie there

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether it was made of these tensors, and they are as they were."""
        return (
            all(map(is_, tensors, self._tensors))
            and list(map(Tensor.data_ptr, tensors)) == self._places
            and _versions(tensors) == self._versions
        )


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return how often tensors were changed, or nothing where that isn't counted: in copies made in inference mode."""
    try:
        return list(map(_version, tensors))
    except RuntimeError:
        return []


class Codes(nn.Module):
    """What all modules with a quantized weight share. The scales keep their dtype when the module gets another one."""

    weight: Any
    encoding: Encoding
    dtype: torch.dtype
    """The dtype in which the module computes."""
    logical_shape: tuple[int, ...]
    """The shape of the weight that the codes stand for."""
    parts: Sequence[Tensor] = ()
    """The codes and scales of the layers over whose memory this module's lie. Changes of them are changes of these."""

    def hold(self, encoding: Encoding, shape: tuple[int, ...]) -> None:
        """Replace the weight by the codes and scales of a weight of this shape, without values."""
        self.encoding, self.logical_shape, self.dtype = encoding, shape, torch.float32
        self._packed: dict[int, _Packed] = {}
        for name, stored in encoding.stored("weight", shape).items():
            empty = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype), device="meta")
            self._parameters[name] = nn.Parameter(empty, requires_grad=False)

    def take(self, codes: Tensor, scale: Tensor) -> None:
        """Hold these codes and scales, over the same memory."""
        for name, value in (("weight", codes), (_SCALE, scale)):
            self._parameters[name] = nn.Parameter(value, requires_grad=False)

    @property
    def scale(self) -> Tensor:
        """Return the scales."""
        scale = self._parameters[_SCALE]
        if scale is None:
            raise RuntimeError("a quantized module without its scales")
        return scale

    def numbers(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight that the codes stand for. *Shape:* () -> that of the weight."""
        return quantized.dequantized(self.weight, self.scale, self.encoding, dtype)

    def product(self, x: Tensor, bias: Tensor | None = None, expert: int | None = None) -> Tensor:
        """Return x Wᵀ + b, with the matrix of one expert if there are several. *Shape:* (…, columns) -> (…, rows)."""
        codes, scale = self.weight, self.scale
        if expert is not None:
            codes, scale = codes[expert], scale[expert]
            bias = None if bias is None else bias[expert]
        kernel = quantized_kernel(x, codes.shape[0], self.encoding) if codes.is_cpu else ""
        if kernel not in (INT8PACK, COLUMNS, INT4PACK):
            out = quantized.exact(x, codes, scale, self.encoding)
        else:
            flat = x.reshape(-1, x.shape[-1])
            if kernel == INT4PACK:
                out = quantized.int4pack(flat, self._pack(codes, scale, expert), self.encoding)
            else:
                out = (quantized.int8pack if kernel == INT8PACK else quantized.columns)(flat, codes, scale)
            out = out.view(*x.shape[:-1], out.shape[-1])
        return out if bias is None else out + bias

    def _pack(self, codes: Tensor, scale: Tensor, expert: int | None) -> quantized.Packed:
        """Return the packed copy of a matrix. It is made at the first product, and again if the codes or scales change.

        No counter sees a change in place of ``.data``.
        """
        own, found = self._parameters, self._packed.get(expert or 0)
        tensors: Any = self.parts or (own["weight"], own[_SCALE])
        if found is None or not found.is_of(tensors):
            with torch.inference_mode(False):  # the copy outlives the call, and gradients may be wanted later
                found = self._packed[expert or 0] = _Packed(tensors, quantized.pack(codes, scale, self.encoding))
        return found.copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale, self._packed = self.scale, {}
        self._parameters[_SCALE] = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = fn(torch.empty(0, dtype=self.dtype, device=scale.device))
        self.dtype = moved.dtype
        self._parameters[_SCALE] = nn.Parameter(scale.to(moved.device), requires_grad=False)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": {}}


class QuantizedLinear(Codes, Linear):
    """A linear layer with a quantized weight."""

    def __init__(self, plain: Linear, encoding: Encoding) -> None:
        Linear.__init__(self, plain.in_features, plain.out_features, bias=plain.bias is not None)
        self.hold(encoding, tuple(plain.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b. *Shape:* (…, inputs) -> (…, outputs)."""
        return self.product(x, self.bias)


def is_own_quantized(layer: nn.Module) -> bool:
    """Return what ``modules.is_own`` returns, for a quantized layer."""
    return is_own(layer, QuantizedLinear)


class QuantizedTable(Codes, Table):
    """A quantized token table. A tied head multiplies by it too."""

    def __init__(self, plain: Table, encoding: Encoding) -> None:
        Table.__init__(self, plain.num_embeddings, plain.embedding_dim)
        self.hold(encoding, tuple(plain.weight.shape))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ids. *Shape:* (…) -> (…, columns)."""
        return quantized.dequantized(self.weight[ids], self.scale[ids], self.encoding, self.dtype)
