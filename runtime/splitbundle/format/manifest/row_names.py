"""Find a source tensor that has two names, where a name may stand for one tensor a matrix row (SB-M-082, SB-M-088)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import accumulate
from typing import Final

ROW: Final = "{row}"
"""The placeholder for the number of a matrix row. It is a whole component of a name between dots."""
_Named = tuple[int, int, str]
"""The number that a name has in another one's place of the row, the number of its own rows, and the name."""


def named_twice(sources: Mapping[str, int]) -> str | None:
    """Return a name of ``sources`` that stands for a tensor for which another one stands too, or None.

    Args:
        sources: distinct names -> the number of tensors that a name with ``{row}`` stands for.
    """
    by_row = {name: rows for name, rows in sources.items() if ROW in name}
    if not by_row:
        return None
    crossing: dict[tuple[str, ...], tuple[list[_Named], list[_Named]]] = {}
    for name in sources:
        components = name.split(".")
        own = components.index(ROW) if name in by_row else None
        for place, component in enumerate(components):
            if (number := _number(component)) is None:
                continue
            template = [*components[:place], ROW, *components[place + 1 :]]
            if own is None:
                if number < by_row.get(".".join(template), 0):
                    return name
            else:  # t.{row}.2 and t.1.{row} both stand for t.1.2: with both places open, they are equal
                sides = crossing.setdefault((*template[:own], ROW, *template[own + 1 :]), ([], []))
                sides[own > place].append((number, by_row[name], name))
    return next(filter(None, (_crossing(*sides) for sides in crossing.values())), None)


def _number(component: str) -> int | None:
    """Return the number of a matrix row that a component is, as ``{row}`` writes it."""
    good = component.isascii() and component.isdigit() and (component == "0" or component[0] != "0")
    return int(component) if good else None


def _crossing(firsts: list[_Named], seconds: list[_Named]) -> str | None:
    """Return a name of one list for whose row there is a name in the other list, and the other way round."""
    seconds.sort(key=lambda named: named[1])
    rows = [named[1] for named in seconds]
    # The least number among the names that have at least so many rows: searching all pairs would take too long.
    least = list(accumulate(reversed([number for number, _, _ in seconds]), min))[::-1]
    for number, own_rows, name in firsts:
        enough = bisect_left(rows, number + 1)
        if enough < len(least) and least[enough] < own_rows:
            return name
    return None
