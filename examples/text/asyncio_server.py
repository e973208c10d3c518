"""Serve texts to many clients with asyncio. A client that goes away ends its generation.

    python examples/text/asyncio_server.py license.splitbundle 8765
    (echo "Licensed under the Apache License"; cat) | nc localhost 8765

A client sends a line, the prompt, and gets the new text piece by piece. Computing runs in threads, one piece at a time,
so the event loop never waits for it. Port 0 takes a free one.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from typing import Any

import splitbundle

MAX_AT_ONCE = 4
"""The number of texts that are computed at the same time. Further clients wait."""


async def stream(pipeline: Any, prompt: str, **options: Any) -> AsyncIterator[str]:
    """Yield the pieces of a text. If the task is cancelled, the generation ends before its next token."""
    generation = await asyncio.to_thread(pipeline.stream_text, prompt, **options)
    with generation:  # leaving this block closes the generation, and frees its session
        while (piece := await asyncio.to_thread(next, generation, None)) is not None:
            yield piece


async def cancel_when_gone(reader: asyncio.StreamReader, task: asyncio.Task[None]) -> None:
    """Cancel a task when the client closes the connection. Drop what the client sends until then."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(4096):
            pass
    task.cancel()


class Server:
    """One pipeline for all clients. Each text has a session of its own, which ``stream_text`` makes."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.turns = asyncio.Semaphore(MAX_AT_ONCE)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one client, until the text ends or the client closes the connection."""
        prompt = (await reader.readline()).decode("utf-8", "replace").rstrip("\r\n")
        answer = asyncio.create_task(self.send(prompt, writer))
        watch = asyncio.create_task(cancel_when_gone(reader, answer))
        with contextlib.suppress(asyncio.CancelledError, ConnectionError):
            await answer
        watch.cancel()
        writer.close()

    async def send(self, prompt: str, writer: asyncio.StreamWriter) -> None:
        """Send the pieces of a text, or the reason why there is none."""
        async with self.turns:
            try:
                async for piece in stream(self.pipeline, prompt):
                    writer.write(piece.encode())
                    await writer.drain()
            except splitbundle.BundleError as error:
                writer.write(f"error: {error}\n".encode())
                await writer.drain()


async def main() -> None:
    """Serve until the process is ended."""
    if len(sys.argv) != 3 or not sys.argv[2].isdigit():
        print("usage: python asyncio_server.py BUNDLE PORT", file=sys.stderr)
        sys.exit(2)
    path, port = sys.argv[1:]
    server = await asyncio.start_server(Server(splitbundle.open(path).pipeline()).serve, "localhost", int(port))
    print("listening on port", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
