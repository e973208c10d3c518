"""Close what the garbage collector has found, in a thread of its own.

The collector runs at any moment, also where its thread holds a lock of a connection or of gRPC. A finalizer that sends
something there would wait for that lock for ever.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final


class Closing:
    """What waits to be closed, and the thread that does it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew, as in a forked child, which has no threads of its parent."""
        self._waiting: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Start the thread, if it doesn't run yet."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="splitbundle-closing", daemon=True)
            self._thread.start()

    def later(self, close: Callable[[], None]) -> None:
        """Let the thread call a function. Finalizers may call this: it waits for no lock."""
        self._waiting.put(close)

    def now(self) -> None:
        """Call what waits, in this thread."""
        while True:
            try:
                close = self._waiting.get_nowait()
            except Empty:
                return
            close()

    def _run(self) -> None:
        while True:
            self._waiting.get()()


CLOSING: Final = Closing()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CLOSING.reset)
