"""A histogram in Prometheus' text form, for the status page of a stage, which needs no library."""

from __future__ import annotations

import bisect
from typing import Final

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Histogram:
    """How many values lie below some bounds. The caller has a lock around ``observe``."""

    def __init__(self, bounds: tuple[float, ...] = SECONDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, help_text: str) -> list[str]:
        """Return the lines of https://prometheus.io/docs/instrumenting/exposition_formats."""
        made, below = [f"# HELP {name} {help_text}", f"# TYPE {name} histogram"], 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            below += count
            edge = "+Inf" if bound == float("inf") else f"{bound:g}"
            made.append(f'{name}_bucket{{le="{edge}"}} {below}')
        return [*made, f"{name}_sum {self.sum:.10g}", f"{name}_count {below}"]
