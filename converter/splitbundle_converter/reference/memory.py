"""Measure the memory that this process can still allocate, and the most that it takes during some work."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_INTERVAL: Final = 0.005
"""Seconds between two samples. Reading one takes some hundredths of a millisecond."""


def available_memory() -> int | None:
    """Return the bytes that this process can still allocate, or None if the system does not report them.

    It is the smaller of the machine's available memory and the rest of the control group's limit.
    """
    known = [value for value in (_of_machine(), _of_group()) if value is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _of_group() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return None
    return int(limit) - used if limit.isdigit() else None


def private_memory() -> int | None:
    """Return the bytes of this process's private memory, without mapped files, or None if the system doesn't tell."""
    try:
        with open("/proc/self/status", "rb") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith(b"RssAnon:")), None)
    except OSError:
        return None


def give_back_freed_memory() -> None:
    """Give the memory that was freed back to the system, where the C library can do that.

    glibc keeps freed blocks of up to 32 MiB. Layer after layer, they would add up to a part of the model.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):  # Windows, macOS, musl
        return
    trim(0)


class PeakMemory:
    """The most private memory that a process has during some blocks, beyond that at the start of the first block."""

    def __init__(self) -> None:
        self._start: int | None = None
        self._peak = 0

    @property
    def bytes(self) -> int | None:
        """Return the peak in bytes, or None if the system doesn't report private memory, or no block has run."""
        return None if self._start is None else self._peak - self._start

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Sample the private memory in a thread during the block."""
        start = private_memory()
        if start is None:
            yield
            return
        if self._start is None:
            self._start = self._peak = start
        done = threading.Event()

        def sample() -> None:
            while True:
                self._peak = max(self._peak, private_memory() or 0)
                if done.wait(_INTERVAL):
                    return

        thread = threading.Thread(target=sample, name="splitbundle-memory", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
