"""A connection to a stage server by gRPC. Only bytes pass through it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Final

import grpc

from splitbundle.errors import BundleError, Problem
from splitbundle.records import record
from splitbundle.remote.address import METHOD, SERVICE, STREAM, Address
from splitbundle.remote.carrier import Lost
from splitbundle.remote.streams import Ended, Streams, TimedOut
from splitbundle.remote.tls_files import TlsFiles
from splitbundle.wire.frames import MAX_FRAME

_OPTIONS: Final = [
    ("grpc.max_receive_message_length", MAX_FRAME),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # the state of another channel to this address is not ours
    ("grpc.enable_retries", 0),  # a step that is sent again is our affair
    ("grpc.enable_http_proxy", 0),
]

_TLS_WORDS: Final = ("Tls handshake failed", "SSL_ERROR", "Peer name", "peer name", "Hostname Verification")
"""Words of gRPC's messages about certificates. It has no code for them."""
_NO_TLS: Final = "WRONG_VERSION_NUMBER"
"""The word of a message about a server that doesn't use TLS."""
_ENDED_WORDS: Final = ("reset by peer", "socket closed", "broken pipe", "endpoint closing")


@record(frozen=True, slots=True, kw_only=True)
class _Open:
    """A connection that is open, and the ways to use it."""

    channel: Any
    method: Any
    streams: Streams
    process: int


_ABANDONED: Final[list[_Open]] = []
"""Connections that an interruption may have left in any state. They are kept, so that nothing tidies them up."""


class Channel:
    """A connection to one server. Threads may share it. It connects at the first call, and again after a failure."""

    def __init__(self, address: Address, tls: TlsFiles | None, token: str | None) -> None:
        """Name a server. Nothing is sent yet.

        Args:
            address: where it is.
            tls: the authority of the server, and the client's certificate; None for the authorities of the system.
            token: a token for the server, or None.
        """
        self.address, self._tls = address, tls
        self._metadata = None if token is None else (("authorization", f"Bearer {token}"),)
        self._lock = threading.Lock()
        self._opened: _Open | None = None
        self._sent: set[Any] = set()

    @property
    def text(self) -> str:
        """Return the address, as the user wrote it."""
        return self.address.text

    def call(self, frame: bytes, timeout: float) -> bytes:
        """Return the answer to a frame.

        Args:
            frame: the frame.
            timeout: the seconds to wait.

        Raises:
            Lost: there is no answer.
            BundleError: ``peer.identity`` if the server doesn't know this client; ``wire.size``.
        """
        return self._guarded(lambda open_: open_.method(frame, timeout=timeout, metadata=self._metadata))

    def step(self, frame: bytes, timeout: float) -> bytes:
        """Return the answer to a frame, over a stream that is open already. Arguments and errors are those of ``call``.

        A stream spares a step of decoding half of its time on the wire.
        """
        return self._guarded(lambda open_: open_.streams.ask(frame, timeout))

    def send(self, frame: bytes, timeout: float) -> None:
        """Send a frame whose answer doesn't matter, and don't wait.

        Raises:
            Lost: the connection can't be used.
        """

        def send(open_: _Open) -> bytes:
            sent = open_.method.future(frame, timeout=timeout, metadata=self._metadata)
            self._sent.add(sent)  # gRPC cancels a call that nobody holds
            sent.add_done_callback(self._sent.discard)
            return b""

        self._guarded(send)

    def _guarded(self, ask: Callable[[_Open], bytes]) -> bytes:
        opened = self._connected()
        try:
            return ask(opened)
        except TimedOut:
            raise Lost("no answer in time", silent=True) from None
        except Ended:
            raise Lost("the server has ended the stream") from None
        except grpc.RpcError as error:
            raise self._failed(error, opened) from None
        except ValueError:  # gRPC's error for a connection that was closed
            raise Lost("another thread has closed the connection") from None
        except Exception:
            raise
        except BaseException:
            # Ctrl-C inside of gRPC may leave its locks held for ever. So nothing of this connection is touched again.
            with self._lock:
                _ABANDONED.append(opened)
                if self._opened is opened:
                    self._opened = None
            raise

    def _connected(self) -> _Open:
        with self._lock:
            if self._opened is None or self._opened.process != os.getpid():  # a forked child has no threads of gRPC
                channel = self._open()
                self._opened = _Open(
                    channel=channel,
                    method=channel.unary_unary(f"/{SERVICE}/{METHOD}"),
                    streams=Streams(channel, f"/{SERVICE}/{STREAM}", self._metadata),
                    process=os.getpid(),
                )
            return self._opened

    def _open(self) -> Any:
        if not self.address.secure:
            return grpc.insecure_channel(self.address.target, _OPTIONS)
        files = self._tls
        credentials = grpc.ssl_channel_credentials(
            None if files is None else files.ca,
            None if files is None else files.key,
            None if files is None else files.certificate,
        )
        return grpc.secure_channel(self.address.target, credentials, _OPTIONS)

    def _failed(self, error: Any, opened: _Open) -> Exception:
        code, details = error.code(), " ".join(str(error.details()).split())[:300]
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return Lost("no answer in time", silent=True)
        if code == grpc.StatusCode.UNAUTHENTICATED:
            got, hint = "another one, or none", "Ask who runs the server for a new certificate, or for its token"
            where = self.address.text
            return BundleError(Problem(code="peer.identity", argument=where, expected=details, got=got, hint=hint))
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
            expected = "a frame that the other side takes"
            return BundleError(Problem(code="wire.size", argument=self.address.text, expected=expected, got=details))
        if code == grpc.StatusCode.UNAVAILABLE and any(word in details for word in _TLS_WORDS):
            self._close(opened)
            if _NO_TLS in details:
                return Lost(f"{code.name}: {details} (the server may be one without TLS: grpc://)")
            hint = "Give tls= a directory with the authority of the server and this client's certificate"
            expected = "a server and a client that believe each other's certificates"
            where = self.address.text
            return BundleError(Problem(code="peer.identity", argument=where, expected=expected, got=details, hint=hint))
        if code == grpc.StatusCode.UNAVAILABLE:  # otherwise gRPC would wait before it connects again
            self._close(opened)
            if self.address.secure and any(word in details.lower() for word in _ENDED_WORDS):
                # With TLS 1.3, a server refuses a client after the client's own part of the handshake is done.
                details += " (the server may not believe this client's certificate)"
            elif not self.address.secure and any(word in details.lower() for word in _ENDED_WORDS):
                details += " (the server may want TLS: grpcs://)"
        return Lost(f"{code.name}: {details}")

    def close(self) -> None:
        """Close the connection. The next call makes another one."""
        if self._opened is not None:
            self._close(self._opened)

    def _close(self, opened: _Open) -> None:
        with self._lock:
            if self._opened is not opened:
                return  # another thread has closed it, and perhaps made a new one
            self._opened = None
        if opened.process == os.getpid():
            opened.streams.close()
            opened.channel.close()
