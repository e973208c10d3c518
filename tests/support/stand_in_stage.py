"""A stage for the tests of servers: it adds up the tokens of each row. It needs no backend.

The result of a token is the sum of all tokens of its row so far, number by number, times a weight that is 1 at first.
So every result shows what the cache holds. ``tests/conformance/README.md``, section "The protocol", has the equations.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Final

from splitbundle.errors import BundleError, Problem
from splitbundle.serving.quotas import Quota
from splitbundle.serving.stage_service import Served, StageService
from splitbundle.wire import frames
from splitbundle.wire.messages import Limits, Message

WIDTH: Final = 2
LAYERS: Final = (1, 3)
POSITIONS: Final = 32
FINGERPRINT: Final = "sha256:" + "f" * 64
BUNDLE: Final = "sha256:" + "b" * 64
LIMITS: Final = Limits(message=4096, rows=4, capacity=POSITIONS, slots=64, sessions=3, tickets=2, lease=60.0)
Token = list[float]
Hidden = list[list[Token]]
"""Rows of tokens, without padding."""


class Clock:
    """A clock that only a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Cache:
    """The tokens that each row has."""

    def __init__(self, rows: int, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: Hidden = [[] for _ in range(rows)]
        self.lengths = [0] * rows

    def reorder(self, order: Sequence[int]) -> None:
        self.tokens = [list(self.tokens[row]) for row in order]
        self.lengths = [self.lengths[row] for row in order]

    def grow(self, capacity: int) -> None:
        self.capacity = capacity


class StandIn:
    """The stage, with what a server asks of one."""

    name, backend, fingerprint, layer_range = "trunk", "stand-in", FINGERPRINT, LAYERS
    embeds = has_head = False
    architecture = SimpleNamespace(hidden_size=WIDTH)

    def cache(self, rows: int, capacity: int) -> Cache:
        if capacity > POSITIONS:
            raise refusal("session.capacity", "capacity")
        return Cache(rows, capacity)

    def check(
        self,
        hidden: Hidden,
        *,
        past: Sequence[int] | None = None,
        count: Sequence[int] | None = None,
        cache: Cache | None = None,
        rows: Sequence[int] | None = None,
    ) -> Any:
        past = [0] * len(hidden) if past is None else past
        if cache is None:
            if any(past):
                raise refusal("input.position", "past")
            return SimpleNamespace(past=past, rows=None)
        own = range(len(cache.tokens)) if rows is None else rows
        if len(set(own)) != len(own) or max(own) >= len(cache.tokens):
            raise refusal("input.value", "rows")
        if len(own) != len(hidden):
            raise refusal("input.shape", "batch")
        for row, before, tokens in zip(own, past, hidden, strict=True):
            if before + len(tokens) > cache.capacity:
                raise refusal("session.capacity", "capacity")
            if before > cache.lengths[row]:
                raise refusal("input.position", f"past[{row}]")
        return SimpleNamespace(past=past, rows=own)


class ServedStandIn:
    """The stage between payloads of float32."""

    dtype = "float32"

    def __init__(self) -> None:
        self.stage = StandIn()
        self.weight = 1.0
        self.calls = 0
        """The number of calls that were computed."""
        self.before: Callable[[], None] = lambda: None
        """Runs before each call."""

    def decode(self, payload: memoryview, encoding: str, count: Sequence[int], sequence: int) -> Hidden:
        if encoding != "float32":
            raise ValueError("the stand-in takes float32")
        numbers = [list(pair) for pair in struct.iter_unpack(f"<{WIDTH}f", payload)]
        return [[numbers.pop(0) for _ in range(n)] for n in count]

    def check(self, hidden: Hidden, **given: Any) -> Any:
        return self.stage.check(hidden, **given)

    def run(self, hidden: Hidden, positions: Any, cache: Cache | None) -> Hidden:
        self.before()
        self.calls += 1
        cache = Cache(len(hidden), POSITIONS) if cache is None else cache
        rows = range(len(hidden)) if positions.rows is None else positions.rows
        result = []
        for row, past, tokens in zip(rows, positions.past, hidden, strict=True):
            held = cache.tokens[row] = [*cache.tokens[row][:past], *tokens]
            cache.lengths[row] = len(held)
            result.append([self.scaled(held[: past + i + 1]) for i in range(len(tokens))])
        return result

    def scaled(self, tokens: Sequence[Token]) -> Token:
        return [self.weight * sum(column) for column in zip(*tokens, strict=True)]

    def encode(self, hidden: Hidden, count: Sequence[int], encoding: str) -> list[memoryview]:
        return [memoryview(packed([number for row in hidden for token in row for number in token]))]

    def zeros(self) -> Hidden:
        return [[[0.0] * WIDTH]]

    def is_finite(self, hidden: Hidden) -> bool:
        return all(abs(number) < float("inf") for row in hidden for token in row for number in token)


class StandInTraining:
    """Its one weight learns: a step subtracts the learning rate times the gradient."""

    def __init__(self, served: ServedStandIn, rate: float = 1.0) -> None:
        self.served, self.rate = served, rate
        self.gradient, self.number = 0.0, 0

    def forward(self, hidden: Hidden, count: Sequence[int]) -> tuple[Hidden, Any]:
        return self.served.run(hidden, SimpleNamespace(past=[0] * len(hidden), rows=None), None), hidden

    def backward(self, kept: Hidden, gradient: Hidden) -> Hidden:
        result = []
        for tokens, wanted in zip(kept, gradient, strict=True):
            for i, each in enumerate(wanted):
                sums = [sum(column) for column in zip(*tokens[: i + 1], strict=True)]
                self.gradient += sum(a * b for a, b in zip(sums, each, strict=True))
            result.append([self.served.scaled(wanted[i:]) for i in range(len(wanted))])
        return result

    def discard(self) -> None:
        self.gradient = 0.0

    def step(self, learning_rate: float | None) -> None:
        self.rate = self.rate if learning_rate is None else learning_rate
        self.served.weight -= self.rate * self.gradient
        self.discard()
        self.number += 1


def refusal(code: str, argument: str) -> BundleError:
    return BundleError(Problem(code=code, argument=argument, expected="another one", got="this one"))


def packed(numbers: Sequence[float]) -> bytes:
    """Return numbers as a payload in float32."""
    return struct.pack(f"<{len(numbers)}f", *numbers)


def service(
    limits: Limits = LIMITS,
    *,
    trains: bool = True,
    max_bytes: int = 2**20,
    slot_bytes: int = 8,
    quota: Quota | None = None,
    log: Callable[[str], None] | None = None,
) -> tuple[StageService, ServedStandIn, Clock]:
    """Return a service of the stage, the stage, and its clock."""
    served, clock = ServedStandIn(), Clock()
    offer = Served(bundle=BUNDLE, limits=limits, max_bytes=max_bytes, slot_bytes=slot_bytes, quota=quota)
    training = StandInTraining(served) if trains else None
    return StageService(served, offer, training=training, clock=clock, log=log), served, clock


def asked(
    to: StageService, message: Message, numbers: Sequence[float] = (), owner: str = "alice"
) -> tuple[Any, list[float]]:
    """Return the answer of a service to a message, and its numbers."""
    answer, payload = frames.unpack(to.answer(frames.pack(message, [packed(numbers)]), owner))
    return answer, list(struct.unpack(f"<{len(payload) // 4}f", payload))
