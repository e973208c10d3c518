"""All cases of the kit: vectors as bundles, and whole directories with faults.

This file uses only the standard library, and nothing of splitbundle. It states the expected results itself and asks no
implementation.
"""

from __future__ import annotations

from collections.abc import Iterator

from conformance.case import Case
from conformance.directories import directory_cases
from conformance.documents import large_cases, vector_cases
from conformance.encodings import encoding_cases
from conformance.graphs import genai_cases, graph_cases
from conformance.headers import header_cases
from conformance.number_calls import number_cases
from conformance.parts import part_cases
from conformance.text import tokenizer_cases
from conformance.text_document import text_cases
from conformance.wire_frames import wire_cases

__all__ = ["cases", "number_cases", "wire_cases"]


def cases() -> Iterator[Case]:
    """Yield every case for a reader of bundles. Names are unique, also among those of the wire and of numbers."""
    yield from vector_cases()
    yield from large_cases()
    yield from directory_cases()
    yield from header_cases()
    yield from part_cases()
    yield from encoding_cases()
    yield from graph_cases()
    yield from genai_cases()
    yield from tokenizer_cases()
    yield from text_cases()
