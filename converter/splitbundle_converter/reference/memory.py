"""Measure the memory that this process can still allocate."""

from __future__ import annotations

import os
from pathlib import Path


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
