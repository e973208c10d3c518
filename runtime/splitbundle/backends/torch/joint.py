"""Multiply one input by several weights that lie side by side in memory, as one product.

Weight files keep the matrices of queries, keys and values together, and those of gate and up (SB-W-008). For one token,
each product is short, and what surrounds it takes a good part of its time: after each product, the processor's caches
hold weights in place of the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, nn

from splitbundle.backends.torch.kernel_choice import ONEDNN, TORCH
from splitbundle.backends.torch.kernels import joint_kernel, product, quantized_kernel, takes_few_steps
from splitbundle.backends.torch.modules import Linear, has_global_hooks, is_own
from splitbundle.backends.torch.quantized_modules import QuantizedLinear, is_own_quantized
from splitbundle.format.weight_layout import SCALE

if TYPE_CHECKING:
    from splitbundle.backends.torch.weights import MappedTensors

_BLOCKS: Final = {"attention": ("query", "key", "value"), "mlp": ("gate", "up")}
"""A block of a layer -> its linear layers that multiply the same input."""


class Joint:
    """The weights of some linear layers as one matrix over the same memory.

    A copy is empty, because the weights of a copied stage lie elsewhere. An empty one computes nothing.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        layers: Mapping[str, nn.Module] | None = None,
        quantized: QuantizedLinear | None = None,
    ) -> None:
        self.weight, self.bias, self.quantized = weight, bias, quantized
        self.shape = (0, 0) if weight is None else (weight.shape[0], weight.shape[1])
        self.members = [
            (layer, [(key, part, *_place(part)) for key, part in module._parameters.items()])
            for layer, module in (layers or {}).items()
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return Joint, ()

    def product(self, x: Tensor, block: nn.Module, *, unless_fused: bool = False) -> Tensor | None:
        """Return the results of all layers, side by side, or None if each layer must compute its own.

        That is so if a layer or a weight was replaced, moved or hooked since the stage was loaded, if gradients or a
        compiler must see each layer, or if the kernels of the call compute each product for itself.

        *Shape:* (…, inputs) -> (…, outputs of all layers).

        Args:
            x: the common input.
            block: the module that holds the layers from which this object was made.
            unless_fused: return None, too, if the kernel of each layer would also compute what follows it.
        """
        if self.weight is None or has_global_hooks():
            return None
        kernel: str | None
        if self.quantized is None:
            kernel = joint_kernel(x, *self.shape, self.weight.dtype)
            if kernel is None or (unless_fused and kernel == ONEDNN):
                return None
        else:
            whole = self.quantized
            if not takes_few_steps() or quantized_kernel(x, whole.out_features, whole.encoding) == TORCH:
                return None
        layers = block._modules
        for name, members in self.members:
            layer = layers[name]
            if layer is None or not (is_own(layer) if self.quantized is None else is_own_quantized(layer)):
                return None
            for key, part, at, count in members:
                if layer._parameters[key] is not part:
                    return None
                if part is None:
                    continue
                # Setting ``.data`` gives the same parameter another place, or fewer rows in the same place.
                if part.data_ptr() != at or part.numel() != count or part.requires_grad or not part.is_contiguous():
                    return None
        if self.quantized is not None:
            return self.quantized.product(x, self.bias)
        return product(kernel or TORCH, x, self.weight, self.bias)


NOTHING: Final = Joint()


def _place(part: Tensor | None) -> tuple[int, int]:
    """Return where a tensor lies in memory, and how many numbers it has."""
    return (0, 0) if part is None else (part.data_ptr(), part.numel())


def join(layers: nn.ModuleDict, tensors: MappedTensors) -> None:
    """Give each block of a stage's layers its joint weights, if its parameters are the mapped tensors themselves."""
    for number, layer in layers.items():
        for name, members in _BLOCKS.items():
            block = getattr(layer, name)
            own = {member: found for member in members if (found := getattr(block, member, None)) is not None}
            if len(own) < 2:
                continue
            first, paths = own[members[0]], [f"layers.{number}.{name}.{member}" for member in own]
            weight = tensors.joined([f"{path}.weight" for path in paths])
            bias = None if first.bias is None else tensors.joined([f"{path}.bias" for path in paths])
            if weight is None or (bias is None) != (first.bias is None):
                continue
            if weight.data_ptr() != first.weight.data_ptr():  # the weights were converted, or moved
                continue
            if not isinstance(first, QuantizedLinear):
                block.joint = Joint(weight, bias, own)
                continue
            scale = tensors.joined([f"{path}.weight{SCALE}" for path in paths])
            same = all(getattr(layer, "encoding", None) == first.encoding for layer in own.values())
            if scale is not None and same:
                rows = sum(layer.out_features for layer in own.values())
                whole = QuantizedLinear(Linear(first.in_features, rows, bias=False), first.encoding)
                whole.take(weight, scale)
                whole.parts = [part for layer in own.values() for part in (layer.weight, layer.scale)]
                block.joint = Joint(weight, bias, own, whole)
