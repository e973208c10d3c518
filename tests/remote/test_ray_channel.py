"""The way to a stage in an actor of Ray, without Ray: its answers, and what its errors mean."""

from __future__ import annotations

from typing import Any

import pytest

from splitbundle.errors import BundleError
from splitbundle.records import replace
from splitbundle.remote.carrier import Lost
from splitbundle.remote.link import Link
from splitbundle.remote.options import RemoteOptions
from splitbundle.remote.peers import Peers
from tests.remote.test_peers import EXPECTED, LIMITS, compute, new_cache
from tests.support import stand_in_ray, stand_in_stage
from tests.support.stand_in_ray import GetTimeoutError, RayActorError, RayTaskError


def channel_to(monkeypatch: pytest.MonkeyPatch, answer: Any, sent: list[bytes] | None = None) -> Any:
    module = stand_in_ray.imported(monkeypatch, "splitbundle.remote.ray_channel")
    return module.RayChannel(stand_in_ray.actor(answer, [] if sent is None else sent), "the actor of trunk")


def raising(error: Exception) -> Any:
    def answer(frame: bytes, timeout: float) -> bytes:
        raise error

    return answer


def test_a_frame_is_answered_within_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def answer(frame: bytes, timeout: float) -> bytes:
        waits.append(timeout)
        return frame[::-1]

    channel = channel_to(monkeypatch, answer)
    assert channel.call(b"abc", 2.0) == b"cba"
    assert channel.step(b"abcd", 0.5) == b"dcba"
    assert waits == [2.0, 0.5]


@pytest.mark.parametrize(
    ("error", "reason", "silent"),
    [
        (GetTimeoutError("Get timed out"), "no answer in time", True),
        (RayActorError("The actor died.\nA long story"), "RayActorError: The actor died.", False),
        (RayTaskError(""), "RayTaskError: no reason", False),
    ],
)
def test_errors_of_ray_mean_that_a_frame_is_lost(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, silent: bool
) -> None:
    with pytest.raises(Lost) as caught:
        channel_to(monkeypatch, raising(error)).call(b"", 1.0)
    assert (caught.value.reason, caught.value.silent) == (reason, silent)


def test_an_answer_that_is_no_frame_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Lost, match="an answer that is dict and not bytes"):
        channel_to(monkeypatch, lambda frame, timeout: {}).call(b"", 1.0)


def test_sending_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    channel_to(monkeypatch, raising(AssertionError("nobody asks for the answer")), sent).send(b"abc", 1.0)
    assert sent == [b"abc"]


def test_a_restarted_actor_is_refilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The actor dies between two steps. The next calls fail, and then an empty one answers under the same handle."""
    actors = [stand_in_stage.service(LIMITS)[0] for _ in range(2)]
    failures = 3
    dead = False

    def answer(frame: bytes, timeout: float) -> bytes:
        nonlocal failures
        if dead and failures:
            failures -= 1
            raise RayActorError("The actor is temporarily unavailable")
        return actors[dead].answer(frame, "replica")

    def computed(lose: bool) -> list[list[float]]:
        nonlocal dead
        channel = channel_to(monkeypatch, answer)
        options = RemoteOptions.of(timeout=10.0)
        link, cache = Link(Peers([channel], EXPECTED, options), options), new_cache(1)
        found = [compute(link, cache, [0], [2], [1.0] * (2 * stand_in_stage.WIDTH))]
        dead = lose
        found.append(compute(link, cache, [2], [1], [2.0] * stand_in_stage.WIDTH))
        return found

    assert computed(lose=False) == computed(lose=True)
    assert failures == 0


def test_a_dead_actor_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    options = RemoteOptions.of(timeout=0.1)
    channel = channel_to(monkeypatch, raising(RayActorError("The actor died")))
    with pytest.raises(BundleError, match=r"the actor of trunk: RayActorError: The actor died"):
        Link(Peers([channel], replace(EXPECTED, name="trunk"), options), options)
