"""A client and its servers without a network: what it sends, when, and how often."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

import splitbundle
from splitbundle.errors import BundleError
from splitbundle.format.architecture.rotary import Dynamic
from splitbundle.records import replace
from splitbundle.remote.carrier import Lost
from splitbundle.remote.link import Link, RemoteCache
from splitbundle.remote.options import RemoteOptions
from splitbundle.remote.peers import Expected, Peers
from splitbundle.serving.stage_service import StageService
from splitbundle.stages.call import Call
from splitbundle.wire import frames
from splitbundle.wire.messages import Message, Run, Welcome
from tests.support import stand_in_stage
from tests.support.paths import TESTS

EXPECTED = Expected(
    name="trunk", fingerprint=stand_in_stage.FINGERPRINT, layers=stand_in_stage.LAYERS, width=stand_in_stage.WIDTH
)
LIMITS = replace(stand_in_stage.LIMITS, message=2**17 + 2**16, slots=1024, sessions=64)


class FakeChannel:
    """A channel to a service of this process. It may lose requests or answers, and change answers."""

    def __init__(self, service: StageService) -> None:
        self.service = service
        self.sent: list[bytes] = []
        self.loses: list[str] = []
        """What happens to the next frames that aren't a hello: the "answer" or the "request" is lost; or nothing."""
        self.changes: Callable[[Message], Message] = lambda message: message

    @property
    def kinds(self) -> list[str]:
        return [frames.unpack(frame)[0].op for frame in self.sent]

    def step(self, frame: bytes, timeout: float) -> bytes:
        return self.call(frame, timeout)

    def call(self, frame: bytes, timeout: float) -> bytes:
        self.sent.append(frame)
        lost = self.loses.pop(0) if self.loses and self.kinds[-1] != "hello" else ""
        if lost == "request":
            raise Lost("it went away")
        answer = self.service.answer(frame, "alice")
        if lost == "answer":
            raise Lost("no answer in time", silent=True)
        message, payload = frames.unpack(answer)
        return frames.pack(self.changes(message), [payload])

    def send(self, frame: bytes, timeout: float) -> None:
        self.sent.append(frame)
        self.service.answer(frame, "alice")


def connected(servers: int = 1, expected: Expected = EXPECTED, **options: Any) -> tuple[Peers, list[FakeChannel]]:
    given = RemoteOptions.of(**{"timeout": 5.0, **options})
    peers = Peers([f"grpc://127.0.0.1:{port}" for port in range(1, servers + 1)], expected, given)
    channels = []
    for peer in peers.peers:
        channel = FakeChannel(stand_in_stage.service(LIMITS)[0])
        peer._channel = channel  # type: ignore[assignment]
        channels.append(channel)
    return peers, channels


def linked(servers: int = 1, **options: Any) -> tuple[Link, list[FakeChannel]]:
    peers, channels = connected(servers, **options)
    return Link(peers, RemoteOptions.of(**{"timeout": 5.0, **options})), channels


def new_cache(rows: int, scaling: Any = None) -> RemoteCache:
    kind = SimpleNamespace(attention=SimpleNamespace(position=SimpleNamespace(scaling=scaling)))
    architecture: Any = SimpleNamespace(position_limit=None, kind_of=lambda layer: kind)
    return RemoteCache(architecture, (1, 3), rows, stand_in_stage.POSITIONS)


def compute(
    link: Link, cache: RemoteCache | None, past: Sequence[int], count: Sequence[int], numbers: Sequence[float]
) -> list[float]:
    call = Call(past, count, max(1, *count))
    result = link.run(call, [memoryview(stand_in_stage.packed(numbers))], cache, call.length)
    if cache is not None:
        cache.advance(call)
    return list(struct.unpack(f"<{len(numbers)}f", result))


@pytest.mark.rule("SB-X-010")
@pytest.mark.parametrize(
    ("member", "value", "code"),
    [
        ("protocol", 2, "peer.protocol"),
        ("fingerprint", "sha256:" + "e" * 64, "peer.fingerprint"),
        ("layers", (1, 4), "peer.layers"),
        ("width", 3, "peer.layers"),
    ],
)
def test_a_client_compares_what_a_server_says(member: str, value: object, code: str) -> None:
    """Also where the server took the hello. Nothing but a hello was sent until then."""
    peers, (channel,) = connected()
    channel.changes = lambda message: replace(message, **{member: value})
    with pytest.raises(BundleError) as raised:
        Link(peers, RemoteOptions.of(timeout=5.0))
    assert set(raised.value.codes) == {code}
    assert set(channel.kinds) == {"hello"}


def test_a_client_that_wants_any_model_compares_nothing_of_it() -> None:
    peers, _ = connected(expected=Expected(name=None, fingerprint=None, layers=None, width=None))
    assert Link(peers, RemoteOptions()).welcome.fingerprint == stand_in_stage.FINGERPRINT


@pytest.mark.rule("SB-X-001")
@pytest.mark.parametrize("shard", ["bottom", "top"])
def test_a_client_refuses_an_end_of_the_model(shard: str) -> None:
    bundle = splitbundle.open(TESTS / "golden" / "v1.0" / "gpt2.splitbundle")
    with pytest.raises(BundleError) as raised:
        bundle.stage(shard, remote="grpc://127.0.0.1:1")
    assert raised.value.codes == ("stage.range",)


@pytest.mark.rule("SB-X-007")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_exact_encoding_unless_another_one_is_asked_for(dtype: str) -> None:
    for wire in (None, "int8"):
        peers, (channel,) = connected()
        channel.changes = lambda message: replace(message, dtype=dtype)
        assert Link(peers, RemoteOptions.of(wire=wire)).encoding == (wire or dtype)


def test_an_encoding_that_a_server_does_not_take() -> None:
    peers, (channel,) = connected()
    channel.changes = lambda message: replace(message, encodings=("float32",))
    with pytest.raises(BundleError) as raised:
        Link(peers, RemoteOptions.of(wire="int8"))
    assert raised.value.codes == ("peer.encoding",)


@pytest.mark.rule("SB-X-017")
def test_a_lost_answer_is_asked_for_with_the_same_frame() -> None:
    link, (channel,) = linked()
    cache = new_cache(1)
    assert compute(link, cache, [0], [1], [1, 2]) == [1, 2]
    channel.loses, before = ["answer", "answer"], len(channel.sent)
    assert compute(link, cache, [1], [1], [10, 20]) == [11, 22]
    assert channel.kinds[before:] == ["run", "hello", "run", "hello", "run"]
    assert len(set(channel.sent[before::2])) == 1
    assert channel.service.served.calls == 2


def test_a_frame_that_is_refused_again_and_again_is_not_sent_all_the_time() -> None:
    """A server asks for the same frame again, as it came damaged. So it will be, each time."""
    peers, (channel,) = connected()
    peers.peers[0].connect(1)
    message = Run(session=None, number=0, past=(0,), count=(1,), sequence=1, width=2, encoding="float32")
    with pytest.raises(BundleError) as raised:
        peers.peers[0].exchange(message, frames.pack(message, [stand_in_stage.packed([1, 1])])[:-1], 0.3)
    assert raised.value.codes == ("wire.payload",)
    assert 2 <= len(channel.sent) < 20


@pytest.mark.rule("SB-X-018")
@pytest.mark.parametrize("replay", ["exact", "merged"])
@pytest.mark.parametrize("seed", range(8))
def test_servers_that_lose_their_sessions_change_no_result(seed: int, replay: str) -> None:
    """Random calls, orders and ways back, over two servers that forget, go away, or answer too late."""
    drawn = random.Random(seed)
    rows = drawn.randint(1, 4)
    link, channels = linked(2, replay=replay)
    alone, _ = linked()
    caches = new_cache(rows), new_cache(rows)
    next_number = 0
    for _ in range(40):
        fault = drawn.random()
        if fault < 0.1:
            drawn.choice(channels).service.sessions.end_all()
        elif fault < 0.2:
            drawn.choice(channels).loses = [drawn.choice(("request", "answer"))]
        if drawn.random() < 0.2:
            order = [drawn.randrange(rows) for _ in range(rows)]
            for cache in caches:
                cache.reorder(order)
        lengths = caches[0].lengths
        past = [drawn.randint(0, n) if drawn.random() < 0.2 or n > 28 else n for n in lengths]
        past = [min(n, 28) for n in past]
        count = [drawn.choice((0, 1, 1, 3)) for _ in range(rows)]
        numbers = [float(next_number + i) for i in range(2 * sum(count))]
        next_number += len(numbers)
        found, expected = (
            compute(own, cache, past, count, numbers) for own, cache in zip((link, alone), caches, strict=True)
        )
        assert found == expected
    assert sum("open" in channel.kinds for channel in channels) > 0


@pytest.mark.rule("SB-X-019")
def test_rotations_that_depend_on_the_length_are_not_merged() -> None:
    for scaling, calls in ((None, 2), (Dynamic(factor=2.0, original_positions=4), 4)):
        link, (channel,) = linked(replay="merged")
        cache = new_cache(1, scaling)
        for number in range(3):
            compute(link, cache, [number], [1], [1, 1])
        channel.service.sessions.end_all()
        before = len(channel.sent)
        assert compute(link, cache, [3], [1], [1, 1]) == [4, 4]
        again = [frames.unpack(frame)[0] for frame in channel.sent[before:]]
        steps = [message for message in again if isinstance(message, Run)]
        assert len(steps) == 1 + calls  # the one that found the session gone, and those of the new one


def test_a_server_that_is_another_one_now_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It restarted with other weights in the middle of a text. The client goes on with the other server."""
    link, (first, second) = linked(2)
    cache = new_cache(1)
    compute(link, cache, [0], [1], [1, 1])
    first.service.sessions.end_all()
    first.changes = lambda message: (
        replace(message, fingerprint="sha256:" + "e" * 64) if isinstance(message, Welcome) else message
    )
    assert compute(link, cache, [1], [1], [1, 1]) == [2, 2]
    assert second.kinds == ["hello", "open", "run", "run"]


def test_nobody_answers() -> None:
    peers, channels = connected(2, timeout=0.3)
    for channel in channels:
        channel.call = lambda frame, timeout: (_ for _ in ()).throw(Lost("connection refused"))  # type: ignore[method-assign]
    with pytest.raises(BundleError) as raised:
        Link(peers, RemoteOptions.of(timeout=0.3))
    assert raised.value.codes == ("peer.unreachable",)
    assert raised.value.problems[0].got.count("connection refused") == 2


def test_a_call_that_no_frame_can_hold_is_not_sent() -> None:
    link, (channel,) = linked()
    with pytest.raises(BundleError) as raised:
        compute(link, None, [0], [10_000], [0.0] * 20_000)
    assert raised.value.codes == ("wire.size",)
    assert channel.kinds == ["hello"]
    channel.changes = lambda message: replace(
        message,
        limits=replace(LIMITS, message=2**40),  # type: ignore[attr-defined]
    )
    link.welcome, _ = link._peers.peers[0].connect(1), None
    assert link.room < frames.MAX_FRAME
