"""Continue texts and chats: stop strings, pieces of text while they are made, and the reason of the end."""

from __future__ import annotations

import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from splitbundle import logs
from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.integers import as_integer, as_token_ids
from splitbundle.records import record

if TYPE_CHECKING:
    from splitbundle.format.architecture.decoder import Architecture
    from splitbundle.stages.session import Session

SAMPLING: Final = (
    *("temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed"),
)
"""The arguments that choose how tokens are drawn."""
MAX_STOPS: Final = 64
DEFAULT_TOKENS: Final = 512
"""The largest number of new tokens of a model whose context is unknown, unless the caller gives another."""
FIRST_TOKENS: Final = 256
"""The number of new tokens for which a new session has room at first."""
STOP, LENGTH, CONTEXT, CANCELLED = "stop", "length", "context", "cancelled"


@record(frozen=True, slots=True, kw_only=True)
class Completion:
    """A text that a model made, and how it ended."""

    text: str
    """The new text, without the stop string."""
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    """The new tokens, without the one that ended the text."""
    finish_reason: str
    """``"stop"`` at a stop id or a stop string, ``"length"`` at the number of tokens that was asked for, ``"context"``
    where the model's context is full, ``"cancelled"`` if the caller ended it."""
    stopped_by: str | int | None = None
    """The stop string or the stop id."""
    reused: int = 0
    """The number of tokens of the prompt that were in the session already, and were not computed again."""
    logprobs: tuple[float, ...] | None = None
    """The natural logarithm of the probability of each new token, if asked for."""
    top: tuple[tuple[tuple[int, float], ...], ...] | None = None
    """For each new token, the likeliest tokens with the logarithms of their probabilities, if asked for."""


class StopStrings:
    """Find the first stop string in a text that comes in pieces. No part of a stop string is ever returned."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def feed(self, piece: str) -> str:
        """Return the text that can't belong to a stop string. After ``found`` is set, all further text is dropped."""
        if self.found is not None:
            return ""
        held = self._held + piece
        hits = [(at, -len(stop), stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if hits:
            at, _, self.found = min(hits)
            self._held = ""
            return held[:at]
        keep = max((overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def rest(self) -> str:
        """Return the text that was held back, at the end."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, sought: str) -> int:
    """Return the length of the longest end of a text that begins another text, and isn't all of it."""
    return next((n for n in range(min(len(text), len(sought) - 1), 0, -1) if text.endswith(sought[:n])), 0)


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the stop strings of a caller.

    Raises:
        BundleError: ``input.value``.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS or not all(isinstance(each, str) and each for each in stops):
        raise wrong_argument("stop", f"a text, or up to {MAX_STOPS} texts, none of them empty", quoted(stop))
    return stops


class TextGeneration:
    """The text that a model makes, as an iterator of its pieces. ``Pipeline.stream_text`` makes one.

    A piece is never half a character, and never part of a stop string. ``close`` ends the generation, and frees the
    cache of a session that it made itself. It is also a context manager, which closes it.

    ``text``, ``ids``, ``logprobs`` and ``top`` have what has come so far; ``prompt_ids`` the prompt, and ``reused`` the
    number of its tokens that weren't computed again. ``finish_reason`` is None until the end; ``Completion`` says what
    it and ``stopped_by`` mean.

    One thread uses it at a time. ``close`` may be called from another thread: then the generation ends before its next
    token.
    """

    def __init__(
        self,
        pipeline: Any,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int | None,
        stop: str | Sequence[str] | None,
        stop_ids: Sequence[int] | None,
        session: Session | None,
        logprobs: int | None,
        beyond_context: bool,
        prompt_lookup: int | None,
        sampling: Mapping[str, Any],
    ) -> None:
        vocabulary = pipeline.first.architecture.vocab_size
        self.prompt_ids = tuple(as_token_ids(prompt_ids, "prompt", vocabulary))
        if not self.prompt_ids:
            raise wrong_argument("prompt", "at least one token", "none")
        room = room_after(pipeline, len(self.prompt_ids), beyond=beyond_context)
        wanted = None if max_new_tokens is None else as_integer(max_new_tokens)
        if max_new_tokens is not None and (wanted is None or wanted < 0):
            raise wrong_argument("max_new_tokens", "a number from 0, or None", quoted(max_new_tokens))
        limits = [limit for limit in (wanted, room) if limit is not None]
        self._most = min(limits) if limits else DEFAULT_TOKENS
        self._limit = CONTEXT if room is not None and (wanted is None or room < wanted) else LENGTH
        self._ended: tuple[str, str | int] | None = None
        self._stop_ids = frozenset(
            tokenizer.stop_ids if stop_ids is None else as_token_ids(stop_ids, "stop_ids", vocabulary)
        )
        self._stops = StopStrings(stop_strings(stop))
        self._stream = tokenizer.stream(self.prompt_ids)
        self._wants_logprobs = logprobs
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[tuple[tuple[int, float], ...]] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.stopped_by: str | int | None = None
        self._times: list[float] = []  # of the first token and of the last
        self._drawn = 0
        self._closed = False
        self._steps = pipeline.row_steps(
            self.prompt_ids,
            max_new_tokens=self._most,
            stop_ids=sorted(self._stop_ids),
            session=session,
            logprobs=logprobs,
            prompt_lookup=prompt_lookup,
            **sampling,
        )
        self._pieces = self._make()
        # Nobody may ever ask for a piece. A shared pipeline makes the text all the same, until it is told not to.
        weakref.finalize(self, self._steps.cancel).atexit = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        piece = next(self._pieces)
        if self._closed:  # by another thread, while this piece was made
            self.close()
        return piece

    def __enter__(self) -> TextGeneration:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def cancel(self) -> None:
        """End the generation before its next token. A handler of signals, or another thread, may call this."""
        self._closed = True
        self._steps.cancel()

    def close(self) -> None:
        """End the generation. Its ``finish_reason`` is ``"cancelled"`` unless it had ended before."""
        self.cancel()
        try:
            self._pieces.close()
        except ValueError:
            return  # another thread is computing a token: it sees the mark, and ends
        if self.finish_reason is None:
            self._finish(CANCELLED)

    @property
    def reused(self) -> int:
        """Return the number of tokens of the prompt that weren't computed again."""
        reused: int = self._steps.reused
        return reused

    @property
    def tokens_per_second(self) -> float | None:
        """Return the speed after the first token, or None before there are two."""
        if len(self._times) < 2 or self._times[1] <= self._times[0]:
            return None
        return (self._drawn - 1) / (self._times[1] - self._times[0])

    def completion(self) -> Completion:
        """Make the rest of the text, and return all of it."""
        for _ in self:
            pass
        asked = self._wants_logprobs is not None
        return Completion(
            text=self.text,
            prompt_ids=self.prompt_ids,
            ids=tuple(self.ids),
            finish_reason=self.finish_reason or CANCELLED,
            stopped_by=self.stopped_by,
            reused=self.reused,
            logprobs=tuple(self.logprobs) if asked else None,
            top=tuple(self.top) if asked else None,
        )

    def _make(self) -> Generator[str, None, None]:
        try:
            for step in self._steps:
                if self._closed:
                    self._finish(CANCELLED)
                    return
                yield from self._released(self._take(step))
                if self._ended is not None:
                    self._finish(*self._ended)
                    break
            if self._closed:  # a shared pipeline gave no more steps
                self._finish(CANCELLED)
                return
            yield from self._released(self._rest())
            self._finish(*(self._ended or (self._limit, None)))
        finally:
            self._steps.close()

    def _take(self, step: Any) -> str:
        """Return the text that a step completes. ``_has_ended`` tells whether it is the last one."""
        (token,) = step.ids
        self._times = [*self._times[:1], time.perf_counter()]
        self._drawn += 1
        if token in self._stop_ids:
            self._ended = STOP, token
            return ""
        self.ids.append(token)
        if self._wants_logprobs is not None:
            self.logprobs.append(step.logprobs[0])
            self.top.append(step.top[0])
        piece = self._stops.feed(self._stream.piece(token))
        if self._stops.found is not None:
            self._ended = STOP, self._stops.found
        return piece

    def _rest(self) -> str:
        """Return the text after the last step: a character that isn't whole, or the beginning of a stop string."""
        if self._stops.found is not None:
            return ""
        rest = self._stops.feed(self._stream.rest())
        if self._stops.found is not None:
            self._ended = STOP, self._stops.found
        return rest + self._stops.rest()

    @property
    def _has_ended(self) -> bool:
        """Return whether a stop id, a stop string or the number of tokens has ended the text."""
        return self._ended is not None or self._drawn >= self._most

    def _released(self, piece: str) -> Iterator[str]:
        self.text += piece
        if piece:
            yield piece

    def _finish(self, reason: str, stopped_by: str | int | None = None) -> None:
        self.finish_reason, self.stopped_by = reason, stopped_by
        self._steps.close()
        prompt, new = len(self.prompt_ids), len(self.ids)
        logs.debug(
            "a text ended (%s): %d tokens of prompt, %d of them reused, %d new", reason, prompt, self.reused, new
        )


class RowSteps:
    """The steps of one row: an iterator, the number of tokens of the prompt that weren't computed, and ``close``."""

    def __init__(self, steps: Iterator[Any], reused: int) -> None:
        self._steps, self.reused = steps, reused

    def __iter__(self) -> Iterator[Any]:
        return self._steps

    def cancel(self) -> None:
        """Do nothing: the one who asks for steps makes them."""

    def close(self) -> None:
        """Make no more steps, and free what they hold."""
        self._steps.close()  # type: ignore[attr-defined]


def row_steps(
    pipeline: Any, prompt_ids: Sequence[int], *, session: Session | None, max_new_tokens: int, **options: Any
) -> RowSteps:
    """Begin to continue one row. See ``TextPipeline.row_steps``."""
    reused = 0
    if session is None:
        # The number of new tokens is only a limit, so the session grows with the text.
        session = pipeline.session(1, max(1, len(prompt_ids) + min(max_new_tokens, FIRST_TOKENS) - 1), grows=True)
    else:
        if session.batch_size != 1:
            raise wrong_argument("session", "a session of one row", f"one of {session.batch_size}")
        session.grows = True
        reused = resume(session, prompt_ids)
    ids = pipeline.token_ids([list(prompt_ids[reused:])])
    return RowSteps(pipeline.steps(ids, session=session, max_new_tokens=max_new_tokens, **options), reused)


def context_of(pipeline: Any) -> int | None:
    """Return the number of tokens that a model can take, or None if nothing states it."""
    return shorter_context(pipeline.first.architecture, pipeline.context_length)


def shorter_context(architecture: Architecture, stated: int | None) -> int | None:
    """Return the number of tokens that a model can take, or None if nothing states it.

    Args:
        architecture: the model's facts, whose positions may have a limit.
        stated: the context length that the bundle states.
    """
    known = (architecture.position_limit, stated)
    return min((length for length in known if length is not None), default=None)


def room_after(pipeline: Any, prompt: int, *, beyond: bool) -> int | None:
    """Return the number of tokens that may follow a prompt, or None if there is no limit.

    The last token is drawn and not computed with, so it needs no position.

    Args:
        pipeline: the pipeline.
        prompt: the number of tokens of the prompt.
        beyond: whether the text may go beyond the context length that the model was made for.

    Raises:
        BundleError: ``input.position`` for a prompt that is longer than the context.
    """
    context = pipeline.first.architecture.position_limit if beyond else context_of(pipeline)
    if context is None:
        return None
    if prompt > context:
        expected, got = f"at most {context} tokens, the model's context", f"{prompt}"
        raise BundleError(Problem(code="input.position", argument="prompt", expected=expected, got=got))
    return context - prompt + 1


def resume(session: Session, prompt: Sequence[int], row: int = 0) -> int:
    """Take back what a row has beyond a prompt's beginning, and return the number of tokens that stay.

    At least one token of the prompt is left to compute, as its logits are needed.
    """
    held = session.tokens[row]
    same = common_beginning(held, prompt)

    def back(tokens: int) -> None:
        session.rollback([tokens if each == row else 0 for each in range(session.batch_size)])

    if same < len(held):
        try:
            back(len(held) - same)
        except BundleError as error:
            if error.codes != ("session.rollback",):
                raise
            back(len(held))  # rotations depend on the length here, so nothing can stay
            return 0
    return same


def common_beginning(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many tokens of a prompt a row holds, from the beginning on, without the prompt's last one."""
    most = min(len(held), len(prompt) - 1)
    return next((i for i in range(most) if held[i] != prompt[i]), most)
