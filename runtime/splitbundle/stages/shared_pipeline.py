"""One pipeline for many users at once: a thread computes the rows of all of them together."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from splitbundle.errors import quoted, wrong_argument
from splitbundle.integers import as_integer, as_integers
from splitbundle.stages.generation import Drawing, chosen_logprobs, chosen_sampling
from splitbundle.stages.session import Session
from splitbundle.stages.shared_rows import SharedRows, Text
from splitbundle.stages.text_generation import Completion
from splitbundle.stages.text_pipeline import TextPipeline
from splitbundle.stages.turns import PIECE

Result = TypeVar("Result")


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
            waiting: the texts that may wait for a row, half of them of one client. A further one is refused.
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
        self._rows = SharedRows(pipeline, int(rows), int(waiting), int(piece))
        self._end = weakref.finalize(self, self._rows.close)

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
        return dict(self._rows.stage_seconds)

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
        drawn: int = 0,
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
            drawn: how many of the last tokens of the prompt another pipeline drew, for a text that goes on here.
            sampling: as for ``generate``.

        Raises:
            BundleError: ``input.*``; ``server.full`` if too many texts wait; ``server.draining`` after ``close``.
        """
        if session is not None:
            raise wrong_argument("session", "None: a shared pipeline has one for all", type(session).__name__)
        vocab_size = self.first.architecture.vocab_size
        chosen = chosen_sampling(sampling, vocab_size)
        stops = frozenset(as_integers(stop_ids, "stop_ids"))
        if (before := as_integer(drawn)) is None or not 0 <= before < max(1, len(prompt_ids)):
            raise wrong_argument("drawn", "a number from 0, below that of the prompt's tokens", quoted(drawn))
        drawing = Drawing(self.pipeline, chosen, stops, chosen_logprobs(logprobs, vocab_size), 1, before)
        text = Text(self, prompt_ids, max_new_tokens, drawing)
        self._rows.add(text)
        return text

    def _complete_texts(self, prompts: list[Any], options: dict[str, Any]) -> list[Completion]:
        made: list[Completion] = []
        for begin in range(0, len(prompts), self._rows.number):  # so many have a row at once
            texts = [self.stream_text(prompt, **options) for prompt in prompts[begin : begin + self._rows.number]]
            made += [text.completion() for text in texts]
        return made

    def wake(self) -> None:
        """Look at once which texts are cancelled."""
        self._rows.wake()

    def run(self, work: Callable[[Any], Result]) -> Result:
        """Call a function with the pipeline, between two calls of the texts, and return its result.

        Args:
            work: takes the pipeline. Meanwhile no text gets a token.

        Raises:
            BundleError: ``server.draining`` after ``close``; what the function raises.
        """
        return self._rows.run(lambda: work(self.pipeline))

    def log_probabilities(self, token_ids: Any, *, last: int | None = None) -> list[list[float]]:
        """Return the natural logarithm of the probability of each token, given those before it.

        *Shape:* (batch, sequence) -> batch lists of ``sequence - 1`` numbers, or of ``last``.

        Args:
            token_ids: rows of ids, as lists or as ``token_ids`` of the pipeline makes them.
            last: the number of tokens at the end to score; by default all but the first.

        Raises:
            BundleError: ``input.*``; ``server.draining`` after ``close``.
        """

        def work(pipeline: Any) -> list[list[float]]:
            ids = pipeline.token_ids(token_ids) if isinstance(token_ids, list) else token_ids
            return pipeline.log_probabilities(ids, last=last)  # type: ignore[no-any-return]

        return self.run(work)

    @property
    def most_texts(self) -> int:
        """Return how many texts one client may have at once: in rows, and in the queue."""
        return self._rows.number + self._rows.waiting.most_of_a_client

    @property
    def state(self) -> dict[str, float]:
        """Return numbers for monitoring: rows, what runs and waits, and totals of tokens, calls and seconds."""
        rows = self._rows
        return {
            "rows": rows.number,
            "active": len(rows.turns),
            "waiting": len(rows.waiting),
            **rows.counts,
            **{f"{name}_seconds": value for name, value in rows.seconds.items()},
        }

    def close(self) -> None:
        """End the texts that run with ``server.draining``, and free the caches."""
        self._end()

    def __enter__(self) -> SharedPipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
