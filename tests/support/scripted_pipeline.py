"""A shared pipeline whose answers are written down: for what no small model says, such as calls of tools."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from splitbundle.errors import BundleError, Problem
from splitbundle.stages.generation import Step
from splitbundle.stages.text_pipeline import TextPipeline


class _Steps:
    """The tokens of an answer, one after another."""

    reused = 0

    def __init__(self, ids: Sequence[int], logprobs: int | None, seconds: float) -> None:
        self._ids, self._logprobs, self._seconds = list(ids), logprobs, seconds
        self.cancelled = threading.Event()
        self.lost: BaseException | None = None

    def __iter__(self) -> Iterator[Step]:
        for token in self._ids:
            if self.cancelled.wait(self._seconds) if self._seconds else self.cancelled.is_set():
                if self.lost is not None:
                    raise self.lost
                return
            chances = None if self._logprobs is None else (-0.5,)
            top = None if self._logprobs is None else (tuple((token + i, -0.5 - i) for i in range(self._logprobs)),)
            yield Step(ids=(token,), logprobs=chances, top=top)

    def cancel(self) -> None:
        self.cancelled.set()

    close = cancel


class ScriptedPipeline(TextPipeline):
    """A pipeline that answers with given texts."""

    def __init__(self, pipeline: Any, answer: Callable[[str], str], seconds: float = 0.0) -> None:
        """Write down the answers.

        Args:
            pipeline: whose tokenizer and sizes it has.
            answer: the text of a prompt -> the answer.
            seconds: the time that each token takes.
        """
        self.pipeline, self.bundle, self._answer, self._seconds = pipeline, pipeline.bundle, answer, seconds
        self.stages: list[Any] = []
        self.stage_seconds: dict[str, float] = {}
        self.made: list[_Steps] = []

    @property
    def first(self) -> Any:
        return self.pipeline.first

    def of(self, client: Hashable) -> ScriptedPipeline:
        return self

    def row_steps(self, prompt_ids: Sequence[int], *, logprobs: int | None = None, **options: Any) -> _Steps:
        tokenizer = self.tokenizer()
        answer = self._answer(tokenizer.decode(prompt_ids, control_tokens=True))
        spells = answer.startswith("<|channel|>")  # the control tokens of harmony
        encoded = tokenizer.encode(answer, control_tokens=spells, add_special_tokens=False)
        ids = [*encoded, *tokenizer.stop_ids[:1]]
        self.made.append(_Steps(ids[: options["max_new_tokens"]], logprobs, self._seconds))
        return self.made[-1]

    def run(self, work: Callable[[Any], Any]) -> Any:
        return work(self.pipeline)

    @property
    def state(self) -> dict[str, float]:
        names = ("rows", "active", "waiting", "texts", "prompt_tokens", "reused_tokens", "new_tokens", "calls")
        return dict.fromkeys((*names, "call_rows", "compute_seconds", "queue_seconds"), 0)

    def close(self) -> None:
        problem = Problem(code="server.draining", argument="pipeline", expected="one that is open", got="a closed one")
        for steps in self.made:
            steps.lost = BundleError(problem)
            steps.cancel()


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until a condition holds, and fail if it doesn't in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("it didn't happen in time")
        time.sleep(0.01)
