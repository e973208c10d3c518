"""Stage servers for tests: in a process of their own, and behind a proxy that treats frames badly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from splitbundle.remote.address import parse_address
from splitbundle.remote.channel import Channel
from splitbundle.serving.grpc_server import GrpcServer
from splitbundle.wire import frames
from splitbundle.wire.messages import Message

START: Final = 60.0
"""The seconds in which a server starts, on a busy machine."""


class StageProcess:
    """``splitbundle serve-stage`` in a process of its own."""

    def __init__(self, bundle: Path | str, shard: str, *options: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "splitbundle", "serve-stage", str(bundle), shard, "--json"]
        command += ["--listen", f"127.0.0.1:{port}", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line: list[str] = []
        reader = threading.Thread(target=lambda: line.append(self.process.stdout.readline()))  # type: ignore[union-attr]
        reader.start()
        reader.join(START)
        if not line or not line[0].strip():
            self.process.kill()
            raise RuntimeError(f"the server didn't start: {self.process.communicate()[1]}")
        self.facts: dict[str, Any] = json.loads(line[0])
        if not self.facts["ok"]:
            self.process.wait()
            raise RuntimeError(f"the server didn't start: {self.facts}")
        self.url: str = self.facts["url"]
        self.port = int(self.url.rpartition(":")[2])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the process as ``kill -9`` does."""
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """End the process as a system does, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            for stream in (self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()

    def __enter__(self) -> StageProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


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
