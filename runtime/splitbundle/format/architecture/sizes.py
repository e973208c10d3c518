"""Sizes that a decoder may have, and shapes of its plain tensors."""

from __future__ import annotations

import math
from typing import Final

MAX_SIZE: Final = 2**31 - 1
"""The largest vocabulary, width or number of heads. A product of two still fits 63 bits."""
MAX_LAYERS: Final = 10_000
"""A hundred times the deepest models. With ten times more, a reader would take seconds and hundreds of MB."""
Shapes = dict[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""


def linear_tensors(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    """Return the tensors of a linear layer by name: a weight of (rows, columns) and, with ``bias``, (rows)."""
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def count(shapes: Shapes) -> int:
    """Return the number of parameters of some logical tensors."""
    return sum(math.prod(shape) for shape in shapes.values())
