"""What a client sent for a cache: enough to fill another one. ``spec/v1/wire.md``, section "Replay"."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any, Final

from splitbundle.wire.encodings import EXACT, SCALE

_SWEEP: Final = 64
"""The calls that a history may have before it looks for those that nothing needs."""
_SWEEP_BYTES: Final = 2**20
"""The bytes of its calls, likewise."""


class Sent:
    """A call that a server computed. A plain class, because each step of decoding makes one."""

    __slots__ = ("count", "encoding", "needs", "past", "payload", "rows", "sequence", "width")

    def __init__(
        self,
        *,
        rows: tuple[int, ...] | None,
        past: tuple[int, ...],
        count: tuple[int, ...],
        sequence: int,
        width: int,
        encoding: str,
        payload: bytes | memoryview = b"",
        needs: tuple[int, ...] = (),
    ) -> None:
        self.rows, self.past, self.count = rows, past, count
        """Rows of the cache, or None for all of them; and the positions of their tokens."""
        self.sequence, self.width, self.encoding, self.payload = sequence, width, encoding, payload
        self.needs = needs
        """The numbers of the calls that came last for its rows."""

    def __reduce__(self) -> Any:
        # A payload may be a view of a frame, which can't be copied or pickled.
        given = {name: getattr(self, name) for name in self.__slots__}
        return _sent, (given | {"payload": bytes(self.payload)},)


def _sent(given: dict[str, Any]) -> Sent:
    return Sent(**given)


class _Span:
    """Positions of a row that one call brought."""

    __slots__ = ("call", "row", "start", "stop")

    def __init__(self, call: int, row: int, start: int, stop: int) -> None:
        self.call, self.row, self.start, self.stop = call, row, start, stop


class History:
    """The calls that a cache was made of, with every reordering of rows between them."""

    def __init__(self, rows: int) -> None:
        self._calls: dict[int, Sent] = {}
        self._orders: dict[int, tuple[int, ...]] = {}
        """The number of a call -> the order that the rows took before it."""
        self._spans: list[list[_Span]] = [[] for _ in range(rows)]
        self._order: tuple[int, ...] | None = None
        """The order that rows took after the last call."""
        self._next = self._swept = 0
        self._bytes = self._swept_bytes = 0

    @property
    def size(self) -> int:
        """Return the bytes that it keeps."""
        return sum(len(call.payload) for call in self._calls.values())

    @property
    def order(self) -> tuple[int, ...] | None:
        """Return the order that rows took after the last call, or None."""
        return self._order

    def reorder(self, order: Sequence[int]) -> None:
        """Let row i continue the former row ``order[i]``."""
        self._order = tuple(order) if self._order is None else tuple(self._order[row] for row in order)
        self._spans = [[_Span(s.call, s.row, s.start, s.stop) for s in self._spans[row]] for row in order]

    def add(self, sent: Sent) -> None:
        """Note a call that was computed, and set what it needs. A lower ``past`` forgets the positions above it."""
        past, count = sent.past, sent.count
        number = self._next
        named = range(len(self._spans)) if sent.rows is None else sent.rows
        needs = []
        for own, row in enumerate(named):
            spans = self._spans[row]
            while spans and spans[-1].start >= past[own]:
                spans.pop()
            if spans:
                spans[-1].stop = min(spans[-1].stop, past[own])
                needs.append(spans[-1].call)
            if count[own]:
                spans.append(_Span(number, own, past[own], past[own] + count[own]))
        sent.needs = tuple(sorted(set(needs)))
        self._calls[number] = sent
        if self._order is not None:
            self._orders[number], self._order = self._order, None
        self._next += 1
        self._bytes += len(sent.payload)
        if len(self._calls) > max(_SWEEP, 2 * self._swept) or self._bytes > max(_SWEEP_BYTES, 2 * self._swept_bytes):
            self._sweep()

    def _sweep(self) -> None:
        """Forget the calls that no row needs. The order of a forgotten call is joined to that of the next one."""
        needed: set[int] = set()
        waiting = [span.call for spans in self._spans for span in spans]
        while waiting:
            number = waiting.pop()
            if number not in needed:
                needed.add(number)
                waiting.extend(self._calls[number].needs)
        kept = sorted(needed)
        for number in sorted(self._orders, reverse=True):  # each is joined before those that follow it
            if number in needed:
                continue
            order = self._orders.pop(number)
            place = bisect.bisect_right(kept, number)
            if place == len(kept):  # nothing follows but the rows as they are now
                self._order = order if self._order is None else tuple(order[row] for row in self._order)
            else:
                later = self._orders.get(kept[place])
                self._orders[kept[place]] = order if later is None else tuple(order[row] for row in later)
        self._calls = {number: self._calls[number] for number in kept}
        self._swept = len(kept)
        self._bytes = self._swept_bytes = self.size

    def calls(self) -> Iterator[tuple[tuple[int, ...] | None, Sent]]:
        """Yield the calls that are needed, each with the order that rows take before it."""
        self._sweep()
        for number, call in self._calls.items():
            yield self._orders.get(number), call

    def merged(self, lengths: Sequence[int], piece: int) -> Iterator[Sent]:
        """Yield calls that bring the positions of each row again, in pieces of ``piece`` positions.

        Args:
            lengths: the positions that each row has to hold.
            piece: the largest number of tokens of a row in a call.
        """
        for start in range(0, max(lengths, default=0), piece):
            past = tuple(min(start, length) for length in lengths)
            count = tuple(min(max(length - start, 0), piece) for length in lengths)
            first = next(iter(self._calls.values()))
            parts = [
                part for row in range(len(lengths)) for part in self._tokens(row, past[row], past[row] + count[row])
            ]
            scales, codes = [scale for scale, _ in parts], [code for _, code in parts]
            yield Sent(
                rows=None,
                past=past,
                count=count,
                sequence=max(count),
                width=first.width,
                encoding=first.encoding,
                payload=b"".join((*scales, *codes)),
            )

    def _tokens(self, row: int, start: int, stop: int) -> Iterator[tuple[bytes, bytes]]:
        """Yield what was sent for some positions of a row: scales, if the encoding has them, and numbers."""
        for span in self._spans[row]:
            first, last = max(span.start, start), min(span.stop, stop)
            if first >= last:
                continue
            call = self._calls[span.call]
            before = sum(call.count[: span.row]) + first - span.start
            tokens, number = last - first, sum(call.count)
            size = call.width * EXACT.get(call.encoding, 1)
            scale = 0 if call.encoding in EXACT else SCALE
            codes = call.payload[scale * number :]
            yield (
                bytes(call.payload[scale * before : scale * (before + tokens)]),
                bytes(codes[size * before : size * (before + tokens)]),
            )
