"""The state of a running batch: the cache of each stage, and the past positions of each row."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.integers import as_integer, as_integers
from splitbundle.stages.call import CacheState


class Session:
    """The state of one running batch: the KV cache of each stage, and the tokens that each row has in there.

    One thread uses a session at a time. ``past`` has the number of tokens of each row, ``batch_size`` is the number of
    rows, and ``capacity`` the number of tokens that each row has room for.
    """

    def __init__(self, caches: Sequence[CacheState], batch_size: int, capacity: int, *, grows: bool = False) -> None:
        self.caches, self.batch_size, self.capacity, self.grows = caches, batch_size, capacity, grows
        self.past = [0] * batch_size
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]
        """The ids that each row has in the caches."""

    def advance(
        self, token_ids: Sequence[Sequence[int]], counts: Sequence[int], rows: Sequence[int] | None = None
    ) -> None:
        """Record that each row, or each of ``rows``, got the first ``counts[i]`` of some ids."""
        past = list(self.past)
        for row, ids, count in zip(self._all(rows), token_ids, counts, strict=True):
            self.tokens[row][past[row] :] = ids[:count]
            past[row] += count
        self.past = past

    def make_room(
        self, shape: Sequence[int], counts: Sequence[int] | None = None, rows: Sequence[int] | None = None
    ) -> None:
        """Grow until a call of this shape fits: to twice the capacity at least, and never beyond the model's positions.

        *Shape:* of ids, (batch, sequence); with ``counts``, the number of tokens of each row; with ``rows``, the rows
        that the call computes.
        """
        named = self._all(rows)
        if len(shape) != 2 or shape[0] != len(named):
            return  # the call is refused
        added = [shape[1]] * len(named) if counts is None else counts
        needed = max(self.past[row] + count for row, count in zip(named, added, strict=True))
        limit = min((cache.position_limit for cache in self.caches if cache.position_limit is not None), default=None)
        if needed > self.capacity and (limit is None or needed <= limit):
            doubled = max(needed, 2 * self.capacity)
            self.grow(doubled if limit is None else min(doubled, limit))

    def grow(self, capacity: int) -> None:
        """Give each row more slots. What the caches hold stays.

        Raises:
            BundleError: ``session.capacity`` for more positions than the model has.
        """
        wanted = as_integer(capacity)
        if wanted is None or wanted < self.capacity:
            raise BundleError(
                Problem(
                    code="input.value",
                    argument="capacity",
                    expected=f"a number from {self.capacity}, the present capacity",
                    got=quoted(capacity),
                )
            )
        for cache in self.caches:
            cache.grow(wanted)
        self.capacity = wanted

    def __copy__(self) -> Session:
        """Return a session of its own, with a copy of the caches. So ``copy.copy`` begins a second continuation."""
        return copy.deepcopy(self)

    def rollback(self, tokens: int | Sequence[int]) -> None:
        """Discard the last tokens: the same number in every row, or a number for each row.

        Raises:
            BundleError: ``session.rollback`` for more tokens than a row has, or another number of rows.
        """
        one = as_integer(tokens)
        back = [one] * self.batch_size if one is not None else as_integers(tokens, "tokens")  # type: ignore[arg-type]
        if len(back) != self.batch_size:
            expected = f"one number, or one for each of {self.batch_size} rows"
            raise BundleError(Problem(code="session.rollback", argument="tokens", expected=expected, got=quoted(back)))
        for row, (n, past) in enumerate(zip(back, self.past, strict=True)):
            if not 0 <= n <= past:
                expected = f"0 to {past} tokens, all that row {row} has"
                raise BundleError(Problem(code="session.rollback", argument="tokens", expected=expected, got=quoted(n)))
        left = [before - n for before, n in zip(self.past, back, strict=True)]
        for cache in self.caches:
            for row, n in enumerate(back):
                if n:
                    cache.check_rollback(row, left[row])
        self.past = left
        for held, kept in zip(self.tokens, left, strict=True):
            del held[kept:]

    def reorder(self, rows: Sequence[int]) -> None:
        """Continue row i from the former row ``rows[i]``. A row may be taken several times, as in beam search.

        Raises:
            BundleError: ``input.value`` for rows that don't exist, or another number of them.
        """
        order = as_integers(rows, "rows")
        if len(order) != self.batch_size or not all(0 <= row < self.batch_size for row in order):
            expected = f"{self.batch_size} row numbers below {self.batch_size}"
            raise BundleError(Problem(code="input.value", argument="rows", expected=expected, got=quoted(order)))
        for cache in self.caches:
            cache.reorder(order)
        self.past = [self.past[row] for row in order]
        self.tokens = [list(self.tokens[row]) for row in order]

    def _all(self, rows: Sequence[int] | None) -> Sequence[int]:
        return range(self.batch_size) if rows is None else rows
