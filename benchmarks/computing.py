"""Measure one contender that computes a model, in a separate process. Few modules are imported before the contender."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any, Final

WARM: Final = 3
"""The number of tokens that are decoded before the timing begins."""
CHECKED: Final = 256
"""The length of the prompt before a comparison. The logits after the prompt and one more token are compared."""


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a contender: importing, loading, the first token, and each point of the task.

    Times are in seconds; memory is in bytes.
    """
    clock = time.perf_counter
    figures: dict[str, Any] = {}
    begun = clock()
    for library in task["libraries"]:
        start = clock()
        import_module(library)
        figures[f"import {library}"] = clock() - start
    driver = import_module(f"benchmarks.{task['module']}").Driver
    if hasattr(driver, "imports"):
        driver.imports(task)
    figures["import"] = clock() - begun
    imports = private()
    sampler = Sampler() if task["sample_memory"] else None
    start = clock()
    model = driver(task)
    figures["load"] = clock() - start
    figures["import and load"] = figures["import"] + figures["load"]
    _more(figures, "private after loading", private(), imports)
    model.feed([[1]], True)
    figures["first token"] = time.time() - task["started"]
    figures["first token without imports"] = clock() - start
    for point in task["points"]:
        _point(model, point, task["vocabulary"], figures)
    _more(figures, "private imports", imports, 0)
    _more(figures, "private", private() if sampler is None else sampler.stop(), imports)
    if task["logits"]:
        model.feed(tokens(CHECKED, 1, task["vocabulary"]), True)
        model.feed([[5]], False)
        figures["logits"] = model.logits()
    return figures


def _point(model: Any, point: dict[str, Any], vocabulary: int, figures: dict[str, Any]) -> None:
    """Measure the seconds for a token of the prompt (the minimum) and for a token after the prompt (the median)."""
    clock = time.perf_counter
    context, batch = point["context"], point["batch"]
    rows = tokens(context, batch, vocabulary)
    times = []
    for _ in range(point["prefills"]):
        start = clock()
        model.feed(rows, True)
        times.append((clock() - start) / (context * batch))
    figures[point_name("prefill", context, batch)] = min(times)
    times = []
    for i in range(WARM + point["tokens"] if point["tokens"] else 0):
        step = [[row[i % context]] for row in rows]
        start = clock()
        model.feed(step, False)
        times.append((clock() - start) / batch)
    if times:
        timed = sorted(times[WARM:])
        figures[point_name("decode", context, batch)] = (timed[len(timed) // 2] + timed[(len(timed) - 1) // 2]) / 2


def point_name(what: str, context: int, batch: int) -> str:
    """Return the name of a figure."""
    return f"{what} {context}" if batch == 1 else f"{what} {context} in {batch} rows"


def tokens(context: int, batch: int, vocabulary: int) -> list[list[int]]:
    """Return made-up tokens, which are the same in all processes. *Shape:* (batch, context)."""
    return [[(i * 7919 + row * 104729 + 13) % (vocabulary - 10) + 5 for i in range(context)] for row in range(batch)]


def private() -> int | None:
    """Return the bytes of this process's private memory, or None if the system does not say."""
    try:
        with open("/proc/self/status") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:")), None)
    except FileNotFoundError:
        return None


def _more(figures: dict[str, Any], name: str, found: int | None, before: int | None) -> None:
    """Add a figure in bytes. It is absent if the system does not say, so that no goal is reached by mistake."""
    if found is not None and before is not None:
        figures[name] = found - before


class Sampler:
    """Measures the peak of private memory: a separate thread reads it every few milliseconds."""

    def __init__(self) -> None:
        import threading

        self.most: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self._look()

    def _look(self) -> None:
        if (now := private()) is not None:
            self.most = max(self.most or 0, now)

    def stop(self) -> int | None:
        """Stop, and return the peak in bytes, or None if the system does not say."""
        self._ended.set()
        self._thread.join()
        self._look()
        return self.most
