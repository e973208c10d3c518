"""What a model thinks is told from what it says, in pieces of any size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitbundle.stages.thinking import Thinking


def divided(pieces: list[str], prompt: str = "") -> tuple[str, str]:
    """Return the thinking and the rest of a text that comes in pieces."""
    thinking = Thinking(prompt)
    parts = [part for piece in pieces for part in thinking.feed(piece)] + list(thinking.rest())
    assert all(text for _, text in parts)
    return "".join(text for thinks, text in parts if thinks), "".join(text for thinks, text in parts if not thinks)


@given(st.lists(st.integers(1, 5), max_size=40))
def test_a_block_in_pieces_of_any_size(sizes: list[int]) -> None:
    text = "<think>\nwhat < that </thin?\n</think>\n\nParis <b>is</b> it."
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    assert divided([*pieces, text[at:]]) == ("\nwhat < that </thin?\n", "\n\nParis <b>is</b> it.")


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("no block", "", ("", "no block")),
        ("so</think>this", "<|Assistant|><think>\n", ("so", "this")),  # the template began the block
        ("this", "<think>\n\n</think>\n\n", ("", "this")),  # the template made an empty one
        ("<think>never ends", "", ("never ends", "")),
        ("<think>a</think>\n<think>b</think>c", "", ("ab", "\nc")),
        ("a <think>b</think> c", "", ("", "a <think>b</think> c")),  # the answer explains the marks
        ("<think>a</think>b<think>c</think>", "", ("a", "b<think>c</think>")),
        ("<thinking>b</thinking>c", "", ("b", "c")),
        ("ends with <thi", "", ("", "ends with <thi")),
    ],
)
def test_blocks(text: str, prompt: str, expected: tuple[str, str]) -> None:
    assert divided([text], prompt) == expected
    assert divided(list(text), prompt) == expected
