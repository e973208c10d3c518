"""The steps of a client: each is computed once, by a server that holds the right cache, or by the next one."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Any, Final

from splitbundle.errors import BundleError, Problem
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.remote.carrier import Lost
from splitbundle.remote.closing import CLOSING
from splitbundle.remote.copies import Connected
from splitbundle.remote.history import History, Sent
from splitbundle.remote.options import RemoteOptions
from splitbundle.remote.peers import Peer, Peers, Refused
from splitbundle.stages.call import CacheState, Call
from splitbundle.wire import frames
from splitbundle.wire.encodings import payload_bytes
from splitbundle.wire.headers import MAX_BYTES
from splitbundle.wire.messages import Close, Open, Opened, Renew, Run, Welcome

_OPENING: Final = 5.0
"""The seconds in which a server opens a session."""
_MAX_REPLAYS: Final = 20
"""How often one step may begin a new session. A server that always loses it must not keep a client for ever."""


class _Handle:
    """A session on a server that holds what the history of a cache says."""

    def __init__(self, peer: Peer, welcome: Welcome, session: str, capacity: int) -> None:
        self.peer, self.welcome, self.session, self.capacity = peer, welcome, session, capacity
        self.number = 0


class _Slot:
    """The place of a cache's handle. It outlives the cache, so that the session can be closed then."""

    def __init__(self) -> None:
        self.handle: _Handle | None = None

    def drop(self) -> None:
        """Close the session, without waiting."""
        handle, self.handle = self.handle, None
        if handle is not None:
            try:
                handle.peer.send(Close(session=handle.session))
            except (Lost, BundleError, ValueError, RuntimeError):  # it ends with its lease
                return


class RemoteCache(CacheState):
    """The bookkeeping of a KV cache on a server, and what was sent for it.

    A copy, or a pickle, has no session. The first call of the copy begins one, and sends everything again.
    """

    def __init__(self, architecture: Architecture, layers: tuple[int, int], batch_size: int, capacity: int) -> None:
        super().__init__(architecture, layers, batch_size, capacity)
        self.history = History(batch_size)
        self._hold(_Slot())

    def _hold(self, slot: _Slot) -> None:
        self.slot = slot
        CLOSING.begin()
        weakref.finalize(self, CLOSING.later, slot.drop).atexit = False  # at the end of a process the lease ends them

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "slot"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hold(_Slot())

    def reorder(self, rows: Sequence[int]) -> None:
        """Replace each row i with the former row ``rows[i]``, at the next call."""
        super().reorder(rows)
        self.history.reorder(rows)

    def renew(self) -> bool:
        """Keep the session while there is nothing to compute. Return whether it still lives."""
        handle = self.slot.handle
        if handle is None:
            return False
        try:
            handle.peer.ask(Renew(session=handle.session), (), 2.0)
        except (Lost, BundleError):
            return False
        return True


class _Attempt:
    """How far a call has come."""

    def __init__(self, until: float) -> None:
        self.until = until
        """The time at which to give up."""
        self.peer: Peer | None = None
        """The server that was asked last."""
        self.failed = False
        self.refusals = 0


class Link(Connected):
    """Computes calls of one stage on its servers. Threads may share it, with caches of their own."""

    def __init__(self, peers: Peers, options: RemoteOptions) -> None:
        """Connect to a server.

        Raises:
            BundleError: ``peer.*``.
        """
        self._peers, self._options = peers, options
        self.named = peers.expected.named
        self._stateless: Peer | None
        self._stateless, self.welcome = peers.connected(until=time.monotonic() + options.timeout)
        self.encoding = options.wire or self.welcome.dtype
        if self.encoding not in self.welcome.encodings:
            self._refuse("peer.encoding", f"one of {', '.join(self.welcome.encodings)}", self.encoding)

    @property
    def where(self) -> str:
        """Return the addresses of the servers, in the order in which they are tried."""
        return ", ".join(peer.text for peer in self._peers.peers)

    def _refuse(self, code: str, expected: str, got: str) -> None:
        raise BundleError(Problem(code=code, argument=self.named, expected=expected, got=got))

    def run(self, call: Call, parts: Sequence[memoryview], cache: RemoteCache | None, sequence: int) -> memoryview:
        """Compute a call, and return the payload of the result.

        Args:
            call: the positions of the tokens.
            parts: the tokens, in the link's encoding, as the parts of a payload.
            cache: the cache that the call extends, or None.
            sequence: the length of the padded sequence.

        Raises:
            BundleError: ``peer.unreachable`` if no server computes it in time; what the stage refuses.
        """
        sent = Sent(
            rows=call.rows,
            past=call.past,
            count=call.count,
            sequence=sequence,
            width=self.welcome.width,
            encoding=self.encoding,
        )
        self._check_size(sum(map(len, parts)))
        attempt = _Attempt(time.monotonic() + self._options.timeout)
        while True:
            code = None
            try:
                result, frame = self._attempt(attempt, sent, parts, cache)
            except Lost as lost:
                reason = lost.reason
            except Refused as refused:
                alone = refused.retry == "other" and len(self._peers.peers) == 1
                if refused.retry == "never" or (alone and not refused.codes[0].startswith("server.")):
                    raise
                reason, code = str(refused.problems[0]), refused.codes[0]
                # A server that has lost the session is asked again at once, unless it goes on like this.
                if refused.retry == "replay" and refused.codes[0] != "server.draining":
                    attempt.refusals += 1
                    if attempt.refusals <= _MAX_REPLAYS:
                        self._forget(cache)
                        continue
            except BundleError as error:
                if error.codes != ("peer.identity",) or len(self._peers.peers) == 1:
                    self._forget(cache)
                    raise
                reason = str(error.problems[0])  # another server may know this client
            except BaseException:
                self._forget(cache)  # the server may have computed the step, or not
                raise
            else:
                break
            self._forget(cache)
            self._stateless = None
            if attempt.peer is not None:
                attempt.peer.failed(reason, code)
            if not attempt.failed:  # a step may have taken long before its server was lost
                attempt.failed, attempt.until = True, time.monotonic() + self._options.timeout
            if time.monotonic() >= attempt.until:
                raise self._peers.unreachable()
        if cache is not None:  # the frame is kept as it is, without a copy of the payload
            sent.payload = memoryview(frame)[len(frame) - sum(map(len, parts)) :]
            cache.history.add(sent)
        return result

    def _attempt(
        self, attempt: _Attempt, sent: Sent, parts: Sequence[memoryview], cache: RemoteCache | None
    ) -> tuple[memoryview, bytes]:
        if cache is None:
            if self._stateless is None:
                self._stateless, _ = self._peers.connected(until=attempt.until, but=attempt.peer)
            attempt.peer = self._stateless
            return self._step(attempt.peer, sent, parts, None, 0)
        handle = cache.slot.handle
        if handle is None:
            attempt.peer, welcome = self._peers.connected(until=attempt.until, but=attempt.peer)
            handle = self._begin(attempt.peer, welcome, cache)
        attempt.peer = handle.peer
        capacity = None if cache.capacity == handle.capacity else cache.capacity
        order = cache.history.order
        result = self._step(handle.peer, sent, parts, handle.session, handle.number + 1, order, capacity)
        handle.number, handle.capacity = handle.number + 1, cache.capacity
        return result

    @staticmethod
    def _forget(cache: RemoteCache | None) -> None:
        if cache is not None:
            cache.slot.drop()

    def _check_size(self, payload: int) -> None:
        if payload > self.room:
            problem = Problem(
                code="wire.size",
                argument=self.named,
                expected=f"a call of at most {self.room} bytes, as the server takes",
                got=f"{payload} bytes",
                hint="Send fewer tokens in a call, or choose a narrower encoding",
            )
            raise BundleError(problem)

    @property
    def room(self) -> int:
        """Return the largest payload of a call, in bytes."""
        # The answer is as long as the request, and has to fit into a frame that this side takes.
        return min(self.welcome.limits.message, frames.MAX_FRAME) - MAX_BYTES - frames.PREFIX

    def pieces(self, call: Call, cache: RemoteCache | None) -> list[tuple[int, Call]]:
        """Return the parts of a call that frames can hold, each with the offset of its first token.

        A call without a cache can't be divided, nor one whose rotations depend on its length.
        """
        room = max(self.room // (payload_bytes(self.encoding, 1, self.welcome.width) * len(call.past)), 1)
        if cache is None or cache.rescales(call) or call.length <= room:
            return [(0, call)]
        return list(call.pieces(room))

    def _step(
        self,
        peer: Peer,
        sent: Sent,
        parts: Sequence[bytes | memoryview],
        session: str | None,
        number: int,
        order: tuple[int, ...] | None = None,
        capacity: int | None = None,
    ) -> tuple[memoryview, bytes]:
        """Return the payload of the answer, and the frame that was sent."""
        message = Run(
            session=session,
            number=number,
            past=sent.past,
            count=sent.count,
            sequence=sent.sequence,
            width=sent.width,
            encoding=sent.encoding,
            rows=sent.rows,
            order=order,
            capacity=capacity,
        )
        frame = frames.pack(message, parts)
        _, payload = peer.exchange(message, frame, self._options.step_timeout)
        peer.works()
        return payload, frame

    def _begin(self, peer: Peer, welcome: Welcome, cache: RemoteCache) -> _Handle:
        """Begin a session, and send what it has to hold."""
        CLOSING.now()  # sessions that wait to be closed take room on the server, which this one may need
        opened, _ = peer.ask(Open(rows=cache.batch_size, capacity=cache.capacity), (), _OPENING)
        if not isinstance(opened, Opened):
            raise RuntimeError("ask returned another kind of answer")
        handle = _Handle(peer, welcome, opened.session, cache.capacity)
        cache.slot.handle = handle
        self._replay(cache, handle)
        return handle

    def _replay(self, cache: RemoteCache, handle: _Handle) -> None:
        if self._options.replay == "merged" and not cache.thresholds:
            room = self.room // (payload_bytes(self.encoding, 1, self.welcome.width) * cache.batch_size)
            history = History(cache.batch_size)
            for sent in cache.history.merged(cache.lengths, max(room, 1)):
                self._again(handle, sent, None)
                history.add(sent)
            cache.history = history
            return
        for order, sent in cache.history.calls():
            self._again(handle, sent, order)

    def _again(self, handle: _Handle, sent: Sent, order: tuple[int, ...] | None) -> None:
        self._step(handle.peer, sent, (sent.payload,), handle.session, handle.number + 1, order)
        handle.number += 1
