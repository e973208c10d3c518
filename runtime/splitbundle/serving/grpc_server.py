"""The carrier of a stage server: gRPC, with TLS and the names of clients. Only bytes pass through it."""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc

from splitbundle.errors import BundleError, Problem
from splitbundle.remote.address import METHOD, SERVICE, STREAM, is_loopback
from splitbundle.remote.tls_files import TlsFiles

LOCAL: Final = "local"
"""The name of every client of a server without TLS and without tokens, which is at a loopback address."""
MOST_CALLS: Final = 256
"""The calls and streams that gRPC takes at once, each on a thread of its own. It refuses further ones."""
IDLE: Final = 30.0
"""The seconds after which a stream without requests ends. A client opens another one."""
_LOOK: Final = 1.0
_NO_TOKEN: Final = "a token that this server knows"  # noqa: S105  # a text of an error
_STRANGER: Final = "token:"
"""The name of a client whose token isn't known."""
Answer = Callable[[bytes, str, Callable[[], bool]], bytes]


class GrpcServer:
    """A port at which a service answers frames."""

    def __init__(
        self,
        answer: Answer,
        host: str,
        port: int,
        *,
        max_message: int,
        tls: TlsFiles | None = None,
        tokens: Mapping[str, str] | None = None,
        is_revoked: Callable[[bytes], bool] = lambda certificate: False,
        refused: Callable[[str], None] = lambda owner: None,
    ) -> None:
        """Listen at an address.

        Args:
            answer: returns the answer to a frame of a named client; the third argument says whether it still waits.
            host: the host to listen at.
            port: the port; 0 for any free one.
            max_message: the longest frame, in bytes.
            tls: the server's certificate and key, and the authority of the clients; None for no TLS.
            tokens: a name -> a token, if clients show tokens; otherwise they show certificates.
            is_revoked: returns whether a certificate, in PEM, was revoked.
            refused: called with the name of a client that is refused. gRPC itself refuses certificates of another
                authority, and doesn't report them.

        Raises:
            BundleError: ``server.address`` for an address without TLS that others reach, and for one that can't be had.
        """
        if tls is None and not is_loopback(host):
            expected = "TLS, as other machines reach this address; or a loopback address, such as 127.0.0.1"
            raise BundleError(Problem(code="server.address", argument=host, expected=expected, got="no TLS"))
        self._answer, self._tokens, self._is_revoked, self._tls = answer, tokens, is_revoked, tls is not None
        self._refused = refused
        self._pool = ThreadPoolExecutor(MOST_CALLS, "splitbundle-call")
        self._idle: dict[Any, float] = {}
        """The streams that wait for a request, and since when."""
        self._ending = threading.Event()
        self._looks = threading.Thread(target=self._end_idle, name="splitbundle-streams", daemon=True)
        options = [
            ("grpc.max_receive_message_length", max_message),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
            # A client that vanished without a word: its connection is closed after a minute.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ]
        self._server = grpc.server(
            self._pool,
            options=options,
            maximum_concurrent_rpcs=MOST_CALLS,
            interceptors=(_Gate(self._name_of, self._refuse),),
        )
        handlers = {
            METHOD: grpc.unary_unary_rpc_method_handler(self._call),
            STREAM: grpc.stream_stream_rpc_method_handler(self._stream),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, _credentials(tls, with_certificates=tokens is None))
        except RuntimeError as error:
            got = "one that can't be had: is it in use?"
            problem = Problem(code="server.address", argument=address, expected="a free address", got=got)
            raise BundleError(problem) from error

    def start(self) -> None:
        """Begin to answer."""
        self._server.start()
        self._looks.start()

    def stop(self, grace: float) -> threading.Event:
        """Take no more calls, and give those that run ``grace`` seconds. Return what is set when all have ended."""
        self._ending.set()
        ended: threading.Event = self._server.stop(grace)
        return ended

    def close(self, *, wait: bool = True) -> None:
        """Free the threads. Without ``wait``, one that still computes is freed when it has ended."""
        if self._looks.is_alive():
            self._looks.join()
        self._pool.shutdown(wait=wait)

    def _call(self, data: bytes, context: Any) -> bytes:
        owner = self._owner(context)
        return self._answer(data, owner, context.is_active)

    def _stream(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        self._idle[context] = time.monotonic()
        try:
            for data in requests:
                self._idle.pop(context, None)  # it may have been ended for idleness at this moment
                owner = self._owner(context)  # each time, because a certificate may have been revoked
                yield self._answer(data, owner, context.is_active)
                self._idle[context] = time.monotonic()
                if self._ending.is_set():  # the search for idle streams may be over
                    return
        finally:
            self._idle.pop(context, None)

    def _end_idle(self) -> None:
        """End streams that were idle for long; when the server ends, all that are idle."""
        ending = False
        while not ending or self._idle:
            ending = self._ending.wait(_LOOK if not ending else 0.01) or ending
            now = time.monotonic()
            for context, since in list(self._idle.items()):
                if ending or now - since > IDLE:
                    self._idle.pop(context, None)
                    context.cancel()

    def _owner(self, context: Any) -> str:
        """Return the name of a client, or end the call."""
        if self._tokens is not None:
            name = self._name_of(context.invocation_metadata())
            if name is None:  # since the stream began, the tokens have changed
                self._refuse(context, _STRANGER, _NO_TOKEN)
            return f"token:{name}"
        if not self._tls:
            return LOCAL
        facts = context.auth_context()
        certificate = facts.get("x509_pem_cert", [b""])[0]
        names = facts.get("x509_common_name", [])
        owner = f"certificate:{names[0].decode('utf-8', 'replace') if names else ''}"
        if not certificate or self._is_revoked(certificate):
            self._refuse(context, owner, "a certificate that is valid here")
        return owner

    def _refuse(self, context: Any, owner: str, expected: str) -> None:
        """End a call."""
        self._refused(owner)
        context.abort(grpc.StatusCode.UNAUTHENTICATED, expected)

    def _name_of(self, metadata: Iterable[tuple[str, Any]]) -> str | None:
        """Return the name of the token that a client shows, or None; the empty text if there are no tokens."""
        if self._tokens is None:
            return ""
        given, found = str(dict(metadata).get("authorization", "")), None
        for name, token in self._tokens.items():  # all of them, so that the time says nothing
            if hmac.compare_digest(f"Bearer {token}".encode(), given.encode("utf-8", "replace")):
                found = name
        return found


class _Gate(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses a client without a token before its message is read."""

    def __init__(
        self, name_of: Callable[[Iterable[tuple[str, Any]]], str | None], refuse: Callable[[Any, str, str], None]
    ) -> None:
        def refusal(requests: Any, context: Any) -> Iterator[bytes]:
            refuse(context, _STRANGER, _NO_TOKEN)
            yield b""

        self._name_of = name_of
        self._refusal = grpc.stream_stream_rpc_method_handler(refusal)  # a stream's handler reads nothing first

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Return what handles a call."""
        return self._refusal if self._name_of(details.invocation_metadata) is None else continuation(details)


def _credentials(tls: TlsFiles, *, with_certificates: bool) -> Any:
    return grpc.ssl_server_credentials(
        [(tls.key, tls.certificate)],
        root_certificates=tls.ca if with_certificates else None,
        require_client_auth=with_certificates,
    )
