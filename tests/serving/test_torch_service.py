"""A server of a torch stage that is trained: sessions beside training, and steps that are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import splitbundle
from splitbundle.backends.torch.served import ServedStage
from splitbundle.backends.torch.served_training import ServedTraining
from splitbundle.records import replace
from splitbundle.serving.stage_service import Served, StageService
from splitbundle.wire import frames
from splitbundle.wire.messages import (
    PROTOCOL,
    Backward,
    Forward,
    Hello,
    Message,
    Open,
    Run,
    Step,
    Train,
)
from tests.support.paths import TESTS
from tests.support.stand_in_stage import BUNDLE, LIMITS, packed

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 48
ONE = [0.5] * WIDTH


def service(checkpoints: Path) -> StageService:
    bundle = splitbundle.open(TESTS / "golden" / "v1.0" / "gpt2.splitbundle")
    stage = bundle.stage("trunk", trainable=True, kernels="torch")
    training = ServedTraining(stage, optimizer="sgd", learning_rate=0.1, checkpoints=checkpoints)
    offer = Served(bundle=BUNDLE, limits=replace(LIMITS, message=2**20), max_bytes=2**20, slot_bytes=8)
    return StageService(ServedStage(stage), offer, training=training)


def asked(to: StageService, message: Message, numbers: list[float] | None = None) -> tuple[Any, bytes]:
    answer, payload = frames.unpack(to.answer(frames.pack(message, [packed(numbers or [])]), "alice"))
    return answer, bytes(payload)


def run(session: str | None, number: int, past: int) -> Run:
    return Run(session=session, number=number, past=(past,), count=(1,), sequence=1, width=WIDTH, encoding="float32")


def step(to: StageService, run_id: str, number: int) -> str:
    tail: dict[str, Any] = {"run": run_id, "ticket": number, "width": WIDTH, "encoding": "float32"}
    assert asked(to, Forward(count=(1,), sequence=1, **tail), ONE)[0].op == "forwarded"
    assert asked(to, Backward(tokens=1, **tail), ONE)[0].op == "backwarded"
    return str(asked(to, Step(run=run_id, number=number))[0].op)


@pytest.mark.rule("SB-X-022", "SB-X-023", "SB-X-024")
def test_a_step_is_stored_before_it_is_answered(tmp_path: Path) -> None:
    """A server that is killed after its answer has the step. One that is killed before it may have it, and says so."""
    to = service(tmp_path / "checkpoints")
    session = asked(to, Open(rows=1, capacity=8))[0].session
    first = asked(to, run(session, 1, 0), ONE)
    second = asked(to, run(session, 2, 1), [-1.0, *ONE[1:]])
    assert (first[0].op, second[0].op) == ("ran", "ran")
    assert first[1] != second[1]
    started = asked(to, Train())[0]
    assert asked(to, run(session, 3, 0), ONE)[1] == first[1]
    assert step(to, started.run, 1) == "stepped"
    assert asked(to, run(session, 4, 1), ONE)[0].code == "session.unknown"
    moved = asked(to, run(None, 0, 0), ONE)[1]
    assert moved != first[1]
    # Another server, which begins with what the first one stored.
    again = service(tmp_path / "checkpoints")
    assert asked(again, Hello(protocol=PROTOCOL, fingerprint=None, layers=None))[0].number == 1
    assert asked(again, run(None, 0, 0), ONE)[1] == moved
    started = asked(again, Train())[0]
    assert started.number == 1
    assert asked(again, Step(run=started.run, number=1))[0].op == "stepped"  # it was made, and isn't made again
    assert asked(again, run(None, 0, 0), ONE)[1] == moved
    assert step(again, started.run, 2) == "stepped"
    for each in (to, again):
        each.stop()


def test_a_call_without_tokens_is_one_of_a_step_like_any_other(tmp_path: Path) -> None:
    """Its gradient is nothing, and those of the other calls stay."""
    to = service(tmp_path / "checkpoints")
    started = asked(to, Train())[0]
    for ticket, tokens in ((1, 1), (2, 0), (3, 0)):
        numbers = ONE * tokens
        given = Forward(run=started.run, ticket=ticket, count=(tokens,), sequence=1, width=WIDTH, encoding="float32")
        assert asked(to, given, numbers)[0].op == "forwarded"
        back = Backward(run=started.run, ticket=ticket, tokens=tokens, width=WIDTH, encoding="float32")
        answer, payload = asked(to, back, numbers)
        assert (answer.op, len(payload)) == ("backwarded", 4 * WIDTH * tokens)
    assert asked(to, Step(run=started.run, number=1))[0].op == "stepped"
    to.stop()
