"""The base of the pipelines of every backend: stages in order, sessions and generation."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.integers import as_integer, as_integers
from splitbundle.stages.sampling import Sampling
from splitbundle.stages.session import Session
from splitbundle.stages.stage import Array, LogitsWanted, StageBase

STOPPED = -1
"""The value that ``generate`` yields for a row that has stopped."""


def check_tiling(stages: Sequence[StageBase], *, same_weights: bool) -> None:
    """Check that stages, in order, make one model.

    Raises:
        BundleError: ``pipeline.tiling``, ``pipeline.fingerprint``.
    """

    def refuse(code: str, where: str, expected: str, got: str, hint: str | None = None) -> NoReturn:
        raise BundleError(Problem(code=code, argument=where, expected=expected, got=got, hint=hint))

    at = 0
    for i, stage in enumerate(stages):
        ends = (stage.embeds == (i == 0)) and (stage.has_head == (i == len(stages) - 1))
        if stage.layer_range[0] != at or not ends or stage.architecture != stages[0].architecture:
            expected = f"a stage of one model from layer {at} on, the first embeds, the last has the head"
            got = f"layers {stage.layer_range}, embeds={stage.embeds}, head={stage.has_head}"
            refuse("pipeline.tiling", f"stages[{i}]", expected, got)
        if same_weights and stage.fingerprint != stages[0].fingerprint:
            hint = "same_weights=False mixes the weights of models on purpose"
            expected = f"the fingerprint of the first stage, {stages[0].fingerprint}"
            refuse("pipeline.fingerprint", f"stages[{i}]", expected, stage.fingerprint, hint)
        at = stage.layer_range[1]
    if not stages or at != len(stages[0].architecture.layers):
        refuse("pipeline.tiling", "stages", "stages up to the last layer", f"up to {at}")


class PipelineBase:
    """Stages whose layer ranges tile the model, called as one model."""

    # Each backend defines these.

    def _in_order(self) -> Sequence[Any]:
        """Return the stages in order."""
        raise NotImplementedError

    def token_ids(self, rows: Sequence[Sequence[int]]) -> Array:
        """Return rows of equal length as an array for this pipeline. *Shape:* (batch, sequence), int64."""
        raise NotImplementedError

    def _enter(self, x: Array, stage: Any) -> Array:
        """Return the input of a stage in its dtype and on its device."""
        return x

    def _nested(self, array: object) -> list[list[Any]] | None:
        """Return a two-dimensional array as lists; None for any other object."""
        raise NotImplementedError

    def _shift(self, x: Array, starts: Sequence[int]) -> Array:
        """Rotate row b to the left by starts[b]. *Shape:* (batch, sequence, …) -> the same."""
        raise NotImplementedError

    def _lengthen(self, x: Array, more: int) -> Array:
        """Append zeros to the sequence. *Shape:* (batch, sequence, …) -> (batch, sequence + more, …)."""
        raise NotImplementedError

    def _draw(self, logits: Array, sampling: Sampling, generator: random.Random) -> Array:
        """Draw the next token of each row. *Shape:* (batch, vocab) -> (batch), int64."""
        raise NotImplementedError

    def _row(self, values: list[int], like: Array) -> Array:
        """Return values as an array on the device of another. *Shape:* (number of values), int64."""
        raise NotImplementedError

    def _without_gradients(self) -> AbstractContextManager[Any]:
        return nullcontext()

    # Every backend shares these.

    @property
    def first(self) -> Any:
        """Return the stage that takes token ids."""
        return self._in_order()[0]

    def session(self, batch_size: int = 1, capacity: int | None = None) -> Session:
        """Return an empty session of ``capacity`` slots a row; by default 512, or the positions of a smaller model.

        Raises:
            BundleError: ``session.capacity`` for more positions than the model has.
        """
        if capacity is None:
            capacity = min(512, self.first.architecture.position_limit or 512)
        caches = [stage.cache(batch_size, capacity) for stage in self._in_order()]
        return Session(caches, int(batch_size), int(capacity))

    def forward(
        self,
        token_ids: Array,
        *,
        attention_mask: Array | None = None,
        session: Session | None = None,
        logits: LogitsWanted = "all",
    ) -> Array:
        """Compute logits for some tokens of each row, after the tokens of the session.

        *Shape:* (batch, sequence) -> (batch, sequence, vocab), or (batch, k, vocab) for ``logits="last"`` or k.

        Args:
            token_ids: of an integer dtype.
            attention_mask: (batch, sequence), 1 for a token of this call, 0 for padding. Each row has one run of ones,
                possibly empty, padded left, right or on both sides. Padding enters no cache, and its logits are zero.
            session: a session from ``session()``, which this call extends.
            logits: "all" positions, each row's "last" one, or its last k.

        Raises:
            BundleError: ``input.*``, ``session.*``.
        """
        stages = self._in_order()
        if session is not None and not isinstance(session, Session):
            expected, got = "a session from session()", type(session).__name__
            raise BundleError(Problem(code="input.cache", argument="session", expected=expected, got=got))
        caches: Sequence[Any] = [None] * len(stages) if session is None else session.caches
        if len(caches) != len(stages):
            expected, got = f"the session of a pipeline of {len(stages)} stages", f"one of {len(caches)}"
            raise BundleError(Problem(code="input.cache", argument="session", expected=expected, got=got))
        shape = tuple(getattr(token_ids, "shape", ()))
        starts = counts = None
        if attention_mask is not None:
            starts, counts = self._runs(attention_mask, shape)
            token_ids = self._shift(token_ids, starts)
        past = None if session is None else session.past
        # Every stage checks the call before any cache is written, so that a refusal changes nothing.
        call = stages[0].check(token_ids, past=past, count=counts, cache=caches[0], logits=logits)
        for stage, cache in zip(stages[1:], caches[1:], strict=True):
            stage.check_call(token_ids, stage.convert_call(call), cache, logits)
        x = token_ids[:, : call.length]
        for stage, cache in zip(stages, caches, strict=True):
            x = stage(self._enter(x, stage), positions=stage.convert_call(call), cache=cache, logits=logits)
        if session is not None:
            session.past = [before + n for before, n in zip(call.past, call.count, strict=True)]
        if starts is not None and logits == "all":
            x = self._shift(self._lengthen(x, shape[1] - x.shape[1]), [-start for start in starts])
        return x

    def _runs(self, mask: object, shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
        """Return where the tokens of each row begin, and their number.

        Raises:
            BundleError: ``input.shape``, ``input.mask``.
        """

        def refuse(code: str, expected: str, got: str) -> None:
            raise BundleError(Problem(code=code, argument="attention_mask", expected=expected, got=got))

        rows, own = self._nested(mask), tuple(getattr(mask, "shape", ()))
        if rows is None or own != shape:
            got = type(mask).__name__ if rows is None else str(own)
            refuse("input.shape", f"{shape}, as token_ids: the mask covers this call's tokens only", got)
        starts, counts = [], []
        for row, values in enumerate(rows or ()):
            ones = [i for i, value in enumerate(values) if value]
            if any(value not in (0, 1) for value in values) or (ones and ones[-1] - ones[0] + 1 != len(ones)):
                refuse("input.mask", f"one run of ones, the rest zeros, in row {row}", quoted(values))
            starts.append(ones[0] if ones else 0)
            counts.append(len(ones))
        return starts, counts

    def generate(
        self,
        token_ids: Array,
        *,
        max_new_tokens: int = 20,
        attention_mask: Array | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_ids: Sequence[int] = (),
        session: Session | None = None,
    ) -> Iterator[Array]:
        """Continue a prompt, one token of every row at a time.

        *Shape:* (batch, sequence) -> up to ``max_new_tokens`` times (batch), int64.

        A row ends with the first of ``stop_ids`` that it draws. That token is still yielded; then the row yields -1.

        Args:
            token_ids: the prompt.
            max_new_tokens: the largest number of tokens to yield.
            attention_mask: as for a call.
            temperature: 0 for the likeliest token, else the divisor of the logits.
            top_k: draw among the k likeliest.
            top_p: draw among the likeliest tokens that together reach this probability.
            seed: the seed of the draws; None for a different one each time.
            stop_ids: tokens that end a row.
            session: a session to continue; by default a new one that is large enough.
        """
        sampling = Sampling.of(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        most = as_integer(max_new_tokens)
        if most is None or most < 0:
            got = quoted(max_new_tokens)
            raise BundleError(
                Problem(code="input.value", argument="max_new_tokens", expected="a number from 0", got=got)
            )
        shape = tuple(getattr(token_ids, "shape", ()))
        counts = None if attention_mask is None else self._runs(attention_mask, shape)[1]
        longest = self.first.check(token_ids, count=counts).stop
        if session is None and counts is not None and min(counts) == 0:
            expected, got = "at least one token in every row to go on from", "a row of padding alone"
            raise BundleError(Problem(code="input.mask", argument="attention_mask", expected=expected, got=got))
        limit = self.first.architecture.position_limit
        if session is None and limit is not None and longest + most - 1 > limit:
            expected = f"at most {limit - longest + 1}: the model has {limit} positions, the prompt {longest} tokens"
            raise BundleError(
                Problem(code="input.position", argument="max_new_tokens", expected=expected, got=f"{most}")
            )
        if session is None:
            # The last token is yielded and not fed again, so it needs no slot.
            session = self.session(shape[0], max(1, longest + most - 1))
        stops = frozenset(as_integers(stop_ids, "stop_ids"))
        return self._generate(token_ids, attention_mask, most, sampling, stops, session)

    def _generate(
        self,
        token_ids: Array,
        attention_mask: Array | None,
        max_new_tokens: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
        session: Session,
    ) -> Iterator[Array]:
        generator = random.Random(sampling.seed)
        running = [True] * token_ids.shape[0]
        for _ in range(max_new_tokens):
            with self._without_gradients():  # not around the loop, as the caller's code runs between two tokens
                last = self.forward(token_ids, attention_mask=attention_mask, session=session, logits="last")[:, -1]
                drawn = self._draw(last, sampling, generator)
            tokens = drawn.tolist()
            given = [token if alive else STOPPED for token, alive in zip(tokens, running, strict=True)]
            yield self._row(given, token_ids)
            running = [token >= 0 and token not in stop_ids for token in given]
            if not any(running):
                return
            token_ids, attention_mask = self._row(tokens, token_ids)[:, None], None
            if not all(running):
                attention_mask = self._row([int(alive) for alive in running], token_ids)[:, None]
