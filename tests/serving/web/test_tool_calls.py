"""Calls of tools in texts, however the texts are cut into pieces."""

from __future__ import annotations

import json
import random

import pytest

from splitbundle.serving.web.tool_calls import ToolCalls

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("weather", "now")]
HERMES = '<tool_call>\n{"name": "weather", "arguments": {"town": "Zürich"}}\n</tool_call>'
CASES = [
    ("plain text", "plain text", []),
    (HERMES, "", [("weather", {"town": "Zürich"})]),
    (f"First.\n{HERMES}{HERMES} Then.", "First.\n Then.", [("weather", {"town": "Zürich"})] * 2),
    ('{"name": "now", "parameters": {}}', "", [("now", {})]),
    ('  \n{"name": "now", "arguments": "{\\"zone\\": 1}"}', "", [("now", {"zone": 1})]),
    (
        '[{"name": "now"}, {"name": "weather", "arguments": {"town": "x"}}]',
        "",
        [("now", {}), ("weather", {"town": "x"})],
    ),
    ('[TOOL_CALLS][{"name": "now", "arguments": {}}]', "", [("now", {})]),
    ('<|python_tag|>{"name": "now", "parameters": {}}', "", [("now", {})]),
    ('<tool_call>{"name": "now", "arguments": {}}', "", [("now", {})]),  # it ended with the stop token
    ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
    ('{"name": "now", "parameters": 3}', '{"name": "now", "parameters": 3}', []),
    ("{ not JSON", "{ not JSON", []),
    ("[1, 2]", "[1, 2]", []),
    ("<tool_call>nonsense</tool_call> x", "<tool_call>nonsense</tool_call> x", []),
    ('Text {"name": "now", "parameters": {}}', 'Text {"name": "now", "parameters": {}}', []),
    ("a < b, <tool", "a < b, <tool", []),
    ("[" * 9000, "[" * 9000, []),
]


@pytest.mark.parametrize(("text", "shown", "calls"), CASES, ids=[text[:24] for text, _, _ in CASES])
def test_a_text_in_any_pieces(text: str, shown: str, calls: list[tuple[str, object]]) -> None:
    for seed in range(30 if len(text) < 500 else 2):
        draw, made, found = random.Random(seed), "", ToolCalls(TOOLS)
        at = 0
        while at < len(text):
            size = len(text) if seed == 0 else draw.randint(1, 9)
            made += found.feed(text[at : at + size])
            at += size
        made += found.rest()
        assert made == shown
        assert [(call.name, json.loads(call.arguments)) for call in found.found] == calls
        assert len({call.id for call in found.found}) == len(calls)


def test_without_tools_all_is_text() -> None:
    found = ToolCalls(None)
    assert found.feed(HERMES) + found.rest() == HERMES
    assert found.found == []
