"""The header of a frame: strict JSON, one closed object for each kind of message."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, Final

from splitbundle.format import strict_json
from splitbundle.format.fields import Field, Members, Problems
from splitbundle.records import as_dict, types
from splitbundle.wire import messages, step_headers
from splitbundle.wire.encodings import ENCODINGS, EXACT
from splitbundle.wire.messages import KINDS, Limits, Message
from splitbundle.wire.step_headers import MAX_PADDED, MAX_PADDING, MAX_POSITION, MAX_ROWS, MAX_WIDTH

MAX_BYTES: Final = 2**17
"""The longest header. A step with the most rows, with the longest of each field, takes 129,055 bytes."""
MAX_LEASE: Final = 86400.0
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=True, allow_nan=False)
RETRIES: Final = ("never", "same", "other", "replay")
WHERE: Final = "header"
"""The name of the document in problems."""
_ID: Final = re.compile(r"[0-9a-f]{32}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_CODE: Final = re.compile(r"[a-z]+(\.[a-z-]+)?")
_TEXT: Final = 1024


def dump(message: Message) -> bytes:
    """Return the header of a message, without padding."""
    step = step_headers.dump(message)
    if step is not None:
        return step.encode("ascii")
    optional = getattr(message, "may_be_absent", ())
    values = {name: getattr(message, name) for name in type(message).__slots__}
    for name in optional:
        if values[name] is None:
            del values[name]
    if isinstance(message, messages.Welcome):
        values["limits"] = as_dict(message.limits)
    return _ENCODER.encode({"op": message.op, **values}).encode("ascii")


def parse(data: bytes) -> Message:
    """Parse a header.

    Raises:
        BundleError: ``json.*``, ``field.*``.
    """
    return parse_step(data) or _parse_any(data)


def parse_step(data: bytes) -> Message | None:
    """Return a step or its answer, if the header has the usual form; None for any other. See ``step_headers``."""
    try:
        return step_headers.parse(data.decode("ascii"))
    except UnicodeDecodeError:
        return None


def _parse_any(data: bytes) -> Message:
    problems = Problems(WHERE)
    field = Field(strict_json.parse(data, WHERE, max_bytes=MAX_BYTES), problems)
    op = field.members(["op"], open=True)["op"].choice(tuple(KINDS))
    problems.raise_if_any()
    kind = KINDS[op]
    if kind is messages.Hello and _is_other_protocol(field.value.get("protocol")):
        return messages.Hello(protocol=field.value["protocol"], fingerprint=None, layers=None)
    optional: tuple[str, ...] = getattr(kind, "may_be_absent", ())
    required = [name for name in types(kind) if name not in optional]
    members = field.members(["op", *required], optional)
    given = [*required, *(name for name in optional if name in field.value)]
    values = {name: _reader(op, name)(members[name]) for name in given}
    problems.raise_if_any()
    if "count" in values:
        _check_rows(values, members)
        problems.raise_if_any()
    made: Message = kind(**values)
    return made


def _is_other_protocol(protocol: Any) -> bool:
    """Return whether a hello is of another version, whose other members this one doesn't know (SB-X-010)."""
    return type(protocol) is int and 0 <= protocol <= strict_json.MAX_INTEGER and protocol != messages.PROTOCOL


def _check_rows(values: dict[str, Any], members: Members) -> None:
    """Check the fields that must fit each other (SB-X-009)."""
    count = values["count"]
    for name in ("past", "rows"):
        if values.get(name) is not None and len(values[name]) != len(count):
            members[name].refuse(f"{len(count)} integers, as in count")
    if max(count) > values["sequence"]:
        members["count"].refuse(f"at most {values['sequence']}, the sequence")
    # A reader makes room for the padding, too. A few bytes must not ask for much of it.
    padded, tokens = len(count) * values["sequence"] * values["width"], sum(count) * values["width"]
    if padded > max(MAX_PADDED, MAX_PADDING * tokens):
        members["sequence"].refuse(f"at most {MAX_PADDED} numbers with padding, or {MAX_PADDING} times those of tokens")


def _integers(maximum: int, minimum: int = 0) -> Callable[[Field], tuple[int, ...]]:
    def read(field: Field) -> tuple[int, ...]:
        # One look at all of them is much faster than a look at each. A wrong one is then looked for.
        values = field.value
        integers = type(values) is list and 0 < len(values) <= MAX_ROWS and set(map(type, values)) == {int}
        if integers and minimum <= min(values) and max(values) <= maximum:
            return tuple(values)
        return tuple(each.integer(minimum, maximum) for each in field.items(minimum=1, maximum=MAX_ROWS))

    return read


def _layers(field: Field) -> tuple[int, int]:
    pair = [each.integer(0, MAX_POSITION) for each in field.items(minimum=2, maximum=2)]
    return (pair[0], pair[1]) if len(pair) == 2 else (0, 0)


def _lease(field: Field) -> float:
    if type(field.value) not in (int, float):
        field.refuse("a number", code="field.type")
    elif not (math.isfinite(field.value) and 0 < field.value <= MAX_LEASE):
        field.refuse(f"above 0, at most {MAX_LEASE:g}")
    else:
        return float(field.value)
    return 1.0


def _limits(field: Field) -> Limits:
    members = field.members(list(types(Limits)))
    numbers = {name: members[name].integer(0) for name in types(Limits) if name != "lease"}
    return Limits(**numbers, lease=_lease(members["lease"]))


def _encodings(field: Field) -> tuple[str, ...]:
    return tuple(each.choice(ENCODINGS) for each in field.items(minimum=1, maximum=len(ENCODINGS)))


def _or_null(read: Callable[[Field], Any]) -> Callable[[Field], Any]:
    return lambda field: None if field.is_null else read(field)


def _id(field: Field) -> str:
    return field.string(_ID, "32 hexadecimal digits")


def _digest(field: Field) -> str:
    return field.string(_DIGEST, "sha256: and 64 hexadecimal digits")


def _text(field: Field) -> str:
    return field.string(maximum=_TEXT)


def _number(field: Field) -> int:
    return field.integer()


_READERS: Final[dict[str, Callable[[Field], Any]]] = {
    "argument": _or_null(_text),
    "backend": _text,
    "bundle": _digest,
    "capacity": lambda field: field.integer(1, MAX_POSITION),
    "code": lambda field: field.string(_CODE, "a code"),
    "computed": _number,
    "count": _integers(MAX_POSITION),
    "dtype": lambda field: field.choice(tuple(EXACT)),
    "encoding": lambda field: field.choice(ENCODINGS),
    "encodings": _encodings,
    "expected": _text,
    "fingerprint": _digest,
    "got": _text,
    "instance": _id,
    "layers": _layers,
    "learning_rate": lambda field: field.positive_number(),
    "lease": _lease,
    "limits": _limits,
    "number": _number,
    "order": _integers(MAX_ROWS - 1),
    "past": _integers(MAX_POSITION),
    "protocol": _number,
    "queued": _number,
    "retry": lambda field: field.choice(RETRIES),
    "rows": _integers(MAX_ROWS - 1),
    "run": _id,
    "sequence": lambda field: field.integer(1, MAX_POSITION),
    "session": _id,
    "ticket": lambda field: field.integer(1),
    "tokens": lambda field: field.integer(0, MAX_POSITION),
    "trainable": lambda field: field.boolean(),
    "version": _text,
    "width": lambda field: field.integer(1, MAX_WIDTH),
}
"""A field -> what reads it. A field has the same type in every message, except for those below."""
_OWN_READERS: Final[dict[tuple[str, str], Callable[[Field], Any]]] = {
    (messages.Hello.op, "fingerprint"): _or_null(_digest),
    (messages.Hello.op, "layers"): _or_null(_layers),
    (messages.Open.op, "rows"): lambda field: field.integer(1, MAX_ROWS),
    (messages.Run.op, "session"): _or_null(_id),
}


def _reader(op: str, name: str) -> Callable[[Field], Any]:
    return _OWN_READERS.get((op, name)) or _READERS[name]
