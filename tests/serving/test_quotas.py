"""What one client may hold of a server: sessions, and the memory of their caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import splitbundle
from splitbundle import BundleError, StageServer
from splitbundle.cli.main import main
from splitbundle.records import replace
from splitbundle.serving.quotas import Quota
from splitbundle.serving.stage_server import Budget
from splitbundle.serving.stage_service import StageService
from splitbundle.wire.messages import Close, Failure, Open, Opened, Ran, Run
from tests.support import stand_in_stage
from tests.support.paths import TESTS
from tests.support.stand_in_stage import asked, service

BUNDLE = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
SLOT = 8
"""The bytes of a slot of the stand-in."""
LIMITS = replace(stand_in_stage.LIMITS, sessions=4, slots=40, capacity=20)


def opened(to: StageService, owner: str, rows: int = 1, capacity: int = 2) -> str:
    answer, _ = asked(to, Open(rows=rows, capacity=capacity), owner=owner)
    assert isinstance(answer, Opened), answer
    return answer.session


def refused(to: StageService, message: Any, owner: str, numbers: list[float] | None = None) -> tuple[str, str]:
    answer, _ = asked(to, message, numbers or [], owner)
    assert isinstance(answer, Failure), answer
    return answer.code, answer.retry


def run(session: str, number: int, capacity: int | None, past: int = 0) -> Run:
    return Run(
        session=session,
        number=number,
        past=(past,),
        count=(1,),
        sequence=1,
        width=stand_in_stage.WIDTH,
        encoding="float32",
        capacity=capacity,
    )


@pytest.mark.rule("SB-X-016")
def test_sessions_of_one_client() -> None:
    to, _, _ = service(LIMITS, quota=Quota(sessions=2))
    first, _ = opened(to, "alice"), opened(to, "alice")
    assert refused(to, Open(rows=1, capacity=2), "alice") == ("server.quota", "other")
    opened(to, "bob")
    asked(to, Close(session=first), owner="alice")
    opened(to, "alice")
    assert len(to.sessions) == 3
    to.sessions.end_all()
    assert (len(to.sessions.quotas), to.sessions.slots) == (0, 0)


@pytest.mark.rule("SB-X-016")
def test_memory_of_one_client() -> None:
    """Opening and growing count. What is refused changes nothing, whoever refuses it."""
    to, _, clock = service(LIMITS, quota=Quota(max_bytes=10 * SLOT + 1))
    session = opened(to, "alice", 1, 4)
    assert refused(to, Open(rows=1, capacity=7), "alice") == ("server.quota", "other")
    assert refused(to, run(session, 1, 11), "alice", [1, 1]) == ("server.quota", "other")
    assert isinstance(asked(to, run(session, 1, 10), [1, 1], "alice")[0], Ran)
    assert refused(to, Open(rows=1, capacity=1), "alice")[0] == "server.quota"
    opened(to, "bob", 1, 10)
    opened(to, "carol", 1, 10)
    assert refused(to, Open(rows=2, capacity=10), "dave") == ("server.quota", "other")
    opened(to, "dave", 1, 9)
    assert refused(to, Open(rows=1, capacity=2), "erin")[0] == "server.full"
    clock.now += LIMITS.lease
    to.sessions.end_leases()
    assert (len(to.sessions.quotas), to.sessions.slots) == (0, 0)


def test_a_step_that_is_refused_gives_its_slots_back() -> None:
    to, _, _ = service(LIMITS, quota=Quota(max_bytes=10 * SLOT))
    session = opened(to, "alice", 1, 4)
    assert refused(to, run(session, 1, 10, past=3), "alice", [1, 1])[0] == "input.position"
    opened(to, "alice", 1, 6)


@pytest.mark.parametrize("shared_rows", [0, 8])
def test_two_clients_with_tokens(shared_rows: int) -> None:
    """Each has its own quota, also in a cache that sessions share."""
    bundle = splitbundle.open(BUNDLE)
    tokens = {"alice": "a" * 16, "bob": "b" * 16}
    budget = Budget(sessions_per_client=1, shared_rows=shared_rows)
    with StageServer(bundle, "trunk", tokens=tokens, budget=budget) as server, torch.no_grad():
        alice, bob = (bundle.stage("trunk", remote=server.url, token=each, timeout=0.3) for each in tokens.values())
        hidden = torch.zeros(1, 1, alice.architecture.hidden_size)
        caches = [stage.cache(1, 4) for stage in (alice, alice, bob)]
        alice(hidden, cache=caches[0])
        with pytest.raises(BundleError, match=r"\[peer.unreachable\] .*\[server.quota\] .*at most 1 sessions of one"):
            alice(hidden, cache=caches[1])
        bob(hidden, cache=caches[2])
        assert server.service.counts["open", "server.quota"] > 0


def test_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (("--max-sessions-per-client", "0"), ("--max-memory-per-client", "some")):
        with pytest.raises(SystemExit) as ended:
            main(["serve-stage", str(BUNDLE), "trunk", *words])
        assert ended.value.code == 2
        assert words[0] in capsys.readouterr().err
    for name in ("sessions_per_client", "bytes_per_client"):
        given: dict[str, Any] = {name: 0}
        with pytest.raises(BundleError, match=rf"\[input.value\] {name}"):
            Budget(**given)
