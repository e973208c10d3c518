"""The servers of one stage: which of them are there, and what each of them is."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from splitbundle import logs
from splitbundle.errors import BundleError, Problem
from splitbundle.records import record, replace
from splitbundle.remote.address import parse_address
from splitbundle.remote.carrier import Carrier, Lost
from splitbundle.remote.channel import Channel
from splitbundle.remote.options import RemoteOptions
from splitbundle.remote.tls_files import TlsFiles, read_identity
from splitbundle.remote.tls_purpose import check_purpose
from splitbundle.wire import frames
from splitbundle.wire.messages import ANSWERS, PROTOCOL, Answer, Failure, Forward, Hello, Ran, Request, Run, Welcome

FIRST_WAIT: Final = 5.0
"""The seconds after which a client asks whether a silent server still lives. Each further wait is twice as long."""
PROBE: Final = 2.0
"""The seconds in which a server that lives answers a hello."""
_MAX_FAILURES: Final = 3
"""How often one frame may meet a broken connection, or a damaged answer, while its server lives."""
_HINTS: Final = {
    "peer.protocol": "Install the same version of splitbundle on both sides",
    "peer.fingerprint": "Start the server with this bundle, or open the one that it was started with",
    "peer.layers": "Start the server with the shard of this stage",
    "server.quota": "End sessions of this client, or let the server give each client more",
}
"""A code -> what to do next."""
_START: Final = "Start a server with splitbundle serve-stage, or wait and try again: the session stays usable"
_FIRST_BACK_OFF: Final = 0.05
_LAST_BACK_OFF: Final = 2.0


@record(frozen=True, slots=True, kw_only=True)
class Expected:
    """The stage that a client wants, from the documents of its bundle."""

    name: str | None
    """None if any stage is welcome."""
    fingerprint: str | None
    """None if another model's weights are welcome."""
    layers: tuple[int, int] | None
    """None if any layers are welcome."""
    width: int | None
    trains: bool = False
    """Whether the client trains the stage, so that its weights may have moved."""

    @property
    def named(self) -> str:
        """Return the stage in words, for messages."""
        return "any stage" if self.name is None else f"stage {self.name}"


class Refused(BundleError):
    """A server refused a request."""

    def __init__(self, failure: Failure, where: str) -> None:
        super().__init__(
            Problem(
                code=failure.code,
                argument=f"{where}, {failure.argument}" if failure.argument else where,
                expected=failure.expected,
                got=failure.got,
                hint=_HINTS.get(failure.code),
            )
        )
        self.retry = failure.retry


class Peer:
    """One server of a stage."""

    def __init__(self, channel: Carrier, expected: Expected) -> None:
        self.text, self._channel, self._expected = channel.text, channel, expected
        self.welcome: Welcome | None = None
        self.reason = "not asked yet"
        """Why it can't be used at the moment."""
        self.code: str | None = None
        """The code of this reason, if a server gave it."""
        self.next_try = 0.0
        self._back_off = _FIRST_BACK_OFF

    @property
    def where(self) -> str:
        """Return the name of the stage and the address, for messages."""
        return f"{self._expected.named} at {self.text}"

    def connect(self, timeout: float) -> Welcome:
        """Ask the server what it is, in at most ``timeout`` seconds, and compare it with what the client wants.

        Raises:
            Lost: it doesn't answer.
            BundleError: ``peer.*`` for another stage, other weights or another version.
        """
        expected = self._expected
        hello = Hello(protocol=PROTOCOL, fingerprint=expected.fingerprint, layers=expected.layers)
        try:
            welcome, _ = self.ask(hello, (), timeout)
        except Refused as refused:
            (problem,) = refused.problems
            if not problem.code.startswith("peer."):
                raise
            # The server says what it expected. To the user of a client, that is what came.
            swapped = replace(problem, argument=self.where, expected=problem.got, got=problem.expected)
            raise BundleError(swapped) from None
        if not isinstance(welcome, Welcome):
            raise RuntimeError("ask returned another kind of answer")
        self._compare("peer.protocol", PROTOCOL, welcome.protocol)
        self._compare("peer.fingerprint", expected.fingerprint, welcome.fingerprint)
        if expected.fingerprint is not None and not expected.trains and welcome.number > 0:
            got = f"weights that were trained for {welcome.number} steps"
            hint = "same_weights=False takes them"
            problem = Problem(
                code="peer.fingerprint", argument=self.where, expected=expected.fingerprint, got=got, hint=hint
            )
            raise BundleError(problem)
        self._compare("peer.layers", expected.layers, welcome.layers)
        self._compare("peer.layers", expected.width, welcome.width)
        self._compare("peer.dtype", None if self.welcome is None else self.welcome.dtype, welcome.dtype)
        self.welcome = welcome
        return welcome

    def _compare(self, code: str, expected: object, got: object) -> None:
        if expected is not None and got != expected:
            raise BundleError(
                Problem(code=code, argument=self.where, expected=str(expected), got=str(got), hint=_HINTS.get(code))
            )

    def ask(self, message: Request, payload: Sequence[bytes | memoryview], timeout: float) -> tuple[Answer, memoryview]:
        """Return the answer to one request, sent once. See ``exchange``."""
        return self._read(self._channel.call(frames.pack(message, payload), timeout), message)

    def exchange(self, message: Request, frame: bytes, patience: float) -> tuple[Answer, memoryview]:
        """Return the answer to a frame, and its payload.

        Where there is none, the server is asked whether it still lives. If it does, it gets the same frame again: it is
        computing, or a connection or a frame was lost. It computes a step once.

        Args:
            message: the message of the frame.
            frame: a frame that may be sent several times.
            patience: the seconds after which even a server that lives is given up.

        Raises:
            Lost: the server doesn't answer.
            Refused: the server refused it.
            BundleError: the answer is no frame of the right kind.
        """
        wait, until, failures = FIRST_WAIT, time.monotonic() + patience, 0
        while True:
            left = until - time.monotonic()
            try:
                return self._read(self._channel.step(frame, max(min(wait, left), 0.001)), message)
            except Lost as lost:
                failures += not lost.silent
                if time.monotonic() >= until:
                    raise Lost(f"no answer in {patience:g} s") from None
                if failures > _MAX_FAILURES:
                    raise
                reason = lost.reason
            except Refused as refused:
                failures += 1
                if refused.retry != "same" or failures > _MAX_FAILURES or time.monotonic() >= until:
                    raise
                reason = str(refused.problems[0])
            # It may be the connection that was lost, or one frame of it, and not the server with its sessions.
            try:
                self._channel.call(frames.pack(Hello(protocol=PROTOCOL, fingerprint=None, layers=None)), PROBE)
            except Lost:
                raise Lost(f"{reason}, and no answer to a hello") from None
            wait *= 2

    def _read(self, data: bytes, message: Request) -> tuple[Answer, memoryview]:
        try:
            answer, payload = frames.unpack(data)
        except BundleError as error:
            raise Lost(f"an answer that is no frame: {error.problems[0]}") from None
        if isinstance(answer, Failure):
            raise Refused(answer, self.where)
        if not isinstance(answer, ANSWERS[type(message)]) or not _fits(message, answer):
            raise Lost(f"an answer of the kind {answer.op!a} that belongs to another request")
        return answer, payload  # type: ignore[return-value]

    def send(self, message: Request) -> None:
        """Send a request whose answer doesn't matter, and don't wait."""
        self._channel.send(frames.pack(message), PROBE)

    def relay(self, frame: bytes, timeout: float, *, steps: bool) -> bytes:
        """Return the bytes that answer a frame of another client, sent once, as they are.

        Args:
            frame: the frame.
            timeout: the seconds to wait.
            steps: whether it is a frame of a session, whose steps follow each other.

        Raises:
            Lost: there is no answer.
            BundleError: ``peer.identity``, ``wire.size``.
        """
        return self._channel.step(frame, timeout) if steps else self._channel.call(frame, timeout)

    def failed(self, reason: str, code: str | None = None) -> None:
        """Note that the server can't be used for a while: twice as long as the last time."""
        self.reason, self.code, self.next_try = reason, code, time.monotonic() + self._back_off
        self._back_off = min(2 * self._back_off, _LAST_BACK_OFF)
        logs.debug("%s: %s", self.where, reason)

    def works(self) -> None:
        """Note that the server has answered."""
        self._back_off = _FIRST_BACK_OFF


class Peers:
    """The servers of one stage, in the order of the user's wish. Threads may share it."""

    def __init__(self, addresses: str | Sequence[str | Carrier], expected: Expected, options: RemoteOptions) -> None:
        """Name the servers, by their addresses or by what brings frames to them. Nothing is sent yet.

        Raises:
            BundleError: ``input.value`` for an address of another form; ``keys.file`` and ``file.*``.
        """
        given = [addresses] if isinstance(addresses, str) else list(addresses)
        if not given:
            raise BundleError(
                Problem(code="input.value", argument="remote", expected="at least one address", got="none")
            )
        channels = [_channel(each, options) if isinstance(each, str) else each for each in given]
        self.expected, self._options = expected, options
        self.peers = [Peer(channel, expected) for channel in channels]
        self._lock = threading.Lock()
        self._dtype: str | None = None

    def connected(self, *, until: float, but: Peer | None = None) -> tuple[Peer, Welcome]:
        """Return the first server that answers, and what it is.

        Args:
            until: the time, by ``time.monotonic``, at which to give up.
            but: a server to try last.

        Raises:
            BundleError: ``peer.unreachable`` if none answers in time; ``peer.*`` if none is the right one.
        """
        while True:
            now = time.monotonic()
            ready = [peer for peer in self.peers if peer.next_try <= now]
            ready.sort(key=lambda peer: peer is but)
            wrong: list[BundleError] = []
            for peer in ready:
                try:
                    welcome = peer.connect(min(max(until - time.monotonic(), 0.05), PROBE))
                except Lost as lost:
                    peer.failed(lost.reason)
                    continue
                except BundleError as error:
                    wrong.append(error)
                    peer.failed(str(error.problems[0]), error.codes[0])
                    continue
                with self._lock:
                    self._dtype = self._dtype or welcome.dtype
                    same = self._dtype == welcome.dtype
                if same:
                    return peer, welcome
                peer.failed(f"it computes in {welcome.dtype}, and the first one in {self._dtype}")
            if len(wrong) == len(self.peers):  # each of them answers, and none is the right one
                raise BundleError(problem for error in wrong for problem in error.problems)
            if time.monotonic() >= until:
                raise self.unreachable()
            wake = min(peer.next_try for peer in self.peers)
            time.sleep(max(min(wake, until) - time.monotonic(), 0.005))

    def unreachable(self) -> BundleError:
        """Return the error of a stage without a server, which names each server and why it can't be used."""
        reasons = "; ".join(f"{peer.text}: {peer.reason}" for peer in self.peers)
        hint = _HINTS["server.quota"] if {peer.code for peer in self.peers} == {"server.quota"} else _START
        return BundleError(
            Problem(
                code="peer.unreachable",
                argument=self.expected.named,
                expected="a server that answers",
                got=reasons,
                hint=hint,
            )
        )


def check_identity(options: RemoteOptions) -> TlsFiles | None:
    """Read the certificate of this machine, and check that it is a client's. Return None if there is none.

    Raises:
        BundleError: ``keys.file`` and ``file.*``.
    """
    if options.tls is None:
        return None
    identity = read_identity(options.tls)
    if identity.certificate is not None:
        check_purpose(Path(options.tls), "client")
    return identity


def _channel(text: str, options: RemoteOptions) -> Channel:
    address, identity = parse_address(text, insecure=options.insecure), check_identity(options)
    return Channel(address, identity if address.secure else None, options.token)


def _fits(request: Request, answer: object) -> bool:
    """Return whether an answer says of itself that it belongs to a request."""
    if isinstance(request, Run) and isinstance(answer, Ran):  # at once, as a decoding step waits for it
        same = answer.number == request.number and answer.width == request.width
        return same and answer.encoding == request.encoding and answer.tokens == sum(request.count)
    for name in ("number", "ticket", "width", "encoding"):
        if hasattr(request, name) and getattr(answer, name, getattr(request, name)) != getattr(request, name):
            return False
    tokens = sum(request.count) if isinstance(request, Run | Forward) else getattr(request, "tokens", None)
    return tokens is None or getattr(answer, "tokens", tokens) == tokens
