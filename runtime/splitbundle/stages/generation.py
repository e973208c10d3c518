"""Continue rows of token ids: the half of a pipeline that draws tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.integers import as_integer, as_integers
from splitbundle.records import record
from splitbundle.stages.prompt_lookup import guess
from splitbundle.stages.sampling import History, RowGenerators, Sampling
from splitbundle.stages.session import Session
from splitbundle.stages.stage import Array

MAX_GUESSES: Final = 64
STOPPED = -1
"""The value that ``generate`` yields for a row that has stopped."""


@record(frozen=True, slots=True, kw_only=True)
class Step:
    """The tokens that were drawn in one step."""

    ids: tuple[int, ...]
    """The token of each row, and -1 for a row that has stopped."""
    logprobs: tuple[float, ...] | None
    """The natural logarithm of the probability of each token, or None if it wasn't asked for. It is the model's own
    probability: before the bias, the penalties, the temperature and the filters."""
    top: tuple[tuple[tuple[int, float], ...], ...] | None
    """For each row, the likeliest tokens with the same logarithms, or None."""


class GeneratingPipeline:
    """The half of a pipeline that draws tokens. A backend's pipeline has the methods that it calls."""

    def generate(
        self,
        token_ids: Array,
        *,
        max_new_tokens: int = 20,
        attention_mask: Array | None = None,
        stop_ids: Sequence[int] = (),
        session: Session | None = None,
        prompt_lookup: int | None = None,
        **sampling: Any,
    ) -> Iterator[Array]:
        """Continue a prompt, one token of every row at a time.

        *Shape:* (batch, sequence) -> up to ``max_new_tokens`` times (batch), int64.

        A row ends with the first of ``stop_ids`` that it draws. That token is still yielded; then the row yields -1.
        Rows of different lengths come with padding and a mask. There is no beam search: ``Session.reorder`` lets a
        caller write one, and for open questions it gives worse texts than sampling (Holtzman et al. 2020).

        Closing the iterator frees the session that it made.

        Args:
            token_ids: the prompt.
            max_new_tokens: the largest number of tokens to yield.
            attention_mask: as for a call.
            stop_ids: tokens that end a row.
            session: a session to continue; by default a new one that is large enough.
            prompt_lookup: the number of tokens to guess from the text itself and to check in one call, for one row; by
                default none. The tokens are those of ordinary decoding, up to the rounding of calls of other lengths.
                It pays where a text repeats itself, and costs time elsewhere.
            sampling: how tokens are drawn. ``temperature``: 0, the default, for the likeliest token, else the divisor
                of the logits. ``top_k``, ``top_p``, ``min_p``, ``typical_p``: which tokens may be drawn.
                ``repetition_penalty``, ``presence_penalty``, ``frequency_penalty``: what makes tokens that are there
                already less likely. ``logit_bias``: a number to add to the logit of each of some ids. ``seed``: the
                seed of the draws, the same in every backend; None for a different one each time. ``Sampling`` has the
                formulas. Each row has draws of its own.

        Raises:
            BundleError: ``input.*``, ``session.*``.
        """
        steps = self.steps(
            token_ids,
            max_new_tokens=max_new_tokens,
            attention_mask=attention_mask,
            stop_ids=stop_ids,
            session=session,
            prompt_lookup=prompt_lookup,
            **sampling,
        )
        return (self._row(list(step.ids), token_ids) for step in steps)  # type: ignore[attr-defined]

    def steps(
        self,
        token_ids: Array,
        *,
        max_new_tokens: int = 20,
        attention_mask: Array | None = None,
        stop_ids: Sequence[int] = (),
        session: Session | None = None,
        logprobs: int | None = None,
        prompt_lookup: int | None = None,
        **sampling: Any,
    ) -> Iterator[Step]:
        """Continue a prompt like ``generate``, and yield records with log-probabilities.

        Args:
            token_ids: the prompt. *Shape:* (batch, sequence).
            max_new_tokens: the largest number of steps.
            attention_mask: as for a call.
            stop_ids: tokens that end a row.
            session: a session to continue; by default a new one that is large enough.
            logprobs: the number of likeliest tokens to report with each token; 0 for that of the token alone; None
                for no log-probabilities.
            prompt_lookup: as for ``generate``.
            sampling: as for ``generate``.

        Raises:
            BundleError: ``input.*``, ``session.*``.
        """
        pipeline: Any = self
        vocab_size = pipeline.first.architecture.vocab_size
        chosen = chosen_sampling(sampling, vocab_size)
        most = as_integer(max_new_tokens)
        if most is None or most < 0:
            raise wrong_argument("max_new_tokens", "a number from 0", quoted(max_new_tokens))
        wanted = chosen_logprobs(logprobs, vocab_size)
        guesses = 0 if prompt_lookup is None else as_integer(prompt_lookup)
        if guesses is None or not 0 <= guesses <= MAX_GUESSES:
            raise wrong_argument("prompt_lookup", f"a number from 0 to {MAX_GUESSES}, or None", quoted(prompt_lookup))
        shape = tuple(getattr(token_ids, "shape", ()))
        if guesses and shape[:1] != (1,):
            raise wrong_argument("prompt_lookup", "None for a batch of several rows", quoted(prompt_lookup))
        counts = None if attention_mask is None else pipeline._runs(attention_mask, shape)[1]
        longest = pipeline.first.check(token_ids, count=counts).stop
        if session is None and counts is not None and min(counts) == 0:
            expected, got = "at least one token in every row to go on from", "a row of padding alone"
            raise BundleError(Problem(code="input.mask", argument="attention_mask", expected=expected, got=got))
        limit = pipeline.first.architecture.position_limit
        if session is None and limit is not None and longest + most - 1 > limit:
            expected = f"at most {limit - longest + 1}: the model has {limit} positions, the prompt {longest} tokens"
            raise BundleError(
                Problem(code="input.position", argument="max_new_tokens", expected=expected, got=f"{most}")
            )
        if session is None:
            # The last token is yielded and not fed again, so it needs no slot.
            session = pipeline.session(shape[0], max(1, longest + most - 1))
        stops = frozenset(as_integers(stop_ids, "stop_ids"))
        drawing = Drawing(pipeline, chosen, stops, wanted, shape[0])
        if guesses:
            return _guessed_steps(drawing, session, token_ids, attention_mask, most, guesses)
        return _steps(drawing, session, token_ids, attention_mask, most)


def chosen_sampling(given: Mapping[str, Any], vocab_size: int) -> Sampling:
    """Return the sampling for the arguments of a caller.

    Raises:
        TypeError: for an argument that doesn't exist.
        BundleError: ``input.value``.
    """
    if unknown := sorted(given.keys() - set(Sampling.__slots__)):
        raise TypeError(f"generate() got an unexpected keyword argument {unknown[0]!r}")
    chosen = Sampling.of(**given)
    if beyond := [token for token in chosen.logit_bias or () if token >= vocab_size]:
        raise wrong_argument("logit_bias", f"token ids below {vocab_size}", quoted(beyond[0]))
    return chosen


def chosen_logprobs(given: object, vocab_size: int) -> int | None:
    """Return the number of likeliest tokens to report, or None for no log-probabilities.

    Raises:
        BundleError: ``input.value``.
    """
    wanted = None if given is None else as_integer(given)
    if given is not None and (wanted is None or not 0 <= wanted <= vocab_size):
        raise wrong_argument("logprobs", f"a number from 0 to {vocab_size}, or None", quoted(given))
    return wanted


class Drawing:
    """How the tokens of some rows are drawn, and what has been drawn."""

    def __init__(
        self,
        pipeline: Any,
        sampling: Sampling,
        stop_ids: frozenset[int],
        logprobs: int | None,
        rows: int,
        drawn: int = 0,
    ) -> None:
        """Begin to draw, or go on after ``drawn`` tokens of each row, which are the last ones of its prompt."""
        self.pipeline, self.stop_ids = pipeline, stop_ids
        self._sampling, self._logprobs, self._drawn = sampling, logprobs, drawn
        self._generators = RowGenerators(sampling.seed, rows)
        self._generators.skip(drawn)
        self._history: History | None = None
        self.running = [True] * rows
        """Whether each row goes on."""

    def step(self, last: Array, prompt: Sequence[Sequence[int]]) -> tuple[Step, list[int]]:
        """Draw a token of each row.

        *Shape:* (batch, 1, vocab) -> the step, and the tokens of all rows.

        Args:
            last: the logits of each row's last position.
            prompt: for the first step, the tokens of each row before it.
        """
        pipeline, logprobs = self.pipeline, self._logprobs
        if self._history is None and self._sampling.adjusts:
            self._history = History(prompt, self._drawn)
        drawn = pipeline._draw(last[:, -1], self._sampling, self._generators, self._history)
        chances = None if logprobs is None else tuple(pipeline._scores(last, drawn[:, None])[:, 0].tolist())
        top = None if logprobs is None else tuple(pipeline._likeliest(last[:, -1], logprobs))
        tokens = drawn.tolist()
        given = tuple(token if alive else STOPPED for token, alive in zip(tokens, self.running, strict=True))
        if self._history is not None:
            self._history.add(given)
        return Step(ids=given, logprobs=chances, top=top), tokens

    def end_rows(self, step: Step) -> None:
        """End the rows that drew a token which ends them."""
        self.running = [token >= 0 and token not in self.stop_ids for token in step.ids]


def _steps(
    drawing: Drawing, session: Session, token_ids: Array, attention_mask: Array | None, most: int
) -> Iterator[Step]:
    """Yield one step for each call of the pipeline."""
    pipeline = drawing.pipeline
    for _ in range(most):
        with pipeline._without_gradients():  # not around the loop, as the caller's code runs between two tokens
            last = pipeline.forward(token_ids, attention_mask=attention_mask, session=session, logits="last")
            step, drawn = drawing.step(last, session.tokens)
        yield step
        drawing.end_rows(step)
        if not any(drawing.running):
            return
        token_ids, attention_mask = pipeline._row(drawn, token_ids)[:, None], None
        if not all(drawing.running):
            attention_mask = pipeline._row([int(alive) for alive in drawing.running], token_ids)[:, None]


def _guessed_steps(
    drawing: Drawing, session: Session, token_ids: Array, attention_mask: Array | None, most: int, number: int
) -> Iterator[Step]:
    """Yield the steps of one row. A call of the pipeline checks some guessed tokens, and may make several steps."""
    pipeline, made, guessed = drawing.pipeline, 0, list[int]()
    while made < most:
        with pipeline._without_gradients():
            logits = pipeline.forward(
                token_ids, attention_mask=attention_mask, session=session, logits=len(guessed) + 1
            )
            steps = []
            for place in range(len(guessed) + 1):
                step, _ = drawing.step(logits[:, place : place + 1], session.tokens)
                steps.append(step)
                ended = step.ids[0] in drawing.stop_ids
                if ended or place == len(guessed) or step.ids[0] != guessed[place]:
                    break
        if wrong := len(guessed) + 1 - len(steps):
            session.rollback(wrong)
        yield from steps
        made += len(steps)
        if ended:
            return
        drawn = steps[-1].ids[0]
        known = [*session.tokens[0], drawn]
        # Above such a length, rotations depend on the length of the row, and so on the number of guesses.
        limits = [limit for cache in session.caches for limit in cache.thresholds]
        room = min([number, most - made - 1, *(limit - len(known) for limit in limits)])
        guessed = guess(known, room) if room > 0 else []
        token_ids, attention_mask = pipeline.token_ids([[drawn, *guessed]]), None
