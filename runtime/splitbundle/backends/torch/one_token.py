"""Compute one token of one row through the layers of a stage, without calling their modules.

One token's products are short, and the Python code around them takes a good part of its time: each product leaves
weights in the processor's caches in place of the program. So the layers that most models have are computed here from
their tensors. The results are those of ``Layer.forward``, and each layer that isn't as it was loaded is computed there.
``spec/decisions/0031`` has measurements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitbundle.backends.torch.as_loaded import AsLoaded
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


def through_layers(
    layers: nn.ModuleDict, steps: Steps, x: Tensor, positions: Positions, cache: KVCache | None
) -> Tensor | None:
    """Apply the layers of a stage to one token of one row, or return None if the call is another one.

    *Shape:* (1, 1, hidden) -> the same.
    """
    if not steps.own or cache is None or x.shape[:2] != (1, 1) or positions.padded or has_global_hooks():
        return None
    kernel = kernel_of_one_row(x)
    if kernel is None or x.dtype != positions.dtype:
        return None
    row, token = x.reshape(-1), Token(positions, cache, kernel)
    if type(row) is Tensor and steps.whole is not None and steps.whole.holds(layers.values()):
        return _through_all(steps, row, token).view(1, 1, -1)
    for name, layer in layers.items():
        own = steps.own.get(name)
        # A module may have returned a tensor of another class, which must see each operator.
        if own is not None and type(row) is Tensor and own.as_loaded.holds([layer]):
            row = own.apply(row, token)
        else:
            row = layer(row.view(1, 1, -1), positions, cache).reshape(-1)
    return row.view(1, 1, -1)


def _through_all(steps: Steps, row: Tensor, token: Token) -> Tensor:
    """Apply layers between which nothing else runs. *Shape:* (hidden) -> the same."""
    for rotary in steps.rotaries:
        token.positions.rotary(rotary)  # other stages of a pipeline use these, too, perhaps with gradients
    # No other code gets the tensors between the layers. In inference mode, each operator does less for them.
    # ``torch.inference_mode`` enters the mode in Python: an interrupt there could leave it on.
    with torch._C._InferenceMode(True):
        for own in steps.own.values():
            row = own.apply(row, token)
    return row if torch.is_inference_mode_enabled() else row.clone()


class Steps:
    """The steps of a stage's layers, for those that have the usual parts.

    A copy is empty, as a copied layer's weights lie elsewhere. An empty one computes nothing.
    """

    def __init__(self, layers: nn.ModuleDict | None = None) -> None:
        """Take the layers of a loaded stage."""
        all_layers = {} if layers is None else dict(layers.items())
        usual = {name: layer for name, layer in all_layers.items() if isinstance(layer, Layer) and _is_usual(layer)}
        self.own = {name: OneToken(layer) for name, layer in usual.items()}
        self.whole = AsLoaded(list(usual.values())) if usual and len(usual) == len(all_layers) else None
        """What all layers were, if each of them has steps. One look at all of them costs less than a look at each."""
        kinds = {id(own.rotary): own.rotary for own in self.own.values()}
        self.rotaries = [rotary for rotary in kinds.values() if rotary is not None]
        """The rotations of all layers."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Steps, ()


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

    __slots__ = ("codes", "held", "long")

    def __init__(self, layer: Any) -> None:
        """Take the tensors of a linear layer, or of a ``Joint`` that isn't empty."""
        whole = layer.quantized if isinstance(layer, Joint) else layer
        self.codes = whole if isinstance(whole, QuantizedLinear) else None
        self.held: dict[str, Any] = layer.__dict__ if isinstance(layer, Joint) else layer._parameters
        self.long = self.codes is None and not is_short(layer.weight)

    def of(self, x: Tensor, kernel: str) -> Tensor:
        """Return W x + b. *Shape:* (inputs) -> (outputs)."""
        weight, bias = self.held["weight"], self.held["bias"]
        if kernel == COLUMN and self.long:
            return torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)
        if self.codes is not None:
            return self.codes.product(x[None], bias)[0]
        plain = self.long and (bias is None or bias.is_contiguous())  # as in ``kernels.is_plain_call``
        return product(kernel if plain else TORCH, x[None], weight, bias)[0]

    def onto(self, rest: Tensor, x: Tensor, kernel: str) -> Tensor:
        """Return rest + (W x + b). *Shape:* (outputs), (inputs) -> (outputs)."""
        # In bfloat16, the sum of both would be rounded once, and not twice as in ``Layer``.
        if kernel == COLUMN and self.long and self.held["bias"] is None and x.dtype == torch.float32:
            return torch.addmv(rest, self.held["weight"], x)
        return rest + self.of(x, kernel)


class OneToken:
    """The steps of one layer for one token."""

    def __init__(self, layer: Layer) -> None:
        attention, own = layer.attention, layer.attention.facts
        mlp: Any = layer.mlp
        self.attention, self.mlp, self.as_loaded = attention, mlp, AsLoaded([layer])
        self.rotary = own.position if isinstance(own.position, Rotary) else None
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
        grouped = queries.reshape(self.grouped)
        mixed = functional.scaled_dot_product_attention(grouped, keys, values, scale=own.scale)
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
        if self.rotary is not None:
            both = rotate(both, *token.rotation(self.rotary), self.rotary.layout)
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


def _norm(norm: Norm | None) -> Callable[[Tensor], Tensor]:
    """Return what a norm computes. *Shape:* (size) -> the same."""
    if norm is None:
        return lambda x: x
    held, own = norm._parameters, norm.facts
    if own.kind == "rms_norm" and norm.weight is not None and not own.weight_offset and norm.bias is None:
        return lambda x: rms_norm_of_one_row(x, held["weight"], own.eps)  # type: ignore[arg-type]
    return norm.forward
