"""Rows of the table of failures in docs/guides/stages-on-other-machines.md: what fails, and what a user sees.

``test_security``, ``test_training`` and ``test_parity`` beside this file have the other rows.
"""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import splitbundle
from splitbundle import BundleError, StageServer
from splitbundle.records import replace
from splitbundle.remote import peers
from splitbundle.remote.channel import Channel
from splitbundle.serving.stage_server import Budget
from splitbundle.wire import frames
from splitbundle.wire.messages import Message, Run, Welcome
from tests.support.stage_servers import Dropped, Forward, Proxy, StageProcess

pytestmark = pytest.mark.usefixtures("one_thread")
SHARD = "trunk-3"
IDS = torch.tensor([[44, 308, 68, 455]])
TOKENS = 16


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask a silent server early whether it lives."""
    monkeypatch.setattr(peers, "FIRST_WAIT", 0.3)
    monkeypatch.setattr(peers, "PROBE", 0.5)


def text(bundle: splitbundle.Bundle) -> list[int]:
    """Return what a local pipeline generates."""
    return [int(token) for token in bundle.pipeline(kernels="torch").generate(IDS, max_new_tokens=TOKENS)]


def generate(
    bundle: splitbundle.Bundle, remote: Any, between: Callable[[int], None] = lambda token: None, **options: Any
) -> list[int]:
    """Return what a pipeline with a remote shard generates. ``between`` is called after each token."""
    pipeline = bundle.pipeline(kernels="torch", remote={SHARD: remote}, **options)
    found = []
    for i, token in enumerate(pipeline.generate(IDS, max_new_tokens=TOKENS)):
        found.append(int(token))
        between(i)
    return found


# Servers that die, stop and come back.


@pytest.fixture(scope="module")
def one(every_cut: splitbundle.Bundle) -> Iterator[Callable[..., StageProcess]]:
    """Start servers in processes, and end them."""
    started: list[StageProcess] = []

    def start(*options: str, port: int = 0, bundle: Path | None = None) -> StageProcess:
        started.append(StageProcess(bundle or every_cut.path, SHARD, *options, port=port))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.mark.parametrize("replay", ["exact", "merged"])
def test_a_killed_server_costs_a_pause(
    every_cut: splitbundle.Bundle, one: Callable[..., StageProcess], replay: str
) -> None:
    first, second = one("--threads", "1"), one("--threads", "1")
    killed = {5: first}

    def between(token: int) -> None:
        if token in killed:
            killed[token].kill()

    assert generate(every_cut, [first.url, second.url], between, replay=replay) == text(every_cut)
    second.end()


@pytest.mark.long
def test_servers_that_are_killed_and_come_back(every_cut: splitbundle.Bundle, one: Callable[..., StageProcess]) -> None:
    """Three kills. Each server comes back on its port, and the last time there is no other."""
    running = [one("--threads", "1"), one("--threads", "1")]

    def between(token: int) -> None:
        if token in (3, 7, 11):
            which = {3: 0, 7: 1, 11: 0}[token]
            running[which].kill()
            if token == 11:
                running[1].kill()
            running[which] = one("--threads", "1", port=running[which].port)

    assert generate(every_cut, [server.url for server in running], between, timeout=60) == text(every_cut)
    for server in running:
        server.end()


def test_a_server_that_comes_back_while_a_client_waits(
    every_cut: splitbundle.Bundle, one: Callable[..., StageProcess]
) -> None:
    server = one("--threads", "1")
    restarts: list[threading.Thread] = []

    def between(token: int) -> None:
        if token == 4:
            server.kill()
            restarts.append(threading.Thread(target=lambda: one("--threads", "1", port=server.port)))
            restarts[0].start()

    assert generate(every_cut, server.url, between, timeout=60) == text(every_cut)
    restarts[0].join()


@pytest.mark.usefixtures("impatient")
def test_a_server_that_stops_answering(every_cut: splitbundle.Bundle, one: Callable[..., StageProcess]) -> None:
    """SIGSTOP keeps every connection open. So only a deadline shows it."""
    first = one("--threads", "1")
    with StageServer(every_cut, SHARD) as second:

        def between(token: int) -> None:
            if token == 5:
                first.signal(signal.SIGSTOP)

        assert generate(every_cut, [first.url, second.url], between) == text(every_cut)
        assert second.service.counts["run", "ok"] > 1
    first.signal(signal.SIGCONT)


@pytest.mark.usefixtures("impatient")
def test_a_server_that_stops_for_a_while_is_waited_for(
    every_cut: splitbundle.Bundle, one: Callable[..., StageProcess]
) -> None:
    server = one("--threads", "1")

    def between(token: int) -> None:
        if token == 5:
            server.signal(signal.SIGSTOP)
            threading.Timer(2.0, server.signal, [signal.SIGCONT]).start()

    assert generate(every_cut, server.url, between) == text(every_cut)


def test_all_servers_gone_and_one_back(every_cut: splitbundle.Bundle) -> None:
    server = StageServer(every_cut, SHARD)
    server.start()
    port = int(server.url.rpartition(":")[2])
    far = every_cut.pipeline(kernels="torch", remote={SHARD: server.url}, timeout=1.0)
    near = every_cut.pipeline(kernels="torch")
    with torch.no_grad():
        theirs, mine = far.session(1, 32), near.session(1, 32)
        assert torch.equal(far(IDS, session=theirs), near(IDS, session=mine))
        server.stop()
        with pytest.raises(BundleError) as caught:
            far(IDS, session=theirs)
        (problem,) = caught.value.problems
        assert problem.code == "peer.unreachable"
        assert problem.argument == f"stage {SHARD}"
        assert f"grpc://127.0.0.1:{port}: UNAVAILABLE" in problem.got
        assert theirs.past == [4]
        with StageServer(every_cut, SHARD, port=port):
            assert torch.equal(far(IDS, session=theirs), near(IDS, session=mine))


def test_a_lease_that_runs_out_costs_nothing_but_time(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, SHARD, budget=Budget(lease=0.2)) as server:

        def between(token: int) -> None:
            if token in (2, 9):
                time.sleep(0.8)

        assert generate(every_cut, server.url, between) == text(every_cut)
        assert server.service.sessions.expired == 2
        assert len(server.service.sessions) <= 1


def test_a_cache_can_be_kept_alive(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, SHARD, budget=Budget(lease=0.5)) as server, torch.no_grad():
        stage = every_cut.stage(SHARD, remote=server.url)
        cache = stage.cache(1, 8)
        assert not cache.renew()
        stage(torch.zeros(1, 2, 96), cache=cache)
        for _ in range(8):
            time.sleep(0.15)
            assert cache.renew()
        server.service.sessions.end_all()
        assert not cache.renew()


def test_a_full_server(every_cut: splitbundle.Bundle) -> None:
    with (
        StageServer(every_cut, SHARD, budget=Budget(sessions=1)) as small,
        StageServer(every_cut, SHARD) as large,
        torch.no_grad(),
    ):
        hidden = torch.zeros(1, 2, 96)
        alone = every_cut.stage(SHARD, remote=small.url, timeout=0.5)
        first = alone.cache(1, 8)
        alone(hidden, cache=first)
        with pytest.raises(BundleError, match=r"\[peer.unreachable\] .*\[server.full\] .*at most 1 sessions"):
            alone(hidden, cache=alone.cache(1, 8))
        both = every_cut.stage(SHARD, remote=[small.url, large.url])
        second = both.cache(1, 8)
        both(hidden, cache=second)
        assert len(large.service.sessions) == 1
        del first, second  # the clients' caches go, and so do the sessions
        deadline = time.monotonic() + 10
        while (len(small.service.sessions) or len(large.service.sessions)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(small.service.sessions) == len(large.service.sessions) == 0
        assert small.service.sessions.slots == 0
        alone(hidden, cache=alone.cache(1, 8))


def test_a_server_that_ends_hands_its_sessions_over(
    every_cut: splitbundle.Bundle, one: Callable[..., StageProcess]
) -> None:
    """SIGTERM: nothing new begins there, and the clients go on elsewhere."""
    first = one("--threads", "1")
    with StageServer(every_cut, SHARD) as second:
        ended: list[int] = []

        def between(token: int) -> None:
            if token == 5:
                ended.append(first.end())

        assert generate(every_cut, [first.url, second.url], between) == text(every_cut)
        assert ended == [0]


def test_a_draining_server_is_left(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, SHARD) as first, StageServer(every_cut, SHARD) as second:

        def between(token: int) -> None:
            if token == 5:
                first.service.drain()

        assert generate(every_cut, [first.url, second.url], between) == text(every_cut)
        assert first.service.counts["run", "server.draining"] == 1


# A network that treats frames badly.


def every_third(fault: Callable[[bytes, Forward, list[bytes]], bytes]) -> Callable[[Message, bytes, Forward], bytes]:
    """Return a fault that treats every third step badly. It gets the steps before, too."""
    seen: list[bytes] = []

    def treat(message: Message, data: bytes, forward: Forward) -> bytes:
        if not isinstance(message, Run):
            return forward(data)
        seen.append(data)
        return fault(data, forward, seen) if len(seen) % 3 == 0 else forward(data)

    return treat


def delayed(data: bytes, forward: Forward, seen: list[bytes]) -> bytes:
    time.sleep(0.5)
    return forward(data)


def doubled(data: bytes, forward: Forward, seen: list[bytes]) -> bytes:
    answer = forward(data)
    assert forward(data) == answer
    return answer


def request_dropped(data: bytes, forward: Forward, seen: list[bytes]) -> bytes:
    raise Dropped


def answer_dropped(data: bytes, forward: Forward, seen: list[bytes]) -> bytes:
    forward(data)
    raise Dropped


def reordered(data: bytes, forward: Forward, seen: list[bytes]) -> bytes:
    """The step before comes once more, late, and then the one that was asked for, twice in the wrong order."""
    forward(seen[-2])
    answer = forward(data)
    forward(seen[-2])
    return answer


def request_cut(data: bytes, forward: Forward, seen: list[bytes]) -> bytes:
    return forward(data[: len(data) * 2 // 3])


def answer_cut(data: bytes, forward: Forward, seen: list[bytes]) -> bytes:
    return forward(data)[:100]


def header_cut(data: bytes, forward: Forward, seen: list[bytes]) -> bytes:
    return forward(data[:20])


def broken_connection(data: bytes, forward: Forward, seen: list[bytes]) -> bytes:
    raise ConnectionResetError("gRPC makes an error of the call of it")


def answer_of_another_step(data: bytes, forward: Forward, seen: list[bytes]) -> bytes:
    """A server, or a network, that answers with what belongs to another step."""
    answer, payload = frames.unpack(forward(data))
    return frames.pack(replace(answer, number=answer.number + 1), (payload,))  # type: ignore[arg-type, union-attr]


FAULTS = [
    *(delayed, doubled, request_dropped, answer_dropped, reordered, request_cut, answer_cut, header_cut),
    *(broken_connection, answer_of_another_step),
]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_bad_network_changes_no_token(every_cut: splitbundle.Bundle, fault: Any) -> None:
    with StageServer(every_cut, SHARD) as server, Proxy(server.url, every_third(fault)) as proxy:
        assert generate(every_cut, proxy.url) == text(every_cut)
        assert len(proxy.frames) > TOKENS


@pytest.mark.long
@pytest.mark.usefixtures("impatient")
def test_a_frame_that_is_cut_at_each_byte(every_cut: splitbundle.Bundle) -> None:
    """Whatever is left of a request or of an answer, no result is wrong."""
    hidden = torch.randn(1, 1, 96)
    near = every_cut.stage(SHARD, kernels="torch")
    where = [0]

    def cut_request(data: bytes, forward: Forward, seen: list[bytes]) -> bytes:
        return forward(data[: where[0]])

    def cut_answer(data: bytes, forward: Forward, seen: list[bytes]) -> bytes:
        return forward(data)[: where[0]]

    with StageServer(every_cut, SHARD) as server, torch.no_grad():
        for fault in (cut_request, cut_answer):
            with Proxy(server.url, every_third(fault)) as proxy:
                far = every_cut.stage(SHARD, remote=proxy.url)
                for at in range(0, 500, 3):
                    where[0] = at
                    cache, own = far.cache(1, 8), near.cache(1, 8)
                    for past in range(3):
                        got = far(hidden, past=[past], cache=cache)
                        assert torch.equal(got, near(hidden, past=[past], cache=own))


# Servers that are not the right one.


def test_wrong_servers_are_refused_before_anything_is_sent(every_cut: splitbundle.Bundle, tmp_path: Path) -> None:
    changed = every_cut.stage(SHARD)
    with torch.no_grad():
        next(changed.parameters()).add_(1.0)
    other = every_cut.save_as(tmp_path / "other.splitbundle", changed, vectors=False)
    with StageServer(every_cut, "trunk-2") as shard, StageServer(other, SHARD) as weights:
        for server, code in ((shard, "peer.layers"), (weights, "peer.fingerprint")):
            with pytest.raises(BundleError) as caught:
                every_cut.stage(SHARD, remote=server.url)
            assert caught.value.codes == (code,)
            assert server.url in str(caught.value)
            assert {op for op, _ in server.service.counts} == {"hello"}
        loose = every_cut.stage(SHARD, remote=weights.url, same_weights=False)
        hidden = torch.randn(1, 2, 96)
        with torch.no_grad():
            assert torch.equal(loose(hidden), changed(hidden))


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("protocol", 2, "peer.protocol"),
        ("fingerprint", f"sha256:{'0' * 64}", "peer.fingerprint"),
        ("layers", (0, 1), "peer.layers"),
        ("width", 97, "peer.layers"),
        ("encodings", ("int8",), "peer.encoding"),
    ],
)
def test_a_server_that_says_something_else_is_refused(
    every_cut: splitbundle.Bundle, field: str, value: object, code: str
) -> None:
    """A server that believes itself to be right is compared by the client, too."""

    def fault(message: Message, data: bytes, forward: Forward) -> bytes:
        answer, _ = frames.unpack(forward(data))
        assert isinstance(answer, Welcome)
        return frames.pack(replace(answer, **{field: value}))

    with StageServer(every_cut, SHARD) as server, Proxy(server.url, fault) as proxy:
        with pytest.raises(BundleError) as caught:
            every_cut.stage(SHARD, remote=proxy.url)
        assert caught.value.codes == (code,)
        assert {op for op, _ in server.service.counts} == {"hello"}


def test_a_second_server_in_another_dtype_is_not_used(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, SHARD) as first, StageServer(every_cut, SHARD, dtype="bfloat16") as second:
        far = every_cut.stage(SHARD, remote=[first.url, second.url], timeout=0.5)
        with torch.no_grad():
            cache = far.cache(1, 8)
            far(torch.zeros(1, 1, 96), cache=cache)
            first.service.drain()
            with pytest.raises(BundleError, match=r"\[peer.unreachable\] .*it computes in bfloat16, and the first"):
                far(torch.zeros(1, 1, 96), cache=cache)


@pytest.mark.parametrize("times", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_an_interruption_leaves_a_pipeline_that_works(every_cut: splitbundle.Bundle, times: int) -> None:
    """Ctrl-C at any moment of a step, also inside of gRPC: the next call neither hangs nor gives other numbers."""
    script = Path(__file__).with_name("interrupted_steps.py")
    with StageServer(every_cut, SHARD, threads=1) as server:
        made = subprocess.run(
            [sys.executable, str(script), str(every_cut.path), SHARD, server.url, str(times)],
            capture_output=True,
            text=True,
            timeout=30 + times,
            check=False,
        )
    assert made.stdout == "equal\n", made.stderr[-2000:]


def test_threads_that_share_a_pipeline_survive_a_lost_server(every_cut: splitbundle.Bundle) -> None:
    near = every_cut.pipeline(kernels="torch")
    expected = [int(token) for token in near.generate(IDS, max_new_tokens=TOKENS)]
    first, second = StageServer(every_cut, SHARD), StageServer(every_cut, SHARD)
    first.start()
    second.start()
    far = every_cut.pipeline(kernels="torch", remote={SHARD: [first.url, second.url]})
    found: list[object] = []

    def work() -> None:
        try:
            for _ in range(3):
                found.append([int(token) for token in far.generate(IDS, max_new_tokens=TOKENS)] == expected)
        except Exception as error:  # noqa: BLE001  # whatever it is, the test shows it
            found.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    first.stop(0)
    for thread in threads:
        thread.join(120)
    second.stop()
    assert found == [True] * 24


def test_a_smaller_server_is_left_for_a_larger_one(every_cut: splitbundle.Bundle) -> None:
    with (
        StageServer(every_cut, SHARD, budget=Budget(slots=30)) as small,
        StageServer(every_cut, SHARD) as large,
        torch.no_grad(),
    ):
        far = every_cut.stage(SHARD, remote=[small.url, large.url])
        hidden = torch.randn(1, 40, 96)
        cache = far.cache(1, 64)
        assert torch.equal(far(hidden, cache=cache), far(hidden))
        alone = every_cut.stage(SHARD, remote=small.url)
        with pytest.raises(BundleError, match=r"\[session.capacity\]"):
            alone(hidden, cache=alone.cache(1, 64))


def test_a_cache_that_the_collector_finds_while_a_connection_is_opened(
    every_cut: splitbundle.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector runs at any moment, also in a thread that holds the lock of a connection."""
    opening = Channel._open

    def collected(self: Channel) -> Any:
        gc.collect()
        return opening(self)

    monkeypatch.setattr(Channel, "_open", collected)
    with StageServer(every_cut, SHARD) as server, torch.no_grad():
        hidden = torch.zeros(1, 1, 96)
        far = every_cut.stage(SHARD, remote=server.url)
        cycle: list[Any] = [far.cache(1, 8)]
        far(hidden, cache=cycle[0])
        assert len(server.service.sessions) == 1
        cycle.append(cycle)  # as the traceback of an error does it
        del cycle
        for channel in [each for each in gc.get_objects() if type(each) is Channel]:
            channel.close()
        asked = threading.Thread(target=far.__call__, args=(hidden,), daemon=True)
        asked.start()
        asked.join(30)
        assert not asked.is_alive()
        until = time.monotonic() + 30
        while server.service.sessions and time.monotonic() < until:
            time.sleep(0.01)
        assert len(server.service.sessions) == 0
