"""Guess the next tokens from the text itself, and check several of them in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

NGRAMS: Final = (3, 2)
"""The lengths of the endings that are looked up, the first one that is found counts."""
SPAN: Final = 4096
"""The number of tokens at the end of a text that are searched."""


def guess(tokens: Sequence[int], most: int) -> list[int]:
    """Return the tokens that followed the last earlier place with the same ending, at most ``most``.

    This is prompt lookup decoding (A. Saxena 2023), a form of speculative decoding (Leviathan et al. 2023,
    arXiv:2211.17192) without a second model: texts that are summed up, edited or continued repeat themselves.
    """
    recent = list(tokens[-SPAN:])
    for size in NGRAMS:
        ending = recent[-size:]
        if len(recent) <= size:
            continue
        for start in range(len(recent) - size - 1, -1, -1):
            if recent[start : start + size] == ending:
                return recent[start + size : start + size + most]
    return []
