"""One contender computes a model, in a process of its own, and says how long it took. Little is imported before it."""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

WARM = 3
"""Tokens that are decoded before any is timed."""


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """A contender's figures: of importing, loading, the first token, and of each point that the task has."""
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
    figures["private after loading"] = private() - imports
    model.feed([[1]], True)
    figures["first token"] = time.time() - task["started"]
    figures["first token without imports"] = clock() - start
    for point in task["points"]:
        _point(model, point, task["vocabulary"], figures)
    figures["private imports"] = imports
    figures["private"] = (private() if sampler is None else sampler.stop()) - imports
    if task["logits"]:
        model.feed(tokens(24, 1, task["vocabulary"]), True)
        model.feed([[5]], False)
        figures["logits"] = model.logits()
    return figures


def _point(model: Any, point: dict[str, Any], vocabulary: int, figures: dict[str, Any]) -> None:
    """Seconds a token of the prompt, the least of some; seconds a token after it, the median of some."""
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
    """The name of a figure."""
    return f"{what} {context}" if batch == 1 else f"{what} {context} in {batch} rows"


def tokens(context: int, batch: int, vocabulary: int) -> list[list[int]]:
    """Made-up tokens, the same in every process."""
    return [[(i * 7919 + row * 104729 + 13) % (vocabulary - 10) + 5 for i in range(context)] for row in range(batch)]


def private() -> int:
    """Bytes of this process that are in no file; none where the system doesn't say."""
    try:
        with open("/proc/self/status") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:")), 0)
    except FileNotFoundError:
        return 0


class Sampler:
    """The most private memory that is seen from a thread of its own, every few milliseconds."""

    def __init__(self) -> None:
        import threading

        self.most, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self.most = max(self.most, private())

    def stop(self) -> int:
        """Bytes, at the most."""
        self._ended.set()
        self._thread.join()
        return max(self.most, private())
