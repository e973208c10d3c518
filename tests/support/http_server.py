"""A base for test servers: HTTP/1.1 on loopback, threads, counters, a record of requests, and a door for lies.

A server is a context manager. A subclass has ``respond``, which looks at an ``Exchange`` and answers it. An error of
its own ends the test: the context manager raises it.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self

    from tests.support.lies import Lie

MAIN, OTHER = "127.0.0.1", "127.0.0.2"
"""The two hosts of a server. Both are this machine."""
_RANGE = re.compile(r"bytes=([0-9]+)-([0-9]*)")


class Seen(NamedTuple):
    """A request that came."""

    host: str
    """The host and port that got it."""
    method: str
    path: str
    """The path with its escapes, without the query."""
    query: dict[str, str]
    headers: dict[str, str]
    """By their names in lower case."""

    @property
    def authorization(self) -> str | None:
        """Return the credential that was sent."""
        return self.headers.get("authorization")


class Stopped(Exception):
    """The server ends while an answer is under way."""


class Exchange:
    """A request, and the ways to answer it."""

    def __init__(self, handler: _Handler, owner: LoopbackServer, seen: Seen) -> None:
        self._handler, self.server, self.seen = handler, owner, seen
        self.method, self.path, self.query, self.headers = seen.method, seen.path, seen.query, seen.headers
        self.lie: Lie | None = None
        self.times = 0
        """How often this lie was told before."""
        self._body: bytes | None = None

    @property
    def body(self) -> bytes:
        """Return the body of the request."""
        if self._body is None:
            self._body = self._read_body()
            self.server.received += len(self._body)
        return self._body

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            pieces = []
            while size := int(self._handler.rfile.readline().split(b";")[0], 16):
                pieces.append(self._handler.rfile.read(size))
                self._handler.rfile.readline()
            self._handler.rfile.readline()
            return b"".join(pieces)
        return self._handler.rfile.read(int(self.headers.get("content-length", 0)))

    @property
    def range_start(self) -> int:
        """Return the first byte that is asked for."""
        found = _RANGE.match(self.headers.get("range", ""))
        return int(found[1]) if found else 0

    def raw(self, data: bytes) -> None:
        """Write bytes as they are."""
        self._handler.wfile.write(data)

    def body_bytes(self, data: bytes) -> None:
        """Write bytes of a body, and count them."""
        self._handler.wfile.write(data)
        self.server.sent += len(data)

    def head(self, status: int, headers: Mapping[str, str] | list[tuple[str, str]]) -> None:
        """Write a status and headers."""
        pairs = list(headers.items()) if isinstance(headers, Mapping) else headers
        reason = self._handler.responses.get(status, ("Odd", ""))[0]
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in pairs)]
        self.raw("".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1"))

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        """Answer with a whole body."""
        _ = self.body  # what isn't read would be taken for the next request
        self.head(status, {**(headers or {}), "Content-Length": str(len(body))} if status != 204 else headers or {})
        if self.method != "HEAD":
            self.body_bytes(body)

    def content(
        self,
        data: bytes | Path,
        headers: Mapping[str, str] | None = None,
        *,
        ranges: bool = True,
        tag: str | None = None,
    ) -> None:
        """Answer with content, or the range of it that is asked for. If a lie is due, tell the lie."""
        data = data.read_bytes() if isinstance(data, Path) else data
        if self.lie is not None:
            self.lie.tell(self, data)
            return
        named = dict(headers or {})
        if tag is not None:
            named["ETag"] = tag
        found = _RANGE.fullmatch(self.headers.get("range", "")) if ranges and self.method == "GET" else None
        if ranges:
            named["Accept-Ranges"] = "bytes"
        if found is None:
            self._whole(200, data, named)
            return
        start, stop = int(found[1]), min(int(found[2] or len(data) - 1) + 1, len(data))
        if start >= stop:
            self.answer(416, b"", {**named, "Content-Range": f"bytes */{len(data)}"})
            return
        self._whole(206, data[start:stop], {**named, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def _whole(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.answer(status, data, {"Content-Type": "application/octet-stream", **headers})

    def pause(self, seconds: float) -> None:
        """Wait, but no longer than the server runs.

        Raises:
            Stopped: it ends.
        """
        if self.server.ending.wait(seconds):
            raise Stopped

    def close(self) -> None:
        """Let no further request come on this connection."""
        self._handler.close_connection = True

    def reset(self) -> None:
        """End the connection with a reset."""
        self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._handler.reset = True
        self.close()


class LoopbackServer:
    """An HTTP server on loopback, at a port that the system chooses.

    Attributes:
        url: the base URL, without a ``/`` at its end.
        requests: every request that came, in order.
        sent: the bytes of all bodies that were sent.
        received: the bytes of all bodies that came.
        before: functions that are called with each request before it is answered. They may change the server.
        lies: a pattern -> a lie. A pattern is ``PATH`` for GET, or ``METHOD PATH``, where ``*`` stands for any text.
    """

    def __init__(self, lies: Mapping[str, Lie | str] | None = None) -> None:
        from tests.support.lies import LIES

        self.requests: list[Seen] = []
        self.sent = self.received = 0
        self.before: list[Callable[[Seen], None]] = []
        self.lies = {pattern: LIES[lie] if isinstance(lie, str) else lie for pattern, lie in (lies or {}).items()}
        self.ending = threading.Event()
        self.lock = threading.RLock()
        self._told: dict[tuple[str, str], int] = {}
        self._errors: list[BaseException] = []
        self._connections: set[socket.socket] = set()
        self._listeners: list[tuple[_Listener, threading.Thread]] = []
        self.url = ""

    def respond(self, exchange: Exchange) -> None:
        """Answer a request."""
        raise NotImplementedError

    def listen(self, host: str, respond: Callable[[Exchange], None]) -> str:
        """Open a further port, and return its URL."""
        listener = _Listener((host, 0), self, respond)
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        self._listeners.append((listener, thread))
        return f"http://{listener.place}"

    @property
    def host(self) -> str:
        """Return the host and port."""
        return self.url.removeprefix("http://")

    def other_url(self) -> str:
        """Return the base URL of the same content on another host, which is opened at the first call."""
        with self.lock:
            if len(self._listeners) < 2 or not hasattr(self, "_other"):
                self._other = self.listen(OTHER, self.respond)
            return self._other

    def seen(self, method: str | None = None, path: str = "*") -> list[Seen]:
        """Return the requests of a method whose path fits a pattern."""
        return [each for each in self.requests if method in (None, each.method) and fnmatchcase(each.path, path)]

    def reset_counters(self) -> None:
        """Forget the requests and the bytes."""
        self.requests.clear()
        self.sent = self.received = 0

    def __enter__(self) -> Self:
        self.url = self.listen(MAIN, self.respond)
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        for listener, thread in self._listeners:
            listener.shutdown()
            thread.join()
            listener.server_close()
        with self.lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        if self._errors:
            raise self._errors[0]

    def due(self, seen: Seen) -> tuple[Lie | None, int]:
        """Return the lie for a request, and how often it was told under the same path before."""
        for pattern, lie in self.lies.items():
            method, _, path = pattern.rpartition(" ")
            if seen.method == (method or "GET") and fnmatchcase(seen.path, path):
                with self.lock:
                    times = self._told[seen.method, seen.path] = self._told.get((seen.method, seen.path), 0) + 1
                return lie, times - 1
        return None, 0

    def serve(self, handler: _Handler, respond: Callable[[Exchange], None]) -> None:
        """Answer one request of a connection."""
        target = urllib.parse.urlsplit(handler.path)
        query = dict(urllib.parse.parse_qsl(target.query, keep_blank_values=True))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        seen = Seen(handler.server.place, handler.command, target.path, query, headers)
        with self.lock:
            self.requests.append(seen)
            for hook in self.before:
                hook(seen)
        exchange = Exchange(handler, self, seen)
        lie, times = self.due(seen)
        if lie is not None and not lie.true_after(times):
            exchange.lie, exchange.times = lie, times
            if not lie.about_content:
                _ = exchange.body
                lie.tell(exchange, b"")
                return
        respond(exchange)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, place: tuple[str, int], owner: LoopbackServer, respond: Callable[[Exchange], None]) -> None:
        self.owner, self.respond = owner, respond
        super().__init__(place, _Handler)
        self.place = f"{self.server_address[0]}:{self.server_address[1]}"

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys

        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError | Stopped):
            self.owner._errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener
    reset = False

    def setup(self) -> None:
        super().setup()
        with self.server.owner.lock:
            self.server.owner._connections.add(self.connection)

    def finish(self) -> None:
        with self.server.owner.lock:
            self.server.owner._connections.discard(self.connection)
        super().finish()
        if self.reset:  # shutdown_request would send an ordinary end first
            self.connection.close()

    def _serve(self) -> None:
        self.server.owner.serve(self, self.server.respond)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _serve  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass
