"""Tell what a model thinks from what it says, while the text comes in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from splitbundle.stages.text_generation import overlap

MARKS: Final = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<|START_THINKING|>", "<|END_THINKING|>"))
"""The texts around a thinking block: Qwen, DeepSeek and SmolLM3; Granite and others; Command."""


class Thinking:
    """Divide a text into thinking blocks and the rest. The texts around a block belong to neither.

    Blocks begin before the answer does. A mark within the answer is part of it: the model may well explain ``<think>``.
    """

    def __init__(self, prompt: str = "") -> None:
        """Begin a text.

        Args:
            prompt: the text of the prompt. If it ends inside a block, the model begins with thinking.
        """
        self._held = ""
        self._close: str | None = None
        self._answers = False
        for begin, end in MARKS:
            if prompt.rfind(begin) > prompt.rfind(end) and prompt.rstrip().endswith(begin):
                self._close = end

    def feed(self, piece: str) -> Iterator[tuple[bool, str]]:
        """Yield the texts that are complete, each with whether it is thinking."""
        self._held += piece
        while self._held:
            if self._answers:
                yield False, self._held
                self._held = ""
                return
            marks = [(self._close, None)] if self._close is not None else list(MARKS)
            found = [(at, mark, end) for mark, end in marks if (at := self._held.find(mark)) >= 0]
            held_back = max(overlap(self._held, mark) for mark, _ in marks)
            at, mark, end = min(found, default=(len(self._held) - held_back, "", self._close))
            text, self._held = self._held[:at], self._held[at:]
            if text:
                yield self._close is not None, text
            if self._close is None and text.strip():
                self._answers = True
            elif not found:
                return
            else:
                self._held, self._close = self._held[len(mark) :], end

    def rest(self) -> Iterator[tuple[bool, str]]:
        """Yield the text that was held back, at the end."""
        if self._held:
            yield self._close is not None, self._held
            self._held = ""
