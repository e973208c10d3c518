"""Calls of tools in the text that a model made, for the formats that are known.

- Hermes, Qwen, Granite and others: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``.
- Llama 3: the whole answer is ``{"name": …, "parameters": {…}}``.
- Mistral: the whole answer is ``[{"name": …, "arguments": {…}}]``, after a control token.
- gpt-oss: ``stages.channels`` writes its calls in the first form.

Anything else stays text: a program must not act on a guess.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Sequence
from typing import Any, Final

from splitbundle.records import record
from splitbundle.stages.text_generation import overlap

_BEGIN: Final = "<tool_call>"
_END: Final = "</tool_call>"
_MARKERS: Final = ("[TOOL_CALLS]", "<|python_tag|>")
"""Control tokens before a call, which a tokenizer may spell."""


@record(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call of a function."""

    id: str
    name: str
    arguments: str
    """The arguments as JSON."""


class ToolCalls:
    """Divide a text that comes in pieces into text and calls of tools."""

    def __init__(self, tools: Sequence[dict[str, Any]] | None) -> None:
        """Begin a text.

        Args:
            tools: the tools that the model was offered; None if there were none. Then everything is text.
        """
        self._names = None if tools is None else {tool["function"]["name"] for tool in tools}
        self._held, self._begins = "", True
        self.found: list[ToolCall] = []

    def feed(self, piece: str) -> str:
        """Return the text that is no part of a call. Calls that are complete are in ``found``."""
        if self._names is None:
            return piece
        self._held += piece
        text = self._taken_marked()
        if self._begins and not text:
            start = self._held.lstrip()
            markers = any(marker.startswith(start) or start.startswith(marker) for marker in _MARKERS)
            if not start or start[0] in "{[" or markers:
                return ""  # it may become a call that is the whole answer
        keep = overlap(self._held, _BEGIN)
        if self._held.startswith(_BEGIN):
            return text
        text += self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        self._begins = self._begins and not text.strip()
        return text

    def _taken_marked(self) -> str:
        """Take complete marked calls out of the held text. Return the text before them."""
        before = ""
        while (begin := self._held.find(_BEGIN)) >= 0:
            end = self._held.find(_END, begin)
            if end < 0:
                before += self._held[:begin]
                self._held = self._held[begin:]
                break
            calls = _parsed(self._held[begin + len(_BEGIN) : end], self._names or ())
            if not calls:  # no call: the marks are text, too
                before += self._held[: end + len(_END)]
            else:
                before += self._held[:begin]
                self.found += calls
            self._held = self._held[end + len(_END) :]
            self._begins = False
        return before

    def rest(self) -> str:
        """Return the text that was held back, at the end, unless it is a call."""
        held, self._held = self._held, ""
        if self._names is None or not held:
            return held
        text = held.strip()
        for marker in (*_MARKERS, _BEGIN):  # a model may end with its stop token in place of the closing mark
            text = text.removeprefix(marker).strip()
        calls = _parsed(text, self._names)
        self.found += calls
        return "" if calls else held


def _parsed(text: str, names: Collection[str]) -> list[ToolCall]:
    """Return the calls that a JSON text states; none unless all of it is calls of known tools."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for value in values if isinstance(values, list) else [values]:
        if not isinstance(value, dict) or value.get("name") not in names:
            return []
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return []
        if not isinstance(arguments, dict):
            return []
        spelled = json.dumps(arguments, ensure_ascii=False)
        calls.append(ToolCall(id=f"call_{secrets.token_hex(12)}", name=value["name"], arguments=spelled))
    return calls
