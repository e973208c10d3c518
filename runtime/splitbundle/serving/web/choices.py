"""One choice of an answer while it is made: a text comes in pieces, and becomes the parts of OpenAI's documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from splitbundle.records import record
from splitbundle.serving.web.requests import Request
from splitbundle.serving.web.tool_calls import ToolCall, ToolCalls
from splitbundle.stages.channels import Channels, divided
from splitbundle.stages.text_generation import CANCELLED, STOP
from splitbundle.stages.thinking import Thinking

_CONTEXT_OF_THINKING: Final = 32
"""The tokens at the end of a prompt that tell whether the model begins inside a thinking block."""
Chance = tuple[int, float, Sequence[tuple[int, float]]]
"""A token, its log-probability, and the likeliest tokens with theirs."""


@record(frozen=True, slots=True, kw_only=True)
class Part:
    """What has been added to a choice."""

    index: int
    text: str = ""
    thinking: str = ""
    tool_calls: tuple[tuple[int, ToolCall], ...] = ()
    """Calls with their numbers in the choice."""
    chances: tuple[Chance, ...] | None = None
    finish_reason: str | None = None


class Choice:
    """A choice: the generation behind it, and what comes out of it."""

    def __init__(self, index: int, request: Request, tokenizer: Any, generation: Any) -> None:
        self.index, self.generation, self._request = index, generation, request
        self._tools = ToolCalls(request.tools)
        self._thinking: Thinking | Channels | None = None
        if request.is_chat:
            end = generation.prompt_ids[-_CONTEXT_OF_THINKING:]
            self._thinking = divided(tokenizer.decode(end, control_tokens=True))
        self._reported = self._called = 0

    def parts(self) -> Iterator[Part]:
        """Make the text, and yield what comes. It waits for each token."""
        for piece in self.generation:
            text, thinking = self._divided(piece)
            if text or thinking:
                yield self._part(text, thinking)
        if self.generation.finish_reason == CANCELLED:
            return
        text, thinking = "", ""
        for is_thinking, rest in self._thinking.rest() if self._thinking is not None else ():
            if is_thinking:
                thinking += rest
            else:
                text += self._tools.feed(rest)
        text += self._tools.rest()
        reason = "stop" if self.generation.finish_reason == STOP else "length"
        yield self._part(text, thinking, "tool_calls" if self._tools.found else reason)

    def _divided(self, piece: str) -> tuple[str, str]:
        """Return the text and the thinking of a piece."""
        if self._thinking is None:
            return self._tools.feed(piece), ""
        text, thinking = "", ""
        for is_thinking, each in self._thinking.feed(piece):
            if is_thinking:
                thinking += each
            else:
                text += self._tools.feed(each)
        return text, thinking

    def _part(self, text: str, thinking: str, finish_reason: str | None = None) -> Part:
        made, chances = self.generation, None
        if self._request.logprobs is not None:
            ids, logprobs, top = (each[self._reported :] for each in (made.ids, made.logprobs, made.top))
            chances = tuple(zip(ids, logprobs, top, strict=False))
            self._reported += len(chances)
        calls = tuple(enumerate(self._tools.found))[self._called :]
        self._called += len(calls)
        return Part(
            index=self.index,
            text=text,
            thinking=thinking,
            tool_calls=calls,
            chances=chances,
            finish_reason=finish_reason,
        )
