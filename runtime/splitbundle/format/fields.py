"""Reading typed fields out of parsed JSON, with a pointer for each problem and all problems of a document."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format.strict_json import MAX_INTEGER

MAX_PROBLEMS: Final = 100
"""A hostile document could have millions, and nobody reads more."""
MIN_NUMBER: Final = 1e-37
MAX_NUMBER: Final = 1e37
"""A number above zero and its inverse are numbers in float32; what is made of a few of them is one in float64."""
MAX_ITEMS: Final = 2**18
"""More than the tensors of the deepest model that ``architecture.MAX_LAYERS`` allows."""


class Problems:
    """The problems of one file, gathered while it is read."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found: list[Problem] = []

    def add(self, code: str, pointer: str, expected: str, got: str, hint: str | None = None) -> None:
        """Notes a problem; reading goes on, so that one run names them all (BundleError at the hundredth)."""
        self.found.append(Problem(code=code, file=self.file, pointer=pointer, expected=expected, got=got, hint=hint))
        if len(self.found) >= MAX_PROBLEMS:
            self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raises BundleError with everything noted so far."""
        if self.found:
            raise BundleError(self.found)


class Field:
    """A JSON value and where it stands.

    A method that doesn't find what it expects notes a problem and gives a harmless value of the right type; whoever
    reads a document calls ``Problems.raise_if_any`` before using what was read.
    """

    __slots__ = ("pointer", "problems", "value")

    def __init__(self, value: Any, problems: Problems, pointer: str = "") -> None:
        self.value, self.problems, self.pointer = value, problems, pointer

    def refuse(self, expected: str, *, code: str = "field.value", hint: str | None = None) -> None:
        """Notes that this value isn't ``expected``."""
        self.problems.add(code, self.pointer, expected, quoted(self.value), hint)

    def members(self, required: Collection[str], *, open: bool = False) -> Members:  # noqa: A002
        """The members of an object that has all of ``required`` and, unless ``open``, nothing that isn't named."""
        if not isinstance(self.value, dict):
            self.refuse("an object", code="field.type")
            return Members({}, self)
        for name in required:
            if name not in self.value:
                self.problems.add("field.missing", self.pointer, f"a field {quoted(name)}", "an object without it")
        if not open:
            for name in self.value:
                if name not in required:
                    self.problems.add(
                        "field.unknown",
                        f"{self.pointer}/{escape(name)}",
                        f"one of {', '.join(sorted(required))}",
                        quoted(name),
                    )
        return Members(self.value, self)

    def mapping(self) -> Iterator[tuple[str, Field]]:
        """The entries of an object whose keys are data, in order."""
        if not isinstance(self.value, dict):
            self.refuse("an object", code="field.type")
            return
        for key, value in self.value.items():
            yield key, Field(value, self.problems, f"{self.pointer}/{escape(key)}")

    def items(self, *, minimum: int = 0, maximum: int = MAX_ITEMS) -> list[Field]:
        """The items of an array; none of one that is too long."""
        if not isinstance(self.value, list):
            self.refuse("an array", code="field.type")
            return []
        if not minimum <= len(self.value) <= maximum:
            self.problems.add("field.value", self.pointer, f"{minimum} to {maximum} items", f"{len(self.value)} items")
        if len(self.value) > maximum:
            return []
        return [Field(item, self.problems, f"{self.pointer}/{i}") for i, item in enumerate(self.value)]

    def integer(self, minimum: int = 0, maximum: int = MAX_INTEGER) -> int:
        """An integer in a closed range. A number with a fraction or exponent, even ``1.0``, isn't one."""
        if type(self.value) is not int:
            self.refuse("an integer", code="field.type")
            return minimum
        if not minimum <= self.value <= maximum:
            self.refuse(f"an integer from {minimum} to {maximum}")
            return minimum
        return self.value

    def positive_number(self) -> float:
        """A number above zero."""
        if type(self.value) not in (int, float):
            self.refuse("a number", code="field.type")
            return 1.0
        if not MIN_NUMBER <= self.value <= MAX_NUMBER:
            self.refuse(f"a number from {MIN_NUMBER} to {MAX_NUMBER}")
            return 1.0
        return float(self.value)

    def optional_positive_number(self) -> float | None:
        """A number above zero, or null."""
        return None if self.is_null else self.positive_number()

    def optional_integer(self, minimum: int = 0, maximum: int = MAX_INTEGER) -> int | None:
        """An integer in a closed range, or null."""
        return None if self.is_null else self.integer(minimum, maximum)

    def number(self, choices: Collection[float]) -> float:
        """One of a few numbers."""
        if type(self.value) not in (int, float):
            self.refuse("a number", code="field.type")
        elif float(self.value) not in choices:
            self.refuse(f"one of {', '.join(map(str, choices))}")
        else:
            return float(self.value)
        return next(iter(choices))

    def boolean(self) -> bool:
        """``true`` or ``false``."""
        if not isinstance(self.value, bool):
            self.refuse("a boolean", code="field.type")
            return False
        return self.value

    def string(self, pattern: re.Pattern[str] | None = None, expected: str = "", maximum: int = 1024) -> str:
        """A string, whole as ``pattern`` says."""
        if not isinstance(self.value, str):
            self.refuse("a string", code="field.type")
            return ""
        if len(self.value) > maximum:
            self.refuse(f"at most {maximum} characters")
        elif pattern is not None and not pattern.fullmatch(self.value):
            self.refuse(expected)
        return self.value

    def choice(self, choices: Collection[str]) -> str:
        """One of a few strings."""
        if not isinstance(self.value, str):
            self.refuse("a string", code="field.type")
        elif self.value not in choices:
            self.refuse(f"one of {', '.join(choices)}")
        else:
            return self.value
        return next(iter(choices))

    def kind(self, choices: Collection[str]) -> str | None:
        """Return the member ``kind`` of an object that may be of several; None for another value, which is noted."""
        kind = self.members(["kind"], open=True)["kind"]
        chosen = kind.choice(choices)
        return chosen if chosen == kind.value else None

    @property
    def is_null(self) -> bool:
        """Whether the value is ``null``."""
        return self.value is None


class Members:
    """The members of an object, by name. One that is missing (and was noted) reads as a value of no type."""

    __slots__ = ("_owner", "_values")

    def __init__(self, values: dict[str, Any], owner: Field) -> None:
        self._values, self._owner = values, owner

    def __getitem__(self, name: str) -> Field:
        owner = self._owner
        if name in self._values:
            return Field(self._values[name], owner.problems, f"{owner.pointer}/{escape(name)}")
        # The absence was noted once, by whoever asked for the members: what is read from here on goes nowhere.
        return Field(_ABSENT, Problems(owner.problems.file), f"{owner.pointer}/{escape(name)}")

    def __contains__(self, name: str) -> bool:
        return name in self._values


_ABSENT = object()


def escape(token: str) -> str:
    """A reference token of a JSON pointer (RFC 6901, section 3)."""
    return token.replace("~", "~0").replace("/", "~1")
