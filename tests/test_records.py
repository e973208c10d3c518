"""Records behave like those of ``@dataclass`` with the same options to all callers."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from splitbundle.format.manifest.document import File
from splitbundle.records import as_dict, field, members, record, replace, types


@record(frozen=True, slots=True, kw_only=True)
class Point:
    """Two numbers."""

    x: int
    y: int = 2

    @property
    def total(self) -> int:
        return self.x + self.y


@record(frozen=True, slots=True, kw_only=True)
class Path:
    """Points and more."""

    points: tuple[Point, ...]
    more: dict[str, Any] = field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The dataclass that Point is compared with."""

    x: int
    y: int = 2


def test_fields_defaults_and_values() -> None:
    point = Point(x=1)
    assert (point.x, point.y, point.total, repr(point)) == (1, 2, 3, "Point(x=1, y=2)")
    assert repr(point) == repr(Model(x=1)).replace("Model", "Point")
    assert (Point.__name__, Point.__qualname__, Point.__module__, Point.__doc__) == (
        "Point",
        "Point",
        __name__,
        "Two numbers.",
    )
    assert members(point) == {"x": 1, "y": 2}
    assert types(Path) == {"points": "tuple[Point, ...]", "more": "dict[str, Any]"}
    one, other = Path(points=()), Path(points=())
    assert one.more == {}
    assert one.more is not other.more


def test_equality_and_hash() -> None:
    assert Point(x=1) == Point(y=2, x=1) != Point(x=1, y=3)
    assert {Point(x=1), Point(x=1, y=2)} == {Point(x=1)}
    assert Point(x=1) != Model(x=1)
    assert hash(Point(x=1)) == hash(Model(x=1))
    with pytest.raises(TypeError, match="unhashable"):
        hash(Path(points=()))


@pytest.mark.parametrize(
    ("given", "message"),
    [({}, "missing a required keyword argument: 'x'"), ({"x": 1, "z": 1}, "an unexpected keyword argument 'z'")],
)
def test_other_arguments_are_refused(given: dict[str, int], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Point(**given)
    with pytest.raises(TypeError):
        Point(1, 2)  # type: ignore[call-arg,misc]


def test_nothing_changes() -> None:
    point = Point(x=1)
    for name in ("x", "z"):
        with pytest.raises(AttributeError):
            setattr(point, name, 1)
    with pytest.raises(AttributeError, match="cannot delete field 'x'"):
        del point.x
    assert not hasattr(point, "__dict__")
    assert replace(point, y=5) == Point(x=1, y=5) != point


def test_copies_are_equal() -> None:
    path = Path(points=(Point(x=1),), more={"a": [Point(x=2)]})
    assert pickle.loads(pickle.dumps(path)) == path == copy.deepcopy(path) == copy.copy(path)
    assert as_dict(path) == {"points": ({"x": 1, "y": 2},), "more": {"a": [{"x": 2, "y": 2}]}}


def test_dataclasses_take_them_for_theirs() -> None:
    path = Path(points=(Point(x=1),))
    assert dataclasses.asdict(path) == as_dict(path)
    assert dataclasses.replace(Point(x=1), x=3) == Point(x=3)
    ours, theirs = dataclasses.fields(Point), dataclasses.fields(Model)
    assert [(f.name, f.type, f.default, f.kw_only) for f in ours] == [
        (f.name, f.type, f.default, f.kw_only) for f in theirs
    ]
    assert dataclasses.fields(Path)[1].default_factory is dict
    assert dataclasses.is_dataclass(Path)


def test_options_that_no_record_has() -> None:
    for slots, kw_only in ((False, True), (True, False)):
        with pytest.raises(TypeError, match="slotted and keyword-only"):
            record(frozen=True, slots=slots, kw_only=kw_only)


def test_one_that_is_not_frozen_differs_in_that_alone() -> None:
    @record(frozen=False, slots=True, kw_only=True)
    class Move:
        x: int
        y: int = 2

        def __init__(self, *, x: int, y: int = 2) -> None:
            self.x, self.y = x, y

    move = Move(x=1)
    assert (move, repr(move).split(".")[-1]) == (Move(x=1, y=2), "Move(x=1, y=2)")
    assert (members(move), replace(move, y=3), copy.copy(move)) == ({"x": 1, "y": 2}, Move(x=1, y=3), move)
    move.x = 5
    assert move == Move(x=5)
    with pytest.raises(AttributeError):
        move.z = 5  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="unhashable"):
        hash(move)


def test_asking_what_they_share_for_fields_spoils_none() -> None:
    """``help`` and ``inspect`` ask every base of a class."""
    shared = next(each for each in Point.__mro__ if each.__name__ == "_Record")
    assert not dataclasses.is_dataclass(shared)
    assert [own.name for own in dataclasses.fields(File)] == ["size", "sha256", "header_sha256"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Point(x=1).x = 2  # type: ignore[misc]
