"""Continue several texts at once: one call of the pipeline computes a token of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from splitbundle.stages.generation import Drawing, Step, chosen_logprobs, chosen_sampling
from splitbundle.stages.text_generation import FIRST_TOKENS, Completion, TextGeneration

_PADDING: Final = 0
"""The id before shorter prompts. The mask hides it."""


class _NoSteps:
    """Stands for the steps of a row: they come from the batch."""

    reused = 0

    def __iter__(self) -> _NoSteps:
        return self

    def __next__(self) -> Step:
        raise StopIteration

    def cancel(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class _Facts:
    """What a text of a batch must know of its pipeline."""

    def __init__(self, pipeline: Any) -> None:
        self.first, self.context_length = pipeline.first, pipeline.context_length
        self.most = 0
        """The largest number of new tokens of any row."""

    def row_steps(self, prompt_ids: Sequence[int], *, max_new_tokens: int, **_: Any) -> _NoSteps:
        """Note the number of new tokens that a row may have."""
        self.most = max(self.most, max_new_tokens)
        return _NoSteps()


def complete_batch(
    pipeline: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], sampling: dict[str, Any], **options: Any
) -> list[Completion]:
    """Return the completions of prompts, in their order. See ``TextPipeline.complete_texts``.

    Args:
        pipeline: a pipeline of any backend.
        tokenizer: its tokenizer.
        prompts: the token ids of each prompt.
        sampling: the arguments of sampling.
        options: ``max_new_tokens``, ``stop``, ``stop_ids``, ``logprobs`` and ``beyond_context`` of ``stream_text``.

    Raises:
        BundleError: ``input.*``, ``session.*``.
    """
    facts = _Facts(pipeline)
    vocab_size = pipeline.first.architecture.vocab_size
    chosen = chosen_sampling(sampling, vocab_size)
    wanted = chosen_logprobs(options["logprobs"], vocab_size)
    rows = [
        TextGeneration(facts, tokenizer, ids, session=None, prompt_lookup=None, sampling={}, **options)
        for ids in prompts
    ]
    if rows and facts.most:
        _compute(pipeline, rows, Drawing(pipeline, chosen, frozenset(), wanted, len(rows)), facts.most)
    return [row.completion() for row in rows]


def _compute(pipeline: Any, rows: Sequence[TextGeneration], drawing: Drawing, most: int) -> None:
    """Draw the tokens of all rows, until each has ended."""
    longest = max(len(row.prompt_ids) for row in rows)
    missing = [longest - len(row.prompt_ids) for row in rows]
    ids = [[_PADDING] * short + list(row.prompt_ids) for row, short in zip(rows, missing, strict=True)]
    token_ids, mask = pipeline.token_ids(ids), None
    if any(missing):
        mask = pipeline.token_ids([[0] * short + [1] * (longest - short) for short in missing])
    # The number of new tokens is only a limit, so the session grows with the texts.
    capacity, limit = max(1, longest + min(most, FIRST_TOKENS) - 1), pipeline.first.architecture.position_limit
    session = pipeline.session(len(rows), capacity if limit is None else min(capacity, limit), grows=True)
    while True:
        with pipeline._without_gradients():
            last = pipeline.forward(token_ids, attention_mask=mask, session=session, logits="last")
            step, drawn = drawing.step(last, session.tokens)
        for i, row in enumerate(rows):
            if drawing.running[i]:
                row.text += row._take(_of_row(step, i))
        drawing.running = [alive and not row._has_ended for alive, row in zip(drawing.running, rows, strict=True)]
        if not any(drawing.running):
            return
        token_ids, mask = pipeline._row(drawn, token_ids)[:, None], None
        if not all(drawing.running):
            mask = pipeline._row([int(alive) for alive in drawing.running], token_ids)[:, None]


def _of_row(step: Step, row: int) -> Step:
    return Step(
        ids=(step.ids[row],),
        logprobs=None if step.logprobs is None else (step.logprobs[row],),
        top=None if step.top is None else (step.top[row],),
    )
