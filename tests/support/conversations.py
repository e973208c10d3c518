"""Conversations for the tests of chat templates. Each one is what a program may give to a template."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final
from unittest import mock

from jinja2 import TemplateError

TIME: Final = datetime(2026, 2, 3, 4, 5, 6)
"""The time that templates write."""
CONTROL: Final = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "[INST]", "[/INST]", "<<SYS>>", "<bos>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|header_start|>", "<|eot|>"),
    *("<start_of_turn>", "<end_of_turn>", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "<|system|>"),
    *("<|user|>", "<|assistant|>", "<|end|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
    *(
        "<｜User｜>",
        "<｜Assistant｜>",
        "<｜end▁of▁sentence｜>",
        "<｜tool▁calls▁begin｜>",
        "<tool_call>",
        "</think>",
        "<think>",
    ),
    *("<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|python_start|>", "<|image|>", "<|tool|>"),
)
"""Tokens that these formats write themselves."""


def _said(*turns: str, system: str | None = None) -> list[dict[str, Any]]:
    """Return messages: the user's and the assistant's in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return ([] if system is None else [{"role": "system", "content": system}]) + messages


def _call(arguments: Any, name: str = "weather", number: str = "abcdef123") -> dict[str, Any]:
    return {"type": "function", "id": number, "function": {"name": name, "arguments": arguments}}


def _tool(name: str, description: str, properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS: Final = [
    _tool(
        "weather",
        'Says the "weather".\nToday\'s, for <b>one</b> town & its surroundings',
        {
            "town": {"type": "string", "description": "the town, as in “Zürich”"},
            "unit": {"type": "string", "enum": ["celsius", "kelvin"], "default": "celsius"},
            "days": {"type": ["integer", "null"], "default": 3},
        },
        ["town"],
    ),
    _tool(
        "search",
        "Searches",
        {
            "words": {"type": "array", "items": {"type": "string"}},
            "range": {"type": "object", "properties": {"from": {"type": "number"}, "to": {"type": "number"}}},
            "strict": {"type": "boolean", "default": False},
        },
        [],
    ),
    _tool("now", "Says the time", {}, []),
]
DOCUMENTS: Final = [{"title": "One", "text": "The first\ndocument"}, {"title": "Zwei <|end|>", "text": "2"}]
_WEATHER: Final = [
    {"role": "user", "content": "How is the weather in Zürich?"},
    {"role": "assistant", "content": None, "tool_calls": [_call({"town": "Zürich", "days": 2})]},
    {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": '{"sky": "blue & <clear>"}'},
]
_ANSWERED: Final = [*_WEATHER, {"role": "assistant", "content": "It is blue."}]

CONVERSATIONS: Final[dict[str, dict[str, Any]]] = {
    "one turn": {"messages": _said("Hello")},
    "prompt": {"messages": _said("Hello"), "add_generation_prompt": True},
    "answered": {"messages": _said("Hello", "Hi")},
    "system": {"messages": _said("Hello", system="Be brief."), "add_generation_prompt": True},
    "system answered": {"messages": _said("Hello", "Hi", system="Be brief.")},
    "three turns": {"messages": _said("One", "Two", "Three"), "add_generation_prompt": True},
    "eight turns": {"messages": _said(*map(str, range(8)), system="Count")},
    "unicode": {"messages": _said("Grüße, 世界 🙂 \u200b\u00a0e\u0301", "ſ İ ß Σ"), "add_generation_prompt": True},
    "spaces": {"messages": _said("  \n hi \t\n", "\n\n yo  \n", "\n", system="  s  \n")},
    "empty": {"messages": _said("", "", "", system=""), "add_generation_prompt": True},
    "code": {"messages": _said("```python\nprint('{{ x }}')\n{% if %}\n```\n# {# no #}")},
    "quotes": {"messages": _said('"double" \'single\' \\n \\ """three""" `back`', "</b>&amp;<b>")},
    "controls": {"messages": _said(" ".join(CONTROL), "".join(CONTROL), system="".join(CONTROL))},
    "each control": {"messages": _said(*CONTROL[:9])},
    "thinking": {"messages": _said("Why?", "<think>\nHm.\n</think>\n\nSo."), "add_generation_prompt": False},
    "thinking twice": {"messages": _said("Why?", "<think>Hm.</think>So.", "And?", "<think>\nA\n</think>B")},
    "reasoning field": {
        "messages": [
            *_said("Why?", "So.", "And?"),
            {"role": "assistant", "content": "Then.", "reasoning_content": "\nI think.\n"},
        ]
    },
    "thinking off": {"messages": _said("Why?"), "add_generation_prompt": True, "enable_thinking": False},
    "effort": {"messages": _said("Why?"), "add_generation_prompt": True, "reasoning_effort": "high"},
    "tools": {"messages": _said("Weather?", system="Help."), "tools": TOOLS, "add_generation_prompt": True},
    "tools answered": {"messages": _said("Weather?", "Where?", "Here"), "tools": TOOLS},
    "call": {"messages": _WEATHER[:2], "tools": TOOLS},
    "call with text": {
        "messages": [
            _WEATHER[0],
            {"role": "assistant", "content": "I look.", "thinking": "Look!", "tool_calls": [_call({"town": "“Bern”"})]},
        ],
        "tools": TOOLS,
    },
    "result": {"messages": _WEATHER, "tools": TOOLS, "add_generation_prompt": True},
    "result answered": {"messages": [*_ANSWERED, {"role": "user", "content": "Thanks"}], "tools": TOOLS[:1]},
    "two calls": {
        "messages": [
            _WEATHER[0],
            {"role": "assistant", "content": "", "tool_calls": [_call({"n": [1, 2.5, None, True]}), _call({}, "now")]},
            {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": "blue"},
            {"role": "tool", "name": "now", "tool_call_id": "abcdef123", "content": "<|im_end|></tool_response>"},
        ],
        "tools": TOOLS,
        "add_generation_prompt": True,
    },
    "arguments as text": {
        "messages": [_WEATHER[0], {"role": "assistant", "content": None, "tool_calls": [_call('{"town": "Bern"}')]}]
    },
    "parts": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": " Look: "}, {"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "I see."}]},
        ]
    },
    "documents": {"messages": _said("Who?"), "documents": DOCUMENTS, "add_generation_prompt": True},
    "wrong order": {"messages": [*_said("One"), *_said("Two"), {"role": "critic-2", "content": "No"}]},
}
"""Names -> the arguments of ``apply_chat_template``."""


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of a conversation in which the texts are changed. Keys, roles and types stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [changed(each, change) for each in value]
    if isinstance(value, dict):
        kept = ("role", "type", "id", "tool_call_id", "required", "enable_thinking", "reasoning_effort")
        return {key: copy.deepcopy(each) if key in kept else changed(each, change) for key, each in value.items()}
    return value


class _Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> _Clock:
        return cls(*TIME.timetuple()[:6])


def transformers_text(template: str, conversation: Mapping[str, Any], variables: Mapping[str, str]) -> str | None:
    """Return what ``apply_chat_template`` renders at ``TIME``, or None if the template fails."""
    from transformers.utils import chat_template_utils as library

    others = dict(variables) | {name: value for name, value in conversation.items() if name != "messages"}
    messages = library._normalize_chat_messages(conversation["messages"])
    with mock.patch.object(library, "datetime", _Clock):
        try:
            return str(library.render_jinja_template([messages], chat_template=template, **others)[0][0])
        except (TemplateError, TypeError, ValueError, LookupError):
            return None
