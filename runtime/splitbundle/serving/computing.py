"""One piece of work after another: a stage computes one step at a time, in the order in which they came.

Work that waits is done by a thread of its own. If nothing waits, the caller does its work itself: a decoding step would
otherwise wait until another thread has woken up, and then until its own has, which took more time than all the rest of
the server. OpenMP makes a pool of threads for each thread that computes, so only a few callers may.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeVar

Result = TypeVar("Result")
MOST_CALLERS: Final = 4
"""The threads that may do their work themselves."""


class Stopped(Exception):
    """The thread has ended, or ends before it comes to this work."""


class _Job(Generic[Result]):
    def __init__(self, work: Callable[[], Result]) -> None:
        self.work = work
        self.done = threading.Lock()
        self.done.acquire()
        self.result: Any = None
        self.error: BaseException | None = None


class Computing:
    """Does one piece of work at a time. Threads may share it."""

    def __init__(self, name: str) -> None:
        self._jobs: deque[_Job[Any]] = deque()
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._stopping = False
        self._lock = threading.Lock()
        self._callers: set[int] = set()
        """The threads that may do their work themselves."""
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Return how many pieces of work wait for their turn."""
        return len(self._jobs)

    def run(self, work: Callable[[], Result]) -> Result:
        """Do some work, and return its result.

        Raises:
            Stopped: ``stop`` was called before the work had begun.
            BaseException: what the work raises.
        """
        if not self._jobs and self._may_compute() and self._lock.acquire(blocking=False):
            try:
                if self._stopping:
                    raise Stopped
                return work()
            finally:
                self._lock.release()
        job = _Job(work)
        self._jobs.append(job)
        self._wake.put(None)
        if self._stopping:
            self._refuse_all()
        job.done.acquire()
        if job.error is not None:
            raise job.error
        result: Result = job.result
        return result

    def _may_compute(self) -> bool:
        """Return whether the calling thread is one of the first few that came."""
        caller = threading.get_ident()
        if caller not in self._callers:
            if len(self._callers) >= MOST_CALLERS:
                return False
            self._callers.add(caller)
        return True

    def stop(self, timeout: float | None = None) -> bool:
        """Refuse the work that waits, and wait for that which is done, at most ``timeout`` seconds; None for any time.

        Return whether it has ended. What goes on is the last work: no other begins.
        """
        self._stopping = True
        self._refuse_all()
        self._wake.put(None)
        until = None if timeout is None else time.monotonic() + timeout
        self._thread.join(timeout)
        # A caller may do its work itself.
        ended = self._lock.acquire(timeout=-1 if until is None else max(0.0, until - time.monotonic()))
        if ended:
            self._lock.release()
        self._refuse_all()
        return ended and not self._thread.is_alive()

    def _loop(self) -> None:
        while True:
            self._wake.get()
            with self._lock:
                if self._stopping:
                    return
                try:
                    job = self._jobs.popleft()
                except IndexError:
                    continue
                try:
                    job.result = job.work()
                except BaseException as error:  # noqa: BLE001  # it is raised where the result is waited for
                    job.error = error
                job.done.release()
                del job

    def _refuse_all(self) -> None:
        while True:
            try:
                job = self._jobs.popleft()
            except IndexError:
                return
            job.error = Stopped()
            job.done.release()
