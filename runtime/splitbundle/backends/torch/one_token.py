"""Compute one token of one row through the layers of a stage, without calling their modules.

One token's products are short, and the Python code around them takes a good part of its time: each product leaves
weights in the processor's caches in place of the program. So the layers that most models have are computed here from
their tensors. The results are those of ``Layer.forward``, and each layer that isn't as it was loaded is computed there.
``spec/decisions/0031`` has measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitbundle.backends.torch.cache import KVCache
from splitbundle.backends.torch.decoder import Layer
from splitbundle.backends.torch.feedforward import Mlp
from splitbundle.backends.torch.joint import Joint
from splitbundle.backends.torch.kernel_choice import COLUMN, ONEDNN, TORCH
from splitbundle.backends.torch.kernels import is_short, kernel_of_one_row, product
from splitbundle.backends.torch.modules import has_global_hooks
from splitbundle.backends.torch.norms import Norm
from splitbundle.backends.torch.positions import Positions
from splitbundle.backends.torch.quantized_modules import QuantizedLinear
from splitbundle.backends.torch.rms_norms import rms_norm_of_one_row
from splitbundle.backends.torch.rotary import rotate
from splitbundle.format.architecture.positions import Alibi
from splitbundle.format.architecture.rotary import Rotary

_attention: Final = functional.scaled_dot_product_attention


def through_layers(
    layers: nn.ModuleDict, steps: Steps, x: Tensor, positions: Positions, cache: KVCache | None
) -> Tensor | None:
    """Apply the layers of a stage to one token of one row, or return None if the call is another one.

    *Shape:* (1, 1, hidden) -> the same.
    """
    if not steps or cache is None or x.shape[:2] != (1, 1) or positions.padded or has_global_hooks():
        return None
    kernel = kernel_of_one_row(x)
    if kernel is None or x.dtype != positions.dtype:
        return None
    row, token = x.reshape(-1), Token(positions, cache, kernel)
    for name, layer in layers.items():
        own = steps.get(name)
        if own is not None and own.holds(layer):
            row = own.apply(row, token)
        else:
            row = layer(row.view(1, 1, -1), positions, cache).reshape(-1)
    return row.view(1, 1, -1)


def steps_of(layers: nn.ModuleDict) -> Steps:
    """Return the steps of the layers of a loaded stage that have the usual parts, by the names of the layers."""
    return {name: OneToken(layer) for name, layer in layers.items() if isinstance(layer, Layer) and _is_usual(layer)}


def _is_usual(layer: Layer) -> bool:
    """Return whether ``OneToken`` has the equations of a layer's attention and of its sums."""
    attention = layer.attention.facts
    return (
        layer.placement == "pre"
        and layer.multiplier == 1.0
        and layer.scales is None
        and attention.query_temperature is None
        and attention.logit_cap is None
        and not attention.sinks
        and attention.output_gate is None
        and not isinstance(attention.position, Alibi)
    )


class Token:
    """What all layers share in a call for one token."""

    __slots__ = ("cache", "kernel", "place", "positions", "rotations", "row")

    def __init__(self, positions: Positions, cache: KVCache, kernel: str) -> None:
        self.positions, self.cache, self.kernel = positions, cache, kernel
        self.row, self.place = positions.first_place, positions.past[0]
        self.rotations: dict[int, tuple[Tensor, Tensor]] = {}

    def rotation(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Return the factors of ``rotate``. *Shape:* twice (1, dim)."""
        found = self.rotations.get(id(rotary))
        if found is None:
            cos, sin = self.positions.rotary(rotary)
            found = self.rotations[id(rotary)] = cos.view(1, -1), sin.view(1, -1)
        return found


class _Product:
    """A linear layer, as its tensors."""

    __slots__ = ("bias", "codes", "long", "weight")

    def __init__(self, layer: Any) -> None:
        """Take the tensors of a linear layer, or of a ``Joint`` that isn't empty."""
        whole = layer.quantized if isinstance(layer, Joint) else layer
        self.codes = whole if isinstance(whole, QuantizedLinear) else None
        self.weight: Tensor = layer.weight
        self.bias: Tensor | None = layer.bias
        self.long = self.codes is None and not is_short(self.weight)

    def of(self, x: Tensor, kernel: str) -> Tensor:
        """Return W x + b. *Shape:* (inputs) -> (outputs)."""
        if kernel == COLUMN and self.long:
            return torch.mv(self.weight, x) if self.bias is None else torch.addmv(self.bias, self.weight, x)
        if self.codes is not None:
            return self.codes.product(x[None], self.bias)[0]
        return product(kernel if self.long else TORCH, x[None], self.weight, self.bias)[0]

    def onto(self, rest: Tensor, x: Tensor, kernel: str) -> Tensor:
        """Return rest + (W x + b). *Shape:* (outputs), (inputs) -> (outputs)."""
        # In bfloat16, the sum of both would be rounded once, and not twice as in ``Layer``.
        if kernel == COLUMN and self.long and self.bias is None and x.dtype == torch.float32:
            return torch.addmv(rest, self.weight, x)
        return rest + self.of(x, kernel)


class OneToken:
    """The steps of one layer for one token. A copy is empty, as the copied layer's weights lie elsewhere."""

    def __init__(self, layer: Layer) -> None:
        attention, own = layer.attention, layer.attention.facts
        mlp: Any = layer.mlp
        self.layer, self.attention, self.mlp = layer, attention, mlp
        self.heads, self.grouped = own.heads, (1, own.kv_heads, -1, own.head_dim)
        self.widths = [own.heads * own.head_dim, own.kv_heads * own.head_dim, own.kv_heads * own.value_size]
        self.rotated = self.widths[0] + self.widths[1]
        self.plain_heads = own.query_key_norm is None and own.clip is None and own.value_multiplier is None
        self.attention_norm, self.mlp_norm = _norm(layer.attention_norm), _norm(layer.mlp_norm)
        self.joint = _Product(attention.joint) if attention.joint.weight is not None else None
        self.output = _Product(attention.output)
        self.up: _Product | None = None
        self.both: _Product | None = None
        if isinstance(mlp, Mlp):
            self.down = _Product(mlp.down)
            self.up = _Product(mlp.up) if mlp.gate is None else None
            self.both = _Product(mlp.joint) if mlp.joint.weight is not None else None
        self._remember(layer)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()

    def _remember(self, layer: Layer) -> None:
        """Keep what ``holds`` compares: the parts of each module, and where a module keeps what others add to it."""
        modules = list(layer.modules())
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.dictionaries = [module.__dict__ for module in modules]
        self.parts: list[tuple[dict[str, Any], str, Any]] = [
            (held, name, part)
            for module in modules
            for held in (module._modules, module._parameters)
            for name, part in held.items()
        ]
        blocks = [block for block in (self.attention, self.mlp) if block.joint.weight is not None]
        self.parts += [(block.__dict__, "joint", block.joint) for block in blocks]
        self.places = [
            (part, at)
            for block in blocks
            for _, members in block.joint.members
            for _, part, at in members
            if part is not None
        ]
        replaceable = (layer, "dropout"), (self.attention, "dropout"), (self.mlp, "activation")
        self.parts += [(block.__dict__, name, block.__dict__.get(name)) for block, name in replaceable]

    def holds(self, layer: nn.Module) -> bool:
        """Return whether this layer is the loaded one, with its parts, and unhooked."""
        # Each look costs time: after a product, nothing of this is in the processor's caches.
        if layer is not self.layer or any(self.hooks):
            return False
        for own in self.dictionaries:
            if "forward" in own:
                return False
        for held, name, part in self.parts:
            if held.get(name) is not part:
                return False
        return all(part.data_ptr() == at and part.is_contiguous() for part, at in self.places)

    def apply(self, x: Tensor, token: Token) -> Tensor:
        """Apply the layer. *Shape:* (hidden) -> the same."""
        x = self._attend(x, self.attention_norm(x), token)
        return self._feed(x, self.mlp_norm(x), token)

    def _attend(self, rest: Tensor, x: Tensor, token: Token) -> Tensor:
        """Return ``rest`` plus the result of attention. *Shape:* (hidden), (hidden) -> (hidden)."""
        own, cache, row, place = self.attention.facts, token.cache, token.row, token.place
        queries, keys, values = self._heads(x, token)
        stored_keys, stored_values = cache.keys[self.attention.layer], cache.values[self.attention.layer]
        stored_keys[row, :, place] = keys
        stored_values[row, :, place] = values
        first = self.attention.span.first(place)
        keys = stored_keys[row : row + 1, :, first : place + 1]
        values = stored_values[row : row + 1, :, first : place + 1]
        # The query heads of a group see the same keys. Treat them as positions, so that memory holds each key once.
        mixed = _attention(queries.reshape(self.grouped), keys, values, scale=own.scale)
        return self.output.onto(rest, mixed.reshape(-1), token.kernel)

    def _heads(self, x: Tensor, token: Token) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values. *Shape:* (hidden) -> thrice (…, heads, head_dim), all others 1."""
        own, attention = self.attention.facts, self.attention
        if self.joint is None or self.joint.codes is not None:
            return attention.project(x.view(1, 1, -1), token.positions)
        joint = self.joint.of(x, token.kernel)
        if not self.plain_heads:
            queries, keys, values = torch.split(joint.view(1, 1, -1), self.widths, dim=-1)
            queries = attention.heads(queries, attention.query_norm, token.positions)
            keys = attention.heads(keys, attention.key_norm, token.positions)
            return queries, keys, attention.values(values)
        both = joint[: self.rotated].view(-1, own.head_dim)
        if isinstance(own.position, Rotary):
            both = rotate(both, *token.rotation(own.position), own.position.layout)
        return both[: self.heads], both[self.heads :], joint[self.rotated :].view(own.kv_heads, -1)

    def _feed(self, rest: Tensor, x: Tensor, token: Token) -> Tensor:
        """Return ``rest`` plus the result of the feed-forward block. *Shape:* (hidden), (hidden) -> (hidden)."""
        mlp, kernel = self.mlp, token.kernel
        if kernel != ONEDNN and self.up is not None:
            return self.down.onto(rest, mlp.activation(self.up.of(x, kernel)), kernel)
        if kernel != ONEDNN and self.both is not None and self.both.codes is None:
            gate, other = self.both.of(x, kernel).view(2, -1).unbind()
            return self.down.onto(rest, mlp.activation(gate) * other, kernel)
        added: Tensor = mlp(x.view(1, 1, -1))  # a product of oneDNN computes the activation, too
        return rest + added.view(-1)


Steps = Mapping[str, OneToken | None]
"""The name of a layer -> its steps, or None."""


def _norm(norm: Norm | None) -> Callable[[Tensor], Tensor]:
    """Return what a norm computes. *Shape:* (size) -> the same."""
    if norm is None:
        return lambda x: x
    weight, own = norm.weight, norm.facts
    if own.kind == "rms_norm" and weight is not None and not own.weight_offset and norm.bias is None:
        return lambda x: rms_norm_of_one_row(x, weight, own.eps)
    return norm.forward


def _nothing() -> None:
    """Return None."""
