"""Errors of the converter: a problem names one file of the source, or one argument."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from splitbundle.errors import BundleError, Problem
from splitbundle.format import strict_json

AGAIN: Final = "Fetch the file again from where the model was published"
MISSING: Final = "The checkpoint isn't whole, or its configuration is another model's: fetch both again from one place"
HINTS: Final = {
    "source.missing": "Check the path, and that all files of the model were fetched",
    "source.unreadable": AGAIN,
    "source.safetensors": AGAIN,
    "source.index": AGAIN,
    "source.config": "Compare the file with the published one",
    "source.family": "splitbundle families lists what can be converted",
    "source.tensor": "Fetch the weights and the configuration again, from one place",
    "source.parts": "Save all parts again, from one model",
    "usage": "help(splitbundle_converter.convert) names the values",
    "output": "Choose another output",
}
"""A code, or its beginning -> the next step that is always safe, where a problem has none of its own."""


def problem(
    code: str,
    file: str | None,
    expected: str,
    got: str,
    hint: str | None = None,
    pointer: str | None = None,
    *,
    argument: str | None = None,
) -> Problem:
    """Return a problem of a file of the source, or of an argument. With neither, it is a problem of the machine."""
    hint = hint or HINTS.get(code) or HINTS.get(code.partition(".")[0])
    return Problem(code=code, file=file, pointer=pointer, argument=argument, expected=expected, got=got, hint=hint)


def refusal(
    code: str,
    file: str | None,
    expected: str,
    got: str,
    hint: str | None = None,
    pointer: str | None = None,
    *,
    argument: str | None = None,
) -> BundleError:
    """Return an error with one such problem."""
    return BundleError(problem(code, file, expected, got, hint, pointer, argument=argument))


def source_json(data: bytes, file: str, **named: Any) -> Any:
    """Return the value of a JSON file of the source. The arguments are those of ``strict_json.parse``.

    Raises:
        BundleError: ``json.*``.
    """
    try:
        return strict_json.parse(data, file, **named)
    except BundleError as error:
        raise BundleError(replace(problem, hint=AGAIN) for problem in error.problems) from None


def line(error: BaseException) -> str:
    """Return the message of a library's error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
