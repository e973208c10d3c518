"""uvicorn's HTTP/1.1 with a deadline for the head of a request, which it doesn't have."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS: Final = 20.0
"""The seconds in which the head of a request has to come. A client that sends it slowly holds a connection."""


class PatientProtocol(H11Protocol):
    """A connection that is closed if the head of a request takes too long."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin a connection."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a client."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Have a deadline while a head is awaited, from its first byte on; the first head from the connection on."""
        waits = self.cycle is None or self.cycle.response_complete
        if not waits and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        elif waits and self._deadline is None:
            self._deadline = self.loop.call_later(SECONDS, self._cut)

    def _cut(self) -> None:
        self._deadline = None
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()
