"""Goals as data, and their outcomes: ratios round by round, their median and their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, float]
"""The name of a figure -> seconds, bytes or a rate. For seconds and bytes, a smaller value is better."""
Run = Mapping[str, Figures]
"""The name of a contender -> its figures in one round."""


@dataclass(frozen=True, slots=True)
class Term:
    """A figure of a contender."""

    contender: str
    figure: str

    def of(self, run: Run) -> float | None:
        """Return the value in a round, or None if it was not measured."""
        return run.get(self.contender, {}).get(self.figure)

    def __str__(self) -> str:
        return f"{self.figure} of {self.contender}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A bound on ``against`` ÷ ``own`` (times as fast), or, with ``share``, on ``own`` ÷ ``against``.

    First, the terms of ``less`` are subtracted from ``own``. Without ``against``, the bound is on the amount itself.
    """

    what: str
    own: Term
    against: Term | None = None
    less: tuple[Term, ...] = ()
    share: bool = False
    at_least: float | None = None
    at_most: float | None = None

    def value(self, run: Run) -> float | None:
        """Return the value in one round, or None if a term was not measured."""
        own, less = self.own.of(run), [term.of(run) for term in self.less]
        other = None if self.against is None else self.against.of(run)
        if own is None or None in less or (self.against is not None and other is None):
            return None
        own -= sum(each for each in less if each is not None)
        if other is None:
            return own
        if self.share:
            return own / other
        return other / own if own > 0 else math.inf

    def outcome(self, runs: Sequence[Run]) -> dict[str, Any]:
        """Return the outcome for a report. If a term was not measured, ``median`` is None, and ``missing`` names it."""
        bound = {"at_least": self.at_least} if self.at_most is None else {"at_most": self.at_most}
        outcome: dict[str, Any] = {"what": self.what, **bound, "unit": "s" if self.against is None else "×"}
        values = [self.value(run) for run in runs]
        there = [value for value in values if value is not None]
        if not there or len(there) < len(values):
            terms = [self.own, *([self.against] if self.against else []), *self.less]
            absent = [str(term) for term in terms if any(term.of(run) is None for run in runs)]
            return outcome | {"median": None, "missing": ", ".join(absent)}
        found = spread(there)
        high = self.at_least is None or found["median"] >= self.at_least
        low = self.at_most is None or found["median"] <= self.at_most
        return outcome | found | {"reached": high and low}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the least and the greatest value."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def times_as_fast(runs: Sequence[Run], figure: str, own: str, against: str) -> dict[str, float] | None:
    """Return the spread of how many times as fast ``own`` was as ``against``, in the rounds that have both."""
    goal = Goal(what="", own=Term(own, figure), against=Term(against, figure))
    ratios = [ratio for ratio in map(goal.value, runs) if ratio is not None]
    return spread(ratios) if ratios else None
