"""One KV cache whose rows belong to several sessions, so that their steps can be computed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from splitbundle.stages.call import CacheState

LEAST_CAPACITY: Final = 512
"""The slots of a row of a shared cache, at least: many sessions begin small and grow."""


class SharedRows(CacheState):
    """The rows that one session has in a shared cache, with a bookkeeping of its own.

    Row i of the session is row ``at[i]`` of the cache. What a former session left there can't be seen: a call may only
    go on from positions that this session has brought.
    """

    def __init__(self, shared: SharedCache, at: Sequence[int], capacity: int) -> None:
        cache = shared.cache
        super().__init__(shared.architecture, cache.layers, len(at), capacity)
        self.shared, self.at = shared, tuple(at)

    def reorder(self, rows: Sequence[int]) -> None:
        """Give row i the state of the former row ``rows[i]``."""
        order = list(range(self.shared.cache.batch_size))
        for own, row in enumerate(rows):
            order[self.at[own]] = self.at[row]
        self.shared.cache.reorder(order)
        super().reorder(rows)


class SharedCache:
    """A cache of a fixed number of rows, and which of them are free. The caller has a lock around every call."""

    def __init__(self, architecture: Any, make: Callable[[int, int], Any], rows: int, capacity: int) -> None:
        self.architecture = architecture
        self.cache = make(rows, capacity)
        self._free = list(range(rows))
        self.rows = rows

    @property
    def slots(self) -> int:
        """Return the number of slots that it takes."""
        slots: int = self.rows * self.cache.capacity
        return slots

    @property
    def is_unused(self) -> bool:
        """Return whether no session has a row."""
        return len(self._free) == self.rows

    def take(self, rows: int, capacity: int) -> SharedRows | None:
        """Return rows for a session; None if there aren't enough, or if they are too short."""
        if rows > len(self._free) or capacity > self.cache.capacity:
            return None
        taken, self._free = self._free[:rows], self._free[rows:]
        return SharedRows(self, taken, capacity)

    def release(self, rows: SharedRows) -> None:
        """Take rows back."""
        self._free = sorted((*self._free, *rows.at))
