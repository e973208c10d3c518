"""Count the bytes of work that several threads share."""

from __future__ import annotations

import threading
from collections.abc import Callable

from splitbundle.storage.files import Progress


def counter(what: str, total: int, progress: Progress | None) -> Callable[[int], None]:
    """Return a function that counts the bytes that are done, and reports them. Any thread may call it.

    A negative count takes back what has to be done again.
    """
    done = 0
    lock = threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        if progress is not None:
            with lock:
                done += count
                progress(what, min(done, total), total)

    return advance
