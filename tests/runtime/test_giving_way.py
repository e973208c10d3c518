"""Commands compute with fewer threads where that is faster."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

import splitbundle
from splitbundle import giving_way
from splitbundle.backends.torch import threads
from splitbundle.giving_way import FEW_TOKENS, LAST_WAIT, GivingWay

QUIET = {1: 0.07, 2: 0.04, 3: 0.03, 4: 0.025}
BUSY = {1: 0.07, 2: 0.2, 3: 0.25, 4: 0.3}
"""The number of threads -> the seconds of a token, as they were measured with one and two."""


def calls(way: GivingWay, times: dict[int, float], number: int) -> list[int]:
    """Note calls with one token, and return the number of threads of each."""
    found = []
    for _ in range(number):
        found.append(way.threads)
        way.note(1, times[way.threads])
    return found


def test_all_threads_compute_on_a_quiet_machine() -> None:
    way = GivingWay(2)
    found = calls(way, QUIET, 2000)
    assert found.count(1) <= 14  # a try costs a call, and the first one another call
    assert found[-1] == 2
    assert max(len(run) for run in "".join(map(str, found)).split("1")) == LAST_WAIT


def test_one_thread_computes_beside_a_busy_process() -> None:
    way = GivingWay(2)
    found = calls(way, BUSY, 2000)
    assert found[:20].count(2) <= 8
    assert found[100:].count(2) <= 12  # each try ends with its first call


@pytest.mark.parametrize("most", [2, 3, 4])
def test_a_change_of_load_is_noticed(most: int) -> None:
    way = GivingWay(most)
    for _ in range(3):
        calls(way, QUIET, 600)
        assert way.threads >= most - 1  # it may be trying
        calls(way, BUSY, 60)
        assert calls(way, BUSY, 30).count(1) > 24
        calls(way, QUIET, 2 * LAST_WAIT)


def test_a_single_slow_call_changes_nothing() -> None:
    way = GivingWay(2)
    calls(way, QUIET, 40)
    before = copy.deepcopy(way)
    way.note(1, 0.5)
    assert way.threads == before.threads == 2
    assert calls(way, QUIET, 8) == [2] * 8


def test_prompts_and_other_numbers_of_tokens() -> None:
    way = GivingWay(2)
    calls(way, BUSY, 40)
    assert way.threads == 1
    way.note(FEW_TOKENS + 1, 9.0)
    assert way.threads == 1
    assert calls(way, BUSY, 2) == [1, 1]
    way.note(8, 0.5)  # a batch of eight takes another time
    assert way.threads == 1
    one = GivingWay(1)
    assert calls(one, BUSY, 50) == [1] * 50


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that may use two processors, and gives way."""
    monkeypatch.setattr(giving_way._Process, "gives_way", True)
    monkeypatch.setattr(threads, "_usable", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "copied", [lambda stage: stage, copy.deepcopy, lambda stage: pickle.loads(pickle.dumps(stage))]
)
def test_calls_use_as_many_threads_as_they_may(
    copied: Callable[[object], object], two_threads: None, gpt2: splitbundle.Bundle
) -> None:
    seen: list[int] = []
    options: list[dict[str, object]] = [{}, {"threads": 1}, {"kernels": "torch"}, {"trainable": True}]
    stages = [copied(gpt2.stage(gpt2.shards[1].name, **each)) for each in options]  # type: ignore[call-overload]
    way = stages[0]._ways._of[2] = GivingWay(2)  # type: ignore[attr-defined]
    calls(way, BUSY, 40)
    x = torch.zeros(1, 1, gpt2.architecture.hidden_size)
    for stage in stages:
        stage.layers["1"].register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))  # type: ignore[attr-defined]
        with torch.no_grad():
            stage(x)  # type: ignore[operator]
    assert seen == [1, 1, 2, 2]  # pinned kernels give the same bits, with the same number of threads
    assert torch.get_num_threads() == 2


def test_a_library_never_gives_way_by_itself() -> None:
    code = "import splitbundle, torch; from splitbundle import giving_way; assert not giving_way.gives_way()"
    subprocess.run([sys.executable, "-c", code], check=True)
