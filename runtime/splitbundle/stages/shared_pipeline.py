"""One pipeline for many users at once: a thread computes the rows of all of them together.

Each text has a row of one session. A text that ends leaves its tokens in the row. If the next turn of the same chat
comes, it gets that row, and only what is new is computed.
"""

from __future__ import annotations

import copy
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from splitbundle import logs
from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.integers import as_integer, as_integers
from splitbundle.stages.generation import Drawing, Step, chosen_logprobs, chosen_sampling
from splitbundle.stages.session import Session
from splitbundle.stages.text_generation import common_beginning, context_of, resume
from splitbundle.stages.text_pipeline import TextPipeline
from splitbundle.stages.turns import LARGE_PIECE, PIECE, Turns, Waiting, Work

Result = TypeVar("Result")
FIRST_SLOTS: Final = 256
"""The tokens for which each row has room at first."""


class _End:
    """What comes after the last step of a text."""


class Text(Work):
    """A text that is continued: an iterator of steps, which another thread makes."""

    def __init__(self, shared: SharedPipeline, prompt_ids: Sequence[int], most: int, drawing: Drawing) -> None:
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


class _Owner:
    """The thread that computes, and what it owns. It doesn't hold the ``SharedPipeline``, which may be forgotten."""

    def __init__(self, pipeline: Any, rows: int, waiting: int, piece: int) -> None:
        self.pipeline, self.rows = pipeline, rows
        self.session: Session = pipeline.session(
            rows, min(FIRST_SLOTS, context_of(pipeline) or FIRST_SLOTS), grows=True
        )
        self.turns: Turns[Text] = Turns(piece, max(piece, LARGE_PIECE))
        self.waiting: Waiting[Text] = Waiting(waiting)
        self.free: dict[int, None] = dict.fromkeys(range(rows))
        """The rows without a text, the one that has rested longest first."""
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

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            expected, got = "a shared pipeline of this process", "one of the process that was forked"
            raise wrong_argument("pipeline", expected, got)

    def add(self, text: Text) -> None:
        self._check_process()
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
            self._compute(self.turns.next())  # without a name, as a name would keep its texts while this thread waits

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
            row = max(self.free, key=lambda row: common_beginning(held[row], text.prompt_ids))
            del self.free[row]
            text.row = row
            text.reused = resume(self.session, text.prompt_ids, row)
            text.pending = text.prompt_ids[text.reused :]
            text.left = len(text.pending)
            self.turns.add(text)
            self.counts["texts"] += 1
            self.counts["prompt_tokens"] += len(text.prompt_ids)
            self.counts["reused_tokens"] += text.reused
            self.seconds["queue"] += time.perf_counter() - text.asked

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


class SharedPipeline(TextPipeline):
    """A pipeline that many threads use at once. Their rows are computed together (continuous batching).

        with SharedPipeline(bundle.pipeline(), rows=8) as shared:
            for piece in shared.stream_text("Once", max_new_tokens=20):  # in any number of threads
                print(piece, end="")

    A text is the same as alone, up to the rounding of a batch. Draws depend on the seed of the text alone. Nobody else
    may use the pipeline's sessions; other sessions of the same pipeline are no problem.
    """

    client: Hashable = None
    """Who asks. Clients take turns where texts wait for a row."""
    _whole: SharedPipeline | None = None

    def __init__(
        self, pipeline: Any, *, rows: int = 8, waiting: int = 64, capacity: int | None = None, piece: int = PIECE
    ) -> None:
        """Begin to share a pipeline.

        Args:
            pipeline: a pipeline of any backend, with any stages that take ``rows``.
            rows: the texts that are continued at once. Each row has a KV cache, whose size grows with the longest text.
            waiting: the texts that may wait for a row. A further one is refused.
            capacity: the most tokens of a text, with its prompt; by default the model's context.
            piece: the tokens of a prompt that are computed in one call while other rows wait.

        Raises:
            BundleError: ``input.value``, ``session.capacity``.
        """
        for name, value, least in (("rows", rows, 1), ("waiting", waiting, 0), ("piece", piece, 1)):
            if (number := as_integer(value)) is None or not least <= number <= 2**20:
                raise wrong_argument(name, f"a number from {least} to {2**20}", quoted(value))
        if capacity is not None and ((number := as_integer(capacity)) is None or number < 2):
            raise wrong_argument("capacity", "a number from 2, or None", quoted(capacity))
        self.pipeline, self.capacity = pipeline, capacity
        self.bundle = pipeline.bundle
        self._owner = _Owner(pipeline, int(rows), int(waiting), int(piece))
        self._end = weakref.finalize(self, self._owner.close)

    @property
    def first(self) -> Any:
        """Return the stage that takes token ids."""
        return self.pipeline.first

    @property
    def stages(self) -> list[Any]:
        """Return the stages in order."""
        return list(self.pipeline._in_order())

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Return the name of each stage with the seconds of its last call of one token a row."""
        return dict(self._owner.stage_seconds)

    @property
    def context_length(self) -> int | None:
        """Return the number of tokens that a text may have, or None if there is no limit."""
        known = (self.pipeline.context_length, self.capacity)
        return min((length for length in known if length is not None), default=None)

    def tokenizer(self) -> Any:
        """Return the bundle's tokenizer. It is loaded once."""
        return self.pipeline.tokenizer()

    def of(self, client: Hashable) -> SharedPipeline:
        """Return this pipeline for one client."""
        own = copy.copy(self)
        own.client = client
        own._whole = self._whole or self  # its end is that of the thread
        return own

    def row_steps(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int = 20,
        stop_ids: Sequence[int] = (),
        session: Session | None = None,
        logprobs: int | None = None,
        prompt_lookup: int | None = None,
        **sampling: Any,
    ) -> Text:
        """Begin to continue one row among others, and return its steps. ``stream_text`` calls this.

        Args:
            prompt_ids: the prompt.
            max_new_tokens: the largest number of steps.
            stop_ids: tokens that end it.
            session: None: the pipeline has a session for all.
            logprobs: as for ``steps``.
            prompt_lookup: it has no effect: rows that are computed together need one token at a time.
            sampling: as for ``generate``.

        Raises:
            BundleError: ``input.*``; ``server.full`` if too many texts wait; ``server.draining`` after ``close``.
        """
        if session is not None:
            raise wrong_argument("session", "None: a shared pipeline has one for all", type(session).__name__)
        vocab_size = self.first.architecture.vocab_size
        chosen = chosen_sampling(sampling, vocab_size)
        stops = frozenset(as_integers(stop_ids, "stop_ids"))
        drawing = Drawing(self.pipeline, chosen, stops, chosen_logprobs(logprobs, vocab_size), 1)
        text = Text(self, prompt_ids, max_new_tokens, drawing)
        self._owner.add(text)
        return text

    def wake(self) -> None:
        """Look at once which texts are cancelled."""
        self._owner.wake()

    def run(self, work: Callable[[Any], Result]) -> Result:
        """Call a function with the pipeline, between two calls of the texts, and return its result.

        Raises:
            BundleError: ``server.draining`` after ``close``; what the function raises.
        """
        return self._owner.run(lambda: work(self.pipeline))

    def log_probabilities(self, token_ids: Any, *, last: int | None = None) -> list[list[float]]:
        """Return the logarithm of the probability of each token. See ``TextPipeline.log_probabilities``."""
        return self.run(lambda pipeline: pipeline.log_probabilities(token_ids, last=last))

    @property
    def state(self) -> dict[str, float]:
        """Return numbers for monitoring: rows, what runs and waits, and totals of tokens, calls and seconds."""
        owner = self._owner
        return {
            "rows": owner.rows,
            "active": len(owner.turns),
            "waiting": len(owner.waiting),
            **owner.counts,
            **{f"{name}_seconds": value for name, value in owner.seconds.items()},
        }

    def close(self) -> None:
        """End the texts that run with ``server.draining``, and free the caches."""
        self._end()

    def __enter__(self) -> SharedPipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
