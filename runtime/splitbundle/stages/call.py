"""One call of a stage: the positions of its tokens, and the bookkeeping of caches. The same in every backend.

In a stage, the tokens of a row come first. Positions past[b] … past[b]+count[b]−1 of row b stand at 0 … count[b]−1 of
the sequence, and padding follows. So slot = position, and a causal mask keeps padding out by itself if all rows have
the same past.

A call may compute some rows of a cache. A cache keeps each row at a place of its memory. Before a call, it swaps rows
until those of the call lie next to each other, so that the call gets them as a view of the memory, without a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.rotary import Dynamic, LongRope
from splitbundle.integers import as_integers


class Call:
    """The positions of a call: ``past`` has the number of earlier tokens of each row, and ``count`` that of its tokens
    in this call. ``length`` is the length of the sequence, padding included.
    """

    rows: tuple[int, ...] | None = None
    """The row of the cache that each row of this call is; None for all rows in order."""
    first_place = 0
    """The first of the neighboring places at which the rows lie in the memory of a cache (``CacheState.arrange``)."""
    order: tuple[int, ...] | None = None
    """The row of this call that lies at each of these places; None if they lie there in order."""

    def __init__(self, past: Sequence[int], count: Sequence[int], length: int) -> None:
        self.past, self.count, self.length = tuple(past), tuple(count), length
        self.uniform = self.past[0] if len(set(self.past)) == 1 else None
        """The past of all rows if it is the same, or None."""
        self.padded = any(n != length for n in self.count)
        self.stop = max(p + n for p, n in zip(self.past, self.count, strict=True)) if self.past else 0
        """The last position plus one."""
        self._arranged: dict[tuple[int, ...], Any] = {}
        self._placed: Any = None

    def _like(self, past: Sequence[int], count: Sequence[int]) -> Call:
        """Return another call of this length in the form of this one."""
        return Call(past, count, self.length)

    def arranged(self, first_place: int, order: Sequence[int]) -> Any:
        """Return this call with ``first_place`` and ``order``.

        The stages of a pipeline ask for the same ones, so that all of them use one call.
        """
        key = (first_place, *order)
        if key not in self._arranged:
            made, in_order = self._like(self.past, self.count), list(order) == list(range(len(order)))
            made.rows, made.first_place, made.order = self.rows, first_place, None if in_order else tuple(order)
            self._arranged[key] = made
        return self._arranged[key]

    @property
    def placed(self) -> Any:
        """Return this call with its rows in the order in which they lie in memory."""
        if self.order is None:
            return self
        if self._placed is None:
            rows = range(len(self.past)) if self.rows is None else self.rows
            past, count, named = ([values[i] for i in self.order] for values in (self.past, self.count, rows))
            self._placed = self._like(past, count)
            self._placed.rows, self._placed.first_place = tuple(named), self.first_place
        return self._placed

    def pieces(self, size: int) -> Iterator[tuple[int, Call]]:
        """Yield parts of this call with at most ``size`` tokens a row, each with the offset of its first token."""
        for start in range(0, self.length, size):
            length = min(size, self.length - start)
            past = [p + min(n, start) for p, n in zip(self.past, self.count, strict=True)]
            count = [min(max(n - start, 0), length) for n in self.count]
            piece = Call(past, count, length)
            piece.rows, piece.first_place, piece.order = self.rows, self.first_place, self.order
            yield start, piece


def named_rows(rows: Iterable[int], batch_size: int | None = None) -> tuple[int, ...]:
    """Return the rows of a cache that a caller names. Without ``batch_size``, there may be any number of them.

    Raises:
        BundleError: ``input.value`` unless they are distinct, at least one, and rows of the cache.
    """
    found = tuple(as_integers(rows, "rows"))
    most = batch_size if batch_size is not None else max(found, default=0) + 1
    if not found or len(set(found)) != len(found) or not all(0 <= row < most for row in found):
        upper = "" if batch_size is None else f" to {batch_size - 1}"
        expected = f"distinct row numbers from 0{upper}, at least one"
        raise BundleError(Problem(code="input.value", argument="rows", expected=expected, got=quoted(list(found))))
    return found


class CacheState:
    """The bookkeeping of a KV cache. Each row has ``capacity`` slots, of which the first ``lengths`` hold a token.

    Slots at or above a row's past + count have no meaning. A call with a lower past discards the slots above it.
    ``layers`` are the first layer and the last one plus one, and ``batch_size`` is the number of rows.
    """

    places: list[int]
    """Where each row lies in memory."""

    def __init__(self, architecture: Architecture, layers: tuple[int, int], batch_size: int, capacity: int) -> None:
        self.layers, self.batch_size, self.capacity = layers, batch_size, capacity
        self.position_limit = architecture.position_limit
        self.lengths = [0] * batch_size
        self.places = list(range(batch_size))
        self.thresholds: set[int] = set()
        """The lengths at which the rotation of some layer changes."""
        for layer in range(*layers):
            scaling = getattr(architecture.kind_of(layer).attention.position, "scaling", None)
            if isinstance(scaling, Dynamic | LongRope):
                self.thresholds.add(scaling.original_positions)

    def check(self, call: Call) -> None:
        """Check that this call fits.

        Raises:
            BundleError: ``input.shape`` for another number of rows; ``input.value`` for rows that the cache hasn't;
                ``session.capacity``; ``input.position`` for a past above the number of positions that the cache holds;
                ``session.rollback``.
        """
        named = range(self.batch_size) if call.rows is None else named_rows(call.rows, self.batch_size)
        if len(call.past) != len(named):
            rows = len(call.past)
            raise BundleError(
                Problem(
                    code="input.shape",
                    argument="batch",
                    expected=f"{self.batch_size} rows, as the cache",
                    got=f"{rows}",
                )
            )
        if call.stop > self.capacity:
            raise BundleError(
                Problem(
                    code="session.capacity",
                    argument="capacity",
                    expected=f"at least {call.stop} slots",
                    got=f"{self.capacity}",
                    hint="Open a session with more capacity",
                )
            )
        for i, (row, past) in enumerate(zip(named, call.past, strict=True)):
            if past > self.lengths[row]:
                raise BundleError(
                    Problem(
                        code="input.position",
                        argument=f"past[{i}]",
                        expected=f"at most {self.lengths[row]}, the positions that this stage's cache holds",
                        got=f"{past}",
                    )
                )
            self.check_rollback(row, past)

    def rescales(self, call: Call) -> bool:
        """Return whether rotations depend on the length of this call, so that it can't be divided."""
        return any(call.stop > threshold for threshold in self.thresholds)

    def check_rollback(self, row: int, past: int) -> None:
        """Check that a row may go back to ``past`` positions.

        Raises:
            BundleError: ``session.rollback`` if cached keys would stay that were rotated for a longer row.
        """
        for threshold in self.thresholds:
            if 0 < past <= threshold < self.lengths[row]:
                raise BundleError(
                    Problem(
                        code="session.rollback",
                        argument=f"row {row}",
                        expected=f"0, or more than {threshold} positions, above which rotary positions are scaled",
                        got=f"{past}",
                        hint="Cached keys keep their rotation: start the row again from 0",
                    )
                )

    def grow(self, capacity: int) -> None:
        """Give each row more slots.

        Raises:
            BundleError: ``session.capacity`` for more positions than the model has.
        """
        if self.position_limit is not None and capacity > self.position_limit:
            expected, got = f"at most {self.position_limit}, the positions of the model", f"{capacity}"
            raise BundleError(Problem(code="session.capacity", argument="capacity", expected=expected, got=got))
        self.capacity = capacity

    def advance(self, call: Call) -> None:
        """Record that this call's tokens are stored."""
        rows = range(self.batch_size) if call.rows is None else call.rows
        for row, past, count in zip(rows, call.past, call.count, strict=True):
            self.lengths[row] = past + count

    def reorder(self, rows: Sequence[int]) -> None:
        """Give row i the state of the former row ``rows[i]``. Each row then lies at the place of its number."""
        self.lengths = [self.lengths[row] for row in rows]
        self.places = list(range(self.batch_size))

    def arrange(self, call: Call) -> Any:
        """Swap rows of this cache until those of a call lie next to each other. Return the call with their places."""
        rows = range(self.batch_size) if call.rows is None else call.rows
        places = [self.places[row] for row in rows]
        if places == list(range(len(rows))):
            return call
        if max(places) - min(places) >= len(rows):
            self._gather(rows)
            places = [self.places[row] for row in rows]
        return call.arranged(min(places), sorted(range(len(rows)), key=places.__getitem__))

    def _gather(self, rows: Sequence[int]) -> None:
        """Move rows next to each other, to where most of them lie already."""
        number = len(rows)

        def inside(row: int, first: int) -> bool:  # torch.compile can follow a comparison, but not ``in range``
            return first <= self.places[row] < first + number

        held = [sum(inside(row, first) for row in rows) for first in range(self.batch_size - number + 1)]
        first = held.index(max(held))
        others = iter([row for row in range(self.batch_size) if row not in rows and inside(row, first)])
        for row in rows:
            if not inside(row, first):
                self._exchange(row, next(others))

    def _exchange(self, row: int, other: int) -> None:
        """Let two rows change places."""
        lengths = self.lengths
        # If the process is interrupted in between, some layers are swapped. Then both rows hold nothing.
        self.lengths = [0 if i in (row, other) else length for i, length in enumerate(lengths)]
        self._swap(self.places[row], self.places[other], max(lengths[row], lengths[other]))
        self.places[row], self.places[other] = self.places[other], self.places[row]
        self.lengths = lengths

    def _swap(self, place: int, other: int, slots: int) -> None:
        """Swap the first slots of two places in memory. Each backend defines it."""
        raise NotImplementedError
