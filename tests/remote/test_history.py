"""What a client keeps of a cache refills another one: by brute force against a cache that is simulated."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

import pytest

from splitbundle.remote.history import History, Sent
from splitbundle.wire.encodings import payload_bytes

SCALED = "int8"
Row = list[tuple[int, ...]]
"""For each position, the tokens that it was computed from: what a cache holds of it."""


class Server:
    """A cache as wire.md describes it. It knows of each token where it came from."""

    def __init__(self, rows: int) -> None:
        self.rows: list[Row] = [[] for _ in range(rows)]

    def reorder(self, order: Sequence[int]) -> None:
        self.rows = [list(self.rows[row]) for row in order]

    def compute(self, sent: Sent) -> None:
        named = range(len(self.rows)) if sent.rows is None else sent.rows
        assert len(set(named)) == len(named) == len(sent.past) == len(sent.count)
        assert len(sent.payload) == payload_bytes(sent.encoding, sum(sent.count), sent.width)
        tokens = iter(tokens_of(sent))
        for row, past, count in zip(named, sent.past, sent.count, strict=True):
            assert past <= len(self.rows[row]), "a position that the row doesn't reach"
            held = self.rows[row] = self.rows[row][:past]
            for _ in range(count):
                held.append((*(held[-1] if held else ()), next(tokens)))
        assert next(tokens, None) is None


def payload_of(tokens: Sequence[int], encoding: str) -> bytes:
    """Return tokens that carry numbers of their own: with ``int8``, in their scale and in their code."""
    if encoding == SCALED:
        return struct.pack(f"<{len(tokens)}I", *tokens) + bytes(token % 256 for token in tokens)
    return struct.pack(f"<{len(tokens)}I", *tokens)


def tokens_of(sent: Sent) -> list[int]:
    number = sum(sent.count)
    tokens = list(struct.unpack(f"<{number}I", sent.payload[: 4 * number]))
    if sent.encoding == SCALED:
        assert list(sent.payload[4 * number :]) == [token % 256 for token in tokens]
    return tokens


class Client:
    """Random calls, each sent to a server and noted in a history."""

    def __init__(self, seed: int, rows: int, encoding: str) -> None:
        self.random, self.encoding = random.Random(seed), encoding
        self.server, self.history = Server(rows), History(rows)
        self.next = 0
        self.orders: list[tuple[int, ...]] = []

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.server.rows]

    def act(self) -> None:
        draw = self.random.random()
        rows = len(self.server.rows)
        if draw < 0.2:
            order = tuple(self.random.randrange(rows) for _ in range(rows))
            self.server.reorder(order)
            self.history.reorder(order)
            return
        named = None
        if draw < 0.5:
            named = tuple(self.random.sample(range(rows), self.random.randint(1, rows)))
        own = range(rows) if named is None else named
        back = self.random.random() < 0.3
        past = tuple(self.random.randint(0, n) if back else n for n in (self.lengths[row] for row in own))
        count = tuple(self.random.choice((0, 1, 1, 1, 3)) for _ in own)
        tokens = list(range(self.next, self.next + sum(count)))
        self.next += len(tokens)
        sent = Sent(
            rows=named,
            past=past,
            count=count,
            sequence=max(1, *count),
            width=1 if self.encoding == SCALED else 2 if self.encoding == "float16" else 1,
            encoding=self.encoding,
            payload=payload_of(tokens, self.encoding),
        )
        self.server.compute(sent)
        self.history.add(sent)


def exact(client: Client) -> Server:
    """Return a server to which the calls of a history were sent again."""
    other = Server(len(client.server.rows))
    for order, sent in client.history.calls():
        if order is not None:
            other.reorder(order)
        other.compute(sent)
    if client.history.order is not None:  # it goes with the next call
        other.reorder(client.history.order)
    return other


@pytest.mark.rule("SB-X-018")
@pytest.mark.parametrize("encoding", ["float32", "float16", SCALED])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_same_calls_again_fill_the_same_cache(rows: int, encoding: str) -> None:
    for seed in range(60):
        client = Client(seed, rows, encoding)
        for _ in range(client.random.randint(1, 200)):
            client.act()
        for row, own in zip(exact(client).rows, client.server.rows, strict=True):
            assert row[: len(own)] == own, seed  # what was forgotten may come again, above the row's end
        assert exact(client).rows == exact(client).rows


@pytest.mark.rule("SB-X-019")
@pytest.mark.parametrize("encoding", ["float32", "float16", SCALED])
@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_one_prompt_a_row_fills_the_same_cache(piece: int, encoding: str) -> None:
    for seed in range(60):
        client = Client(seed, 1 + seed % 4, encoding)
        for _ in range(client.random.randint(1, 100)):
            client.act()
        other, again = Server(len(client.server.rows)), History(len(client.server.rows))
        for sent in client.history.merged(client.lengths, piece):
            assert max(sent.count) <= piece
            assert sent.sequence == max(sent.count)
            other.compute(sent)
            again.add(sent)
        assert other.rows == client.server.rows, seed
        # The client goes on with a history of the merged prompts.
        client.history = again
        for _ in range(20):
            client.act()
        for row, own in zip(exact(client).rows, client.server.rows, strict=True):
            assert row[: len(own)] == own, seed


def test_a_history_keeps_no_more_than_it_needs() -> None:
    """A client that goes back all the time has a short row, and keeps only what fills it."""
    client = Client(1, 2, "float32")
    for _ in range(2000):
        past = tuple(min(n, 3) for n in client.lengths)
        tokens = (client.next, client.next + 1)
        client.next += 2
        sent = Sent(
            rows=None,
            past=past,
            count=(1, 1),
            sequence=1,
            width=1,
            encoding="float32",
            payload=payload_of(tokens, "float32"),
        )
        client.server.compute(sent)
        client.history.add(sent)
    assert client.history.size < 2000
    assert len(list(client.history.calls())) == 4
    assert client.history.size == 4 * 8


def test_orders_alone_are_joined() -> None:
    history = History(3)
    history.reorder((1, 2, 0))
    history.reorder((1, 2, 0))
    assert history.order == (2, 0, 1)
    history.reorder((1, 2, 0))
    assert history.order == (0, 1, 2)
    assert list(history.calls()) == []
