"""What the rendering of one chat template may cost. Work is counted, not timed: a template ends the same everywhere.

A unit of work is a character that is made. The other costs are multiples of it, about as long or as large as that many
characters. No signal, thread or process is needed, so the limits also hold in threads and in frozen apps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

__all__ = [
    "DEPTH",
    "ITEM",
    "NODE",
    "OBJECT",
    "Counted",
    "Lazy",
    "LimitReached",
    "budget",
    "deeper",
    "items",
    "number",
    "spend",
    "weigh",
]

WORK: Final = 2**24
"""The units that each rendering has."""
WORK_FOR_INPUT: Final = 32
"""The units that it has besides for each unit of its messages, tools, documents and variables."""
OBJECT: Final = 96
"""The cost of a string, a call or an operation, besides its characters."""
ITEM: Final = 32
"""The cost of an item that is visited or that is listed again."""
NODE: Final = 4
"""The cost of a piece of syntax, each time that the loop or macro that holds it runs."""
DEPTH: Final = 64
"""How deep macros may call each other, and how deep values may be nested."""
_LAZY: Final = 16
"""How many lazy filters may be stacked."""


class LimitReached(Exception):
    """A template asks for more than one rendering may cost."""


class _Budget:
    """What is left of one rendering."""

    __slots__ = ("depth", "left")

    def __init__(self, left: int) -> None:
        self.left, self.depth = left, 0


_CURRENT: ContextVar[_Budget] = ContextVar("the budget of this rendering")


@contextmanager
def budget(size: int) -> Iterator[None]:
    """Give the block the work of one rendering whose input has this many units."""
    token = _CURRENT.set(_Budget(WORK + WORK_FOR_INPUT * size))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def spend(work: int) -> None:
    """Take work from the budget of this rendering.

    Raises:
        LimitReached: there is not enough left.
    """
    current = _CURRENT.get()
    current.left -= max(work, 0)
    if current.left < 0:
        raise LimitReached("more work than rendering these messages may take")


@contextmanager
def deeper() -> Iterator[None]:
    """Count the block as one level of macros that call each other.

    Raises:
        LimitReached: it is one level too many.
    """
    current = _CURRENT.get()
    if current.depth >= DEPTH:
        raise LimitReached(f"macros that call each other more than {DEPTH} levels deep")
    current.depth += 1
    try:
        yield
    finally:
        current.depth -= 1


def weigh(*values: object, per_character: int = 0) -> None:
    """Spend what visiting these values costs, at any depth. A value that is held twice is visited twice.

    Raises:
        LimitReached: it is too much, or a value is nested too deep.
    """
    left: list[tuple[object, int]] = [(value, 0) for value in values]
    while left:
        value, depth = left.pop()
        if isinstance(value, str):
            spend(ITEM + (len(value) * per_character if per_character else len(value) >> 4))
        elif isinstance(value, dict | list | tuple):
            if depth >= DEPTH:
                raise LimitReached(f"values that are nested more than {DEPTH} levels deep")
            spend(ITEM * (len(value) + 1))
            left += [(each, depth + 1) for each in value]
            if isinstance(value, dict):
                left += [(each, depth + 1) for each in value.values()]
        else:
            spend(len(value) if isinstance(value, range) else ITEM)


def number(value: Any) -> Any:
    """Return the result of an operation, unless it is an integer of more than 64 bits.

    Raises:
        LimitReached: it is one.
    """
    if isinstance(value, int) and value.bit_length() > 64:
        raise LimitReached("an integer of more than 64 bits")
    return value


class Lazy:
    """An iterator over what a filter selects or makes. Each step costs work."""

    __slots__ = ("_depth", "_steps")

    def __init__(self, steps: Iterable[Any], *over: object) -> None:
        self._steps = iter(steps)
        self._depth: int = 1 + max((each._depth for each in over if isinstance(each, Lazy)), default=0)
        if self._depth > _LAZY:
            raise LimitReached(f"more than {_LAZY} filters that wait for each other")

    def __iter__(self) -> Lazy:
        return self

    def __next__(self) -> Any:
        spend(ITEM)
        return next(self._steps)


class Counted:
    """What a loop goes over. Each round costs work."""

    __slots__ = ("_over",)

    def __init__(self, over: Any) -> None:
        self._over = over

    def __iter__(self) -> Iterator[Any]:
        for each in self._over:
            spend(OBJECT if isinstance(each, str) else ITEM)
            yield each

    def __len__(self) -> int:
        return len(self._over)


def items(value: Any) -> list[Any]:
    """Return the items of any iterable as a list, after spending what the list costs."""
    if not isinstance(value, Lazy):
        spend(len(value) * (OBJECT if isinstance(value, str) else ITEM))
        return list(value)
    made = []
    for each in value:
        spend(ITEM)
        made.append(each)
    return made
