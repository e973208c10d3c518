"""Whether layers are as they were loaded: the same modules, parts, facts and weights, and nothing hooked.

This is asked for each token, and the processor's caches have forgotten everything by then. So it is asked of all layers
at once, by functions of Python that loop in C.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import contains, is_, itemgetter
from typing import Any, Final

from torch import Tensor, nn

from splitbundle.backends.torch.decoder import Layer

_FACTS: Final = ("dropout", "multiplier", "placement", "scales")
_hooks, _hooks_before = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")


class AsLoaded:
    """What some layers were when they were loaded."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        """Note what these layers are now."""
        self._layers = list(layers)
        self._modules = [module for layer in layers for module in layer.modules()]
        self._kinds = list(map(type, self._modules))
        self._attributes = [module.__dict__ for module in self._modules]
        self._sizes = list(map(len, self._attributes))
        members: list[tuple[dict[str, Any], str, Any]] = []
        for module in self._modules:
            for held in (module._modules, module._parameters):
                members += [(held, name, member) for name, member in held.items()]
        members += [(module.__dict__, name, module.__dict__.get(name)) for module, name in _facts(layers)]
        self._held, self._names, self._members = (list(each) for each in zip(*members, strict=True))
        self._member_kinds = list(map(type, self._members))
        joined = [each for block in _with_joints(layers) for _, kept in block.joint.members for each in kept]
        self._parts = [part for _, part, _, _ in joined if part is not None]
        # The parts of the joint weights, where they were: setting ``.data`` gives a parameter another place.
        self._places = [place for _, part, place, _ in joined if part is not None]
        self._counts = [count for _, part, _, count in joined if part is not None]

    def holds(self, layers: Iterable[nn.Module]) -> bool:
        """Return whether these are the loaded layers, in this order, with their parts, and unhooked."""
        given = list(layers)
        return (
            len(given) == len(self._layers)
            and all(map(is_, given, self._layers))
            and all(map(is_, map(type, self._modules), self._kinds))
            # A part in place of None, and a compiled module, change the number of attributes.
            and list(map(len, self._attributes)) == self._sizes
            and not any(map(contains, self._attributes, repeat("forward")))
            and not any(map(_hooks, self._attributes))
            and not any(map(_hooks_before, self._attributes))
            and all(map(is_, map(dict.get, self._held, self._names), self._members))
            and all(map(is_, map(type, self._members), self._member_kinds))
            and list(map(Tensor.data_ptr, self._parts)) == self._places
            and list(map(Tensor.numel, self._parts)) == self._counts
            and all(map(Tensor.is_contiguous, self._parts))
        )


def _facts(layers: Sequence[Layer]) -> list[tuple[nn.Module, str]]:
    """Return the attributes of layers that their steps depend on, each with its module."""
    found: list[tuple[nn.Module, str]] = []
    for layer in layers:
        found += [(layer, name) for name in _FACTS]
        found += [(norm, "facts") for norm in (layer.attention_norm, layer.mlp_norm) if norm is not None]
        found += [(layer.attention, "facts"), (layer.attention, "dropout"), (layer.mlp, "activation")]
    return [*found, *((block, "joint") for block in _with_joints(layers))]


def _with_joints(layers: Sequence[Layer]) -> list[Any]:
    """Return the blocks of layers whose weights are joined."""
    blocks: list[Any] = [block for layer in layers for block in (layer.attention, layer.mlp)]
    return [block for block in blocks if block.joint.weight is not None]
