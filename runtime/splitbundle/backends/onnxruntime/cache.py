"""The KV cache of a stage under onnxruntime: arrays that graphs extend in place."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy
import onnxruntime

from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.graph import cache_names, cache_sizes, next_name
from splitbundle.stages.call import CacheState, Call

BLOCK: Final = 64
"""The number of slots is a multiple of this, except at the full capacity."""
BINDINGS: Final = 256
"""The most bindings that a cache keeps, so that many sets of rows don't fill the memory with them."""


class KVCache(CacheState):
    """The keys and values of a stage's layers. The slot of a token is its position.

    A graph attends to every slot of its cache. So the cache starts without slots and adds a quarter more each time it
    is full. A copy of the cache every few hundred tokens costs less than attention scores for empty slots.
    """

    def __init__(
        self,
        architecture: Architecture,
        layers: tuple[int, int],
        batch_size: int,
        capacity: int,
        dtypes: Mapping[str, str],
    ) -> None:
        """Make a cache without slots. ``dtypes`` gives the dtype of each cache input of the graphs."""
        super().__init__(architecture, layers, batch_size, capacity)
        self.dtypes = dict(dtypes)
        self.slots = 0
        """The current number of slots."""
        self.arrays: dict[str, numpy.ndarray] = {}
        self._sizes = {name: cache_sizes(architecture, name) for name in cache_names(layers)}
        self._bindings: dict[tuple[Any, int, int], Any] = {}
        """A graph's session, the place of a call's first row and the number of its rows -> the binding."""
        # Fail now, not in the middle of a text, if there is too little memory: this allocates all of it and doesn't
        # touch it.
        each = sum(math.prod(size) * numpy.dtype(self.dtypes[name]).itemsize for name, size in self._sizes.items())
        numpy.empty([batch_size, capacity, each], numpy.uint8)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or a pickle, has the arrays. The objects of onnxruntime over their memory are made anew.
        return self.__dict__ | {"_bindings": {}}

    def __copy__(self) -> KVCache:
        return copy.deepcopy(self)  # two caches that write into one memory would be no copy

    def make_room(self, call: Call) -> None:
        """Add slots until this call's tokens and their padding fit."""
        needed = max(call.past) + call.length
        if needed <= self.slots:
            return
        more = max(needed, min(self.slots + self.slots // 4, self.capacity))
        self._resize(-(-more // BLOCK) * BLOCK if more < self.capacity else more)

    def _resize(self, slots: int) -> None:
        for name, (heads, width) in self._sizes.items():
            # Memory must start as zeros: a masked slot is still multiplied by 0, and uninitialized memory may hold
            # NaN. 0 · NaN is NaN.
            array = numpy.zeros((self.batch_size, heads, slots, width), self.dtypes[name])
            if name in self.arrays:
                array[:, :, : self.slots] = self.arrays[name]
            self.arrays[name] = array
        self._bindings.clear()
        self.slots = slots

    def binding(self, session: Any, names: Sequence[str], call: Call) -> Any:
        """Return an IO binding that binds the cache ports of a graph to the rows of a call. Other calls reuse it."""
        key = session, call.first_place, len(call.past)
        if key not in self._bindings:
            if len(self._bindings) >= BINDINGS:
                self._bindings.clear()
            binding = session.io_binding()
            for name in names:
                rows = self.arrays[name][call.first_place : call.first_place + len(call.past)]
                # The same memory is bound as an input and as an output, so that graphs write in place.
                value = onnxruntime.OrtValue.ortvalue_from_numpy(rows)
                binding.bind_ortvalue_input(name, value)
                binding.bind_ortvalue_output(next_name(name), value)
            self._bindings[key] = binding
        return self._bindings[key]

    def reorder(self, rows: Sequence[int]) -> None:
        """Replace each row i with the former row ``rows[i]``."""
        places = [self.places[row] for row in rows]
        self.arrays = {name: numpy.ascontiguousarray(array[places]) for name, array in self.arrays.items()}
        self._bindings.clear()
        super().reorder(rows)

    def _swap(self, place: int, other: int, slots: int) -> None:
        for array in self.arrays.values():
            array[[place, other], :, :slots] = array[[other, place], :, :slots]
