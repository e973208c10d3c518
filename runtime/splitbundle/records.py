"""Records: classes with named fields. The fields are passed by keyword, and records compare by value.

``record`` makes the same classes as ``@dataclass`` with ``slots=True``, ``kw_only=True`` and the same ``frozen``. One
that isn't frozen brings its own ``__init__``. Type checkers and the functions of ``dataclasses`` accept them as such.
But ``dataclasses`` imports ``inspect`` and compiles six functions for each class. With forty records, that was most of
the time of ``import splitbundle``. Here all classes share their functions.
"""

from __future__ import annotations

__all__ = ["as_dict", "field", "members", "record", "replace", "types"]

TYPE_CHECKING = False  # type checkers treat it as true; importing typing would be most of this import's time
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar

_set = object.__setattr__
_REQUIRED: Any = object()


class _Made:
    """A default that a factory makes for each record."""

    def __init__(self, factory: Callable[[], Any]) -> None:
        self.factory = factory


if TYPE_CHECKING:
    from dataclasses import dataclass as record
    from dataclasses import field, replace
else:

    def field(*, default_factory: Callable[[], Any]) -> Any:
        """Return a default that ``default_factory`` makes for each record."""
        return _Made(default_factory)

    def record(*, frozen: bool, slots: bool, kw_only: bool) -> Callable[[type], type]:
        """Return a decorator that makes a class with annotations a record.

        Args:
            frozen: whether the fields of a record can't be set anew. A class of which thousands are made in a second
                isn't frozen, and has an ``__init__`` of its own, which takes a third of the time.
            slots: True.
            kw_only: True.

        Raises:
            TypeError: ``slots`` or ``kw_only`` is False.
        """
        if not (slots and kw_only):
            raise TypeError("a record is slotted and keyword-only")
        return _record if frozen else _unfrozen

    def replace(of: Any, /, **changes: Any) -> Any:
        """Return a copy of a record with some fields changed."""
        return of.__replace__(**changes)


def members(of: Any) -> dict[str, Any]:
    """Return the fields of a record with their values, in order."""
    names: tuple[str, ...] = of.__slots__
    return {name: getattr(of, name) for name in names}


def types(of: Any) -> dict[str, str]:
    """Return the fields of a record with their annotations as text, in order."""
    found: dict[str, str] = of.record_types
    return found


def as_dict(value: Any) -> Any:
    """Return a copy of a value in which every record, at any depth, is a dict.

    A field that ``may_be_absent`` names is left out if its value is None.
    """
    if isinstance(value, _Record):
        absent = [name for name in value.may_be_absent if getattr(value, name) is None]
        return {name: as_dict(each) for name, each in members(value).items() if name not in absent}
    if isinstance(value, dict):
        return {key: as_dict(each) for key, each in value.items()}
    return type(value)(map(as_dict, value)) if isinstance(value, list | tuple) else value


class _DataclassFields:
    """The attribute that ``dataclasses.replace``, ``asdict`` and ``fields`` read. It is made at first use."""

    def __get__(self, instance: object, owner: type[_Record]) -> Any:
        if owner is _Record:  # it has no fields, and a value kept here would be inherited by every record
            raise AttributeError("__dataclass_fields__")
        import dataclasses

        def described(default: Any) -> Any:
            if default is _REQUIRED:
                return dataclasses.field()
            if isinstance(default, _Made):
                return dataclasses.field(default_factory=default.factory)
            return dataclasses.field(default=default)

        specified = [(name, kind, described(owner.record_defaults[name])) for name, kind in types(owner).items()]
        like: Any = dataclasses.make_dataclass(owner.__name__, specified, frozen=True, kw_only=True)
        owner.__dataclass_fields__ = like.__dataclass_fields__
        return like.__dataclass_fields__


class _Record:
    """The base of all records."""

    __slots__ = ()
    record_types: ClassVar[dict[str, str]] = {}
    record_defaults: ClassVar[dict[str, Any]] = {}
    may_be_absent: ClassVar[tuple[str, ...]] = ()
    """The fields that ``as_dict`` leaves out if they are None."""
    __dataclass_fields__: Any = _DataclassFields()

    def __init__(self, **given: Any) -> None:
        if given.keys() != self.record_defaults.keys():
            given = self._completed(given)
        for name, value in given.items():
            _set(self, name, value)
        self.__post_init__()

    def __post_init__(self) -> None:
        """Check the fields. A record may override this."""

    @classmethod
    def _completed(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name not in cls.record_defaults:
                raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {name!r}")
        values = cls.record_defaults | given
        for name, value in values.items():
            if value is _REQUIRED:
                raise TypeError(f"{cls.__name__}() missing a required keyword argument: {name!r}")
            if name not in given and isinstance(value, _Made):
                values[name] = value.factory()
        return values

    def __replace__(self, /, **changes: Any) -> Any:
        return type(self)(**(members(self) | changes))

    def __repr__(self) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in members(self).items())})"

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return tuple(members(self).values()) == tuple(members(other).values())

    def __hash__(self) -> int:
        return hash(tuple(members(self).values()))

    def __setattr__(self, name: str, value: object) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> None:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def __reduce__(self) -> Any:
        return _restored, (type(self), members(self))


def _restored(cls: type[_Record], values: dict[str, Any]) -> _Record:
    return cls(**values)


def _unfrozen(cls: type[Any]) -> type[Any]:
    made = _record(cls)
    for name in ("__setattr__", "__delattr__"):
        setattr(made, name, getattr(object, name))
    made.__hash__ = None  # type: ignore[assignment]
    return made


def _record(cls: type[Any]) -> type[Any]:
    own = dict(vars(cls))
    for left in ("__dict__", "__weakref__"):
        own.pop(left, None)
    defaults = {name: own.pop(name, _REQUIRED) for name in cls.__annotations__}
    own |= {"__slots__": tuple(defaults), "__qualname__": cls.__qualname__}
    own |= {"record_types": dict(cls.__annotations__), "record_defaults": defaults}
    return type(cls.__name__, (_Record,), own)
