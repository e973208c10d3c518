"""Problems and errors, in one form for people and for programs."""

from __future__ import annotations

from splitbundle.records import members, record, replace

TYPE_CHECKING = False  # type checkers treat it as true; importing typing would be most of this import's time
if TYPE_CHECKING:
    from collections.abc import Iterable


@record(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem: its place, the expected value, the actual value, and the next step.

    ``code`` is one of the codes of ``spec/v1/bundle.md``, section "Errors".
    """

    code: str
    expected: str
    got: str
    file: str | None = None
    """The path inside the bundle, or of the source file."""
    pointer: str | None = None
    """The RFC 6901 pointer into the file's JSON (of a safetensors file, into the header)."""
    offset: int | None = None
    """The byte offset in the file, if no pointer applies."""
    argument: str | None = None
    """The argument of a call, if the problem is not in a file."""
    hint: str | None = None
    """The next step for the user."""

    def __str__(self) -> str:
        where = [part for part in (self.file, self.argument) if part]
        if self.pointer is not None:
            where.append(self.pointer or "(the whole document)")
        if self.offset is not None:
            where.append(f"byte {self.offset}")
        text = f"[{self.code}] {' '.join(where)}{': ' if where else ''}expected {self.expected}, got {self.got}"
        return printable(f"{text}. {self.hint}" if self.hint else text)

    def as_json(self) -> dict[str, object]:
        """Return the fields that are set, for ``--json``."""
        return {key: value for key, value in members(self).items() if value is not None}


class BundleError(Exception):
    """The base of all errors of this package. It has all problems that were found, not only the first."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[BundleError], tuple[tuple[Problem, ...]]]:
        # Workers send errors to other processes. The default would call __init__ with the text.
        return type(self), (self.problems,)

    @property
    def codes(self) -> tuple[str, ...]:
        """Return the codes of the problems, in order."""
        return tuple(problem.code for problem in self.problems)


class MissingExtra(BundleError):
    """An optional feature needs a library that isn't installed, or can't be loaded."""

    @classmethod
    def of(cls, library: str, extra: str, purpose: str) -> MissingExtra:
        """Return the error for ``library``, which ``pip install "splitbundle[extra]"`` installs."""
        return cls(
            Problem(
                code="backend.missing",
                expected=f"the library {library}, to {purpose}",
                got="no such library in this environment",
                hint=f'Install it: pip install "splitbundle[{extra}]"',
            )
        )


class VerificationError(BundleError):
    """The files of a bundle differ from its manifest or break a rule, or computed values differ (``ParityError``)."""


class ParityError(VerificationError):
    """Computed values differ from the original model's by more than the tolerance."""


def wrong_argument(argument: str, expected: str, got: str, hint: str | None = None) -> BundleError:
    """Return the error of a call with a value that an argument can't have: ``input.value``."""
    return BundleError(Problem(code="input.value", argument=argument, expected=expected, got=got, hint=hint))


def broken_library(error: BaseException, libraries: Iterable[str]) -> MissingExtra | None:
    """Return the error for a library that is installed and can't be loaded: ``backend.broken``.

    Args:
        error: what was raised.
        libraries: the top names of the libraries that are meant.

    Returns:
        None if the error wasn't raised while one of these libraries was imported.
    """
    known, trace = frozenset(libraries), error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        name = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if frame.f_code.co_name == "<module>" and name in known:
            return MissingExtra(
                Problem(
                    code="backend.broken",
                    expected=f"the library {name}, which is installed, to load",
                    got=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                    hint=f'python -c "import {name}" shows the whole error. Uninstall {name}, and install it again',
                )
            )
        trace = trace.tb_next
    return None


def within(error: BundleError, place: object) -> list[Problem]:
    """Return the problems of an error, their files with the path of their bundle, where several bundles are read."""
    return [replace(each, file=f"{place}/{each.file}") if each.file else each for each in error.problems]


def printable(text: str) -> str:
    """Return a text from outside as one line. Control characters and line breaks are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def quoted(value: object, limit: int = 80) -> str:
    """Return ``ascii(value)``, cut to ``limit`` characters, because a value may be hostile.

    A long dict, list or tuple is only counted.
    """
    if isinstance(value, dict | list | tuple) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)} items"
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
