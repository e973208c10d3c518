"""The encodings of a payload: how many bytes its numbers take. Each backend has the numbers' side of it."""

from __future__ import annotations

from typing import Final

EXACT: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
"""The encodings that are a dtype -> the bytes of a number."""
ENCODINGS: Final = (*EXACT, "int8")
SCALE: Final = 4
"""The bytes of the scale that each token has in ``int8``."""
LARGEST_CODE: Final = 127


def payload_bytes(encoding: str, tokens: int, width: int) -> int:
    """Return the bytes of a payload of ``tokens`` tokens with ``width`` numbers each."""
    return tokens * (EXACT[encoding] * width if encoding in EXACT else SCALE + width)
