"""Errors of the converter: a problem names one file of the source, or one argument."""

from __future__ import annotations

from splitbundle.errors import BundleError, Problem


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


def line(error: BaseException) -> str:
    """Return the message of a library's error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
