"""A small HTTP server beside a stage server: ``/healthz``, which computes a step, and ``/metrics``."""

from __future__ import annotations

import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from splitbundle.errors import BundleError, Problem
from splitbundle.serving import metrics
from splitbundle.serving.stage_service import StageService
from splitbundle.wire import frames
from splitbundle.wire.messages import Health, Healthy

OWNER: Final = "status"
_FRESH: Final = 1.0
"""The seconds for which a result of the health check holds. So requests can't keep the stage busy."""
_PATIENCE: Final = 10.0
"""The seconds that a connection may be silent."""


class StatusServer:
    """The health and the metrics of a service, over HTTP. It shows no content."""

    def __init__(self, service: StageService, host: str, port: int) -> None:
        """Listen at an address.

        Raises:
            BundleError: ``server.address`` if the address can't be had.
        """
        self._service, self._lock = service, threading.Lock()
        self._checked, self._healthy = -_FRESH, False
        own = self

        class Handler(BaseHTTPRequestHandler):
            timeout = _PATIENCE
            server_version, sys_version = "splitbundle", ""

            def do_GET(self) -> None:  # the name that http.server calls
                status, kind, text = own.answer(self.path.partition("?")[0])
                data = text.encode("utf-8")
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name that http.server gives
                return

        class Server(ThreadingHTTPServer):
            allow_reuse_address = sys.platform != "win32"  # there, another process could take the address too
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        try:
            self._server = Server((host, port), Handler)
        except (OSError, OverflowError) as error:
            got = f"{type(error).__name__}: {error}"
            problem = Problem(code="server.address", argument=f"{host}:{port}", expected="a free address", got=got)
            raise BundleError(problem) from error
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="splitbundle-status", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, path: str) -> tuple[int, str, str]:
        """Return the status, the media type and the text for a path."""
        if path == "/metrics":
            return 200, metrics.CONTENT_TYPE, metrics.render(self._service)
        if path != "/healthz":
            return 404, "text/plain; charset=utf-8", "there are /healthz and /metrics\n"
        if self._service.draining:
            return 503, "text/plain; charset=utf-8", "ending\n"
        with self._lock:
            if time.monotonic() - self._checked >= _FRESH:
                answer, _ = frames.unpack(self._service.answer(frames.pack(Health()), OWNER))
                self._healthy, self._checked = isinstance(answer, Healthy), time.monotonic()
            healthy = self._healthy
        return (200, "text/plain; charset=utf-8", "ok\n") if healthy else (503, "text/plain; charset=utf-8", "failed\n")
