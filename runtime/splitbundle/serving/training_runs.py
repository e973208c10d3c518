"""The training of a stage by one client at a time: runs, tickets and numbered steps. No I/O; the clock is given.

It is called where one piece of work is done at a time.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import deque
from collections.abc import Callable
from typing import Any

from splitbundle.errors import BundleError
from splitbundle.serving.refusals import Refusal
from splitbundle.serving.sessions import MAX_KEPT_BYTES, Sessions
from splitbundle.wire import frames
from splitbundle.wire.messages import (
    Answer,
    Backward,
    Backwarded,
    Discard,
    Discarded,
    Forward,
    Forwarded,
    Limits,
    Step,
    Stepped,
    Train,
    Training,
)


class _Kept:
    """The digest of a frame that was answered, and its answer, which is empty when it is no longer kept."""

    __slots__ = ("answer", "request")

    def __init__(self, request: bytes, answer: bytes) -> None:
        self.request, self.answer = request, answer


class _Ticket:
    """A forward call, and its gradient when it has come."""

    def __init__(self, message: Forward, graph: Any, forward: _Kept) -> None:
        self.message, self.graph, self.forward = message, graph, forward
        self.backward: _Kept | None = None


class TrainingRuns:
    """The present run of a stage that is trained."""

    def __init__(self, training: Any, served: Any, limits: Limits, clock: Callable[[], float]) -> None:
        """Begin without a run.

        Args:
            training: the ``ServedTraining`` of the stage.
            served: its ``ServedStage``.
            limits: the number of tickets, and the lease.
            clock: returns the time in seconds. It never goes back.
        """
        self._training, self._served, self._limits, self._clock = training, served, limits, clock
        self._run, self._owner, self._expires = "", "", 0.0
        self._tickets: dict[int, _Ticket] = {}
        self._issued = 0
        self._answers: deque[_Kept] = deque()
        self._kept_bytes = 0

    @property
    def number(self) -> int:
        """Return the number of the last step that was made."""
        return int(self._training.number)

    @property
    def tickets(self) -> int:
        """Return the number of forward calls that wait for a gradient."""
        # The list is made at once. Another thread asks for the metrics.
        return sum(ticket.backward is None for ticket in list(self._tickets.values()))

    def handle(
        self,
        message: Train | Forward | Backward | Discard | Step,
        payload: memoryview,
        data: bytes,
        owner: str,
        sessions: Sessions,
    ) -> tuple[Answer | bytes, list[memoryview]]:
        """Return the answer to a request, as a message and its payload, or as a frame that was kept.

        Raises:
            Refusal: ``server.full``, ``train.lost``, ``train.ticket``, ``train.gap``.
            BundleError: ``input.*``, ``wire.value``, ``train.value``, ``output.*``.
        """
        now = self._clock()
        if isinstance(message, Train):
            if self._run and self._owner != owner and now < self._expires:
                raise Refusal("server.full", "train", "one client that trains at a time", "another one", "other")
            self._drop()
            self._issued = 0
            self._run, self._owner = secrets.token_hex(16), owner
            self._expires = now + self._limits.lease
            return Training(run=self._run, number=self.number, lease=self._limits.lease), []
        if not self._run or message.run != self._run or owner != self._owner or now >= self._expires:
            raise Refusal("train.lost", "run", "the present run", "one that has ended", "replay")
        try:
            if isinstance(message, Forward):
                return self._forward(message, payload, data), []
            if isinstance(message, Backward):
                return self._backward(message, payload, data), []
            if isinstance(message, Discard):
                self._drop()
                return Discarded(number=self.number), []
            return self._step(message, sessions), []
        finally:
            self._expires = self._clock() + self._limits.lease

    def end_lease(self) -> None:
        """Drop what a run holds whose lease is over."""
        if self._run and self._clock() >= self._expires:
            self._run = ""
            self._drop()

    @property
    def is_over(self) -> bool:
        """Return whether there is a run whose lease is over."""
        return bool(self._run) and self._clock() >= self._expires

    def _drop(self) -> None:
        self._tickets.clear()
        self._answers.clear()
        self._kept_bytes = 0
        self._training.discard()

    def _keep(self, request: bytes, answer: bytes) -> _Kept:
        """Keep an answer. If there are too many bytes of them, the oldest go. A client repeats its last frame."""
        kept = _Kept(request, answer)
        self._answers.append(kept)
        self._kept_bytes += len(answer)
        while self._kept_bytes > MAX_KEPT_BYTES and len(self._answers) > 1:
            self._forget(self._answers.popleft())
        return kept

    def _forget(self, kept: _Kept) -> None:
        self._kept_bytes -= len(kept.answer)
        kept.answer = b""

    def _forward(self, message: Forward, payload: memoryview, data: bytes) -> bytes:
        digest = hashlib.sha256(data).digest()
        known = self._tickets.get(message.ticket)
        if known is not None:
            return self._again(known.forward, digest, message.ticket)
        if message.ticket <= self._issued:
            raise Refusal("train.ticket", "ticket", f"a number above {self._issued}", str(message.ticket), "never")
        if self.tickets >= self._limits.tickets:
            expected = f"at most {self._limits.tickets} forward calls that wait for a gradient"
            raise Refusal("server.full", "ticket", expected, "one more", "never")
        hidden = self._served.decode(payload, message.encoding, message.count, max(1, *message.count))
        result, graph = self._training.forward(hidden, message.count)
        parts = self._served.encode(result, message.count, message.encoding)
        made = Forwarded(
            ticket=message.ticket, tokens=sum(message.count), width=message.width, encoding=message.encoding
        )
        kept = self._keep(digest, frames.pack(made, parts))
        self._tickets[message.ticket] = _Ticket(message, graph, kept)
        self._issued = message.ticket
        return kept.answer

    def _backward(self, message: Backward, payload: memoryview, data: bytes) -> bytes:
        ticket = self._tickets.get(message.ticket)
        if ticket is None:
            raise Refusal("train.ticket", "ticket", "the ticket of a forward call", "no such ticket")
        digest = hashlib.sha256(data).digest()
        if ticket.backward is not None:
            return self._again(ticket.backward, digest, message.ticket)
        forward = ticket.message
        if (message.tokens, message.width) != (sum(forward.count), forward.width):
            expected = f"{sum(forward.count)} tokens of {forward.width} numbers, as in the forward call"
            raise Refusal("input.shape", "tokens", expected, f"{message.tokens} of {message.width}")
        gradient = self._served.decode(payload, message.encoding, forward.count, max(1, *forward.count))
        try:
            parts = self._served.encode(
                self._training.backward(ticket.graph, gradient), forward.count, message.encoding
            )
        except BaseException:  # some gradients may have been added, and others not
            self._run = ""
            self._drop()
            raise
        made = Backwarded(ticket=message.ticket, tokens=message.tokens, width=message.width, encoding=message.encoding)
        ticket.graph = None
        self._forget(ticket.forward)
        ticket.backward = self._keep(digest, frames.pack(made, parts))
        return ticket.backward.answer

    @staticmethod
    def _again(kept: _Kept, digest: bytes, ticket: int) -> bytes:
        if digest != kept.request or not kept.answer:
            got = "another frame under it" if digest != kept.request else "one whose answer isn't kept any longer"
            raise Refusal("train.ticket", "ticket", f"the frame of ticket {ticket}", got)
        return kept.answer

    def _step(self, message: Step, sessions: Sessions) -> Stepped:
        # The same frame again. With tickets it isn't one, as a step ends them: a client would lose their gradients.
        if message.number == self.number and not self._tickets:
            return Stepped(number=message.number)
        if message.number != self.number + 1:
            expected = f"{self.number + 1}, the next step"
            raise Refusal("train.gap", "number", expected, str(message.number))
        if waiting := self.tickets:
            raise Refusal("train.ticket", "number", "a gradient for every forward call", f"{waiting} without one")
        try:
            self._training.step(message.learning_rate)
        except BundleError as error:
            if error.codes == ("train.value",):  # no weight has moved, and the step is void
                self._drop()
                raise
            self._run = ""
            got = error.problems[0].code
            raise Refusal("train.lost", "step", "a step that can be stored", got, "replay") from error
        self._drop()
        sessions.end_all()
        return Stepped(number=self.number)
