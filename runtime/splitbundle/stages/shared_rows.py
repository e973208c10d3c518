"""The rows of a shared pipeline, and the thread that computes them.

Each text has a row of one session. A text that ends leaves its tokens in the row. If the next turn of the same chat
comes, it gets that row, and only what is new is computed.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from splitbundle import logs
from splitbundle.errors import BundleError, Problem, wrong_argument
from splitbundle.stages.generation import Drawing, Step
from splitbundle.stages.session import Session
from splitbundle.stages.text_generation import common_beginning, context_of, resume
from splitbundle.stages.turns import LARGE_PIECE, Turns, Waiting, Work

Result = TypeVar("Result")
FIRST_SLOTS: Final = 256
"""The tokens for which each row has room at first."""


class _End:
    """What comes after the last step of a text."""


class Text(Work):
    """A text that is continued: an iterator of steps, which another thread makes."""

    def __init__(self, shared: Any, prompt_ids: Sequence[int], most: int, drawing: Drawing) -> None:
        super().__init__(shared.client)
        self.prompt_ids, self.most, self.drawing = list(prompt_ids), most, drawing
        self.pending = list(prompt_ids)
        """The tokens that have to be computed before the next one can be drawn."""
        self.row: int | None = None
        self.reused = 0
        self.cancelled = False
        self.asked, self.first = time.perf_counter(), 0.0
        self._shared = shared  # it isn't closed while somebody waits for this text
        self.made: SimpleQueue[Step | BaseException | type[_End]] = SimpleQueue()

    def __iter__(self) -> Iterator[Step]:
        while True:
            found = self.made.get()
            if found is _End:
                return
            if isinstance(found, BaseException):
                raise found
            yield found  # type: ignore[misc]

    def cancel(self) -> None:
        """Make no more steps, and free the row. Another thread may call this."""
        self.cancelled = True
        self._shared.wake()

    close = cancel


class SharedRows:
    """The thread that computes, and what it owns. It doesn't hold the ``SharedPipeline``, which may be forgotten."""

    def __init__(self, pipeline: Any, rows: int, waiting: int, piece: int) -> None:
        self.pipeline, self.number = pipeline, rows
        self.session: Session = pipeline.session(
            rows, min(FIRST_SLOTS, context_of(pipeline) or FIRST_SLOTS), grows=True
        )
        self.turns: Turns[Text] = Turns(piece, max(piece, LARGE_PIECE))
        self.waiting: Waiting[Text] = Waiting(waiting)
        self.free: dict[int, None] = dict.fromkeys(range(rows))
        """The rows without a text, the one that has rested longest first."""
        self.clients: dict[int, Hashable] = {}
        """A row -> whose text it had last. Only the same client goes on from what is there: the time, and the number of
        reused tokens, would tell others what he asked."""
        self.counts = {"texts": 0, "prompt_tokens": 0, "reused_tokens": 0, "new_tokens": 0, "calls": 0, "call_rows": 0}
        self.seconds = {"queue": 0.0, "first_token": 0.0, "compute": 0.0}
        self.stage_seconds: dict[str, float] = {}
        """The name of a stage -> the seconds of its last call with one token a row."""
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._changed = threading.Condition()
        self._closing, self._process = False, os.getpid()
        self._thread = threading.Thread(target=self._loop, name="splitbundle-shared", daemon=True)
        self._thread.start()

    def _check_open(self) -> None:
        if self._closing:
            expected, got = "a shared pipeline that is open", "a closed one"
            raise BundleError(Problem(code="server.draining", argument="pipeline", expected=expected, got=got))

    def _check_thread(self) -> None:
        if threading.current_thread() is self._thread:
            raise wrong_argument("pipeline", "a call from another thread", "one from within run()")

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            expected, got = "a shared pipeline of this process", "one of the process that was forked"
            raise wrong_argument("pipeline", expected, got)

    def add(self, text: Text) -> None:
        self._check_process()
        self._check_thread()
        with self._changed:
            self._check_open()
            self.waiting.add(text)
            self._changed.notify()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def run(self, work: Callable[[], Result]) -> Result:
        """Do some work between two calls, and return its result."""
        made: SimpleQueue[tuple[bool, Any]] = SimpleQueue()

        def job() -> None:
            try:
                made.put((True, work()))
            except BaseException as error:  # noqa: BLE001  # it is raised where the result is waited for
                made.put((False, error))

        self._check_process()
        self._check_thread()
        with self._changed:
            self._check_open()
            self._jobs.put(job)
            self._changed.notify()
        succeeded, result = made.get()
        if not succeeded:
            raise result
        return result  # type: ignore[no-any-return]

    def close(self) -> None:
        if os.getpid() != self._process:  # a forked child has no such thread
            return
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._drop_cancelled()
                while not (self._closing or self._jobs.qsize() or len(self.turns) or len(self.waiting)):
                    self._changed.wait()
                    self._drop_cancelled()
                closing = self._closing
                if not closing:
                    self._admit()
            while self._jobs.qsize():
                self._jobs.get()()
            if closing:
                self._end_all()
                return
            # In the order of rows, so that nothing is permuted. A name for them would keep texts from being freed.
            self._compute(sorted(self.turns.next(), key=lambda chosen: chosen[0].row or 0))

    def _drop_cancelled(self) -> None:
        for text in self.turns:
            if text.cancelled:
                self._finish(text)
        for text in self.waiting.drop(lambda text: text.cancelled):
            text.made.put(_End)

    def _admit(self) -> None:
        """Give rows to texts that wait, as long as there are any."""
        while self.free and (text := self.waiting.take()) is not None:
            if text.most == 0:
                text.made.put(_End)
                continue
            held = self.session.tokens
            # The longest beginning in common; among equals, the row that has rested longest.
            known = {row: self._known(row, text) for row in self.free}
            row = max(known, key=lambda row: known[row])
            del self.free[row]
            text.row = row
            if not known[row]:
                self.session.rollback([len(held[each]) if each == row else 0 for each in range(self.number)])
            text.reused = resume(self.session, text.prompt_ids, row)
            self.clients[row] = text.client
            text.pending = text.prompt_ids[text.reused :]
            text.left = len(text.pending)
            self.turns.add(text)
            self.counts["texts"] += 1
            self.counts["prompt_tokens"] += len(text.prompt_ids)
            self.counts["reused_tokens"] += text.reused
            self.seconds["queue"] += time.perf_counter() - text.asked

    def _known(self, row: int, text: Text) -> int:
        """Return how many tokens of a text's prompt a row holds for its client."""
        if self.clients.get(row) != text.client:
            return 0
        return common_beginning(self.session.tokens[row], text.prompt_ids)

    def _compute(self, chosen: list[tuple[Text, int]]) -> None:
        if not chosen:
            return
        began = time.perf_counter()
        try:
            logits = self._forward(chosen)
        except BaseException as error:  # noqa: BLE001  # it is raised where the steps are waited for
            logs.debug("a call of %d rows failed: %s", len(chosen), error)
            for text, _ in chosen:
                text.made.put(_copy(error))
                self._finish(text, ended=False)
            return
        for place, (text, count) in enumerate(chosen):
            del text.pending[:count]
            text.left = len(text.pending)
            if not text.left:
                self._draw(text, logits[place : place + 1])
        self.seconds["compute"] += time.perf_counter() - began
        self.counts["calls"] += 1
        self.counts["call_rows"] += len(chosen)

    def _forward(self, chosen: list[tuple[Text, int]]) -> Any:
        """Compute some tokens of some rows. *Shape:* -> (rows, 1, vocab), the logits of each row's last token."""
        pipeline, longest = self.pipeline, max(count for _, count in chosen)
        ids = pipeline.token_ids([text.pending[:count] + [0] * (longest - count) for text, count in chosen])
        mask = None
        if any(count < longest for _, count in chosen):
            mask = pipeline.token_ids([[1] * count + [0] * (longest - count) for _, count in chosen])
        rows = [text.row for text, _ in chosen]
        timed = self.stage_seconds.__setitem__ if longest == 1 else None
        with pipeline._without_gradients():
            return pipeline.forward(
                ids, attention_mask=mask, session=self.session, logits="last", rows=rows, timed=timed
            )

    def _draw(self, text: Text, last: Any) -> None:
        drawing = text.drawing
        try:
            with self.pipeline._without_gradients():
                step, (token,) = drawing.step(last, [text.prompt_ids])
        except BaseException as error:  # noqa: BLE001  # likewise; NaN in one row is no matter of the others
            text.made.put(error)
            self._finish(text, ended=False)
            return
        if not text.first:
            text.first = time.perf_counter()
            self.seconds["first_token"] += text.first - text.asked
        text.made.put(step)
        self.counts["new_tokens"] += 1
        text.most -= 1
        if text.most == 0 or token in drawing.stop_ids:
            self._finish(text)
        else:
            text.pending, text.left = [token], 1

    def _finish(self, text: Text, *, ended: bool = True) -> None:
        self.turns.remove(text)
        if text.row is not None:
            self.free[text.row] = None
            text.row = None
        if ended:
            text.made.put(_End)

    def _end_all(self) -> None:
        expected, got = "a shared pipeline that stays open", "one that was closed"
        error = BundleError(Problem(code="server.draining", argument="pipeline", expected=expected, got=got))
        for text in self.turns:
            self.turns.remove(text)
            text.made.put(error)
        while (waiting := self.waiting.take()) is not None:
            waiting.made.put(error)
        self.session = None  # type: ignore[assignment]  # its caches are freed at once


def _copy(error: BaseException) -> BaseException:
    """Return an error that one thread can raise. Threads that raise the same one would mix their tracebacks."""
    try:
        return copy.copy(error)
    except Exception:  # noqa: BLE001  # errors of libraries may refuse
        return error
