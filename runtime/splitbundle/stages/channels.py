"""Tell thinking, answers and calls of tools apart in harmony, the format of gpt-oss, while the text comes in pieces.

The format is at https://github.com/openai/harmony/blob/main/docs/format.md: a model writes several messages, each
``<|start|>HEADER<|message|>CONTENT<|end|>``. The header names a channel, and the recipient of a call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Final

from splitbundle.stages.text_generation import overlap
from splitbundle.stages.thinking import Thinking

START: Final = "<|start|>"
CHANNEL: Final = "<|channel|>"
MESSAGE: Final = "<|message|>"
MARKS: Final = (START, "<|end|>", MESSAGE, CHANNEL, "<|constrain|>", "<|return|>", "<|call|>")
"""The control tokens between messages and their parts."""
_ENDS: Final = ("<|end|>", "<|return|>", "<|call|>", START)
_ANALYSIS: Final = "analysis"
_NAME: Final = re.compile(r"<\|channel\|>\s*([^\s<]*)")
_RECIPIENT: Final = re.compile(r"(?:^|\s|>)to=functions\.([^\s<]+)")
_LONGEST_HEADER: Final = 512
"""A longer text isn't a header: then the model doesn't follow the format, and this is its answer."""


def divided(prompt: str) -> Thinking | Channels:
    """Return what divides the text after a prompt, whose end tells the format. The prompt has its control tokens."""
    begun = prompt.rpartition(START)[2]
    if START in prompt and begun.startswith("assistant") and not any(end in begun for end in _ENDS):
        return Channels(begun)
    return Thinking(prompt)


class Channels:
    """Divide a text in harmony into thinking and the rest, as ``Thinking`` does for marked blocks.

    The channel ``analysis`` is thinking. Everything else is the answer, with an empty line between two messages. A call
    of a function becomes ``<tool_call>{"name": …, "arguments": …}</tool_call>``, as several other models write it.
    """

    def __init__(self, header: str = "") -> None:
        """Begin after a header that the prompt began, or after a header and the beginning of a content."""
        self._held = header
        self._header: str | None = None  # of the message whose content comes, or None within a header
        self._call: str | None = None
        self._said: dict[bool, bool] = {}
        """Whether something was said, and whether something was thought."""
        self._parted = True
        for _ in self.feed(""):
            pass  # what the prompt holds of a content is no part of the text

    def feed(self, piece: str) -> Iterator[tuple[bool, str]]:
        """Yield the texts that are complete, each with whether it is thinking."""
        self._held += piece
        while self._held:
            if self._header is None:
                header, mark, rest = self._held.partition(MESSAGE)
                if mark:
                    self._begin(header, rest)
                elif len(self._held) > _LONGEST_HEADER:
                    self._begin("", self._held.removeprefix("assistant"))
                else:
                    return
                continue
            found = min((at, end) for end in _ENDS if (at := self._held.find(end)) >= 0) if self._ends() else None
            if found is None:
                keep = max(overlap(self._held, end) for end in _ENDS)
                at = len(self._held) - keep
                text, self._held = self._held[:at], self._held[at:]
                yield from self._content(text)
                return
            at, end = found
            text, self._held = self._held[:at], self._held[at + len(end) :]
            yield from self._content(text)
            yield from self._end()

    def rest(self) -> Iterator[tuple[bool, str]]:
        """Yield the text that was held back, at the end."""
        held, self._held = self._held, ""
        if self._header is not None:
            yield from self._content(held)
            yield from self._end()
        elif CHANNEL not in held and START not in held and held.removeprefix("assistant").strip():
            self._begin("", "")  # the model doesn't follow the format
            yield from self._content(held.removeprefix("assistant"))

    def _ends(self) -> bool:
        return any(end in self._held for end in _ENDS)

    def _begin(self, header: str, rest: str) -> None:
        self._header, self._held, self._parted = header, rest, False
        self._call = "" if _RECIPIENT.search(header) else None

    def _end(self) -> Iterator[tuple[bool, str]]:
        """End a message. A call is complete then."""
        call, header = self._call, self._header or ""
        self._header, self._call = None, None
        name = _RECIPIENT.search(header)
        if call is not None and name is not None:
            yield (
                False,
                f'<tool_call>{{"name": {json.dumps(name[1])}, "arguments": {call.strip() or "{}"}}}</tool_call>',
            )
            self._said[False] = True

    def _content(self, text: str) -> Iterator[tuple[bool, str]]:
        if self._call is not None:
            self._call += text
            return
        if not text:
            return
        found = _NAME.search(self._header or "")
        thinks = found is not None and found[1] == _ANALYSIS
        if not self._parted and self._said.get(thinks):
            text = f"\n\n{text}"
        self._parted = self._said[thinks] = True
        yield thinks, text
