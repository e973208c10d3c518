"""Bounds on the processor's time that hold on any machine: multiples of known work, measured in the same process.

A test that says "soon" says it as a ratio: ``with at_most(30, parsing, 2**24): ...``. The factor is wide, several times
what the work takes, since caches, clock rates and neighbors change while a test runs. A bound finds work that grows
with the square of its input or with a number in it, not work that is a little slower than before.
"""

from __future__ import annotations

import functools
import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

_ENTRY: Final = {"dtype": "BF16", "shape": [128, 64], "data_offsets": [0, 16384]}
_MEBIBYTE: Final = 2**20


def seconds(work: Callable[[], object]) -> float:
    """Return the processor's seconds that ``work`` takes."""
    with _no_collection():
        start = time.process_time()
        work()
        return time.process_time() - start


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector still: after thousands of tests, one run of it takes longer than what is measured."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def parsing(size: int) -> float:
    """Return the seconds that the standard library takes to parse ``size`` bytes of JSON, a mebibyte at a time.

    It holds little memory, so that a process with a limit can measure it.
    """
    piece = _document()
    rounds = max(1, round(size / len(piece)))
    return seconds(lambda: [len(json.loads(piece)) for _ in range(rounds)]) * size / (rounds * len(piece))


@functools.cache
def _document() -> bytes:
    """A mebibyte of JSON, much like the header of a weight file."""
    entry = json.dumps(_ENTRY)
    return ("{" + ", ".join(f'"layers.{i}.weight": {entry}' for i in range(_MEBIBYTE // 84)) + "}").encode("ascii")


@contextmanager
def at_most(times: float, yardstick: Callable[..., float], *arguments: Any) -> Iterator[None]:
    """Assert that the block takes at most so many times the processor's time of the yardstick.

    The yardstick is measured once a process, and again where the block took longer: the machine may be slower by then.
    """
    with _no_collection():
        start = time.process_time()
        yield
        spent = time.process_time() - start
    if spent > times * _measured(yardstick, *arguments):
        again = yardstick(*arguments)
        assert spent <= times * again, f"took {spent:.3f} s, more than {times:g} times the yardstick's {again:.3f} s"


@functools.cache
def _measured(yardstick: Callable[..., float], *arguments: Any) -> float:
    return yardstick(*arguments)
