"""Leases of texts: Ray doesn't end the work of a reader that is gone, so replicas do.

A reader tells all replicas again and again which texts it still waits for. A text that nobody has named for a while
ends, and frees its row. If the reader lives after all, it lets a replica go on.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final

PULSE: Final = 10.0
"""The seconds between two messages of a reader."""
LEASE: Final = 6 * PULSE
"""The seconds for which a text lives without one."""


class Leases:
    """The leases of a replica's texts. Threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._until = clock, dict[str, float]()

    def begin(self, text: str) -> None:
        """Give a text its first lease."""
        self._until[text] = self._clock() + LEASE

    def renew(self, texts: Sequence[str]) -> None:
        """Renew the leases of those texts that run here."""
        for text in texts:
            if text in self._until:
                self._until[text] = self._clock() + LEASE

    def is_over(self, text: str) -> bool:
        """Return whether nobody waits for a text any longer."""
        return self._clock() >= self._until.get(text, 0.0)

    def end(self, text: str) -> None:
        """Forget a text."""
        self._until.pop(text, None)


class Pulse:
    """Renews the leases of a reader's texts, in a thread that ends when the texts have."""

    def __init__(self, renew: Callable[[list[str]], object], pulse: float = PULSE) -> None:
        """Begin with no texts.

        Args:
            renew: called with the ids of the texts. It doesn't raise because of a replica.
            pulse: the seconds between two calls.
        """
        self._renew, self._pulse = renew, pulse
        self._texts: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._beats = False

    def add(self, text: Any) -> None:
        """Renew the lease of a text, as long as somebody holds it and it ``runs``."""
        with self._lock:
            self._texts.add(text)
            if not self._beats:
                self._beats = True
                threading.Thread(target=self._beat, name="splitbundle-ray-pulse", daemon=True).start()

    @property
    def texts(self) -> list[Any]:
        """Return the texts that run."""
        with self._lock:
            return [text for text in self._texts if text.runs]

    def _beat(self) -> None:
        while True:
            time.sleep(self._pulse)
            with self._lock:
                names = [text.id for text in self._texts if text.runs]
                if not names:
                    self._beats = False
                    return
            self._renew(names)
