"""Run the transfers of several files at once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

JOBS: Final = 4
"""How many files are moved at once."""
POLL: Final = 0.05
"""Seconds between two looks at a file that another process downloads."""


class Stopped(Exception):
    """Another file failed, or the caller was interrupted."""


def run_jobs(work: list[Callable[[], bool]], jobs: int, stop: threading.Event) -> None:
    """Run functions in several threads, until each has returned True. One that returns False is called again later.

    The threads are daemons: a process that is interrupted doesn't wait for a server. The first error stops all of them.
    One job at a time needs no further thread.

    Raises:
        BaseException: the first error of a function, or an interruption of this thread.
    """
    waiting = deque(work)
    lock = threading.Lock()
    errors: list[BaseException] = []
    left = len(work)

    def worker() -> None:
        nonlocal left
        while not stop.is_set():
            with lock:
                job = waiting.popleft() if waiting else None
                if job is None and not left:
                    return
            if job is None:  # another thread may give its file back
                time.sleep(POLL)
                continue
            try:
                finished = job()
            except Stopped:
                return
            except BaseException as error:  # noqa: BLE001  # it is raised in the thread of the caller
                with lock:
                    errors.append(error)
                stop.set()
                return
            with lock:
                if finished:
                    left -= 1
                else:
                    waiting.append(job)
            if not finished:
                time.sleep(POLL)

    several = 0 if jobs == 1 else min(jobs, len(work))
    threads = [threading.Thread(target=worker, daemon=True) for _ in range(several)]
    try:
        if not several:
            worker()
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    except BaseException:
        stop.set()
        raise
    if errors:
        raise errors[0]
