"""Bring frames of browsers to the servers of a stage: a browser has HTTP, and the servers have gRPC.

A frame passes through as it is. It holds hidden states and positions; ids and text never leave the browser.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from splitbundle import logs
from splitbundle.errors import BundleError, Problem
from splitbundle.records import record
from splitbundle.remote.carrier import Lost
from splitbundle.remote.peers import Peer, Peers
from splitbundle.serving.refusals import Refusal, retry_of, unknown
from splitbundle.wire import frames
from splitbundle.wire.messages import Close, Failure, Hello, Message, Open, Opened, Renew, Run

MAX_SESSIONS: Final = 4096
"""The sessions that are remembered. Of more, the one that was silent for the longest time is forgotten."""
TRIES: Final = 2
"""How often a frame is sent where a connection breaks. A server computes a step once."""
_TEXT: Final = 1000
"""The characters of a text in an error: fewer than a header may have."""
_NOBODY: Final = ""
"""The owner of the sessions of a gateway without keys."""


@record(frozen=True, slots=True, kw_only=True)
class _Session:
    """A session on a server: the server, and the name of the key whose holder began it."""

    peer: Peer
    owner: str


class Relay:
    """A way for frames to one stage. Threads may share it."""

    def __init__(
        self,
        name: str,
        peers: Peers,
        *,
        timeout: float = 30.0,
        step_timeout: float = 300.0,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """Name a stage.

        Args:
            name: the shard.
            peers: its servers.
            timeout: the seconds to look for a server that answers.
            step_timeout: the seconds in which a step is computed.
            log: called with a line where no server answers.
        """
        self.name, self.peers = name, peers
        self._timeout, self._step_timeout, self._log = timeout, step_timeout, log
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Look for a server that answers, and is the right one.

        Raises:
            BundleError: ``peer.*``.
        """
        self.peers.connected(until=time.monotonic() + self._timeout)

    def answer(self, frame: bytes, owner: str | None) -> bytes:
        """Return the frame that answers a frame. It never raises because of a client or a server.

        Args:
            frame: the frame.
            owner: the name of the key that the client showed; None without keys.
        """
        try:
            message, _ = frames.unpack(frame)
            return self._passed(message, frame, owner or _NOBODY)
        except BundleError as error:
            return _failed(error)

    def _passed(self, message: Message, frame: bytes, owner: str) -> bytes:
        if isinstance(message, Run | Renew | Close) and message.session is not None:
            session = self._session(message.session, owner)
            if isinstance(message, Close):
                self._forget(message.session)
            return self._in_session(message.session, session.peer, frame)
        if isinstance(message, Hello | Open | Run):
            return self._begun(message, frame, owner)
        if message.op in ("train", "forward", "backward", "discard", "step"):
            raise Refusal("train.refused", message.op, "a gateway that trains", "one that only computes")
        raise Refusal("wire.header", "op", "hello, open, run, renew or close", f"{message.op!a}")

    def _begun(self, message: Hello | Open | Run, frame: bytes, owner: str) -> bytes:
        """Bring a frame without a session to the first server that answers."""
        peer = self._connected()
        try:
            data = peer.relay(frame, self._step_timeout, steps=False)
        except Lost as lost:
            peer.failed(lost.reason)
            raise self._unreachable(lost.reason, "other") from None
        if isinstance(message, Open):
            self._remember(data, peer, owner)
        return data

    def _in_session(self, name: str, peer: Peer, frame: bytes) -> bytes:
        for attempt in range(TRIES):
            try:
                return peer.relay(frame, self._step_timeout, steps=True)
            except Lost as lost:
                reason = lost.reason
                if lost.silent:  # it may still compute: the client sends the frame again, and waits
                    raise self._unreachable(reason, "same") from None
                logs.debug("%s, try %d: %s", peer.where, attempt, reason)
        peer.failed(reason)
        self._forget(name)
        raise self._unreachable(reason, "replay")

    def _connected(self) -> Peer:
        try:
            peer, _ = self.peers.connected(until=time.monotonic() + self._timeout)
        except BundleError as error:
            raise self._unreachable(str(error.problems[0]), "other") from None
        peer.works()
        return peer

    def _unreachable(self, reason: str, retry: str) -> Refusal:
        """Return what a client is told. The addresses of servers, and what is wrong with them, are for the log."""
        if self._log is not None:
            self._log(f"stage {self.name}: {reason}")
        return Refusal("peer.unreachable", f"stage {self.name}", "a server that answers", "none", retry)

    def _remember(self, data: bytes, peer: Peer, owner: str) -> None:
        try:
            opened, _ = frames.unpack(data)
        except BundleError:
            return  # the client says so itself
        if isinstance(opened, Opened):
            with self._lock:
                self._sessions[opened.session] = _Session(peer=peer, owner=owner)
                while len(self._sessions) > MAX_SESSIONS:
                    self._sessions.popitem(last=False)

    def _session(self, name: str, owner: str) -> _Session:
        """Return a session. For the holder of another key it doesn't exist (SB-X-011)."""
        with self._lock:
            found = self._sessions.get(name)
            if found is None or found.owner != owner:
                raise unknown()
            self._sessions.move_to_end(name)
            return found

    def _forget(self, name: str) -> None:
        with self._lock:
            self._sessions.pop(name, None)


def _failed(error: BundleError) -> bytes:
    problem: Problem = error.problems[0]
    where = problem.argument if problem.argument is not None else problem.pointer
    return frames.pack(
        Failure(
            code=problem.code,
            expected=problem.expected[:_TEXT],
            got=problem.got[:_TEXT],
            argument=None if where is None else where[:_TEXT],
            retry=error.retry if isinstance(error, Refusal) else retry_of(problem.code),
        )
    )
