"""The base of the pipelines of every backend: stages in order, sessions and generation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.stages.call import Call, named_rows
from splitbundle.stages.contract import check_contract
from splitbundle.stages.generation import GeneratingPipeline
from splitbundle.stages.sampling import History, RowGenerators, Sampling
from splitbundle.stages.session import Session
from splitbundle.stages.stage import Array, LogitsWanted, StageBase
from splitbundle.stages.text_pipeline import TextPipeline


def check_tiling(stages: Sequence[StageBase], *, same_weights: bool) -> None:
    """Check that stages, in order, make one model.

    Raises:
        BundleError: ``pipeline.stage``, ``pipeline.tiling``, ``pipeline.fingerprint``.
    """

    def refuse(code: str, where: str, expected: str, got: str, hint: str | None = None) -> NoReturn:
        raise BundleError(Problem(code=code, argument=where, expected=expected, got=got, hint=hint))

    at = 0
    for i, stage in enumerate(stages):
        check_contract(stage, f"stages[{i}]")
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


class PipelineBase(GeneratingPipeline, TextPipeline):
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

    def _draw(self, logits: Array, sampling: Sampling, generators: RowGenerators, history: History | None) -> Array:
        """Draw the next token of each row. *Shape:* (batch, vocab) -> (batch), int64."""
        raise NotImplementedError

    def _scores(self, logits: Array, token_ids: Array) -> Array:
        """Return the log-probability of each token. *Shape:* (batch, n, vocab), (batch, n) -> (batch, n)."""
        raise NotImplementedError

    def _likeliest(self, logits: Array, number: int) -> list[tuple[tuple[int, float], ...]]:
        """Return the likeliest tokens of each row, with their log-probabilities. *Shape:* (batch, vocab)."""
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

    def session(self, batch_size: int = 1, capacity: int | None = None, *, grows: bool = False) -> Session:
        """Return an empty session of ``capacity`` slots a row; by default 512, or the positions of a smaller model.

        One thread uses a session at a time. Threads with sessions of their own may share the pipeline.

        Args:
            batch_size: the number of rows.
            capacity: the number of slots of a row.
            grows: whether a call that needs more slots gets them, by a copy of the cache. Otherwise it is refused.

        Raises:
            BundleError: ``session.capacity`` for more positions than the model has.
        """
        if capacity is None:
            capacity = min(512, self.first.architecture.position_limit or 512)
        caches = [stage.cache(batch_size, capacity) for stage in self._in_order()]
        return Session(caches, int(batch_size), int(capacity), grows=grows)

    def forward(
        self,
        token_ids: Array,
        *,
        attention_mask: Array | None = None,
        session: Session | None = None,
        logits: LogitsWanted = "all",
        rows: Sequence[int] | None = None,
        timed: Callable[[str, float], None] | None = None,
    ) -> Array:
        """Compute logits for some tokens of each row, after the tokens of the session.

        *Shape:* (batch, sequence) -> (batch, sequence, vocab), or (batch, k, vocab) for ``logits="last"`` or k.

        Args:
            token_ids: of an integer dtype.
            attention_mask: (batch, sequence), 1 for a token of this call, 0 for padding. Each row has one run of ones,
                possibly empty, padded left, right or on both sides. Padding enters no cache, and its logits are zero.
            session: a session from ``session()``, which this call extends.
            logits: "all" positions, each row's "last" one, or its last k.
            rows: (batch) the rows of the session that this call computes: its row i is ``rows[i]``. They are distinct
                numbers from 0 in any order; by default all rows in order. The other rows stay as they are, and cost no
                time. So a prompt can join while other rows go on.
            timed: is called with the name of each stage and the seconds that its call took.

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
        named: dict[str, Any] = {}  # empty unless there are rows, because a stage of others may not know the argument
        if rows is not None:
            rows = named["rows"] = self._named(rows, session)
            past = [session.past[row] for row in rows] if session is not None else None
        if session is not None and session.grows:
            session.make_room(shape, counts, rows)
        # Every stage checks the call before any cache is written, so that a refusal changes nothing.
        call = stages[0].check(token_ids, past=past, count=counts, cache=caches[0], logits=logits, **named)
        for stage, cache in zip(stages[1:], caches[1:], strict=True):
            stage.check_call(token_ids, _converted(call, stage), cache, logits)
        x = token_ids[:, : call.length]
        for stage, cache in zip(stages, caches, strict=True):
            began = time.perf_counter() if timed is not None else 0.0
            x = stage(self._enter(x, stage), positions=_converted(call, stage), cache=cache, logits=logits)
            if timed is not None:
                timed(stage.name, time.perf_counter() - began)
        if session is not None:
            session.advance(self._nested(token_ids) or [], call.count, rows)
        if starts is not None and logits == "all":
            x = self._shift(self._lengthen(x, shape[1] - x.shape[1]), [-start for start in starts])
        return x

    def _named(self, rows: Sequence[int], session: Session | None) -> tuple[int, ...]:
        """Return the rows of a call.

        Raises:
            BundleError: ``input.value`` without a session, for rows that it hasn't, or where a stage takes no rows.
        """

        def refuse(expected: str, got: str) -> NoReturn:
            raise BundleError(Problem(code="input.value", argument="rows", expected=expected, got=got))

        if session is None:
            refuse("no rows without a session, whose rows they are", quoted(rows))
        for stage in self._in_order():
            if not getattr(stage, "takes_rows", False):
                refuse(f"no rows, because stage {stage.name} computes all rows of its cache", quoted(rows))
        return named_rows(rows, session.batch_size)

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


def _converted(call: Call, stage: Any) -> Call:
    """Return a call in the form of a stage. A stage of a user may have none of its own."""
    convert = getattr(stage, "convert_call", None)
    converted: Call = call if convert is None else convert(call)
    return converted
