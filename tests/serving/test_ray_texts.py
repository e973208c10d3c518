"""The texts of a deployment on Ray as their reader sees them, without Ray: replicas are lists of messages."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from splitbundle.errors import BundleError
from splitbundle.serving import ray_leases
from splitbundle.serving.ray_leases import LEASE, Leases, Pulse
from tests.support import stand_in_ray
from tests.support.stand_in_ray import BackPressureError, RayActorError, RayServeException, RayTaskError

PROMPT = [7, 8]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, whose waits are short."""
    module = stand_in_ray.imported(monkeypatch, "splitbundle.serving.ray_texts")
    monkeypatch.setattr(module, "SILENCE", 0.3)
    monkeypatch.setattr(module, "_FIRST_BACK_OFF", 0.001)
    return module


class Request:
    """An iterator of messages. An error among them is raised, and None waits until ``cancel``."""

    def __init__(self, messages: list[Any]) -> None:
        self._messages, self._cancelled = messages, threading.Event()

    def __iter__(self) -> Iterator[Any]:
        for message in self._messages:
            if isinstance(message, Exception):
                raise message
            if message is None:
                assert self._cancelled.wait(10)
                return
            yield message

    def cancel(self) -> None:
        self._cancelled.set()


class Replicas:
    """Answers each request with the next list of messages, and the last one again and again."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers, self.asked, self.requests = list(answers), [], []  # type: ignore[var-annotated]

    def __call__(self, text: str, prompt: list[int], options: dict[str, Any]) -> Request:
        self.asked.append((prompt, options))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if len(answer) == 1 and isinstance(answer[0], BackPressureError):
            raise answer[0]
        self.requests.append(Request(answer))
        return self.requests[-1]


def steps(*ids: int, reused: int = 0) -> tuple[Any, ...]:
    return "steps", reused, tuple((each, -0.5, ((each, -0.5),)) for each in ids)


def made(texts: Any, replicas: Replicas, most: int = 6, timeout: float = 5.0, **options: Any) -> Any:
    return texts.RaySteps(replicas, PROMPT, {"max_new_tokens": most, **options}, timeout)


def ids(text: Any) -> list[int]:
    return [step.ids[0] for step in text]


def test_messages_become_steps(texts: Any) -> None:
    text = made(texts, Replicas([steps(1, reused=2), steps(), steps(2, 3), ("end",)]))
    found = list(text)
    assert [step.ids for step in found] == [(1,), (2,), (3,)]
    assert (found[0].logprobs, found[0].top, text.reused) == ((-0.5,), (((1, -0.5),),), 2)
    assert not text.runs


@pytest.mark.parametrize(
    "loss",
    [
        [RayActorError("it died")],
        [RayServeException("it is being ended")],
        [("error", True, [{"code": "peer.unreachable", "expected": "a stage", "got": "none"}])],
        [],
        [None],
    ],
    ids=["dead", "ending", "without a stage", "ended early", "silent"],
)
def test_another_replica_goes_on_after_what_has_come(texts: Any, loss: list[Any]) -> None:
    replicas = Replicas([steps(1, 2), *loss], loss or [steps()], [steps(3), steps(4, 5, 6), ("end",)])
    if loss == [None]:
        replicas.answers.pop(1)
    text = made(texts, replicas, seed=5, drawn=1)
    assert ids(text) == [1, 2, 3, 4, 5, 6]
    assert text.moved == (1 if loss == [None] else 2)
    assert replicas.asked[0] == (PROMPT, {"seed": 5, "max_new_tokens": 6, "drawn": 1})
    assert replicas.asked[-1] == ([*PROMPT, 1, 2], {"seed": 5, "max_new_tokens": 4, "drawn": 3})


def test_a_text_that_is_whole_goes_nowhere(texts: Any) -> None:
    for options in ({"most": 2}, {"stop_ids": [2]}):
        replicas = Replicas([steps(1, 2), RayActorError("it died before it said so")])
        assert ids(made(texts, replicas, **options)) == [1, 2]
        assert len(replicas.asked) == 1
    assert ids(made(texts, Replicas([]), most=0)) == []


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ([("error", False, [{"code": "input.value", "expected": "x", "got": "y"}])], "[input.value] expected x, got y"),
        ([RayTaskError("Traceback\n  ...\nZeroDivisionError: by zero")], "got ZeroDivisionError: by zero"),
        ([BackPressureError("256 wait")], "[server.full] replicas: expected room in the queue of the deployment"),
        ([None], "[server.full] replicas: expected a replica that takes the text within 0.2 s"),
        ([RayActorError("it died")], "[peer.unreachable] replicas: expected a replica that goes on within 0.2 s"),
    ],
)
def test_errors_of_a_text(texts: Any, answer: list[Any], problem: str) -> None:
    with pytest.raises(BundleError) as caught:
        ids(made(texts, Replicas(answer), timeout=0.2))
    assert problem in str(caught.value)


def test_a_text_that_no_replica_takes_again_is_unreachable(texts: Any) -> None:
    text = made(texts, Replicas([steps(1), RayActorError("it died")], [None]), timeout=0.2)
    with pytest.raises(BundleError, match=r"\[peer.unreachable\]"):
        ids(text)


def test_another_thread_ends_a_text(texts: Any) -> None:
    for end in ("cancel", "fail"):
        replicas = Replicas([steps(1), None])
        text = made(texts, replicas)
        found: list[int] = []

        def ended(text: Any = text, end: str = end) -> None:
            time.sleep(0.05)
            text.cancel() if end == "cancel" else text.fail(BundleError([]))

        thread = threading.Thread(target=ended)
        thread.start()
        try:
            found += ids(text)
            assert end == "cancel"
        except BundleError:
            assert end == "fail"
        thread.join()
        assert replicas.requests[0]._cancelled.is_set()
        assert len(replicas.asked) == 1


def test_leases_end_without_a_word() -> None:
    now = 0.0
    leases = Leases(lambda: now)
    leases.begin("a")
    leases.begin("b")
    now = LEASE - 1
    leases.renew(["a", "unknown"])
    now = LEASE
    assert (leases.is_over("a"), leases.is_over("b"), leases.is_over("unknown")) == (False, True, True)
    leases.end("a")
    assert leases.is_over("a")


def test_a_pulse_names_the_texts_that_run_and_ends_with_them() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.id, self.runs = name, True

    named: list[list[str]] = []
    pulse = Pulse(named.append, 0.02)
    a, b = Named("a"), Named("b")
    pulse.add(a)
    pulse.add(b)
    until = time.monotonic() + 5
    while len(named) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert {"a", "b"} in [set(each) for each in named]
    b.runs = False
    del a
    while pulse._beats and time.monotonic() < until:
        time.sleep(0.01)
    assert not pulse._beats
    assert pulse.texts == []
    assert ray_leases.PULSE < LEASE
