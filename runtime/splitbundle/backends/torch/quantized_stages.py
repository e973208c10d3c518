"""Give a stage the modules of its quantized weights, in place of the plain ones."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from splitbundle.backends.torch.experts import Stacked
from splitbundle.backends.torch.modules import Linear, Table
from splitbundle.backends.torch.quantized_modules import Codes, QuantizedLinear, QuantizedTable
from splitbundle.format.encodings import Encoding
from splitbundle.format.manifest.document import Storage
from splitbundle.format.weight_layout import SCALE


class QuantizedStacked(Codes, Stacked):
    """The quantized matrices of one projection of all experts."""

    def __init__(self, plain: Stacked, encoding: Encoding) -> None:
        count, outputs, inputs = plain.weight.shape
        Stacked.__init__(self, count, inputs, outputs, bias=plain.bias is not None)
        self.hold(encoding, (count, outputs, inputs))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Return x Wᵀ + b for one expert. *Shape:* (…, inputs) -> (…, outputs)."""
        return self.product(x, self.bias, expert)


_KINDS: Final[dict[type[nn.Module], Any]] = {
    Linear: QuantizedLinear,
    Stacked: QuantizedStacked,
    Table: QuantizedTable,
}


def is_code(name: str, tensor: Tensor) -> bool:
    """Return whether a stored tensor holds the codes or the scales of a quantized weight."""
    return name.endswith(SCALE) or not tensor.is_floating_point()


def use_quantized(stage: nn.Module, storage: Storage, dtype: torch.dtype) -> None:
    """Replace the modules of a stage whose weights are quantized. They compute in ``dtype``, and have no values yet."""
    for name in storage.encodings:
        path, encoding = name.removesuffix(".weight"), storage.encoding_of(name)
        outer, _, own = path.rpartition(".")
        try:
            parent = stage.get_submodule(outer)
            plain = parent.get_submodule(own)
        except AttributeError:
            continue  # another part of the model
        kind = _KINDS.get(type(plain))
        if kind is not None and encoding is not None:
            module = kind(plain, encoding)
            module.dtype = dtype
            setattr(parent, own, module)
            stage.quantized = True  # type: ignore[assignment]
