"""How the converter says what it refuses: one problem, of one file of the source."""

from __future__ import annotations

from splitbundle.errors import BundleError, Problem


def problem(
    code: str, file: str, expected: str, got: str, hint: str | None = None, pointer: str | None = None
) -> Problem:
    """One thing that is wrong with a file of the source."""
    return Problem(code=code, file=file, pointer=pointer, expected=expected, got=got, hint=hint)


def refused(
    code: str, file: str, expected: str, got: str, hint: str | None = None, pointer: str | None = None
) -> BundleError:
    """An error that is one such thing."""
    return BundleError(problem(code, file, expected, got, hint, pointer))


def line(error: BaseException) -> str:
    """An error of some library on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
