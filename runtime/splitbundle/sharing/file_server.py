"""A static file server for bundles in a local network. It reads, and never writes.

It hands out the files that a manifest lists and nothing else, has ranges and validators, and limits what clients take:
connections, time and memory. It has no TLS and asks for no login.
"""

from __future__ import annotations

import contextlib
import http
import io
import ipaddress
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from splitbundle.errors import printable, wrong_argument
from splitbundle.sharing.file_requests import byte_range, has_tag, path_of, pull_command
from splitbundle.sharing.reference import is_loopback
from splitbundle.sharing.served_files import Served, ServedFiles
from splitbundle.version import __version__

MAX_CONNECTIONS: Final = 64
"""The connections that are served at once. A further one is told to come back."""
MAX_HEAD: Final = 16 * 2**10
"""The bytes of a request: its line and its headers."""
MINIMUM_RATE: Final = 1024
"""Bytes a second. A client that takes a file more slowly is cut off."""
PIECE: Final = 2**20
"""The bytes of a file that are sent until the client's rate is looked at."""
SECONDS: Final = 30.0
"""The time for a request to come, and for an answer to begin to move."""
_HOST: Final = re.compile(r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?")
_TYPES: Final = {".json": "application/json", ".md": "text/plain; charset=utf-8", ".tar": "application/x-tar"}

Log = Callable[[str], None]
"""A function that is called with a line about each request, which is printable."""


class FileServer(ThreadingHTTPServer):
    """Serves bundles: ``serve_forever`` in one thread, and each connection in a thread of its own."""

    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"  # there, another process could take the address too
    request_queue_size = 128

    def __init__(
        self,
        served: ServedFiles,
        host: str = "127.0.0.1",
        port: int = 8000,
        *,
        log: Log | None = None,
        seconds: float = SECONDS,
        connections: int = MAX_CONNECTIONS,
    ) -> None:
        """Listen.

        Args:
            served: what to serve.
            host: the address or name to listen at. ``0.0.0.0`` and ``::`` are all addresses of this machine.
            port: the port; 0 lets the system choose.
            log: called with a line about each request, from several threads.
            seconds: the time for a request to come.
            connections: how many are served at once.

        Raises:
            BundleError: ``input.value`` for a host or a port where this process can't listen.
        """
        self.served = served
        self.log = log
        self.seconds = seconds
        self._free = threading.BoundedSemaphore(connections)
        self._deadlines: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except OSError as error:
            hint = "127.0.0.1 is this machine alone, 0.0.0.0 all its addresses"
            raise wrong_argument("host", "an address of this machine", f"{host}: {error.strerror}", hint) from error
        self.address_family = found[0][0]
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            got, hint = f"{host}:{port}: {error.strerror}", "0 lets the system choose a free port"
            raise wrong_argument("port", "a port that this process may listen at", got, hint) from error
        self.loopback = is_loopback(self.own_host)

    def server_bind(self) -> None:
        """Bind, and look up no name: the base class would ask the DNS for this machine's own."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    @property
    def own_host(self) -> str:
        """Return the address and the port, as a URL has them."""
        name, port = str(self.server_address[0]), self.server_address[1]
        return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"

    @property
    def url(self) -> str:
        """Return the URL of the index. For all addresses of a machine, it has this machine's name."""
        if ipaddress.ip_address(str(self.server_address[0])).is_unspecified:
            return f"http://{socket.gethostname()}:{self.server_address[1]}/"
        return f"http://{self.own_host}/"

    def stop(self) -> None:
        """Close the listening socket and every connection. Call it after ``serve_forever`` has ended."""
        self.server_close()
        with self._lock:
            for connection in self._deadlines:
                _cut(connection)

    def allow(self, connection: socket.socket, seconds: float) -> None:
        """Give a connection some more time for its next step."""
        with self._lock:
            self._deadlines[connection] = time.monotonic() + seconds

    def service_actions(self) -> None:
        """Cut the connections off whose time is over. ``serve_forever`` calls it twice a second."""
        now = time.monotonic()
        with self._lock:
            for connection, deadline in self._deadlines.items():
                if now > deadline:
                    _cut(connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread, or refuse it while there are too many."""
        if not self._free.acquire(blocking=False):
            _refuse(request)
            self.shutdown_request(request)
            return
        self.allow(request, self.seconds)
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system has no more threads
            self._forget(request)
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def _forget(self, request: socket.socket) -> None:
        with self._lock:
            del self._deadlines[request]
        self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say which error ended a connection. One that the client ended isn't worth a line."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.write_log(f"{client_address[0]} {type(error).__name__}: {error}"[:300])

    def write_log(self, line: str) -> None:
        """Log a line. A log that can't be written ends no connection."""
        if self.log is not None:
            with contextlib.suppress(OSError, ValueError):
                self.log(printable(line))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and file are two writes, and the second mustn't wait for an answer
    server_version = f"splitbundle/{__version__}"
    sys_version = ""
    server: FileServer

    def setup(self) -> None:
        # A step that waits for longer than this has failed. The deadlines see those that move, but too slowly.
        self.request.settimeout(self.server.seconds)
        super().setup()
        self.status, self.moved = 0, 0

    def handle_one_request(self) -> None:
        """Read a request, whose size is limited, and answer it."""
        self.server.allow(self.connection, self.server.seconds)
        self.close_connection = True
        self.status, self.moved = 0, 0
        self.command, self.path, self.requestline = "", "", ""
        self.request_version = "HTTP/1.1"
        try:
            head = self._read_head()
            if head is None:
                return
            socket_file, self.rfile = self.rfile, io.BytesIO(head)
            self.raw_requestline = self.rfile.readline()
            try:
                good = self.parse_request()
            finally:
                self.rfile = socket_file
            if good:
                self._answer()
            self.wfile.flush()
        except OSError:  # the client is gone, or its time is over
            self.close_connection = True
        if self.status:
            self.server.write_log(f"{self.client_address[0]} {self.requestline[:200]} {self.status} {self.moved}")

    def _read_head(self) -> bytes | None:
        head = bytearray()
        while True:
            line = self.rfile.readline(MAX_HEAD + 1)
            if not line:
                return None
            head += line
            if len(head) > MAX_HEAD:
                self.requestline = head[:80].decode("latin-1")
                long_line = b"\n" not in head[:MAX_HEAD]
                self._refuse(414 if long_line else 431, "The request is too long")
                return None
            if line in (b"\r\n", b"\n"):
                return bytes(head)

    def _answer(self) -> None:
        if self.request_version == "HTTP/0.9":
            self.request_version, self.close_connection = "HTTP/1.0", True
            self._refuse(400, "This server needs HTTP/1.0 or 1.1")
        elif self.command not in ("GET", "HEAD"):
            self._refuse(405, "This server is read-only", {"Allow": "GET, HEAD"})
        elif "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0":
            self._refuse(413, "This server takes no content")
        elif not self._has_host():
            self._refuse(400, "This request needs one header Host")
        elif self.server.loopback and not is_loopback(self.headers.get("Host", "localhost")):
            # A web page from elsewhere can make the user's browser ask this machine under the page's own host name, and
            # could read the answer.
            self._refuse(421, "This server is for its own machine, and the host of the URL is another one")
        else:
            path = path_of(self.path)
            if path == "":
                self._send_index()
                return
            found = None if path is None else self.server.served.open(path)
            if found is None:
                self._say(404, "Nothing is served under this path. The page / says what is.")
                return
            with contextlib.closing(found.file):
                self._send_file(str(path), found)

    def _has_host(self) -> bool:
        hosts = self.headers.get_all("Host", [])
        if not hosts:
            return self.request_version == "HTTP/1.0"
        return len(hosts) == 1 and _HOST.fullmatch(hosts[0]) is not None

    def _send_index(self) -> None:
        host = self.headers.get("Host") or self.server.own_host
        lines = [f"splitbundle {__version__}: bundles to pull", ""]
        for bundle in self.server.served.bundles():
            lines += [
                bundle.name,
                f"  bundle id   {bundle.id}",
                f"  {pull_command(f'http://{host}/', bundle.name, bundle.shards)}",
                "",
            ]
        lines += [f"{name}\n  http://{host}/{name}\n" for name in self.server.served.archives()]
        self._say(200, "\n".join(lines))

    def _send_file(self, path: str, found: Served) -> None:
        tag, size = f'"{found.tag}"', found.size
        kind = next((kind for end, kind in _TYPES.items() if path.endswith(end)), "application/octet-stream")
        headers = {"Content-Type": kind, "ETag": tag, "Accept-Ranges": "bytes", "Cache-Control": "no-cache"}
        if has_tag(self.headers.get_all("If-None-Match", []), tag):
            self._begin(304, headers, None)
            return
        wanted = self.headers.get("Range") if self.command == "GET" else None
        if wanted is not None and self.headers.get("If-Range", tag) != tag:
            wanted = None
        part = byte_range(wanted, size)
        start, stop = part or (0, size)
        if part is not None and start >= stop:
            self._say(416, "The file is shorter than that", {"Content-Range": f"bytes */{size}"})
            return
        if part is not None:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._begin(200 if part is None else 206, headers, stop - start)
        while self.command == "GET" and start < stop:
            count = min(PIECE, stop - start)
            self.server.allow(self.connection, self.server.seconds + count / MINIMUM_RATE)
            sent = self.connection.sendfile(found.file, start, count)
            start, self.moved = start + sent, self.moved + sent
            if sent != count:  # the file was shortened meanwhile
                self.close_connection = True
                return

    def _say(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        body = (text.rstrip("\n") + "\n").encode("utf-8")
        self._begin(status, {"Content-Type": "text/plain; charset=utf-8", **(headers or {})}, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)
            self.moved = len(body)

    def _refuse(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        """Answer a request after which the connection can't go on."""
        self.close_connection = True
        self._say(status, text, headers)
        with contextlib.suppress(OSError):
            # Closing a socket with unread bytes resets it, and the client might not see the answer.
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(min(1.0, self.server.seconds))
            for _ in range(16):
                if not self.connection.recv(2**16):
                    break

    def _begin(self, status: int, headers: dict[str, str], length: int | None) -> None:
        self.status = status
        self.send_response_only(status)
        self.send_header("Server", self.server_version)
        self.send_header("Date", self.date_time_string())
        for name, value in headers.items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that isn't HTTP. The base class would repeat the request in a web page."""
        if self.request_version == "HTTP/0.9":
            self.request_version = "HTTP/1.0"
        self._refuse(code, http.HTTPStatus(code).phrase)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name in the base class
        """Write nothing: ``handle_one_request`` logs."""


def _refuse(connection: socket.socket) -> None:
    """Tell a client to come back. It mustn't hold up the others."""
    with contextlib.suppress(OSError):
        connection.settimeout(0.1)
        connection.sendall(
            b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        )
        connection.shutdown(socket.SHUT_WR)
        connection.recv(2**16)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
