"""The processors that this process may use: its affinity, its container's quota, and what a fork leaves."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Final

GROUPS: Final = Path("/sys/fs/cgroup")
OWN: Final = Path("/proc/self/cgroup")


class _Fork:
    inherited_torch = False


def inherited_torch() -> bool:
    """Return whether this process was forked from one that had imported torch."""
    return _Fork.inherited_torch


def _after_fork() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "set_num_threads"):  # None bars an import
        _Fork.inherited_torch = True
        torch.set_num_threads(1)


# In a forked child, GNU's OpenMP waits forever for threads that only the parent has. spec/decisions/0002 explains this.
# The number of threads is a setting of the whole process. This package changes it for good only in a forked child,
# which would hang otherwise. Opening a bundle imports this module, so a master that preloads needs no stage for it.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def usable() -> int:
    """Return the number of processors that this process may use, at least 1.

    ``os.cpu_count`` counts those of the machine. A container with a quota of two has as many as the machine, and is
    stopped for the rest of each tenth of a second once two processors' time is used up.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota(groups: Path = GROUPS, own: Path = OWN) -> float | None:
    """Return the quota of this process's control groups in processors, or None if there is none.

    A quota holds for all groups below it, so the smallest one counts. Both versions of control groups are read:
    ``cpu.max``, and ``cpu.cfs_quota_us`` with ``cpu.cfs_period_us`` (Linux, Documentation/admin-guide/cgroup-v2.rst and
    scheduler/sched-bwc.rst).
    """
    places = {groups, groups / "cpu"}
    for line in _read(own).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "" or "cpu" in controllers.split(","):
            inside = Path(path.lstrip("/"))
            for place in (inside, *inside.parents):
                places |= {groups / place, groups / "cpu" / place}
    quotas = [quota for place in places for quota in _quotas(place)]
    return min(quotas, default=None)


def _quotas(group: Path) -> list[float]:
    pairs = [
        _read(group / "cpu.max").split(),
        [*_read(group / "cpu.cfs_quota_us").split(), *_read(group / "cpu.cfs_period_us").split()],
    ]
    found = []
    for pair in pairs:
        if len(pair) == 2 and all(part.isdigit() for part in pair) and int(pair[1]) > 0:  # else "max", or -1
            found.append(int(pair[0]) / int(pair[1]))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""
