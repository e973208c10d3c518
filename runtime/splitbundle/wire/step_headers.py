"""The headers of a step and of its answer, written and read at once: a decoding step waits for both, twice.

Only headers in the form that ``dump`` gives them are read here. Any other one is parsed member by member.
"""

from __future__ import annotations

import re
from typing import Final

from splitbundle.format import strict_json
from splitbundle.wire.encodings import ENCODINGS
from splitbundle.wire.messages import Message, Ran, Run

MAX_ROWS: Final = 4096
MAX_POSITION: Final = 2**31 - 1
MAX_WIDTH: Final = 2**20
MAX_PADDED: Final = 2**28
"""The numbers of a hidden state with its padding, if it has many more of them than of tokens."""
MAX_PADDING: Final = 16
_INTEGER: Final = "(0|[1-9][0-9]{0,15})"
_INTEGERS: Final = r"\[((?:0|[1-9][0-9]{0,9})(?:,(?:0|[1-9][0-9]{0,9}))*)\]"
_ID: Final = '"([0-9a-f]{32})"'
_ENCODING: Final = f'"({"|".join(ENCODINGS)})"'
_RUN: Final = re.compile(
    rf'{{"op":"run","session":(?:null|{_ID}),"number":{_INTEGER},"past":{_INTEGERS},"count":{_INTEGERS},'
    rf'"sequence":{_INTEGER},"width":{_INTEGER},"encoding":{_ENCODING}'
    rf'(?:,"rows":{_INTEGERS})?(?:,"order":{_INTEGERS})?(?:,"capacity":{_INTEGER})?}} *'
)
_RAN: Final = re.compile(
    rf'{{"op":"ran","number":{_INTEGER},"instance":{_ID},"tokens":{_INTEGER},"width":{_INTEGER},'
    rf'"encoding":{_ENCODING},"queued":{_INTEGER},"computed":{_INTEGER}}} *'
)


def dump(message: Message) -> str | None:
    """Return the header of a step or of its answer, without padding; None for another message."""
    if type(message) is Run:
        session = "null" if message.session is None else f'"{message.session}"'
        return (
            f'{{"op":"run","session":{session},"number":{message.number},"past":[{_joined(message.past)}],'
            f'"count":[{_joined(message.count)}],"sequence":{message.sequence},"width":{message.width},'
            f'"encoding":"{message.encoding}"'
            + ("" if message.rows is None else f',"rows":[{_joined(message.rows)}]')
            + ("" if message.order is None else f',"order":[{_joined(message.order)}]')
            + ("}" if message.capacity is None else f',"capacity":{message.capacity}}}')
        )
    if type(message) is Ran:
        return (
            f'{{"op":"ran","number":{message.number},"instance":"{message.instance}","tokens":{message.tokens},'
            f'"width":{message.width},"encoding":"{message.encoding}","queued":{message.queued},'
            f'"computed":{message.computed}}}'
        )
    return None


def parse(header: str) -> Message | None:
    """Return a step or its answer, if the header is in order and has the usual form; None for any other."""
    found = _RUN.fullmatch(header)
    if found is None:
        return _parse_ran(header)
    session, number, past, count, sequence, width, encoding, rows, order, capacity = found.groups()
    run = Run(
        session=session,
        number=int(number),
        past=_integers(past),
        count=_integers(count),
        sequence=int(sequence),
        width=int(width),
        encoding=encoding,
        rows=None if rows is None else _integers(rows),
        order=None if order is None else _integers(order),
        capacity=None if capacity is None else int(capacity),
    )
    return run if _in_range(run) and _rows_fit(run) else None


def _parse_ran(header: str) -> Message | None:
    found = _RAN.fullmatch(header)
    if found is None:
        return None
    number, instance, tokens, width, encoding, queued, computed = found.groups()
    ran = Ran(
        number=int(number),
        instance=instance,
        tokens=int(tokens),
        width=int(width),
        encoding=encoding,
        queued=int(queued),
        computed=int(computed),
    )
    most = strict_json.MAX_INTEGER
    numbers = ran.number <= most and ran.queued <= most and ran.computed <= most
    return ran if numbers and ran.tokens <= MAX_POSITION and 0 < ran.width <= MAX_WIDTH else None


def _joined(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def _integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _in_range(run: Run) -> bool:
    return (
        run.number <= strict_json.MAX_INTEGER
        and 0 < run.sequence <= MAX_POSITION
        and 0 < run.width <= MAX_WIDTH
        and (run.capacity is None or 0 < run.capacity <= MAX_POSITION)
        and max(run.past) <= MAX_POSITION  # the counts are at most the sequence
        and (run.rows is None or max(run.rows) < MAX_ROWS)
        and (run.order is None or (len(run.order) <= MAX_ROWS and max(run.order) < MAX_ROWS))
    )


def _rows_fit(run: Run) -> bool:
    """Return whether the fields fit each other (SB-X-009)."""
    number, most = len(run.count), max(run.count)
    same = number <= MAX_ROWS and len(run.past) == number and (run.rows is None or len(run.rows) == number)
    padded = number * run.sequence * run.width
    return same and most <= run.sequence and padded <= max(MAX_PADDED, MAX_PADDING * sum(run.count) * run.width)
