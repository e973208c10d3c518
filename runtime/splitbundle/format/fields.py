"""Read typed fields of parsed JSON, and note all problems of a document, each with its pointer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any, Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format.strict_json import MAX_INTEGER

MAX_PROBLEMS: Final = 100
"""The largest number of problems in one error. A hostile document could have millions."""
MIN_NUMBER: Final = 1e-37
MAX_NUMBER: Final = 1e37
"""The range of positive numbers. Each and its inverse fit float32, and products of a few of them fit float64."""
MAX_ITEMS: Final = 2**18
"""The longest array: more than the tensors of the deepest model that ``MAX_LAYERS`` allows."""


class Problems:
    """The problems of one file, collected while it is read."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.found: list[Problem] = []

    def add(self, code: str, pointer: str, expected: str, got: str, hint: str | None = None) -> None:
        """Note a problem. Reading continues, so that one error has all problems; the hundredth raises BundleError."""
        self.found.append(Problem(code=code, file=self.file, pointer=pointer, expected=expected, got=got, hint=hint))
        if len(self.found) >= MAX_PROBLEMS:
            self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise BundleError with all problems so far."""
        if self.found:
            raise BundleError(self.found)


class Field:
    """A JSON value and its pointer.

    If a value isn't as expected, a method notes a problem and returns a harmless value of the right type. So a parser
    must call ``Problems.raise_if_any`` before it uses the values.
    """

    __slots__ = ("pointer", "problems", "value")

    def __init__(self, value: Any, problems: Problems, pointer: str = "") -> None:
        self.value, self.problems, self.pointer = value, problems, pointer

    def refuse(self, expected: str, *, code: str = "field.value", hint: str | None = None) -> None:
        """Note that this value isn't ``expected``."""
        self.problems.add(code, self.pointer, expected, quoted(self.value), hint)

    def members(
        self,
        required: Collection[str],
        optional: Collection[str] = (),
        *,
        open: bool = False,  # noqa: A002
    ) -> Members:
        """Return the members of an object. It must have all of ``required``.

        Unless ``open``, it may have no others but ``optional``.
        """
        if not isinstance(self.value, dict):
            self.refuse("an object", code="field.type")
            return Members({}, self)
        for name in required:
            if name not in self.value:
                self.problems.add("field.missing", self.pointer, f"a field {quoted(name)}", "an object without it")
        if not open:
            for name in self.value:
                if name not in required and name not in optional:
                    self.problems.add(
                        "field.unknown",
                        f"{self.pointer}/{escape(name)}",
                        f"one of {', '.join(sorted([*required, *optional]))}",
                        quoted(name),
                    )
        return Members(self.value, self)

    def mapping(self) -> Iterator[tuple[str, Field]]:
        """Yield the entries of an object whose keys are data, in order."""
        if not isinstance(self.value, dict):
            self.refuse("an object", code="field.type")
            return
        for key, value in self.value.items():
            yield key, Field(value, self.problems, f"{self.pointer}/{escape(key)}")

    def items(self, *, minimum: int = 0, maximum: int = MAX_ITEMS) -> list[Field]:
        """Return the items of an array; no items if it is too long."""
        if not isinstance(self.value, list):
            self.refuse("an array", code="field.type")
            return []
        if not minimum <= len(self.value) <= maximum:
            self.problems.add("field.value", self.pointer, f"{minimum} to {maximum} items", f"{len(self.value)} items")
        if len(self.value) > maximum:
            return []
        return [Field(item, self.problems, f"{self.pointer}/{i}") for i, item in enumerate(self.value)]

    def integer(self, minimum: int = 0, maximum: int = MAX_INTEGER) -> int:
        """Return an integer in a closed range. A number with a fraction or an exponent, even ``1.0``, is refused."""
        if type(self.value) is not int:
            self.refuse("an integer", code="field.type")
            return minimum
        if not minimum <= self.value <= maximum:
            self.refuse(f"an integer from {minimum} to {maximum}")
            return minimum
        return self.value

    def positive_number(self) -> float:
        """Return a number above zero."""
        if type(self.value) not in (int, float):
            self.refuse("a number", code="field.type")
            return 1.0
        if not MIN_NUMBER <= self.value <= MAX_NUMBER:
            self.refuse(f"a number from {MIN_NUMBER} to {MAX_NUMBER}")
            return 1.0
        return float(self.value)

    def optional_positive_number(self) -> float | None:
        """Return a number above zero, or None for null."""
        return None if self.is_null else self.positive_number()

    def optional_integer(self, minimum: int = 0, maximum: int = MAX_INTEGER) -> int | None:
        """Return an integer in a closed range, or None for null."""
        return None if self.is_null else self.integer(minimum, maximum)

    def number(self, choices: Collection[float]) -> float:
        """Return one of a few numbers."""
        if type(self.value) not in (int, float):
            self.refuse("a number", code="field.type")
        elif float(self.value) not in choices:
            self.refuse(f"one of {', '.join(map(str, choices))}")
        else:
            return float(self.value)
        return next(iter(choices))

    def boolean(self) -> bool:
        """Return ``true`` or ``false``."""
        if not isinstance(self.value, bool):
            self.refuse("a boolean", code="field.type")
            return False
        return self.value

    def string(self, pattern: re.Pattern[str] | None = None, expected: str = "", maximum: int = 1024) -> str:
        """Return a string that ``pattern`` matches as a whole."""
        if not isinstance(self.value, str):
            self.refuse("a string", code="field.type")
            return ""
        if len(self.value) > maximum:
            self.refuse(f"at most {maximum} characters")
        elif pattern is not None and not pattern.fullmatch(self.value):
            self.refuse(expected)
        return self.value

    def choice(self, choices: Collection[str]) -> str:
        """Return one of a few strings."""
        if not isinstance(self.value, str):
            self.refuse("a string", code="field.type")
        elif self.value not in choices:
            self.refuse(f"one of {', '.join(choices)}")
        else:
            return self.value
        return next(iter(choices))

    def kind(self, choices: Collection[str]) -> str | None:
        """Return the member ``kind`` of an object, one of ``choices``. Note any other value, and return None."""
        kind = self.members(["kind"], open=True)["kind"]
        chosen = kind.choice(choices)
        return chosen if chosen == kind.value else None

    @property
    def is_null(self) -> bool:
        """Return whether the value is ``null``."""
        return self.value is None


class Members:
    """The members of an object by name. A missing member, which was noted, has a value of no JSON type."""

    __slots__ = ("_owner", "_values")

    def __init__(self, values: dict[str, Any], owner: Field) -> None:
        self._values, self._owner = values, owner

    def __getitem__(self, name: str) -> Field:
        owner = self._owner
        if name in self._values:
            return Field(self._values[name], owner.problems, f"{owner.pointer}/{escape(name)}")
        # ``Field.members`` has noted the absence once. Further problems of this member are dropped.
        return Field(_ABSENT, Problems(owner.problems.file), f"{owner.pointer}/{escape(name)}")

    def __contains__(self, name: str) -> bool:
        return name in self._values


_ABSENT = object()


def escape(token: str) -> str:
    """Return a reference token of a JSON pointer (RFC 6901, section 3)."""
    return token.replace("~", "~0").replace("/", "~1")
