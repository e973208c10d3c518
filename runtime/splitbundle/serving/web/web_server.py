"""The server process: uvicorn around the application, until a signal ends it."""

from __future__ import annotations

import socket
import sys
import threading
import time
from typing import Any, Final, Protocol

import uvicorn

from splitbundle.errors import BundleError, Problem
from splitbundle.serving.web.patient_protocol import PatientProtocol

_BACKLOG: Final = 512
_MOST_CONNECTIONS: Final = 2048
"""The connections that are answered at once. A further one gets status 503."""


class Answering(Protocol):
    """What answers at a port."""

    @property
    def app(self) -> Any:
        """Return the application, as uvicorn runs it."""

    draining: bool
    """Whether new requests are refused."""
    running: int
    """The requests that are answered."""

    def close(self) -> None:
        """Let go of everything."""


class WebServer:
    """A port at which a door answers. It serves from ``start`` on, in a thread of its own."""

    def __init__(
        self, door: Answering, host: str, port: int, *, certificate: str | None = None, key: str | None = None
    ) -> None:
        """Listen at an address.

        Args:
            door: what answers.
            host: the host to listen at.
            port: the port; 0 for any free one.
            certificate: the file of the server's certificate, for TLS; None for none.
            key: the file of its key.

        Raises:
            BundleError: ``server.address`` if the address can't be had; ``keys.file`` for a certificate that can't.
        """
        self._door = door
        self._socket = _listening(host, port)
        self.port: int = self._socket.getsockname()[1]
        kind = "http" if certificate is None else "https"
        self.url = f"{kind}://[{host}]:{self.port}" if ":" in host else f"{kind}://{host}:{self.port}"
        config = uvicorn.Config(
            door.app,
            http=PatientProtocol,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=None,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        try:
            config.load()
        except OSError as error:
            self._socket.close()
            expected = "a certificate and its key, in PEM"
            got = f"{type(error).__name__}: {error}"
            raise BundleError(Problem(code="keys.file", file=certificate, expected=expected, got=got)) from error
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="splitbundle-web", daemon=True)
        self._failure: BaseException | None = None

    def _serve(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        except BaseException as error:  # noqa: BLE001  # wait() raises it
            self._failure = error

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)
        self._check()

    def wait(self) -> None:
        """Wait until the server ends."""
        while self._thread.is_alive():
            self._thread.join(0.5)
        self._check()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def stop(self, grace: float = 10.0) -> None:
        """Take nothing new, give the answers that are sent ``grace`` seconds, and end."""
        self._door.draining = True
        until = time.monotonic() + grace
        try:
            while self._door.running and time.monotonic() < until:
                time.sleep(0.02)
        finally:  # also at a second Ctrl-C: then the texts end at once
            self._end()

    def _end(self) -> None:
        self._door.close()
        self._server.should_exit = True
        if self._thread.is_alive():  # it may not have been started
            self._thread.join(2)
            self._server.force_exit = True
            self._thread.join(5)
        self._socket.close()

    def __enter__(self) -> WebServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small packets at once only on sockets that name TCP. Otherwise an answer may wait 40 ms for nothing.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if sys.platform != "win32":  # on Windows it would let another process take the address too
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        made.close()
        got = f"{type(error).__name__}: {error}"
        problem = Problem(code="server.address", argument=f"{host}:{port}", expected="a free address", got=got)
        raise BundleError(problem) from error
    return made
