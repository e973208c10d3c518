"""The code of the pages in docs/ and of README.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from tests.support.paths import ROOT

_BLOCK: Final = re.compile(r"(?:<!-- ([a-z ]+): ([^>]*?) -->\n+)?^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Fence(NamedTuple):
    """A fenced block of a page, with the note in the comment before it: ``<!-- NOTE: ABOUT -->``."""

    line: int
    note: str | None
    about: str | None
    kind: str
    body: str


def fences(page: str) -> Iterator[Fence]:
    """Yield the fenced blocks of a page in order. ``page`` is its path in the checkout."""
    text = (ROOT / page).read_text("utf-8")
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start(4)) + 1
        yield Fence(line, found[1], found[2], found[3], found[4])


def programs(page: str) -> dict[str, str]:
    """Return the files that a page asks its reader to save: ``<!-- file: NAME -->`` before a block."""
    return {fence.about or "": fence.body for fence in fences(page) if fence.note == "file"}
