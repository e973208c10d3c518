"""The training of a stage on a server: forward and backward calls, and the steps of its optimizer."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import NoReturn, TypeVar

from splitbundle.errors import BundleError, Problem
from splitbundle.remote.carrier import Lost
from splitbundle.remote.copies import Trained
from splitbundle.remote.options import RemoteOptions
from splitbundle.remote.peers import Peers, Refused
from splitbundle.wire import frames
from splitbundle.wire.messages import (
    Answer,
    Backward,
    Backwarded,
    Discard,
    Discarded,
    Forward,
    Forwarded,
    Request,
    Step,
    Stepped,
    Train,
    Training,
)

Kind = TypeVar("Kind", bound=Answer)


class TrainingLink(Trained):
    """Trains one stage on one server, whose weights they are."""

    def __init__(self, peers: Peers, options: RemoteOptions, encoding: str, width: int) -> None:
        """Name the server. The first call begins a run.

        Raises:
            BundleError: ``train.refused`` for several servers: each would have weights of its own.
        """
        self._peers, self._options, self._encoding, self._width = peers, options, encoding, width
        self.named = peers.expected.named
        if len(peers.peers) > 1:
            self._refuse("train.refused", "one server: its weights move", f"{len(peers.peers)}")
        self._peer = peers.peers[0]
        self._lock = threading.RLock()
        self._run: str | None = None
        self._ticket = 0
        self._pending = False
        """Whether the server holds something of the present step."""
        self._in_doubt = False
        """Whether a step was asked for, and no answer came: it may have been made."""
        self.number: int | None = None
        """The number of the last step, or None before the first call."""

    def forward(self, parts: Sequence[memoryview], count: tuple[int, ...], sequence: int) -> tuple[int, memoryview]:
        """Compute the stage with gradients, and return the ticket and the payload of the result.

        Raises:
            BundleError: ``train.lost`` if the server lost the step; ``peer.*``.
        """
        with self._lock:
            if self._run is None or self._in_doubt:
                self._begin()
            try:
                answer, payload = self._ask(self._forward(count, sequence), parts, Forwarded)
            except BundleError as error:
                if "train.lost" not in error.codes or self._pending:
                    raise
                # Nothing of this step was on the server yet: its lease ran out between two steps.
                self._begin()
                answer, payload = self._ask(self._forward(count, sequence), parts, Forwarded)
            self._pending = True
            return answer.ticket, payload

    def _forward(self, count: tuple[int, ...], sequence: int) -> Forward:
        self._ticket += 1
        return Forward(
            run=self._run or "",
            ticket=self._ticket,
            count=count,
            sequence=sequence,
            width=self._width,
            encoding=self._encoding,
        )

    def backward(self, ticket: int, tokens: int, parts: Sequence[memoryview]) -> memoryview:
        """Send the gradient of a forward call's result, and return the payload of that of its input.

        Raises:
            BundleError: ``train.lost``, ``peer.*``.
        """
        with self._lock:
            if self._run is None:
                self._lost("its forward call was made before the server was lost")
            message = Backward(run=self._run, ticket=ticket, tokens=tokens, width=self._width, encoding=self._encoding)
            return self._ask(message, parts, Backwarded)[1]

    def discard(self) -> None:
        """Drop the gradients on the server.

        Raises:
            BundleError: ``peer.*``.
        """
        with self._lock:
            if self._run is not None:
                try:
                    self._ask(Discard(run=self._run), (), Discarded)
                except BundleError as error:
                    if "train.lost" not in error.codes:  # with the run, its gradients are gone
                        raise
            self._pending = False

    def step(self, learning_rate: float | None) -> int:
        """Move the weights once, and return the number of the step.

        Raises:
            BundleError: ``train.lost`` if the step wasn't made; ``peer.*``, after which it may have been made: call it
                again.
        """
        with self._lock:
            if self._in_doubt:
                return self._settle(learning_rate)
            if self._run is None or self.number is None:
                self._lost("nothing was computed since the last step, or since the server was lost")
            if not self._pending:
                self._lost("nothing was computed since the last step")
            self._in_doubt = True
            return self._ask_step(learning_rate)

    def _ask_step(self, learning_rate: float | None) -> int:
        wanted = (self.number or 0) + 1
        message = Step(run=self._run or "", number=wanted, learning_rate=learning_rate)
        try:
            self._ask(message, (), Stepped)
        except BundleError as error:
            if "train.lost" in error.codes:
                # The server was lost at some moment of the step. Its number says on which side of it.
                return self._settle(learning_rate)
            if not any(code.startswith("peer.") for code in error.codes):
                self._in_doubt = False  # the server has refused it
            raise
        self.number, self._pending, self._in_doubt = wanted, False, False
        return wanted

    def _settle(self, learning_rate: float | None) -> int:
        """Find out whether a step was made whose answer never came. If it can still be made, make it."""
        before = self.number or 0
        if self._run is not None:  # perhaps the run still lives: the same step again is made once
            return self._ask_step(learning_rate)
        answer, _ = self._ask(Train(), (), Training)
        self._run, self._ticket, self._pending, self._in_doubt = answer.run, 0, False, False
        self.number = answer.number
        if self.number != before + 1:
            self._lost("the server was lost before it made the step")
        return before + 1

    def _begin(self) -> None:
        if self._in_doubt:
            expected, got = "step() again", "a call while nobody knows whether the last step was made"
            hint = "step() finds out, and makes it if it wasn't. Then let the other parts take it, too"
            raise BundleError(Problem(code="train.gap", argument=self.named, expected=expected, got=got, hint=hint))
        before = self.number
        self._run = None
        answer, _ = self._ask(Train(), (), Training)
        self._run, self._ticket, self._pending = answer.run, 0, False
        self.number = answer.number
        if before is not None and self.number != before:
            self._lost(f"the server is at step {self.number} now, and was at {before}")

    def _ask(self, message: Request, parts: Sequence[memoryview], kind: type[Kind]) -> tuple[Kind, memoryview]:
        """Ask until there is an answer. A frame may be sent again: the server computes it once."""
        frame = frames.pack(message, parts)
        until: float | None = None
        while True:
            try:
                answer, payload = self._peer.exchange(message, frame, self._options.step_timeout)
            except Lost as lost:
                reason = lost.reason
            except Refused as refused:
                if refused.codes[0] == "train.lost":
                    self._lost(refused.problems[0].got)
                if refused.retry not in ("other", "replay") or not refused.codes[0].startswith("server."):
                    raise
                reason = str(refused.problems[0])
            else:
                if not isinstance(answer, kind):
                    raise RuntimeError("exchange returned another kind of answer")
                self._peer.works()
                return answer, payload
            self._peer.failed(reason)
            until = time.monotonic() + self._options.timeout if until is None else until
            self._peers.connected(until=until)
            if time.monotonic() >= until:
                raise self._peers.unreachable()

    def _lost(self, got: str) -> NoReturn:
        self._run = None
        expected = "a server that has computed every part of this step"
        hint = "No weight has moved: drop the gradients of the other parts, and compute the step again"
        raise BundleError(Problem(code="train.lost", argument=self.named, expected=expected, got=got, hint=hint))

    def _refuse(self, code: str, expected: str, got: str) -> NoReturn:
        raise BundleError(Problem(code=code, argument=self.named, expected=expected, got=got))
