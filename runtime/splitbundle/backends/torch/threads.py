"""The threads that compute a call. The setting of the process stays as it is between calls."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from splitbundle import giving_way, processors
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.giving_way import GivingWay
from splitbundle.integers import as_integer

MAX_THREADS: Final = 1024


def checked(threads: object) -> int | None:
    """Return a number of threads from a caller, or None for the default.

    Raises:
        BundleError: ``input.value``.
    """
    number = None if threads is None else as_integer(threads)
    if threads is not None and (number is None or not 1 <= number <= MAX_THREADS):
        expected = f"1 to {MAX_THREADS}"
        raise BundleError(Problem(code="input.value", argument="threads", expected=expected, got=quoted(threads)))
    return number


def for_call(threads: int | None) -> int:
    """Return the number of threads for a call: the given one, or torch's, but no more than this process may use.

    A forked child has one.
    """
    if processors.inherited_torch():
        return 1
    return min(torch.get_num_threads(), _usable()) if threads is None else threads


_seen: dict[int, int] = {}


def _usable() -> int:
    """Return the number of processors, which is read once in each process: files say it."""
    process = os.getpid()
    if process not in _seen:
        _seen.clear()
        _seen[process] = processors.usable()
    return _seen[process]


@contextmanager
def using(threads: int | None) -> Iterator[None]:
    """Compute the block with a number of threads, as ``for_call`` says."""
    before, wanted = torch.get_num_threads(), for_call(threads)
    if wanted == before:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Ways:
    """How the calls of a stage give way to other processes."""

    def __init__(self) -> None:
        self._of: dict[int, GivingWay] = {}

    @contextmanager
    def using(self, threads: int | None, tokens: int, *, steady: bool) -> Iterator[None]:
        """Compute a call with this many tokens, with a number of threads as ``for_call`` says.

        In a process that gives way, this is the largest number, unless it has to be ``steady``.
        """
        most = for_call(threads)
        if steady or most == 1 or not giving_way.gives_way():
            with using(threads):
                yield
            return
        way = self._of.setdefault(most, GivingWay(most))
        began = time.perf_counter()
        with using(way.threads):
            yield
        way.note(tokens, time.perf_counter() - began)
