"""What a server promises beside its answers: memory, threads, and what happens when something fails."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Callable
from typing import Any

import pytest

from splitbundle.errors import BundleError, Problem
from splitbundle.records import replace
from splitbundle.serving import metrics, sessions, training_runs
from splitbundle.serving.stage_service import StageService
from splitbundle.wire import frames
from splitbundle.wire.messages import (
    Backward,
    Close,
    Closed,
    Failure,
    Forward,
    Forwarded,
    Health,
    Open,
    Opened,
    Ran,
    Renew,
    Renewed,
    Run,
    Step,
    Train,
)
from tests.support.stand_in_stage import LIMITS, POSITIONS, ServedStandIn, asked, packed, service


def run(session: str | None, number: int, past: tuple[int, ...] = (0,), count: tuple[int, ...] = (1,)) -> Run:
    return Run(
        session=session, number=number, past=past, count=count, sequence=max(1, *count), width=2, encoding="float32"
    )


def opened(to: StageService, rows: int = 1, capacity: int = POSITIONS) -> str:
    answer, _ = asked(to, Open(rows=rows, capacity=capacity))
    assert isinstance(answer, Opened)
    return answer.session


def code(answer: Any) -> str:
    assert isinstance(answer, Failure), answer
    return answer.code


class Held:
    """A stage whose next call waits until it may go on, and a thread that asks for it."""

    def __init__(self, to: StageService, served: ServedStandIn, message: Run) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.answer: Any = None
        served.before = self.wait

        def ask() -> None:
            self.answer, _ = asked(to, message, [1, 1])

        self.thread = threading.Thread(target=ask)
        self.thread.start()
        assert self.begun.wait(60)

    def wait(self) -> None:
        self.begun.set()
        assert self.go.wait(60)

    def ended(self) -> Any:
        self.go.set()
        self.thread.join(60)
        return self.answer


@pytest.mark.rule("SB-X-001")
@pytest.mark.parametrize("end", ["embeds", "has_head"])
def test_no_stage_with_an_end_of_the_model_is_served(end: str) -> None:
    _, served, _ = service()
    setattr(served.stage, end, True)
    with pytest.raises(BundleError) as raised:
        StageService(served, service()[0].offer)
    assert raised.value.codes == ("stage.range",)


@pytest.mark.rule("SB-X-011")
def test_ids_are_random_bits_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def token_hex(size: int) -> str:
        drawn.append(size)
        return f"{len(drawn):032x}"

    monkeypatch.setattr(secrets, "token_hex", token_hex)
    to, _, _ = service()
    assert to.instance == f"{1:032x}"
    assert opened(to) == f"{2:032x}"
    answer, _ = asked(to, Train())
    assert answer.run == f"{3:032x}"
    assert drawn == [16, 16, 16]


@pytest.mark.rule("SB-X-012")
def test_a_lease_lasts_while_a_step_is_computed() -> None:
    to, served, clock = service()
    session = opened(to)

    def later() -> None:
        clock.now += 1000
        to.sessions.end_leases()

    served.before = later
    assert isinstance(asked(to, run(session, 1), [1, 1])[0], Ran)
    clock.now += LIMITS.lease - 1
    to.sessions.end_leases()
    assert (len(to.sessions), to.sessions.expired) == (1, 0)
    clock.now += 1
    to.sessions.end_leases()
    assert (len(to.sessions), to.sessions.slots, to.sessions.expired) == (0, 0, 1)


@pytest.mark.rule("SB-X-014")
def test_an_order_of_a_step_whose_capacity_is_refused_is_not_applied() -> None:
    to, _, _ = service()
    session = opened(to, 2)
    assert isinstance(asked(to, run(session, 1, (0, 0), (2, 1)), [1] * 6)[0], Ran)
    moved = replace(run(session, 2, (1, 2), (1, 1)), order=(1, 0), capacity=LIMITS.capacity + 1)
    assert code(asked(to, moved, [1] * 4)[0]) == "session.capacity"
    assert isinstance(asked(to, run(session, 2, (2, 1), (1, 1)), [1] * 4)[0], Ran)


@pytest.mark.rule("SB-X-016")
def test_slots_are_free_when_no_step_holds_them() -> None:
    """Otherwise a client could hold any number of caches: steps that wait, of sessions that it has closed."""
    to, served, _ = service()
    session = opened(to, 2)
    held = Held(to, served, run(session, 1, (0, 0), (1, 0)))
    assert isinstance(asked(to, Close(session=session))[0], Closed)
    assert (len(to.sessions), to.sessions.slots) == (0, 2 * POSITIONS)
    assert code(asked(to, Open(rows=1, capacity=1))[0]) == "server.full"
    assert isinstance(held.ended(), Ran)
    assert to.sessions.slots == 0
    assert opened(to, 2)


@pytest.mark.rule("SB-X-016")
def test_sessions_that_are_being_opened_count(monkeypatch: pytest.MonkeyPatch) -> None:
    to, served, _ = service()
    make = served.stage.cache
    found: list[str] = []

    def slow(rows: int, capacity: int) -> Any:
        monkeypatch.undo()
        found.extend(type(asked(to, Open(rows=1, capacity=1))[0]).__name__ for _ in range(LIMITS.sessions))
        return make(rows, capacity)  # as if other threads asked in the middle

    monkeypatch.setattr(served.stage, "cache", slow)
    opened(to, 1, 1)
    assert found == ["Opened", "Opened", "Failure"]
    assert len(to.sessions) == LIMITS.sessions


@pytest.mark.rule("SB-X-016")
def test_a_cache_that_no_memory_is_left_for_takes_no_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    to, served, _ = service()

    def none(rows: int, capacity: int) -> Any:
        raise MemoryError

    monkeypatch.setattr(served.stage, "cache", none)
    assert code(asked(to, Open(rows=1, capacity=1))[0]) == "server.failed"
    assert (len(to.sessions), to.sessions.slots) == (0, 0)
    monkeypatch.undo()
    assert all(opened(to, 1, 1) for _ in range(LIMITS.sessions))


@pytest.mark.rule("SB-X-016")
def test_the_bytes_of_caches_are_limited_too() -> None:
    to, _, _ = service(max_bytes=100, slot_bytes=10)
    assert code(asked(to, Open(rows=1, capacity=11))[0]) == "server.full"
    assert opened(to, 2, 5)
    assert code(asked(to, Open(rows=1, capacity=1))[0]) == "server.full"


@pytest.mark.rule("SB-X-024")
def test_a_step_that_waits_while_the_weights_move_is_not_computed() -> None:
    to, served, _ = service()
    session = opened(to)
    training, _ = asked(to, Train())
    held = Held(to, served, run(None, 0))
    behind: list[Any] = []
    moves = threading.Thread(target=lambda: behind.append(asked(to, Step(run=training.run, number=1))[0]))
    moves.start()
    wait_until(lambda: to.waiting == 1)
    steps = threading.Thread(target=lambda: behind.append(asked(to, run(session, 1), [1, 1])[0]))
    steps.start()
    wait_until(lambda: to.waiting == 2)
    held.ended()
    moves.join(60)
    steps.join(60)
    assert {type(each).__name__ for each in behind} == {"Stepped", "Failure"}
    assert next(each.code for each in behind if isinstance(each, Failure)) == "session.unknown"
    assert served.calls == 1
    assert to.sessions.slots == 0


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(6000):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it never was")


@pytest.mark.rule("SB-X-014", "SB-X-026")
@pytest.mark.parametrize(
    "error", [MemoryError, RuntimeError, ValueError, OSError, TypeError, IndexError, ArithmeticError]
)
def test_a_step_that_fails_ends_its_session_alone(error: type[Exception]) -> None:
    """The cache may hold half of it. A text of the library could hold numbers, so none is sent."""
    to, served, _ = service()
    session, other = opened(to, 1, 8), opened(to, 1, 8)

    def fail() -> None:
        raise error("3.14159 in a payload")

    served.before = fail
    answer, _ = asked(to, run(session, 1), [3.14159, 1])
    assert (code(answer), answer.retry) == ("server.failed", "other")
    assert "3.14" not in answer.got + answer.expected
    served.before = lambda: None
    assert code(asked(to, run(session, 1), [1, 1])[0]) == "session.unknown"
    assert isinstance(asked(to, run(other, 1), [1, 1])[0], Ran)
    assert to.sessions.slots == 8


@pytest.mark.rule("SB-X-014", "SB-X-016")
@pytest.mark.parametrize(("error", "lives"), [(BundleError, True), (MemoryError, False)])
def test_a_cache_that_can_not_grow(error: type[Exception], lives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that refuses has changed nothing. One that fails may have grown in part."""
    to, _, _ = service()
    session = opened(to, 2, 4)
    asked(to, run(session, 1, (0, 0), (1, 1)), [1, 1, 2, 2])
    problem = Problem(code="session.capacity", expected="less", got="more")
    (own,) = to.sessions._sessions.values()

    def fail(capacity: int) -> None:
        raise error(problem)

    own.cache.grow = fail
    grows = run(session, 2, (1, 1), (1, 1))
    grows = type(grows)(**{name: getattr(grows, name) for name in grows.__slots__} | {"order": (1, 0), "capacity": 6})
    asked(to, grows, [0, 0, 0, 0])
    assert to.sessions.slots == (8 if lives else 0)
    answer, numbers = asked(to, run(session, 2, (1, 1), (1, 1)), [0, 0, 0, 0])
    if lives:
        assert numbers == [1, 1, 2, 2]
    else:
        assert code(answer) == "session.unknown"


def test_a_step_of_a_client_that_is_gone_is_not_begun() -> None:
    to, served, _ = service()
    session = opened(to)
    frame = frames.pack(run(session, 1), [packed([1, 1])])
    answer, _ = frames.unpack(to.answer(frame, "alice", lambda: False))
    assert (code(answer), answer.retry, served.calls) == ("server.unwanted", "same", 0)  # type: ignore[union-attr]
    assert isinstance(frames.unpack(to.answer(frame, "alice"))[0], Ran)


@pytest.mark.rule("SB-X-017")
def test_the_same_frame_twice_at_once_is_computed_once() -> None:
    to, served, _ = service()
    session = opened(to)
    held = Held(to, served, run(session, 1))
    again: list[Any] = []
    thread = threading.Thread(target=lambda: again.append(asked(to, run(session, 1), [1, 1])))
    thread.start()
    wait_until(lambda: to.sessions._sessions[session].steps_waiting == 2)
    first = held.ended()
    thread.join(60)
    assert again[0][0] == first
    assert served.calls == 1


@pytest.mark.rule("SB-X-013")
def test_answers_that_are_kept_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_KEPT_BYTES", 500)
    to, _, clock = service()
    first, second = opened(to, 1, 8), opened(to, 1, 8)
    asked(to, run(first, 1), [1, 1])
    clock.now += 1
    for number in (1, 2, 3):
        asked(to, run(second, number, (number - 1,)), [1, 1])
    answer, _ = asked(to, run(first, 1), [1, 1])
    assert (code(answer), answer.retry) == ("session.gap", "replay")
    assert isinstance(asked(to, run(second, 3, (2,)), [1, 1])[0], Ran)
    assert isinstance(asked(to, run(first, 2, (1,)), [1, 1])[0], Ran)
    assert 0 < to.sessions._kept_bytes <= 500
    to.sessions.end_all()
    assert to.sessions._kept_bytes == 0


def forward(run: str, ticket: int) -> Forward:
    return Forward(run=run, ticket=ticket, count=(1,), sequence=1, width=2, encoding="float32")


def backward(run: str, ticket: int) -> Backward:
    return Backward(run=run, ticket=ticket, tokens=1, width=2, encoding="float32")


@pytest.mark.rule("SB-X-021")
def test_answers_of_training_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may have any number of tickets. The last answer is always kept."""
    monkeypatch.setattr(training_runs, "MAX_KEPT_BYTES", 400)
    to, served, _ = service()
    started, _ = asked(to, Train())
    assert to.training is not None
    for ticket in range(1, 50):
        for message in (forward(started.run, ticket), backward(started.run, ticket)):
            answer, _ = asked(to, message, [1, 1])
            assert asked(to, message, [1, 1])[0] == answer
        assert to.training._kept_bytes <= 400
    assert code(asked(to, backward(started.run, 1), [1, 1])[0]) == "train.ticket"
    assert to.training._training.gradient == 49 * 2
    assert served.calls == 49
    asked(to, Step(run=started.run, number=1))
    assert to.training._kept_bytes == 0


@pytest.mark.rule("SB-X-021")
def test_a_gradient_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of its gradients may have been added."""
    to, _, _ = service()
    started, _ = asked(to, Train())
    assert to.training is not None
    asked(to, forward(started.run, 1), [1, 1])

    def fail(kept: Any, gradient: Any) -> Any:
        to.training._training.gradient += 1  # type: ignore[union-attr]
        raise MemoryError

    monkeypatch.setattr(to.training._training, "backward", fail)
    assert code(asked(to, backward(started.run, 1), [1, 1])[0]) == "server.failed"
    assert (to.training.tickets, to.training._training.gradient) == (0, 0)
    assert code(asked(to, Step(run=started.run, number=1))[0]) == "train.lost"


@pytest.mark.rule("SB-X-023")
def test_a_step_that_can_not_be_stored_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    to, served, _ = service()
    session = opened(to)
    started, _ = asked(to, Train())
    assert to.training is not None
    asked(to, forward(started.run, 1), [1, 1])
    asked(to, backward(started.run, 1), [1, 1])

    def fail(rate: float | None) -> None:
        raise BundleError(Problem(code="output.failed", expected="room", got="none"))

    monkeypatch.setattr(to.training._training, "step", fail)
    answer, _ = asked(to, Step(run=started.run, number=1))
    assert (code(answer), answer.got) == ("train.lost", "output.failed")
    assert (served.weight, to.training.number) == (1, 0)
    assert isinstance(asked(to, Renew(session=session))[0], Renewed)  # the weights are as they were


@pytest.mark.rule("SB-X-025")
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_stage_that_computes_no_numbers_is_not_healthy(number: float) -> None:
    to, served, _ = service()
    served.weight = number
    answer, _ = asked(to, Health())
    assert (code(answer), answer.retry, served.calls) == ("server.failed", "other", 1)


@pytest.mark.rule("SB-X-026")
def test_requests_that_wait_when_the_service_stops_are_answered() -> None:
    to, served, _ = service()
    session = opened(to)
    held = Held(to, served, run(session, 1))
    waiting: list[Any] = []
    thread = threading.Thread(target=lambda: waiting.append(asked(to, run(None, 0), [1, 1])[0]))
    thread.start()
    wait_until(lambda: to.waiting == 1)
    stops = threading.Thread(target=to.stop)
    stops.start()
    thread.join(60)
    assert (code(waiting[0]), waiting[0].retry) == ("server.draining", "replay")
    assert isinstance(held.ended(), Ran)
    stops.join(60)
    assert (len(to.sessions), to.sessions.slots) == (0, 0)
    assert code(asked(to, Health())[0]) == "server.draining"


@pytest.mark.rule("SB-X-026")
def test_long_texts_are_cut() -> None:
    """An error answers any frame, so its own header must be one that is taken."""
    to, _, _ = service(LIMITS)
    op = "\U0001f642" * 900
    header = f'{{"op":"train","{op}":1}}'.encode()
    frame = frames.MAGIC + len(header).to_bytes(4, "little") + header
    answer, _ = frames.unpack(to.answer(frame, "alice"))
    assert code(answer) == "field.unknown"
    assert answer.argument is not None  # type: ignore[union-attr]
    assert 900 < len(answer.argument) <= 1000  # type: ignore[union-attr]


def test_metrics_name_no_client_and_no_number_of_a_payload() -> None:
    to, _, _ = service()
    asked(to, run(opened(to), 1), [7.25, 1], owner="alice")
    asked(to, forward(asked(to, Train())[0].run, 1), [7.25, 1])
    text = metrics.render(to)
    assert 'requests_total{op="run",result="ok"} 1' in text
    assert "splitbundle_stage_tickets 1" in text
    assert "alice" not in text
    assert "7.25" not in text
    for line in text.splitlines():
        assert line.startswith("# ") or re.fullmatch(r'\w+({(\w+="[\w.+-]+",?)+})? [\d.e+-]+', line), line


def test_forward_results_are_kept_until_their_gradient() -> None:
    to, _, _ = service()
    started, _ = asked(to, Train())
    assert isinstance(asked(to, forward(started.run, 1), [1, 1])[0], Forwarded)
    assert to.training is not None
    before = to.training._kept_bytes
    asked(to, backward(started.run, 1), [1, 1])
    assert 0 < to.training._kept_bytes <= before


def test_the_log_names_clients_and_codes_and_no_content() -> None:
    lines: list[str] = []
    to, _, _ = service(log=lines.append)
    session = opened(to)
    asked(to, run(session, 1), [1.25, 1])
    asked(to, run(session, 5), [1.25, 1])
    asked(to, Close(session=session))
    assert lines == ["alice: open", "alice: run was refused: session.gap", "alice: close"]


def test_a_name_is_one_line_of_the_log() -> None:
    lines: list[str] = []
    to, _, _ = service(log=lines.append)
    asked(to, Open(rows=1, capacity=POSITIONS), owner="certificate:eve\nalice: \x1b[2Jopen")
    to.refused("certificate:eve\r\u2028")
    assert lines == [
        r"certificate:eve\nalice: \x1b[2Jopen: open",
        r"certificate:eve\r\u2028: a call was refused: peer.identity",
    ]


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), ValueError("I/O operation on closed file.")])
def test_a_log_that_can_not_be_written_refuses_nobody(error: Exception) -> None:
    def log(line: str) -> None:
        raise error

    to, _, _ = service(log=log)
    session = opened(to)
    assert code(asked(to, run(session, 5), [1, 1])[0]) == "session.gap"
    assert isinstance(asked(to, run(session, 1), [1, 1])[0], Ran)
    to.refused("certificate:carol")
    assert to.counts["call", "peer.identity"] == 1
