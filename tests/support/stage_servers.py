"""Stage servers for tests: in a process of their own, and behind a proxy that treats frames badly."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from splitbundle.remote.address import parse_address
from splitbundle.remote.channel import Channel
from splitbundle.serving.grpc_server import GrpcServer
from splitbundle.wire import frames
from splitbundle.wire.messages import Message
from tests.support.server_process import START, ServerProcess


class StageProcess(ServerProcess):
    """``splitbundle serve-stage`` in a process of its own."""

    command = "serve-stage"

    def __init__(self, bundle: Path | str, shard: str, *options: str, port: int = 0) -> None:
        super().__init__(bundle, shard, *options, port=port)


class Dropped(Exception):
    """A proxy gives no answer."""


Forward = Callable[[bytes], bytes]
Fault = Callable[[Message, bytes, Forward], bytes]


class Proxy:
    """A server between a client and a stage server. A fault treats each frame as it likes.

    A fault is called with the message, its frame, and a function that asks the server. It returns the answer, or raises
    ``Dropped`` for none.
    """

    def __init__(self, target: str, fault: Fault) -> None:
        self._channel = Channel(parse_address(target), None, None)
        self._fault, self._ended = fault, threading.Event()
        self.frames: list[bytes] = []
        self._server = GrpcServer(self._answer, "127.0.0.1", 0, max_message=frames.MAX_FRAME)
        self.url = f"grpc://127.0.0.1:{self._server.port}"

    def _answer(self, data: bytes, owner: str, alive: Callable[[], bool]) -> bytes:
        self.frames.append(data)
        try:
            return self._fault(frames.unpack(data)[0], data, lambda frame: self._channel.call(frame, START))
        except Dropped:
            while alive() and not self._ended.is_set():
                time.sleep(0.005)
            return b""

    def __enter__(self) -> Proxy:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._server.stop(0).wait()
        self._server.close()
        self._channel.close()


def open_files() -> int:
    """Return the number of open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))
