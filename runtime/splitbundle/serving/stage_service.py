"""A stage for clients on other machines: it answers frames. A carrier, such as gRPC, brings them.

One call of the stage is computed at a time: a stage uses all processors, and two calls at once would be slower than one
after the other. Steps of several sessions may be one call (``stage_steps``).
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from splitbundle import logs
from splitbundle.errors import BundleError, Problem, printable
from splitbundle.records import record
from splitbundle.serving.computing import Computing, Stopped
from splitbundle.serving.histogram import Histogram
from splitbundle.serving.quotas import Quota
from splitbundle.serving.refusals import Refusal, compare, draining, retry_of, unknown
from splitbundle.serving.sessions import Session, Sessions
from splitbundle.serving.stage_steps import StageSteps
from splitbundle.serving.training_runs import TrainingRuns
from splitbundle.version import __version__
from splitbundle.wire import frames
from splitbundle.wire.encodings import ENCODINGS
from splitbundle.wire.messages import (
    PROTOCOL,
    Answer,
    Backward,
    Close,
    Closed,
    Discard,
    Failure,
    Forward,
    Health,
    Healthy,
    Hello,
    Limits,
    Message,
    Open,
    Opened,
    Ran,
    Renew,
    Renewed,
    Run,
    Step,
    Train,
    Welcome,
)

Result = TypeVar("Result")
Alive = Callable[[], bool]
_LOGGED: Final = ("open", "close", "train", "step")
"""The requests that are logged. A step of a session isn't: there are many."""
_TEXT: Final = 1000
"""The characters of a text in an error: fewer than a header may have."""
_FAILURES: Final = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError),
    *(OSError, RuntimeError, TypeError, ValueError),
)
"""What libraries that compute raise. One request mustn't end as anything but an answer."""


@record(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server offers, beside its stage."""

    bundle: str
    """The id of the bundle."""
    limits: Limits
    max_bytes: int
    """The bytes that the caches of all sessions may take."""
    slot_bytes: int
    """The bytes of a slot in the stage's caches."""
    shared_rows: int = 0
    """The rows of the cache that sessions share; 0 for none."""
    quota: Quota | None = None
    """What one client may hold; None for all that the server has."""


class StageService:
    """Answers frames with a stage. Threads may share it."""

    def __init__(
        self,
        served: Any,
        offer: Served,
        *,
        training: Any = None,
        clock: Callable[[], float] = time.monotonic,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """Begin to serve a stage.

        Args:
            served: the ``ServedStage`` of a backend.
            offer: what the server offers.
            training: the ``ServedTraining`` of the stage, or None if nobody trains it.
            clock: returns the time in seconds. It never goes back.
            log: called with a line for each session, training step and refusal. It holds the client's name, and no
                content; None for ``logging``.

        Raises:
            BundleError: ``stage.range`` for a stage that embeds or has the head (SB-X-001).
        """
        stage = served.stage
        if stage.embeds or stage.has_head:
            ends = "embeds" if stage.embeds else "has the head"
            hint = "Token ids and logits stay with the client. splitbundle resplit cuts the ends off"
            expected = "a stage between the embedding and the head"
            raise BundleError(
                Problem(code="stage.range", argument=stage.name, expected=expected, got=f"one that {ends}", hint=hint)
            )
        self.served, self.offer = served, offer
        self.instance = secrets.token_hex(16)
        self.sessions = Sessions(
            offer.limits,
            clock,
            max_bytes=offer.max_bytes,
            slot_bytes=offer.slot_bytes,
            shared_rows=offer.shared_rows,
            architecture=stage.architecture,
            quota=offer.quota,
        )
        self.training = None if training is None else TrainingRuns(training, served, offer.limits, clock)
        self.draining = False
        self._write = log or (lambda line: logs.debug("%s", line))
        self.counts: dict[tuple[str, str], int] = {}
        """The kind of a request, and "ok" or the code of an error -> how many there were."""
        self.tokens = 0
        self.computed_seconds = 0.0
        self.queued_seconds = 0.0
        self.step_seconds = Histogram()
        self._counting = threading.Lock()
        self._computing = Computing("splitbundle-stage")
        self.steps = StageSteps(served, self._computing, self.sessions)

    def answer(self, data: bytes, owner: str, alive: Alive = lambda: True) -> bytes:
        """Return the frame that answers a frame. It never raises because of a client.

        Args:
            data: the frame.
            owner: the name of the client, as the carrier knows it.
            alive: returns whether the client still waits. A step of a client that is gone isn't begun.
        """
        op = "unreadable"
        try:
            message, payload = frames.unpack(data, self.offer.limits.message)
            op = message.op
            answer, parts = self._handle(message, payload, data, owner, alive)
            made = answer if isinstance(answer, bytes) else frames.pack(answer, parts)
        except BundleError as error:
            return self._failed(op, owner, error)
        except Stopped:  # while the request waited
            return self._failed(op, owner, draining("replay"))
        except _FAILURES as error:
            got = f"{type(error).__name__} in the server"
            return self._failed(op, owner, Refusal("server.failed", op, "a step that can be computed", got, "other"))
        self._count(op, "ok")
        if op in _LOGGED:
            self.note(f"{owner}: {op}")
        return made

    def refused(self, owner: str) -> None:
        """Note that the carrier has refused a client, before it read what the client wants.

        Args:
            owner: the name of the client, as far as the carrier knows it.
        """
        self.note(f"{owner}: a call was refused: peer.identity")
        self._count("call", "peer.identity")

    def note(self, line: str) -> None:
        """Write a line into the log of the server."""
        # The server goes on if its disk is full, or if the reader of its stderr has ended.
        with contextlib.suppress(OSError, ValueError):
            self._write(printable(line))  # an authority may have signed a name with line breaks

    def _failed(self, op: str, owner: str, error: BundleError) -> bytes:
        problem = error.problems[0]
        self.note(f"{owner}: {op} was refused: {problem.code}")
        retry = error.retry if isinstance(error, Refusal) else retry_of(problem.code)
        where = problem.argument if problem.argument is not None else problem.pointer
        self._count(op, problem.code)
        return frames.pack(
            Failure(
                code=problem.code,
                expected=problem.expected[:_TEXT],
                got=problem.got[:_TEXT],
                argument=None if where is None else where[:_TEXT],
                retry=retry,
            )
        )

    def _count(self, op: str, result: str) -> None:
        with self._counting:
            self.counts[op, result] = self.counts.get((op, result), 0) + 1

    def _handle(
        self, message: Message, payload: memoryview, data: bytes, owner: str, alive: Alive
    ) -> tuple[Answer | bytes, list[memoryview]]:
        if isinstance(message, Run):
            return self._run(message, payload, data, owner, alive)
        if isinstance(message, Hello):
            return self._welcome(message), []
        if isinstance(message, Open):
            return self._open(message, owner), []
        if isinstance(message, Renew):
            self.sessions.leave(self.sessions.enter(message.session, owner))
            return Renewed(lease=self.offer.limits.lease), []
        if isinstance(message, Close):
            session = self.sessions.enter(message.session, owner)
            self.sessions.end(session)
            self.sessions.leave(session)
            return Closed(), []
        if isinstance(message, Health):
            return self._healthy(alive), []
        if isinstance(message, Train | Forward | Backward | Discard | Step):
            if self.training is None:
                raise Refusal("train.refused", message.op, "a server that trains", "one that only computes")
            self._check_draining()
            if isinstance(message, Forward):
                self._check_size(message)
            training = self.training
            return self._compute(lambda: training.handle(message, payload, data, owner, self.sessions), alive)[0]
        raise Refusal("wire.header", "op", "a request", f"{message.op!a}")

    def _welcome(self, hello: Hello) -> Welcome:
        stage, limits = self.served.stage, self.offer.limits
        compare("peer.protocol", hello.protocol, PROTOCOL)
        compare("peer.fingerprint", hello.fingerprint, stage.fingerprint)
        compare("peer.layers", hello.layers, stage.layer_range)
        return Welcome(
            protocol=PROTOCOL,
            fingerprint=stage.fingerprint,
            bundle=self.offer.bundle,
            layers=stage.layer_range,
            width=stage.architecture.hidden_size,
            dtype=self.served.dtype,
            encodings=ENCODINGS,
            backend=stage.backend,
            version=__version__,
            instance=self.instance,
            trainable=self.training is not None,
            number=0 if self.training is None else self.training.number,
            limits=limits,
        )

    def _open(self, message: Open, owner: str) -> Opened:
        self._check_draining("other")
        self.sessions.end_leases()
        session = self.sessions.open(owner, message.rows, message.capacity, self.served.stage.cache)
        return Opened(session=session.name, instance=self.instance, lease=self.offer.limits.lease)

    def _check_draining(self, retry: str = "replay") -> None:
        if self.draining:
            raise draining(retry)

    def _healthy(self, alive: Alive) -> Healthy:
        def compute() -> None:
            hidden = self.served.zeros()
            if not self.served.is_finite(self.served.run(hidden, self.served.check(hidden), None)):
                raise Refusal("server.failed", "health", "finite numbers", "NaN or infinity", "other")

        _, _, computed = self._compute(compute, alive)
        return Healthy(computed=computed)

    def _compute(self, work: Callable[[], Result], alive: Alive) -> tuple[Result, int, int]:
        """Do some work when it is its turn, and return the result and how long it waited and took, in µs."""
        asked = time.monotonic_ns()

        def run() -> tuple[Result, int, int]:
            begun = time.monotonic_ns()
            if not alive():
                raise Refusal("server.unwanted", "request", "a client that waits", "one that is gone", "same")
            result = work()
            return result, (begun - asked) // 1000, (time.monotonic_ns() - begun) // 1000

        result, queued, computed = self._computing.run(run)
        with self._counting:
            self.queued_seconds += queued / 1e6
            self.computed_seconds += computed / 1e6
        return result, queued, computed

    def _run(
        self, message: Run, payload: memoryview, data: bytes, owner: str, alive: Alive
    ) -> tuple[Answer | bytes, list[memoryview]]:
        self._check_draining()
        self._check_size(message)
        if message.session is None:
            if (message.number, message.rows, message.order, message.capacity) != (0, None, None, None):
                raise Refusal("wire.header", "session", "a session, for a number, rows, order or capacity", "null")
            return self._ran(message, payload, None, alive)
        session = self.sessions.enter(message.session, owner)
        try:
            with session.lock:
                if session.ended:  # while this step waited
                    raise unknown()
                kept = session.answer
                if message.number == session.number and kept:
                    if data != session.request:
                        got = "another frame under it"
                        raise Refusal("session.repeat", "number", f"the frame of step {session.number}", got, "replay")
                    return kept, []
                if message.number != session.number + 1:
                    expected = f"{session.number + 1}, the next step"
                    raise Refusal("session.gap", "number", expected, str(message.number), "replay")
                answer, parts = self._ran(message, payload, session, alive)
                made = frames.pack(answer, parts)
                session.number = message.number
                self.sessions.keep(session, data, made)
                return made, []
        finally:
            self.sessions.leave(session)

    def _check_size(self, message: Run | Forward) -> None:
        """Check the size of a call, with its padding, before it takes memory (SB-X-029)."""
        width, limits = self.served.stage.architecture.hidden_size, self.offer.limits
        if message.width != width:
            raise Refusal("input.shape", "width", f"{width}, the model's", str(message.width))
        rows, longest = len(message.count), max(message.count)
        if rows > limits.rows:
            raise Refusal("input.shape", "count", f"at most {limits.rows} rows", str(rows), "other")
        if rows * longest > limits.slots:
            expected = f"at most {limits.slots} positions, of all rows together and with padding"
            raise Refusal("input.shape", "count", expected, f"{rows} rows of {longest}", "other")

    def _ran(
        self, message: Run, payload: memoryview, session: Session | None, alive: Alive
    ) -> tuple[Ran, list[memoryview]]:
        step = self.steps.run(message, payload, session, alive)
        queued, computed = (step.begun - step.asked) // 1000, (step.ended - step.begun) // 1000
        tokens = sum(message.count)
        with self._counting:
            self.tokens += tokens
            self.queued_seconds += queued / 1e6
            self.computed_seconds += computed / 1e6
            self.step_seconds.observe((queued + computed) / 1e6)
        ran = Ran(
            number=message.number,
            instance=self.instance,
            tokens=tokens,
            width=message.width,
            encoding=message.encoding,
            queued=queued,
            computed=computed,
        )
        return ran, step.parts or []

    @property
    def waiting(self) -> int:
        """Return how many requests wait for the stage."""
        return self._computing.waiting

    def end_leases(self) -> None:
        """End the sessions, and the run of training, whose lease is over."""
        self.sessions.end_leases()
        training = self.training
        if training is not None and training.is_over:
            with contextlib.suppress(Stopped):
                self._computing.run(training.end_lease)

    def drain(self) -> None:
        """Begin nothing new. Steps that are computed end as usual."""
        self.draining = True

    def stop(self, timeout: float | None = None) -> bool:
        """Wait for the step that is computed, at most ``timeout`` seconds, and end all sessions.

        Return whether the step has ended. None waits for it in any case.
        """
        self.drain()
        ended = self._computing.stop(timeout)
        self.sessions.end_all()
        return ended
