"""Compute with fewer threads where that is faster: for commands, which own their process.

The threads of a product wait for the slowest of them. Where another process has pushed one of them from its core, all
others wait until it is back, and fewer threads take less time. So another number is tried now and then, and the faster
one stays. ``spec/decisions/0016`` has measurements.
"""

from __future__ import annotations

import statistics
from typing import Final

FEW_TOKENS: Final = 64
"""Calls with more tokens are prompts. They take part in nothing here but the result."""
FIRST_WAIT: Final = 4
LAST_WAIT: Final = 256
"""The calls after which another number of threads is tried. Each failed try doubles them."""
TRIED: Final = 3
"""The calls of a try."""
FASTER: Final = 0.9
"""A try must take less than this share of the usual time."""
SLOWER: Final = 1.3
"""A try ends at once with a call that takes more than this share of the usual time."""
SUDDEN: Final = 1.5
"""Two calls in a row that take more than this share of the usual time bring the next try forward."""
_NEWEST: Final = 0.2
"""The weight of a call in the usual time."""


class GivingWay:
    """The number of threads for the calls of a stage, from one to ``most``."""

    def __init__(self, most: int) -> None:
        self.most = self._chosen = most
        self._tokens = 0
        self._direction = -1
        """Whether the next try has fewer threads, or more (1)."""
        self._seen = {most}
        """The numbers of threads whose kernels are measured."""
        self._again()

    def _again(self) -> None:
        """Forget how long calls take."""
        self._usual: float | None = None
        self._tried: int | None = None
        self._times: list[float] = []
        self._wait = self._left = FIRST_WAIT
        self._slow = 0

    @property
    def threads(self) -> int:
        """Return the number of threads for the next call."""
        return self._chosen if self._tried is None else self._tried

    def note(self, tokens: int, seconds: float) -> None:
        """Note a call with ``threads``: the number of its tokens, and how long it took."""
        if tokens > FEW_TOKENS or self.most == 1:
            return
        if tokens != self._tokens:
            self._tokens = tokens
            self._again()
        elif self.threads not in self._seen:  # the first call with a number of threads measures kernels
            self._seen.add(self.threads)
        elif self._tried is not None and self._usual is not None:
            self._note_try(self._tried, self._usual, seconds)
        else:
            self._note_usual(seconds)

    def _note_usual(self, seconds: float) -> None:
        if self._usual is None:
            self._usual = seconds
        self._slow = self._slow + 1 if seconds > SUDDEN * self._usual else 0
        sudden = self._slow > 1
        self._usual += (1.0 if sudden else _NEWEST) * (seconds - self._usual)
        self._left -= 1
        if self._left <= 0 or sudden:
            if not 1 <= self._chosen + self._direction <= self.most:
                self._direction = -self._direction
            tried = self._chosen + self._direction * max(1, self._chosen // 4)
            self._tried, self._times, self._slow = min(max(tried, 1), self.most), [], 0

    def _note_try(self, tried: int, usual: float, seconds: float) -> None:
        self._times.append(seconds)
        if seconds < SLOWER * usual and len(self._times) < TRIED:
            return
        took = statistics.median(self._times)
        if len(self._times) == TRIED and took < FASTER * usual:
            self._chosen, self._usual, self._wait = tried, took, FIRST_WAIT
        else:
            self._wait, self._direction = min(2 * self._wait, LAST_WAIT), -self._direction
        self._tried, self._left = None, self._wait


class _Process:
    gives_way = False


def give_way() -> None:
    """Let the stages of this process give way from now on."""
    _Process.gives_way = True


def gives_way() -> bool:
    """Return whether the stages of this process give way."""
    return _Process.gives_way
