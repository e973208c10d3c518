"""The channels of harmony are told apart, in pieces of any size.

The texts are examples of https://github.com/openai/harmony/blob/main/docs/format.md.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitbundle.stages.channels import Channels, divided
from splitbundle.stages.thinking import Thinking

PROMPT = "<|start|>user<|message|>What is 2 + 2?<|end|><|start|>assistant"
THOUGHT = 'User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.'
SUM = f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant<|channel|>final<|message|>2 + 2 = 4."
CALL = (
    "<|channel|>analysis<|message|>Need to use function get_weather.<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.get_weather <|constrain|>json<|message|>{"location":"San Francisco"}'
)
CALLED = '<tool_call>{"name": "get_weather", "arguments": {"location":"San Francisco"}}</tool_call>'
PREAMBLE = (
    "<|channel|>analysis<|message|>{long chain of thought}<|end|><|start|>assistant<|channel|>commentary<|message|>"
    "**Action plan**:\n1. Generate an HTML file<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.generate_file<|constrain|>json<|message|>{"template": "basic_html", "path": "index.html"}<|call|>'
)


def parts(pieces: list[str], prompt: str = PROMPT) -> tuple[str, str]:
    """Return what is thought and what is said in a text that comes in pieces."""
    channels = divided(prompt)
    found = [part for piece in pieces for part in channels.feed(piece)] + list(channels.rest())
    assert all(text for _, text in found)
    return "".join(text for thinks, text in found if thinks), "".join(text for thinks, text in found if not thinks)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SUM, (THOUGHT, "2 + 2 = 4.")),
        (f"{SUM}<|return|>", (THOUGHT, "2 + 2 = 4.")),
        (CALL, ("Need to use function get_weather.", CALLED)),
        (f"{CALL}<|call|>", ("Need to use function get_weather.", CALLED)),
        (
            PREAMBLE,
            (
                "{long chain of thought}",
                "**Action plan**:\n1. Generate an HTML file"
                '<tool_call>{"name": "generate_file", "arguments": {"template": "basic_html", "path": "index.html"}}'
                "</tool_call>",
            ),
        ),
        (  # the recipient may stand with the role
            ' to=functions.get_weather<|channel|>commentary<|constrain|>json<|message|>{"location":"San Francisco"}',
            ("", CALLED),
        ),
        (
            "<|channel|>commentary to=functions.now<|message|><|call|>",
            ("", '<tool_call>{"name": "now", "arguments": {}}</tool_call>'),
        ),
        ("<|channel|>analysis to=python<|message|>print(2 + 2)", ("print(2 + 2)", "")),  # a tool of the model's own
        ("<|channel|>final<|message|>a <think> b < c <| d", ("", "a <think> b < c <| d")),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
            "<|start|>assistant<|channel|>commentary<|message|>c<|end|><|start|>assistant<|channel|>final<|message|>d",
            ("a\n\nb", "c\n\nd"),
        ),
        (f"{SUM}<|end|><|start|>assistant<|chan", (THOUGHT, "2 + 2 = 4.")),  # the number of tokens ends a header
        ("<|channel|>anal", ("", "")),
        ("<|channel|>analysis<|message|>never en", ("never en", "")),
        ("The model forgets its format.", ("", "The model forgets its format.")),
        ("x" * 2000, ("", "x" * 2000)),
        ("", ("", "")),
    ],
)
def test_channels(text: str, expected: tuple[str, str]) -> None:
    assert parts([text]) == expected
    assert parts(list(text)) == expected


@given(st.lists(st.integers(1, 9), max_size=60))
def test_pieces_of_any_size(sizes: list[int]) -> None:
    text, pieces, at = PREAMBLE, [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    assert parts([*pieces, text[at:]]) == parts([text])


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        (f"{PROMPT}<|channel|>final<|message|>", "4", ("", "4")),  # the prompt may begin the message
        (f"{PROMPT}<|channel|>analysis<|message|>Let", " me", (" me", "")),
        (f"{PROMPT}<|channel|>", "final<|message|>4", ("", "4")),
    ],
)
def test_a_prompt_that_begins_the_answer(prompt: str, text: str, expected: tuple[str, str]) -> None:
    assert parts(list(text), prompt) == expected


@pytest.mark.parametrize(
    "prompt", ["", "Say <|start|>.", "<|im_start|>assistant\n", "<|start|>user<|message|>a<|end|>"]
)
def test_other_prompts_are_of_other_formats(prompt: str) -> None:
    assert isinstance(divided(prompt), Thinking)
    assert isinstance(divided(PROMPT), Channels)
