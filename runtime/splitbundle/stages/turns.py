"""Which rows are computed next, where many share one model. No threads, no clock, no arrays.

Rows that need one token are computed together: reading the weights costs most of such a call, and it is the same for
one row and for many (Yu et al. 2022, "Orca"). A long prompt is computed in pieces, with a call of the others between
two pieces, so that nobody waits for all of it. Long prompts take turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from typing import Final, Generic, TypeVar

from splitbundle.errors import BundleError, Problem

PIECE: Final = 64
"""The tokens of a piece of a prompt, if other rows wait."""
LARGE_PIECE: Final = 512
"""The tokens of a piece, if no other row waits. Larger ones take more memory, and aren't faster."""


class Work:
    """Tokens of one row that have to be computed. A subclass says what for."""

    def __init__(self, client: Hashable) -> None:
        self.client = client
        """Who waits for it. Clients take turns, however many rows each of them wants."""
        self.left = 0
        """The number of tokens that have to be computed before the row can go on."""


W = TypeVar("W", bound=Work)


class Turns(Generic[W]):
    """The work that runs, and the order of its calls."""

    def __init__(self, piece: int = PIECE, large_piece: int = LARGE_PIECE) -> None:
        """Make an empty table.

        Args:
            piece: the tokens of a piece of a prompt, if other rows wait.
            large_piece: the tokens of a piece, if no other row waits.
        """
        self._piece, self._large_piece = piece, large_piece
        self._running: dict[W, None] = {}
        self._prompt_is_next = False

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[W]:
        return iter(list(self._running))

    def add(self, work: W) -> None:
        """Let some work take part."""
        self._running[work] = None

    def remove(self, work: W) -> None:
        """Let some work take part no longer."""
        self._running.pop(work, None)

    def next(self) -> list[tuple[W, int]]:
        """Return the rows of the next call, each with the number of its tokens; nothing if no row has any."""
        steps = [work for work in self._running if work.left == 1]
        prompts = [work for work in self._running if work.left > 1]
        if not prompts or (steps and not self._prompt_is_next):
            self._prompt_is_next = True
            return [(work, 1) for work in steps]
        self._prompt_is_next = False
        first = prompts[0]
        size = min(first.left, self._piece if len(self._running) > 1 else self._large_piece)
        chosen = [(first, size)]
        # Further prompts go along where padding costs little: a call computes the padding, too.
        limit = self._piece if steps else self._large_piece
        for work in prompts[1:]:
            if size // 2 <= min(work.left, size) and (len(chosen) + 1) * size <= limit:
                chosen.append((work, min(work.left, size)))
        for work, _ in chosen:  # to the end: prompts take turns
            del self._running[work]
            self._running[work] = None
        return chosen


class Waiting(Generic[W]):
    """Work that waits for room. Clients take turns, and each one's own work keeps its order."""

    def __init__(self, most: int) -> None:
        """Make an empty queue.

        Args:
            most: the largest number of pieces of work that wait.
        """
        self._most = most
        self.most_of_a_client = most if most < 2 else most // 2
        """One client can't keep the others out of the queue."""
        self._by_client: dict[Hashable, deque[W]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_client.values()))

    def add(self, work: W) -> None:
        """Let some work wait.

        Raises:
            BundleError: ``server.full`` if too much waits already.
        """
        own = len(self._by_client.get(work.client, ()))
        if len(self) >= self._most or own >= self.most_of_a_client:
            expected = f"at most {self._most} requests that wait, and {self.most_of_a_client} of one client"
            raise BundleError(
                Problem(code="server.full", argument="queue", expected=expected, got="one more", hint="Try again later")
            )
        self._by_client.setdefault(work.client, deque()).append(work)

    def drop(self, unwanted: Callable[[W], bool]) -> list[W]:
        """Take work out of the queue that nobody wants, and return it."""
        found = [work for queue in self._by_client.values() for work in queue if unwanted(work)]
        for work in found:
            queue = self._by_client[work.client]
            queue.remove(work)
            if not queue:
                del self._by_client[work.client]
        return found

    def take(self) -> W | None:
        """Return the next work, and take it out of the queue; None if nothing waits."""
        for client, queue in self._by_client.items():
            work = queue.popleft()
            del self._by_client[client]
            if queue:  # to the end: clients take turns
                self._by_client[client] = queue
            return work
        return None
