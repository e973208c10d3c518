"""One call of a stage: the positions of its tokens, and the bookkeeping of caches. The same in every backend.

In a stage, the tokens of a row come first. Positions past[b] … past[b]+count[b]−1 of row b stand at 0 … count[b]−1 of
the sequence, and padding follows. So slot = position, and a causal mask keeps padding out by itself if all rows have
the same past.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from splitbundle.errors import BundleError, Problem
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.rotary import Dynamic, LongRope


class Call:
    """The number of past positions of each row, and the number of its tokens in this call."""

    def __init__(self, past: Sequence[int], count: Sequence[int], length: int) -> None:
        self.past, self.count, self.length = tuple(past), tuple(count), length
        self.uniform = self.past[0] if len(set(self.past)) == 1 else None
        """The past of all rows if it is the same, or None."""
        self.padded = any(n != length for n in self.count)
        self.stop = max(p + n for p, n in zip(self.past, self.count, strict=True)) if self.past else 0
        """The last position plus one."""

    def pieces(self, size: int) -> Iterator[tuple[int, Call]]:
        """Yield parts of this call with at most ``size`` tokens a row, each with the offset of its first token."""
        for start in range(0, self.length, size):
            length = min(size, self.length - start)
            past = [p + min(n, start) for p, n in zip(self.past, self.count, strict=True)]
            count = [min(max(n - start, 0), length) for n in self.count]
            yield start, Call(past, count, length)


class CacheState:
    """The bookkeeping of a KV cache. Each row has ``capacity`` slots, of which the first ``lengths`` hold a token.

    Slots at or above a row's past + count have no meaning. A call with a lower past discards the slots above it.
    """

    def __init__(self, architecture: Architecture, layers: tuple[int, int], batch_size: int, capacity: int) -> None:
        self.layers, self.batch_size, self.capacity = layers, batch_size, capacity
        self.position_limit = architecture.position_limit
        self.lengths = [0] * batch_size
        self.thresholds: set[int] = set()
        """The lengths at which the rotation of some layer changes."""
        for layer in range(*layers):
            scaling = getattr(architecture.kind_of(layer).attention.position, "scaling", None)
            if isinstance(scaling, Dynamic | LongRope):
                self.thresholds.add(scaling.original_positions)

    def check(self, call: Call) -> None:
        """Check that this call fits.

        Raises:
            BundleError: ``input.shape`` for another number of rows; ``session.capacity``; ``input.position`` for a past
                above the number of positions that the cache holds; ``session.rollback``.
        """
        if len(call.past) != self.batch_size:
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
        for row, (past, filled) in enumerate(zip(call.past, self.lengths, strict=True)):
            if past > filled:
                raise BundleError(
                    Problem(
                        code="input.position",
                        argument=f"past[{row}]",
                        expected=f"at most {filled}, the positions that this stage's cache holds",
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
        self.lengths = [past + count for past, count in zip(call.past, call.count, strict=True)]

    def reorder(self, rows: Sequence[int]) -> None:
        """Give row i the state of the former row ``rows[i]``."""
        self.lengths = [self.lengths[row] for row in rows]
