"""Convert numbers from callers: those of Python, or of any library."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from splitbundle.errors import quoted, wrong_argument


def as_integer(value: object) -> int | None:
    """Return an integer of Python, numpy or torch as an ``int``; None for any other value, True and False included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # raises TypeError if it isn't an integer
    except TypeError:
        return None


def as_number(value: object) -> float | None:
    """Return a number of Python, numpy or torch as an ``int`` or a ``float``; None for any other value."""
    whole = as_integer(value)
    if whole is not None:
        return whole
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # an array of several numbers
        return None


def as_integers(values: Iterable[int], argument: str) -> list[int]:
    """Return integers of Python, numpy or torch as a list of ``int``.

    Raises:
        BundleError: ``input.value``, which names ``argument``, for other values.
    """
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        raise wrong_argument(argument, "integers", quoted(values)) from None


def as_token_ids(values: Iterable[int], argument: str, vocab_size: int) -> list[int]:
    """Return token ids as a list of ``int``.

    Raises:
        BundleError: ``input.value``, which names ``argument``, for bytes, for values that aren't integers, and for
            integers that aren't from 0 to ``vocab_size - 1``.
    """
    if isinstance(values, bytes | bytearray):
        raise wrong_argument(argument, "token ids", quoted(values))
    ids = as_integers(values, argument)
    wrong = next((number for number in ids if not 0 <= number < vocab_size), None)
    if wrong is not None:
        raise wrong_argument(argument, f"token ids from 0 to {vocab_size - 1}", str(wrong))
    return ids
