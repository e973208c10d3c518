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
from conformance.headers import header_cases
from conformance.text import tokenizer_cases
from conformance.text_document import text_cases


def cases() -> Iterator[Case]:
    """Yield every case. Names are unique."""
    yield from vector_cases()
    yield from large_cases()
    yield from directory_cases()
    yield from header_cases()
    yield from encoding_cases()
    yield from tokenizer_cases()
    yield from text_cases()
