"""Whole numbers from callers: Python's own, or those of any library."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from splitbundle.errors import BundleError, Problem, quoted


def as_integer(value: object) -> int | None:
    """Return a whole number as an ``int``; None for any other value, True and False included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # this asks whether it can
    except TypeError:
        return None


def as_integers(values: Iterable[int], argument: str) -> list[int]:
    """Return whole numbers, of numpy or torch too, as a list of ``int``.

    Raises:
        BundleError: ``input.value`` for other values.
    """
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        expected, got = "integers", quoted(values)
        raise BundleError(Problem(code="input.value", argument=argument, expected=expected, got=got)) from None
