"""How the converter says what it refuses: one problem, of one file of the source or of one argument."""

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
    """One thing that is wrong with a file of the source, or with an argument; with neither, it is the machine's."""
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
    """An error that is one such thing."""
    return BundleError(problem(code, file, expected, got, hint, pointer, argument=argument))


def line(error: BaseException) -> str:
    """An error of some library on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
