"""Read a configuration, and refuse each field that could change a number but was not read.

A row of the family table reads the fields that it knows. Another field could change a number only if transformers
declares it or reads it. Such a field must have its default value, or be known to change no logits. The fields that
transformers does not know either are kept, and never interpreted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format.architecture.decoder import Architecture
from splitbundle_converter.families.evidence import Evidence
from splitbundle_converter.families.inert_fields import QUANTIZED, is_inert, is_neutral, other_computation, repeated

UNSUPPORTED: Final = (
    "A model with this value can't be converted yet. Do not change the value: it would describe another model"
)


class ConfigReader:
    """A reader of typed fields of a configuration. It records which fields were read.

    A method that finds a problem notes it in ``problems`` and returns a valid substitute, so that one call of
    ``finish`` can report all problems.
    """

    def __init__(self, values: Mapping[str, Any], evidence: Evidence, file: str, pointer: str = "") -> None:
        self._values, self._evidence, self._file, self._pointer = values, evidence, file, pointer
        self.read: set[str] = set()
        """The names of the fields that were read or are ignored."""
        self.not_used: dict[str, Any] = {}
        """The fields that neither the row nor transformers uses, with their values."""
        self.problems: list[Problem] = []

    def inside(self, name: str) -> ConfigReader:
        """Return a reader of the object in a field. The caller passes it to ``add`` at the end."""
        value = self.raw(name)
        return ConfigReader(
            value if isinstance(value, dict) else {}, self._evidence, self._file, f"{self._pointer}/{name}"
        )

    def apart(self) -> ConfigReader:
        """Return a reader of the same fields. What it reads and refuses is not noted here."""
        return ConfigReader(self._values, self._evidence, self._file, self._pointer)

    def add(self, inner: ConfigReader) -> None:
        """Add the problems and the unused fields of a reader of an inner object."""
        self.problems += inner.problems
        place = inner._pointer.removeprefix(f"{self._pointer}/").replace("/", ".")
        self.not_used |= {f"{place}.{name}": value for name, value in inner.not_used.items()}

    def unread(self) -> list[str]:
        """Return the names of the fields that were not read."""
        return [name for name in self._values if name not in self.read]

    def raw(self, name: str) -> Any:
        """Return the unchecked value of a field, or None if it is absent."""
        self.read.add(name)
        return self._values.get(name)

    def refuse(self, name: str, expected: str, got: object = None, hint: str | None = None) -> None:
        """Note that a field can't be converted. An equal problem is noted only once."""
        got = self._values.get(name) if got is None else got
        problem = Problem(
            code="source.config",
            file=self._file,
            pointer=f"{self._pointer}/{name}",
            expected=expected,
            got=quoted(got),
            hint=hint or UNSUPPORTED,
        )
        if problem not in self.problems:
            self.problems.append(problem)

    def integer(self, name: str, minimum: int = 1, maximum: int = 2**31 - 1) -> int:
        """Return an integer field from ``minimum`` to ``maximum``."""
        value = self.raw(name)
        if type(value) is not int or not minimum <= value <= maximum:
            self.refuse(name, f"an integer from {minimum} to {maximum}")
            return minimum
        return value

    def number(self, name: str) -> float:
        """Return a finite number above zero."""
        value = self.raw(name)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            self.refuse(name, "a number above 0")
            return 1.0
        return float(value)

    def optional_number(self, name: str) -> float | None:
        """Return a finite number above zero, or None if the field is absent or null."""
        return None if self.raw(name) is None else self.number(name)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """Return an array of ``count`` finite numbers above zero."""
        values = self.raw(name)
        if not isinstance(values, list) or len(values) != count:
            self.refuse(name, f"{count} numbers")
        elif not all(type(value) in (int, float) and 0 < value < float("inf") for value in values):
            self.refuse(name, "numbers above 0")
        else:
            return tuple(float(value) for value in values)
        return (1.0,) * count

    def boolean(self, name: str) -> bool:
        """Return a boolean field."""
        value = self.raw(name)
        if type(value) is not bool:
            self.refuse(name, "true or false")
            return False
        return value

    def choice(self, name: str, choices: Mapping[str, str]) -> str:
        """Return the item of ``choices`` for the value of a string field."""
        value = self.raw(name)
        if not isinstance(value, str) or value not in choices:
            self.refuse(name, f"one of {', '.join(choices)}")
            return next(iter(choices.values()))
        return choices[value]

    def allowed(self, name: str, *values: object) -> None:
        """Check that a field is absent, has one of ``values``, which change no number, or is null as by default."""
        null = name in self._values and self.raw(name) is None and not self._evidence.defaults.get(name)
        if name in self._values and not null and self.raw(name) not in values:
            self.refuse(name, " or ".join(quoted(value) for value in values))

    def ignored(self, names: Collection[str]) -> None:
        """Mark fields as ignored: they change no number."""
        self.read.update(names)

    def leave(self, name: str, expected: str) -> None:
        """Accept a field of an inner object that was not read, if transformers has no use for a field of this name."""
        value = self._values[name]
        if value is None or is_inert(name) or name not in self._evidence.mentioned:
            self.not_used[name] = value
        else:
            self.refuse(name, expected)

    def finish(self, architecture: Architecture) -> None:
        """Check that no problem was noted, and that no unread field can change what the original computes.

        Args:
            architecture: The facts that were read. A field that repeats one of them must agree.

        Raises:
            BundleError: ``source.config``, with all problems.
        """
        for name, value in self._values.items():
            if name not in self.read:
                self._judge(name, value, architecture)
        if self.problems:
            raise BundleError(self.problems)

    def _judge(self, name: str, value: Any, architecture: Architecture) -> None:
        declared, default = name in self._evidence.defaults, self._evidence.defaults.get(name)
        fact = repeated(name, architecture)
        if (other := other_computation(name, value)) is not None:
            self.refuse(name, other, value)
        elif is_inert(name) or QUANTIZED.fullmatch(name) or (value is None and not default):
            pass  # the quantisation was judged before
        elif declared:
            if value != default:
                self.refuse(name, f"its default, {quoted(default)}", value)
        elif self._evidence.knows(name) and not is_neutral(name, value):
            expected = f"no such field, as {self._evidence.readers.get(name, 'transformers')} of transformers reads it"
            self.refuse(name, expected, value)
        elif fact is not None and type(value) is int and value != fact[1]:
            self.refuse(name, f"{fact[1]}, as it is {fact[0]}", value)
        if not declared:
            self.not_used[name] = value
