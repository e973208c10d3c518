"""The steps of sessions: those that share a cache are computed together, and a long one in pieces between them.

Each step is one piece of work of ``Computing``, and so waits for its turn. The one whose turn it is computes what the
other ones need, too: they find their results when their turn comes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from splitbundle.errors import BundleError
from splitbundle.serving.computing import Computing
from splitbundle.serving.refusals import Refusal, unknown
from splitbundle.serving.sessions import Session, Sessions
from splitbundle.serving.shared_cache import SharedRows
from splitbundle.stages.call import Call
from splitbundle.stages.turns import PIECE, Turns, Work
from splitbundle.wire.messages import Run

_TEXT: Final = 1000
_WHOLE: Final = 2**31
"""The tokens of a piece of a step that is alone: all of them, so that one client gets the bits of a local stage."""
Alive = Callable[[], bool]


class Step(Work):
    """A step of a session, or one without a session: what it needs, and what came out."""

    def __init__(self, message: Run, payload: memoryview, session: Session | None, alive: Alive) -> None:
        super().__init__(None if session is None else session.owner)
        self.message, self.payload, self.session, self.alive = message, payload, session, alive
        self.hidden: Any = None
        self.start = 0
        """The tokens of each row that were computed."""
        self.computed: list[Any] = []
        self.parts: list[memoryview] | None = None
        """The parts of the payload of the result, at the end."""
        self.error: BaseException | None = None
        self.asked, self.begun, self.ended = time.monotonic_ns(), 0, 0

    @property
    def is_over(self) -> bool:
        """Return whether there is a result, or an error."""
        return self.parts is not None or self.error is not None

    def rows(self, size: int) -> tuple[list[int], list[int], list[int]]:
        """Return the past, the count and the row of the shared cache of each row, for the next ``size`` tokens."""
        message, own = self.message, self.session.cache  # type: ignore[union-attr]
        past = [p + min(n, self.start) for p, n in zip(message.past, message.count, strict=True)]
        count = [min(max(n - self.start, 0), size) for n in message.count]
        named = range(own.batch_size) if message.rows is None else message.rows
        return past, count, [own.at[row] for row in named]

    def fail(self, error: BaseException) -> None:
        """End with an error."""
        self.error, self.ended = error, time.monotonic_ns()


class StageSteps:
    """Computes the steps of a service. Threads may share it."""

    def __init__(self, served: Any, computing: Computing, sessions: Sessions) -> None:
        self._served, self._computing, self._sessions = served, computing, sessions
        self._new: deque[Step] = deque()
        self._turns: Turns[Step] = Turns(PIECE, _WHOLE)
        self.calls = self.call_rows = 0
        """The calls of shared caches, and the steps in them."""

    def run(self, message: Run, payload: memoryview, session: Session | None, alive: Alive) -> Step:
        """Compute a step, when it is its turn.

        Raises:
            BundleError: what the stage refuses; ``session.unknown``; ``server.unwanted`` for a client that is gone.
            Stopped: as ``Computing.run``.
        """
        step = Step(message, payload, session, alive)
        if session is not None and isinstance(session.cache, SharedRows):
            self._new.append(step)
            self._computing.run(lambda: self._until_over(step))
        else:
            self._computing.run(lambda: self._alone(step))
        if step.error is not None:
            raise step.error
        return step

    def _alone(self, step: Step) -> None:
        """Compute a step with a cache of its own, or without one."""
        if self._is_unwanted(step):
            return
        try:
            positions, cache = self._prepare(step)
        except BundleError as error:
            step.fail(error)
            return
        except BaseException as error:  # noqa: BLE001  # the one who waits raises it
            self._give_up(step, error)
            return
        try:
            result = self._served.run(step.hidden, positions, cache)
            self._finish(step, result)
        except BaseException as error:  # noqa: BLE001  # likewise; the cache may hold half of the step
            self._give_up(step, error)

    def _until_over(self, step: Step) -> None:
        """Compute steps in their turns until one of them is over. It may be over already."""
        while not step.is_over:
            self._begin_new()
            if not step.is_over:
                self._call(self._turns.next())

    def _begin_new(self) -> None:
        """Check the steps that have come, and let them take part."""
        while self._new:
            step = self._new.popleft()
            if self._is_unwanted(step):
                continue
            try:
                self._prepare(step)
            except BundleError as error:
                step.fail(error)
            except BaseException as error:  # noqa: BLE001  # the one who waits raises it
                self._give_up(step, error)
            else:
                step.left = max(1, *step.message.count)
                self._turns.add(step)

    def _is_unwanted(self, step: Step) -> bool:
        step.begun = time.monotonic_ns()
        if not step.alive():
            step.fail(Refusal("server.unwanted", "request", "a client that waits", "one that is gone", "same"))
        elif step.session is not None and step.session.ended:  # while it waited, perhaps by a step that moved weights
            step.fail(unknown())
        return step.error is not None

    def _call(self, chosen: list[tuple[Step, int]]) -> None:
        """Compute some tokens of some steps: those of one cache and one length together."""
        groups: dict[tuple[int, int], list[Step]] = {}
        for step, size in chosen:
            session: Any = step.session
            if session.ended:  # since it began, training has moved the weights
                self._turns.remove(step)
                step.fail(unknown())
            else:
                groups.setdefault((id(session.cache.shared), size), []).append(step)
        for (_, size), steps in groups.items():
            try:
                self._compute(steps, size)
            except BaseException as error:  # noqa: BLE001  # those who wait raise it; a cache may hold half of a step
                for step in steps:
                    self._turns.remove(step)
                    self._give_up(step, error)

    def _compute(self, steps: list[Step], size: int) -> None:
        served, shared = self._served, steps[0].session.cache.shared  # type: ignore[union-attr]
        past: list[int] = []
        count: list[int] = []
        rows: list[int] = []
        for step in steps:
            for joined, own in zip((past, count, rows), step.rows(size), strict=True):
                joined.extend(own)
        hidden = served.joined([step.hidden[:, step.start : step.start + size] for step in steps], 0)
        positions = served.check(hidden, past=past, count=count, cache=shared.cache, rows=rows)
        result = served.run(hidden, positions, shared.cache)
        self.calls, self.call_rows = self.calls + 1, self.call_rows + len(rows)
        first = 0
        for step in steps:
            own_past, own_count, own_rows = step.rows(size)
            call = Call(own_past, own_count, size)
            call.rows = step.message.rows
            step.session.cache.advance(call)  # type: ignore[union-attr]
            step.computed.append(result[first : first + len(own_rows)])
            first += len(own_rows)
            step.start += size
            step.left -= size
            if not step.left:
                self._turns.remove(step)
                self._finish(step, served.joined(step.computed, 1))

    def _finish(self, step: Step, result: Any) -> None:
        message = step.message
        step.parts = self._served.encode(result, message.count, message.encoding)
        step.ended = time.monotonic_ns()

    def _give_up(self, step: Step, error: BaseException) -> None:
        if step.session is not None:
            self._sessions.end(step.session)
        step.fail(error)

    def _prepare(self, step: Step) -> tuple[Any, Any]:
        """Check a step, and only then apply its order and capacity. Return its positions and its cache."""
        message, session = step.message, step.session
        # The rest of the sequence is padding, which no row needs.
        sequence = max(1, *message.count)
        step.hidden = hidden = self._served.decode(step.payload, message.encoding, message.count, sequence)
        if session is None:
            return self._served.check(hidden, past=message.past, count=message.count), None
        cache, before = session.cache, session.capacity
        lengths, capacity = cache.lengths, cache.capacity
        order = message.order
        if order is not None and (len(order) != session.rows or max(order) >= session.rows):
            expected = f"{session.rows} row numbers below {session.rows}"
            raise Refusal("input.value", "order", expected, str(list(order))[:_TEXT])
        try:
            if order is not None:
                cache.lengths = [lengths[row] for row in order]
            if message.capacity is not None:
                self._sessions.grow(session, message.capacity)
                cache.capacity = message.capacity
            try:
                positions = self._checked(message, hidden, cache)
            except BaseException:
                self._sessions.shrink(session, before)
                raise
        finally:
            cache.lengths, cache.capacity = lengths, capacity
        if message.capacity is not None and message.capacity != capacity:
            try:
                cache.grow(message.capacity)
            except BundleError:  # it refuses before it changes anything
                self._sessions.shrink(session, before)
                raise
        if order is not None:
            cache.reorder(order)
        return positions, cache

    def _checked(self, message: Run, hidden: Any, cache: Any) -> Any:
        check = self._served.check
        if not isinstance(cache, SharedRows):
            rows = {} if message.rows is None else {"rows": message.rows}
            return check(hidden, past=message.past, count=message.count, cache=cache, **rows)
        positions = check(hidden, count=message.count)  # the rest is a matter of this session's own bookkeeping
        call = Call(message.past, message.count, positions.length)
        call.rows = message.rows
        cache.check(call)
        return positions
