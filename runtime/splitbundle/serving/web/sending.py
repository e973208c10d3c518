"""Send an answer, and notice when nobody reads it: a client that hung up, or one that stopped reading."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")
PATIENCE: Final = 60.0
"""The seconds for which a client may read nothing while its answer is sent."""


class HungUp(Exception):
    """The client went away before its answer was sent."""


class EventStream:
    """An answer of server-sent events. It ends when the client goes away, or reads nothing for a minute."""

    def __init__(
        self, events: AsyncIterator[bytes], headers: Mapping[str, str], on_end: Callable[[bool], None]
    ) -> None:
        """Describe an answer.

        Args:
            events: the events, complete with their empty lines.
            headers: further headers.
            on_end: called at the end, with whether all of it was sent.
        """
        self._events, self._headers, self.on_end = events, headers, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. Starlette calls this."""
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would keep the events until there are many
            **self._headers,
        }
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        complete = False
        sending = asyncio.ensure_future(self._send_all(raw, send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            complete = sending.done() and not sending.cancelled() and sending.exception() is None
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            self.on_end(complete)

    async def _send_all(self, headers: list[tuple[bytes, bytes]], send: Send) -> None:
        async def patiently(message: dict[str, Any]) -> None:
            await asyncio.wait_for(send(message), PATIENCE)

        try:
            await patiently({"type": "http.response.start", "status": 200, "headers": headers})
            async for event in self._events:
                await patiently({"type": "http.response.body", "body": event, "more_body": True})
            await patiently({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]


async def unless_left(work: Awaitable[Result], receive: Receive) -> Result:
    """Return the result of some work.

    Raises:
        HungUp: the client went away first. The work is cancelled.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HungUp
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    """Wait until a client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
