"""The environment in which chat templates are compiled: Jinja's immutable sandbox, with less in it.

A template reaches plain data, and the names, methods, filters and tests that are listed here. All that it does goes
through functions that keep marks and spend work. ``template_guard`` puts them into the parsed template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, Final

from jinja2 import Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from splitbundle.text.marked import Marked, greatest
from splitbundle.text.template_filters import FILTERS, TESTS
from splitbundle.text.template_limits import (
    OBJECT,
    Counted,
    LimitReached,
    deeper,
    items,
    spend,
    weigh,
)
from splitbundle.text.template_operations import (
    Method,
    arithmetic,
    compared,
    concatenated,
    contained,
    has_method,
    key,
    method,
    piece,
    text,
)

__all__ = ["ChatEnvironment", "Refused"]

_LONGEST_RANGE: Final = 100_000
_LONGEST_FORMAT: Final = 256
_LOOP: Final = frozenset(
    ("index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem", "depth", "depth0")
)
_MACRO: Final = frozenset(("name", "arguments", "catch_kwargs", "catch_varargs", "caller"))


class Function:
    """A function that templates may call by its name."""

    __slots__ = ("members", "run")

    def __init__(self, run: Callable[..., Any], **members: Function) -> None:
        self.run, self.members = run, members

    def __call__(self, *values: Any, **named: Any) -> Any:
        return self.run(*values, **named)


class _Generation(Extension):
    """``{% generation %}`` shows which text the model wrote. Marks say it already, so it renders its content alone."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment of one chat template. It holds no state of a rendering.

    ``clock`` returns the time that ``strftime_now`` writes.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, clock: Callable[[], datetime]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,  # it would compute constant expressions before there is a budget
            finalize=_written,
            cache_size=0,
        )
        self.filters = FILTERS | _INSERTED
        self.tests = dict(TESTS)

        def strftime_now(form: Any) -> Marked:
            written = text(form)
            if len(written) > _LONGEST_FORMAT:
                raise LimitReached(f"a format of a time with more than {_LONGEST_FORMAT} characters")
            return Marked(clock().strftime(str.__str__(written)), greatest(written))

        self.globals = {
            "range": Function(_range),
            "dict": Function(_dict, fromkeys=Function(_from_keys)),
            "namespace": Function(_Namespace),
            "raise_exception": Function(_raise),
            "strftime_now": Function(strftime_now),
        }

    def concat(self, pieces: Iterable[str]) -> Marked:
        """Return the output of a template, a macro or a block."""
        return concatenated(pieces)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return ``obj.attribute``: a method that templates may call, or an item."""
        return self._found(obj, attribute, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return ``obj[argument]``: an item, or else what ``obj.argument`` gives."""
        if isinstance(obj, dict | list | tuple | str | range):
            try:
                return (text(obj) if isinstance(obj, str) else obj)[key(argument)]
            except (TypeError, LookupError):
                pass
        return self._found(obj, argument, None)

    def _found(self, obj: Any, name: Any, item: str | None) -> Any:
        if isinstance(obj, Undefined):
            return obj[name]  # raises
        if not isinstance(name, str):
            return self.undefined(obj=obj, name=name)
        if name.startswith("_") and not (isinstance(obj, dict) and name in obj):
            return self.unsafe_undefined(obj, name)
        callable_here = has_method(obj, name)
        if callable_here is not None:
            return Method(obj, name) if callable_here else self.unsafe_undefined(obj, name)
        if isinstance(obj, dict) and item is not None and item in obj:
            return obj[item]
        if isinstance(obj, Namespace) or (isinstance(obj, LoopContext) and name in _LOOP):
            return getattr(obj, name, self.undefined(obj=obj, name=name))
        if isinstance(obj, LoopContext) and name in ("cycle", "changed"):
            return Method(obj, name)
        if isinstance(obj, Macro) and name in _MACRO:
            return getattr(obj, name)
        if isinstance(obj, Function) and name in obj.members:
            return obj.members[name]
        return self.undefined(obj=obj, name=name)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return ``left operator right``."""
        return arithmetic(operator, left, right)

    def call(self, context: Context, called: Any, /, *values: Any, **named: Any) -> Any:
        """Call a macro, a method or a function."""
        named.pop("_loop_vars", None)
        named.pop("_block_vars", None)
        spend(OBJECT)
        if isinstance(called, Method) and isinstance(called.of, LoopContext):
            weigh(*values)
            return getattr(called.of, called.name)(*values, **named)
        if isinstance(called, Method):
            return method(called, values, named)
        if isinstance(called, Macro):
            spend(2 * OBJECT)
            with deeper():
                return called(*values, **named)
        if isinstance(called, LoopContext):
            with deeper():
                return called(*map(Counted, values), **named)
        if isinstance(called, Function | Undefined):
            return called(*values, **named)
        raise SecurityError(f"a value of the type {type(called).__name__} is not callable")


class _Namespace(Namespace):
    """``namespace()``: its names don't begin with an underscore, so that a template reaches nothing inside."""

    def __init__(*values: Any, **named: Any) -> None:
        attributes = _dict(*values[1:], **named)
        for name in attributes:
            _public(name)
        Namespace.__init__(values[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        spend(OBJECT)
        super().__setitem__(name, value)


def _public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace can't have the name {name!r}: it begins with an underscore")


def _range(*values: int) -> range:
    made = range(*values)
    if max(abs(made.start), abs(made.stop)) >> 63 or len(made) > _LONGEST_RANGE:
        raise LimitReached(f"a range of more than {_LONGEST_RANGE} numbers")
    return made


def _dict(values: Any = (), /, **named: Any) -> dict[Any, Any]:
    spend(OBJECT * (len(values) + len(named)))
    made = dict(values) if isinstance(values, dict) else {key(name): value for name, value in items(values)}
    return made | named


def _from_keys(names: Any, value: Any = None) -> dict[Any, Any]:
    names = items(names)
    spend(OBJECT * len(names))
    return {key(name): value for name in names}


def _raise(message: Any = "") -> None:
    raise Refused(str.__str__(text(message)))


class Refused(TemplateError):
    """The template itself refuses its input, with ``raise_exception``."""


@pass_context
def _written(_: Context, value: Any) -> Marked:
    return text(value)


def _keywords(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError("only a dict can give keyword arguments")
    spend(OBJECT * len(value))
    return value


def _spent(work: int) -> bool:
    spend(work)
    return True


_INSERTED: Final[dict[str, Callable[..., Any]]] = {
    "loop over": Counted,
    "spend work": _spent,
    "compare": compared,
    "is in": contained,
    "concatenate": concatenated,
    "slice by": piece,
    "use as key": key,
    "use as arguments": items,
    "use as keywords": _keywords,
}
"""What ``template_guard`` puts into templates. No template can name them: their names have spaces."""
