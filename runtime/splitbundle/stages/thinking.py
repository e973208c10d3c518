"""Tell what a model thinks from what it says, while the text comes in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

MARKS: Final = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<|START_THINKING|>", "<|END_THINKING|>"))
"""The texts around a thinking block: Qwen, DeepSeek and SmolLM3; Granite and others; Command."""


class Thinking:
    """Divide a text into thinking blocks and the rest. The texts around a block belong to neither."""

    def __init__(self, prompt: str = "") -> None:
        """Begin a text.

        Args:
            prompt: the text of the prompt. If it ends inside a block, the model begins with thinking.
        """
        self._held = ""
        self._close: str | None = None
        for begin, end in MARKS:
            if prompt.rfind(begin) > prompt.rfind(end) and prompt.rstrip().endswith(begin):
                self._close = end

    def feed(self, piece: str) -> Iterator[tuple[bool, str]]:
        """Yield the texts that are complete, each with whether it is thinking."""
        self._held += piece
        while self._held:
            marks = [(self._close, None)] if self._close is not None else list(MARKS)
            found = [(at, mark, end) for mark, end in marks if (at := self._held.find(mark)) >= 0]
            if not found:
                keep = max(_overlap(self._held, mark) for mark, _ in marks)
                text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                if text:
                    yield self._close is not None, text
                return
            at, mark, end = min(found)
            if at:
                yield self._close is not None, self._held[:at]
            self._held, self._close = self._held[at + len(mark) :], end

    def rest(self) -> Iterator[tuple[bool, str]]:
        """Yield the text that was held back, at the end."""
        if self._held:
            yield self._close is not None, self._held
            self._held = ""


def _overlap(text: str, mark: str) -> int:
    """Return the length of the longest end of a text that begins a mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
