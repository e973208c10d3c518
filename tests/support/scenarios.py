"""Sequences of calls to a pipeline. Each row's history is kept here, and the original model computes it alone."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Literal

import torch
from torch import Tensor

from splitbundle.stages.session import Session
from tests.support.models import TOLERANCE, expect, expected_logits, relative, token_rows


@dataclass
class Worst:
    """The largest relative difference of a test, and where it was."""

    name: str
    value: float = 0.0
    where: str = "nowhere"
    compared: int = 0

    def see(self, got: Tensor, expected: Tensor, where: str) -> None:
        """*Shape:* (tokens, vocab) twice."""
        if got.shape != expected.shape or len(expected):
            difference = relative(got, expected)
            self.compared += len(expected)
            if difference > self.value:
                self.value, self.where = difference, where

    def check(self) -> None:
        """Fail above the tolerance, and if nothing was compared."""
        text = f"{self.name}: worst relative difference {self.value:.3g} of {self.compared} tokens, at {self.where}"
        print(text)  # pytest -rP shows the largest difference of a test that passes
        assert self.compared, text
        assert self.value <= TOLERANCE, text


Side = Literal["left", "right", "both"]


@dataclass
class Conversation:
    """A session and each row's history. Every logit is compared with the original's on that history alone."""

    pipeline: Any
    rows: int
    worst: Worst
    where: str
    capacity: int = 40
    histories: list[list[int]] = field(init=False)
    session: Session = field(init=False)

    def __post_init__(self) -> None:
        self.session = self.pipeline.session(self.rows, self.capacity)
        self.histories = [[] for _ in range(self.rows)]

    def say(
        self, tokens: Sequence[Sequence[int]], side: Side | None = None, logits: Literal["all", "last"] | int = "all"
    ) -> None:
        """Give each row's tokens in one call, padded on ``side``; None for tokens that need no padding."""
        ids, mask, starts = pad(tokens, side)
        got = self.pipeline(ids, attention_mask=mask, session=self.session, logits=logits)
        where = f"{self.where}, after {[len(h) for h in self.histories]}, lengths {[len(t) for t in tokens]}, {side}"
        for row, (new, start) in enumerate(zip(tokens, starts, strict=True)):
            self.histories[row] += new
            known = expected_logits(self.worst.name, tuple(self.histories[row]))
            if logits == "all":
                begin, number = start, len(new)
            else:
                wanted = 1 if logits == "last" else logits
                number = min(wanted, len(new))
                begin = wanted - number
            self.worst.see(
                got[row, begin : begin + number], known[len(known) - number :], f"{where}, row {row}, {logits}"
            )
            padding = torch.cat((got[row, :begin], got[row, begin + number :]))
            assert not padding.any(), f"{self.worst.name}: {where}, row {row}: the logits of padding aren't zero"
        assert self.session.past == [len(history) for history in self.histories]

    def forget(self, numbers: Sequence[int]) -> None:
        """Roll each row back."""
        self.session.rollback(numbers)
        self.histories = [h[: len(h) - n] for h, n in zip(self.histories, numbers, strict=True)]

    def reorder(self, rows: Sequence[int]) -> None:
        """Let row i go on from row ``rows[i]``."""
        self.session.reorder(rows)
        self.histories = [list(self.histories[row]) for row in rows]


def pad(tokens: Sequence[Sequence[int]], side: Side | None) -> tuple[Tensor, Tensor | None, list[int]]:
    """Return ids, mask, and the first token's place in each row.

    Padding is random ids, so reading it shows in the result.
    """
    longest = max(1, *map(len, tokens))
    if side is None:
        return torch.tensor(tokens), None, [0] * len(tokens)
    width = longest + (2 if side == "both" else 0)
    ids = torch.tensor(token_rows(*[width] * len(tokens), seed=99))
    mask = torch.zeros_like(ids)
    starts = []
    for row, new in enumerate(tokens):
        room = width - len(new)
        start = {"left": room, "right": 0, "both": (room + row) // 2}[side]
        ids[row, start : start + len(new)] = torch.tensor(new, dtype=torch.int64)
        mask[row, start : start + len(new)] = 1
        starts.append(start)
    return ids, mask, starts


def uneven_pieces(talk: Conversation) -> None:
    """3 + 1 + 7 + 2 tokens, past every small window."""
    rows = token_rows(13, 13, seed=1)
    for start, stop in itertools.pairwise((0, 3, 4, 11, 13)):
        talk.say([row[start:stop] for row in rows[: talk.rows]])


def padded(talk: Conversation, side: Side) -> None:
    """Rows of different lengths, one of them empty, then decoding with a different past in every row."""
    talk.say(token_rows(5, 9, 0, 12, seed=2), side)
    for seed in (3, 4, 5):
        talk.say(token_rows(1, 1, 1, 1, seed=seed))
    # Some rows pause, as stopped rows do, and pieces pass a window from different pasts.
    talk.say(token_rows(0, 1, 1, 0, seed=6), side)
    talk.say(token_rows(3, 0, 7, 2, seed=7), side)
    talk.say(token_rows(6, 6, 6, 6, seed=8))


def rolled_back(talk: Conversation) -> None:
    """Forgotten positions must have no effect, in any row, and below a window too."""
    talk.say(token_rows(11, 11, 11, seed=9))
    talk.forget([0, 3, 8])
    talk.say(token_rows(2, 2, 2, seed=10))
    talk.forget([2, 0, 5])
    talk.say(token_rows(4, 1, 6, seed=11), "left")
    talk.forget([15 - 2, 11 - 2, 6 - 2])
    talk.say(token_rows(5, 5, 5, seed=12))
    talk.forget([7, 7, 7])
    talk.say(token_rows(3, 3, 3, seed=13))


def reordered(talk: Conversation) -> None:
    """Reorder as beam search does: some rows go on twice, others not at all, with equal and with different pasts."""
    talk.say(token_rows(6, 6, 6, seed=14))
    talk.reorder([2, 0, 0])
    talk.say(token_rows(1, 1, 1, seed=15))
    talk.say(token_rows(2, 5, 0, seed=16), "right")
    talk.reorder([1, 1, 2])
    talk.say(token_rows(1, 1, 1, seed=17))
    talk.reorder([1, 2, 0])
    talk.say(token_rows(7, 3, 4, seed=18), "both")


def last_logits(talk: Conversation) -> None:
    """Ask for logits of the last position, and of the last k: fewer, as many, and more than a row has."""
    talk.say(token_rows(6, 6, 6, seed=19), logits="last")
    talk.say(token_rows(4, 4, 4, seed=20), logits=3)
    talk.say(token_rows(2, 2, 2, seed=21), logits=5)
    talk.say(token_rows(5, 0, 2, seed=22), "left", logits="last")
    talk.say(token_rows(1, 3, 0, seed=23), "right", logits=2)
    talk.say(token_rows(1, 1, 1, seed=24), logits="last")
    talk.say(token_rows(2, 0, 3, seed=25), "both", logits=4)


SCENARIOS: Final[dict[str, tuple[int, Callable[[Conversation], None]]]] = {
    "pieces": (2, uneven_pieces),
    "one row in pieces": (1, uneven_pieces),
    "left": (4, lambda talk: padded(talk, "left")),
    "right": (4, lambda talk: padded(talk, "right")),
    "both": (4, lambda talk: padded(talk, "both")),
    "rollback": (3, rolled_back),
    "reorder": (3, reordered),
    "last": (3, last_logits),
}
"""Name -> the rows, and the calls."""


class _Recorded(Conversation):
    """A conversation that calls nothing. It keeps the rows that no other row of its own begins with."""

    def __post_init__(self) -> None:
        self.histories = [[] for _ in range(self.rows)]
        self.longest: set[tuple[int, ...]] = set()

    def say(self, tokens: Sequence[Sequence[int]], side: Any = None, logits: Any = "all") -> None:
        self.histories = [[*history, *new] for history, new in zip(self.histories, tokens, strict=True)]
        rows = {tuple(history) for history in self.histories}
        self.longest = {row for row in self.longest | rows if not any(_begins(row, other) for other in rows)}

    def forget(self, numbers: Sequence[int]) -> None:
        self.histories = [h[: len(h) - n] for h, n in zip(self.histories, numbers, strict=True)]

    def reorder(self, rows: Sequence[int]) -> None:
        self.histories = [list(self.histories[row]) for row in rows]


def _begins(row: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(row) < len(other) and other[: len(row)] == row


@cache
def histories() -> tuple[tuple[int, ...], ...]:
    """Return the rows of all scenarios, without those that another one begins with."""
    found: set[tuple[int, ...]] = set()
    for rows, scenario in SCENARIOS.values():
        talk = _Recorded(None, rows, Worst(""), "")
        scenario(talk)
        found |= talk.longest
    return tuple(sorted(row for row in found if not any(_begins(row, other) for other in found)))


def run(pipeline: Any, worst: Worst, where: str) -> None:
    """Run all scenarios with one pipeline, which takes and gives tensors."""
    expect(worst.name, histories())
    for rows, scenario in SCENARIOS.values():
        scenario(Conversation(pipeline, rows, worst, where))


def chat(pipeline: Any, worst: Worst, where: str, chance: random.Random) -> None:
    """Make calls, rollbacks and reorderings in a random order."""
    talk = Conversation(pipeline, 3, worst, where)
    for _ in range(14):
        longest = talk.capacity - max(map(len, talk.histories))
        what = chance.random()
        if what < 0.2 or longest < 8:
            talk.forget([chance.randint(0, len(history)) for history in talk.histories])
        elif what < 0.35:
            talk.reorder([chance.randrange(3) for _ in range(3)])
        else:
            number = chance.choice((1, 1, 2, 6))
            lengths = [chance.randint(0, number) for _ in range(3)] if what < 0.7 else [number] * 3
            side: Side | None = chance.choice(("left", "right", "both")) if what < 0.7 else None
            logits: Literal["all", "last"] | int = chance.choice(("all", "last", 3))
            talk.say(token_rows(*lengths, seed=chance.randrange(10_000)), side, logits)
