"""The KV cache of a stage under onnxruntime: arrays that graphs extend where they lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy
import onnxruntime

from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.graph import cache_names, cache_sizes, next_name
from splitbundle.stages.call import CacheState, Call

BLOCK: Final = 64
"""CacheState are added in multiples of this."""


class KVCache(CacheState):
    """The keys and values of a stage's layers; slot = position.

    A graph attends to every slot that there is, so slots are added as they are needed: a quarter more each time. A
    copy of the cache every few hundred tokens costs less than scores of slots that nobody has filled.
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: tuple[int, int],
        batch_size: int,
        capacity: int,
        dtypes: Mapping[str, str],
    ) -> None:
        """Takes the dtype of each cache too, as the graphs' inputs have it."""
        super().__init__(architecture, layers, batch_size, capacity)
        self.dtypes = dict(dtypes)
        self.slots = 0
        """How many there are now."""
        self.arrays: dict[str, numpy.ndarray] = {}
        self.values: dict[str, Any] = {}
        """The same memory as onnxruntime takes it: bound as an input and as the next output, it is written in place."""
        self._sizes = {name: cache_sizes(architecture, name) for name in cache_names(layers)}
        self._bindings: dict[Any, Any] = {}
        # What can't be had is said now and not in the middle of a text: this asks for the memory, and doesn't touch it.
        each = sum(math.prod(size) * numpy.dtype(self.dtypes[name]).itemsize for name, size in self._sizes.items())
        numpy.empty([batch_size, capacity, each], numpy.uint8)

    def make_room(self, call: Call) -> None:
        """Adds slots until this call's tokens and their padding have theirs."""
        needed = max(call.past) + call.length
        if needed <= self.slots:
            return
        more = max(needed, min(self.slots + self.slots // 4, self.capacity))
        self._resize(-(-more // BLOCK) * BLOCK if more < self.capacity else more)

    def _resize(self, slots: int) -> None:
        for name, (heads, width) in self._sizes.items():
            # Zeros, not whatever memory held: a masked slot still takes part in a product, and 0 · NaN is NaN.
            array = numpy.zeros((self.batch_size, heads, slots, width), self.dtypes[name])
            if name in self.arrays:
                array[:, :, : self.slots] = self.arrays[name]
            self._put(name, array)
        self.slots = slots

    def _put(self, name: str, array: numpy.ndarray) -> None:
        self.arrays[name] = array
        self.values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        self._bindings.clear()

    def binding(self, session: Any, names: Sequence[str]) -> Any:
        """What binds a graph's caches to this one's, kept from call to call."""
        if session not in self._bindings:
            binding = session.io_binding()
            for name in names:
                binding.bind_ortvalue_input(name, self.values[name])
                binding.bind_ortvalue_output(next_name(name), self.values[name])
            self._bindings[session] = binding
        return self._bindings[session]

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row ``rows[i]`` was."""
        for name, array in list(self.arrays.items()):
            self._put(name, numpy.ascontiguousarray(array[list(rows)]))
        super().reorder(rows)
