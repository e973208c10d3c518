"""Continue rows of token ids: the half of a pipeline that draws tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.integers import as_integer, as_integers
from splitbundle.records import record
from splitbundle.stages.sampling import History, RowGenerators, Sampling
from splitbundle.stages.session import Session
from splitbundle.stages.stage import Array

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
            sampling: as for ``generate``.

        Raises:
            BundleError: ``input.*``, ``session.*``.
        """
        pipeline: Any = self
        known = set(Sampling.__slots__)
        if unknown := sorted(sampling.keys() - known):
            raise TypeError(f"generate() got an unexpected keyword argument {unknown[0]!r}")
        chosen = Sampling.of(**sampling)
        vocab_size = pipeline.first.architecture.vocab_size
        if beyond := [token for token in chosen.logit_bias or () if token >= vocab_size]:
            raise wrong_argument("logit_bias", f"token ids below {vocab_size}", quoted(beyond[0]))
        most = as_integer(max_new_tokens)
        if most is None or most < 0:
            raise wrong_argument("max_new_tokens", "a number from 0", quoted(max_new_tokens))
        wanted = None if logprobs is None else as_integer(logprobs)
        if logprobs is not None and (wanted is None or not 0 <= wanted <= vocab_size):
            raise wrong_argument("logprobs", f"a number from 0 to {vocab_size}, or None", quoted(logprobs))
        shape = tuple(getattr(token_ids, "shape", ()))
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
        return _steps(pipeline, token_ids, attention_mask, most, chosen, stops, session, wanted)


def _steps(
    pipeline: Any,
    token_ids: Array,
    attention_mask: Array | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: frozenset[int],
    session: Session,
    logprobs: int | None,
) -> Iterator[Step]:
    rows = token_ids.shape[0]
    generators, history = RowGenerators(sampling.seed, rows), None
    running = [True] * rows
    for _ in range(max_new_tokens):
        with pipeline._without_gradients():  # not around the loop, as the caller's code runs between two tokens
            last = pipeline.forward(token_ids, attention_mask=attention_mask, session=session, logits="last")
            if history is None and sampling.adjusts:
                history = History(session.tokens)
            drawn = pipeline._draw(last[:, -1], sampling, generators, history)
            chances = None if logprobs is None else pipeline._scores(last, drawn[:, None])[:, 0].tolist()
            top = pipeline._likeliest(last[:, -1], logprobs) if logprobs is not None else None
        tokens = drawn.tolist()
        given = [token if alive else STOPPED for token, alive in zip(tokens, running, strict=True)]
        yield Step(
            ids=tuple(given),
            logprobs=None if chances is None else tuple(chances),
            top=None if top is None else tuple(top),
        )
        running = [token >= 0 and token not in stop_ids for token in given]
        if not any(running):
            return
        if history is not None:
            history.add(given)
        token_ids, attention_mask = pipeline._row(tokens, token_ids)[:, None], None
        if not all(running):
            attention_mask = pipeline._row([int(alive) for alive in running], token_ids)[:, None]
