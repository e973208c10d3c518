"""Streams of frames over one connection. A decoding step over an open stream takes half of the time of a call.

A thread reads the answers of a stream, so that the caller waits in a queue and never inside of gRPC. There, Ctrl-C
could leave a lock of gRPC held for ever. And a wait in a queue has a deadline, while gRPC gives a stream one deadline
for its whole life. An answer comes into the queue in the function that gRPC calls to read a message. So the caller
doesn't wait for the reading thread to wake up.
"""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue
from typing import Any, Final

MOST_IDLE: Final = 16
"""The idle streams that are kept."""


class TimedOut(Exception):
    """There was no answer in time."""


class Ended(Exception):
    """The server has ended the stream, as it does with one that was idle for long."""


class Stream:
    """A stream to a server: frames go in, and answers come out in the same order."""

    def __init__(self, channel: Any, method: str, metadata: Any) -> None:
        self._method = channel.stream_stream(method, response_deserializer=self._take)
        self._metadata = metadata
        self._requests: SimpleQueue[bytes | None] = SimpleQueue()
        self._found: SimpleQueue[bytes | Exception] = SimpleQueue()
        self._answers: Any = None
        threading.Thread(target=self._read, name="splitbundle-stream", daemon=True).start()

    def _read(self) -> None:
        try:
            self._answers = self._method(iter(self._requests.get, None), metadata=self._metadata)
            for _ in self._answers:
                pass  # _take has put it into the queue
            self._found.put(Ended())
        except Exception as error:  # noqa: BLE001  # it is raised where the answer is waited for
            self._found.put(error)

    def _take(self, answer: bytes) -> bool:
        self._found.put(answer)
        return True  # None would be an error, and the answer itself would be held for longer

    def ask(self, frame: bytes, timeout: float) -> bytes:
        """Return the answer to a frame.

        Raises:
            TimedOut: there was no answer in time.
            Ended: the server has ended the stream.
            grpc.RpcError: the stream is broken.
        """
        self._requests.put(frame)
        try:
            found = self._found.get(timeout=timeout)
        except Empty:
            raise TimedOut from None
        if isinstance(found, Exception):
            raise found
        return found

    def cancel(self) -> None:
        """End the stream at once. Nobody waits for that."""
        self._requests.put(None)
        if self._answers is not None:
            threading.Thread(target=self._answers.cancel, name="splitbundle-cancel", daemon=True).start()


class Streams:
    """The streams of one connection. Threads may share it: each request has a stream for itself."""

    def __init__(self, channel: Any, method: str, metadata: Any) -> None:
        self._channel, self._method, self._metadata = channel, method, metadata
        self._idle: list[Stream] = []

    def ask(self, frame: bytes, timeout: float) -> bytes:
        """Return the answer to a frame.

        Raises:
            TimedOut: there was no answer in time.
            Ended: the server has ended the stream.
            grpc.RpcError: the connection is broken, or the server refuses the client.
        """
        try:
            stream = self._idle.pop()
        except IndexError:
            stream = Stream(self._channel, self._method, self._metadata)
        try:
            answer = stream.ask(frame, timeout)
        except BaseException:  # also an interruption: a late answer must not meet another request
            stream.cancel()
            raise
        if len(self._idle) < MOST_IDLE:
            self._idle.append(stream)
        else:
            stream.cancel()
        return answer

    def close(self) -> None:
        """End all streams that are idle. Those that wait end with their connection."""
        while self._idle:
            try:
                self._idle.pop().cancel()
            except IndexError:  # another thread took the last one
                return
