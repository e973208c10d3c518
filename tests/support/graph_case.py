"""What a case of a hostile graph is, and the list of all cases. The cases are in the modules ``graph_cases`` and
``graph_loop_cases``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from onnx import ModelProto

Change = Callable[[ModelProto], bytes | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A case: its fault in words, its change, and its code.

    The change edits the model, or returns bytes in its place.
    """

    name: str
    code: str
    change: Change


CASES: Final[list[Case]] = []


def case(code: str, name: str, change: Change) -> None:
    """Add a case to ``CASES``."""
    CASES.append(Case(name=name, code=code, change=change))


def changed(code: str) -> Callable[[Change], Change]:
    """Add a function that is named after its case."""

    def add(change: Change) -> Change:
        case(code, change.__name__.replace("_", "-"), change)
        return change

    return add


def written(model: ModelProto) -> bytes:
    """The bytes as the writer writes them."""
    return model.SerializeToString(deterministic=True)


def varint(value: int) -> bytes:
    """A number in protobuf's encoding."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
