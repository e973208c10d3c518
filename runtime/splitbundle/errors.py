"""What goes wrong, said once and in one form, for people and for programs."""

from __future__ import annotations

from splitbundle.records import members, record

TYPE_CHECKING = False  # type checkers take it for true; importing typing would be most of this import's time
if TYPE_CHECKING:
    from collections.abc import Iterable


@record(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong: where, what was expected, what came, what to do.

    ``code`` is one of the codes of ``spec/v1/bundle.md``, section "Error codes".
    """

    code: str
    expected: str
    got: str
    file: str | None = None
    """Path inside the bundle, or of the source file."""
    pointer: str | None = None
    """RFC 6901 pointer into the file's JSON (for safetensors: into the header)."""
    offset: int | None = None
    """Byte offset in the file, where no pointer applies."""
    argument: str | None = None
    """The argument of a call, where no file is at fault."""
    hint: str | None = None
    """What to do next."""

    def __str__(self) -> str:
        where = [part for part in (self.file, self.argument) if part]
        if self.pointer is not None:
            where.append(self.pointer or "(the whole document)")
        if self.offset is not None:
            where.append(f"byte {self.offset}")
        text = f"[{self.code}] {' '.join(where)}{': ' if where else ''}expected {self.expected}, got {self.got}"
        return printable(f"{text}. {self.hint}" if self.hint else text)

    def as_json(self) -> dict[str, object]:
        """The fields that say something, for ``--json``."""
        return {key: value for key, value in members(self).items() if value is not None}


class BundleError(Exception):
    """Everything that this package refuses. All problems that were found, not the first alone."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[BundleError], tuple[tuple[Problem, ...]]]:
        # Workers send their errors across processes; the default would call __init__ with the text.
        return type(self), (self.problems,)

    @property
    def codes(self) -> tuple[str, ...]:
        """The problems' codes, in order."""
        return tuple(problem.code for problem in self.problems)


class MissingExtra(BundleError):
    """A library that an optional feature needs isn't installed."""

    @classmethod
    def of(cls, library: str, extra: str, purpose: str) -> MissingExtra:
        """The error for ``library``, which ``pip install "splitbundle[extra]"`` brings."""
        return cls(
            Problem(
                code="backend.missing",
                expected=f"the library {library}, to {purpose}",
                got="no such library in this environment",
                hint=f'Install it: pip install "splitbundle[{extra}]"',
            )
        )


class VerificationError(BundleError):
    """A bundle isn't what it says that it is."""


class ParityError(VerificationError):
    """Computed values differ from the original model's by more than the tolerance."""


def printable(text: str) -> str:
    """A text from elsewhere as one line: what a terminal would obey, or a reader take for another line, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def quoted(value: object, limit: int = 80) -> str:
    """``value`` as it would stand in JSON or Python, cut to ``limit`` characters: values are hostile too."""
    if isinstance(value, dict | list | tuple) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)} items"
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"
