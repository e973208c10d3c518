"""Steps of several clients on one server: computed together, in pieces, and never with the cache of another one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import splitbundle
import splitbundle_converter
from splitbundle.backends import registry
from splitbundle.records import replace
from splitbundle.serving.stage_service import Served, StageService
from splitbundle.stages.turns import PIECE
from splitbundle.wire import frames
from splitbundle.wire.messages import Close, Open, Run
from tests.support.paths import ROOT
from tests.support.scripted_pipeline import wait_until
from tests.support.stand_in_stage import BUNDLE, LIMITS

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 96
SLOTS = 2**15


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    """The trained example in three shards with graphs."""
    output = tmp_path_factory.mktemp("steps") / "b.splitbundle"
    return splitbundle_converter.convert(ROOT / "examples" / "license-gpt2", output, split=[2, 4], onnx=True)


def made(bundle: splitbundle.Bundle, backend: str, shared_rows: int, slots: int = SLOTS) -> StageService:
    options = {"kernels": "torch"} if backend == "torch" else {}
    stage = bundle.stage("trunk", backend=backend, **options)
    limits = replace(LIMITS, message=2**22, capacity=256, slots=slots, sessions=64, rows=8)
    offer = Served(bundle=BUNDLE, limits=limits, max_bytes=2**40, slot_bytes=8, shared_rows=shared_rows)
    return StageService(registry.module(backend, "served").ServedStage(stage), offer)


@pytest.fixture(params=["torch", "onnxruntime"])
def services(request: pytest.FixtureRequest, bundle: splitbundle.Bundle) -> Iterator[tuple[StageService, StageService]]:
    """A service with a shared cache, and one without."""
    both = made(bundle, request.param, 8), made(bundle, request.param, 0)
    yield both
    for service in both:
        service.stop()


class Client:
    """A client of a service, which keeps the number of its steps."""

    def __init__(self, service: StageService, name: str = "alice", rows: int = 1, capacity: int = 250) -> None:
        self.service, self.name, self.number = service, name, 0
        opened = self.ask(Open(rows=rows, capacity=capacity))[0]
        assert opened.op == "opened", opened
        self.session = opened.session

    def ask(self, message: Any, payload: bytes = b"") -> tuple[Any, bytes]:
        answer, found = frames.unpack(self.service.answer(frames.pack(message, [payload]), self.name))
        return answer, bytes(found)

    def run(self, hidden: torch.Tensor, past: list[int], count: list[int], **given: Any) -> Any:
        """Compute a step. *Shape:* (rows, sequence, width) -> (tokens, width), or the error."""
        data = b"".join(hidden[row, :n].contiguous().numpy().tobytes() for row, n in enumerate(count))
        message = Run(
            session=self.session,
            number=self.number + 1,
            past=tuple(past),
            count=tuple(count),
            sequence=max(1, *count),
            width=WIDTH,
            encoding="float32",
            **given,
        )
        answer, found = self.ask(message, data)
        if answer.op != "ran":
            return answer
        self.number += 1
        tokens = torch.frombuffer(bytearray(found), dtype=torch.float32) if found else torch.zeros(0)
        return tokens.view(-1, WIDTH)


def hidden(seed: int, rows: int, tokens: int) -> torch.Tensor:
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_steps_that_wait_are_one_call(services: tuple[StageService, StageService]) -> None:
    shared, alone = services
    clients, others = [Client(shared, f"c{i}") for i in range(6)], [Client(alone, f"c{i}") for i in range(6)]
    prompts = [hidden(i, 1, 3 + i) for i in range(6)]
    for client, other, prompt in zip(clients, others, prompts, strict=True):
        count = [prompt.shape[1]]
        assert torch.equal(client.run(prompt, [0], count), other.run(prompt, [0], count))  # alone: the same bits
    before = shared.steps.calls
    go_on = threading.Event()
    with ThreadPoolExecutor(7) as pool:
        busy = pool.submit(shared._computing.run, go_on.wait)
        tokens = [hidden(100 + i, 1, 1) for i in range(6)]
        found = [pool.submit(c.run, t, [3 + i], [1]) for i, (c, t) in enumerate(zip(clients, tokens, strict=True))]
        wait_until(lambda: len(shared.steps._new) == 6)
        go_on.set()
        busy.result()
        for i, (each, other) in enumerate(zip(found, others, strict=True)):
            torch.testing.assert_close(each.result(), other.run(tokens[i], [3 + i], [1]), atol=2e-5, rtol=2e-5)
    assert shared.steps.calls == before + 1
    assert shared.steps.call_rows >= 6


def test_a_long_step_lets_others_in(services: tuple[StageService, StageService]) -> None:
    shared, alone = services
    long, short, other = Client(shared, "long"), Client(shared, "short"), Client(alone)
    prompt, length = hidden(1, 1, 200), 200
    short.run(hidden(2, 1, 4), [0], [4])
    order: list[str] = []
    go_on = threading.Event()
    before = shared.steps.calls
    with ThreadPoolExecutor(3) as pool:
        busy = pool.submit(shared._computing.run, go_on.wait)

        def ask(name: str, client: Client, *given: Any) -> Any:
            result = client.run(*given)
            order.append(name)
            return result

        first = pool.submit(ask, "long", long, prompt, [0], [length])
        wait_until(lambda: len(shared.steps._new) == 1)
        second = pool.submit(ask, "short", short, hidden(3, 1, 1), [4], [1])
        wait_until(lambda: len(shared.steps._new) == 2)
        go_on.set()
        busy.result()
        torch.testing.assert_close(first.result(), other.run(prompt, [0], [length]), atol=2e-5, rtol=2e-5)
        assert second.result().shape == (1, WIDTH)
    assert shared.steps.calls - before >= 2
    assert length > PIECE


def test_random_sessions_are_those_of_a_server_without_a_shared_cache(
    services: tuple[StageService, StageService],
) -> None:
    """Sessions of several rows join, go back, reorder, grow and leave, in threads of their own."""
    import random

    shared, alone = services

    def play(seed: int) -> None:
        draw = random.Random(seed)
        for life in range(3):
            rows = draw.choice((1, 1, 2, 3))
            pair = [Client(service, f"s{seed}", rows, 32) for service in (shared, alone)]
            lengths, capacity = [0] * rows, 32
            for number in range(12):
                count = [draw.choice((0, 1, 1, 1, 2, 9)) for _ in range(rows)]
                order = None
                if number and draw.random() < 0.2:
                    order = tuple(draw.randrange(rows) for _ in range(rows))
                    lengths = [lengths[row] for row in order]
                past = [draw.choice((n, n, n, n // 2)) for n in lengths]
                needed = max(p + n for p, n in zip(past, count, strict=True))
                grown = {}
                if needed > capacity:
                    capacity = min(2 * needed, 256)
                    grown = {"capacity": capacity}
                inputs = hidden(1000 * seed + 100 * life + number, rows, max(1, *count))
                both = [client.run(inputs, past, count, order=order, **grown) for client in pair]
                torch.testing.assert_close(*both, atol=3e-5, rtol=3e-5)
                lengths = [p + n for p, n in zip(past, count, strict=True)]
            for client in pair:
                assert client.ask(Close(session=client.session))[0].op == "closed"

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(play, range(5)))
    assert shared.steps.calls > 0
    assert [len(service.sessions) for service in services] == [0, 0]
    assert [service.sessions.slots for service in services] == [0, 0]


def test_a_session_sees_nothing_of_the_one_before_it(services: tuple[StageService, StageService]) -> None:
    shared, _ = services
    keeper, first = Client(shared, "keeper"), Client(shared, "first")
    first.run(hidden(1, 1, 8), [0], [8])
    at = shared.sessions.enter(first.session, "first").cache.at
    shared.sessions.leave(shared.sessions._sessions[first.session])
    assert first.ask(Close(session=first.session))[0].op == "closed"
    second = Client(shared, "second")
    assert shared.sessions._sessions[second.session].cache.at == at  # the same row
    refused = second.run(hidden(2, 1, 1), [3], [1])
    assert (refused.op, refused.code) == ("error", "input.position")
    assert keeper.run(hidden(3, 1, 1), [0], [1]).shape == (1, WIDTH)


def test_a_session_that_does_not_fit_has_its_own_cache(bundle: splitbundle.Bundle) -> None:
    from splitbundle.serving.shared_cache import SharedRows

    service = made(bundle, "torch", 4, slots=4 * 512 * 2)
    kinds = []
    clients = [Client(service, "a", rows) for rows in (3, 2, 1)]
    for client in clients:
        kinds.append(isinstance(service.sessions._sessions[client.session].cache, SharedRows))
    assert kinds == [True, False, True]
    for client, rows in zip(clients, (3, 2, 1), strict=True):
        assert client.run(hidden(1, rows, 2), [0] * rows, [2] * rows).shape == (2 * rows, WIDTH)
        client.ask(Close(session=client.session))
    assert service.sessions.slots == 0
    small = made(bundle, "torch", 4, slots=600)  # a shared cache would take more than half of it
    Client(small, "a")
    assert small.sessions.slots == 250
    for each in (service, small):
        each.stop()


def test_a_session_that_outgrows_the_shared_cache_begins_again(bundle: splitbundle.Bundle) -> None:
    """The shared cache can't have more slots. The session ends, and a new one of that size has a cache of its own."""
    service = made(bundle, "torch", 8, slots=8 * 256 * 2)
    client, other = Client(service, "a", capacity=16), Client(service, "b", capacity=16)
    shared = service.sessions._sessions[client.session].cache.shared
    service.sessions._most = shared.slots + 300
    shared.cache.capacity = 200  # as if it had been made for shorter rows
    assert client.run(hidden(1, 1, 4), [0], [4]).shape == (4, WIDTH)
    refused = client.run(hidden(2, 1, 1), [4], [1], capacity=250)
    assert refused.code == "session.unknown"
    assert client.run(hidden(2, 1, 1), [4], [1]).code == "session.unknown"
    assert other.run(hidden(3, 1, 1), [0], [1]).shape == (1, WIDTH)
    again = Client(service, "a", capacity=250)
    assert again.run(hidden(1, 1, 4), [0], [4]).shape == (4, WIDTH)
    service.stop()


def test_a_failing_call_ends_its_sessions_and_no_others(services: tuple[StageService, StageService]) -> None:
    shared, _ = services
    first, second = Client(shared, "first"), Client(shared, "second")
    second.run(hidden(1, 1, 2), [0], [2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared.served, "run", lambda *given: (_ for _ in ()).throw(RuntimeError("lost")))
        assert first.run(hidden(2, 1, 1), [0], [1]).code == "server.failed"
    assert first.run(hidden(2, 1, 1), [0], [1]).code == "session.unknown"
    assert second.run(hidden(3, 1, 1), [2], [1]).shape == (1, WIDTH)


def test_clients_over_the_network_are_merged(bundle: splitbundle.Bundle, tmp_path: Path) -> None:
    """Whole pipelines with a remote trunk, in threads: the texts are those of each alone."""
    from splitbundle import StageServer

    prompts = [f"Licensed under the Apache License{' and' * i}" for i in range(6)]
    local = bundle.pipeline(kernels="torch")
    own = [local.complete_text(prompt, max_new_tokens=24).text for prompt in prompts]
    with StageServer(bundle, "trunk") as server:
        remote = bundle.pipeline(remote={"trunk": server.url}, kernels="torch")
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda prompt: remote.complete_text(prompt, max_new_tokens=24).text, prompts))
        steps = server.service.steps
        assert found == own
        assert steps.call_rows > steps.calls
