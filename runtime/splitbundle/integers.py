"""Whole numbers that callers give, of Python's types or of any library's."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from splitbundle.errors import BundleError, Problem, quoted


def as_integer(value: object) -> int | None:
    """A whole number of Python's or of any library's; None for anything else, True and False too."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # this asks whether it can
    except TypeError:
        return None


def as_integers(values: Iterable[int], argument: str) -> list[int]:
    """Values that are integers, be it numpy's or torch's, as integers."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        expected, got = "integers", quoted(values)
        raise BundleError(Problem(code="input.value", argument=argument, expected=expected, got=got)) from None
