"""What brings frames to a server, and its answers back: gRPC, or an actor of Ray. Only bytes pass through it."""

from __future__ import annotations

from typing import Protocol


class Lost(Exception):
    """A frame has no answer: the server can't be reached, or is silent."""

    def __init__(self, reason: str, *, silent: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.silent = reason, silent


class Carrier(Protocol):
    """A way to one server. Threads may share it."""

    @property
    def text(self) -> str:
        """Return the name of the server, for messages."""

    def call(self, frame: bytes, timeout: float) -> bytes:
        """Return the answer to a frame.

        Args:
            frame: the frame.
            timeout: the seconds to wait.

        Raises:
            Lost: there is no answer.
        """

    def step(self, frame: bytes, timeout: float) -> bytes:
        """Return the answer to a frame of a session, whose steps follow each other. Otherwise it is as ``call``."""

    def send(self, frame: bytes, timeout: float) -> None:
        """Send a frame whose answer doesn't matter, and don't wait.

        Raises:
            Lost: the connection can't be used.
        """
