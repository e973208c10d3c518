"""The number of threads of a call: the option, the quota, and the process's setting, which stays."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import splitbundle
from splitbundle import BundleError
from splitbundle.backends.torch import threads


@pytest.fixture(autouse=True)
def setting() -> Iterator[None]:
    """Give the process three threads for the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of processors that this process may use, as its only item."""
    number = [8]
    monkeypatch.setattr(threads, "_usable", lambda: number[0])
    return number


def seen(stage: object) -> list[int]:
    """Return the number of threads inside a call."""
    found: list[int] = []
    layer = next(iter(stage.layers.values()))  # type: ignore[attr-defined]
    layer.register_forward_pre_hook(lambda *_: found.append(torch.get_num_threads()))
    return found


def test_a_stage_computes_with_its_own_number(gpt2: splitbundle.Bundle, usable: list[int]) -> None:
    x = torch.zeros(1, 2, gpt2.architecture.hidden_size)
    for given, expected in ((None, 3), (1, 1), (2, 2), (torch.tensor(2), 2), (16, 16)):
        stage = gpt2.stage(gpt2.shards[1].name, threads=given)  # type: ignore[call-overload]
        inside = seen(stage)
        stage(x)
        assert inside == [expected]
        assert torch.get_num_threads() == 3


def test_a_quota_below_torchs_number(gpt2: splitbundle.Bundle, usable: list[int]) -> None:
    usable[0] = 2
    stage = gpt2.stage(gpt2.shards[1].name)
    inside = seen(stage)
    stage(torch.zeros(1, 2, gpt2.architecture.hidden_size))
    assert (inside, torch.get_num_threads()) == ([2], 3)


def test_the_number_stays_after_an_error(gpt2: splitbundle.Bundle) -> None:
    stage = gpt2.stage(gpt2.shards[1].name, threads=1)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    next(iter(stage.layers.values())).register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        stage(torch.zeros(1, 2, gpt2.architecture.hidden_size))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("wrong", [0, -1, 1025, 1.5, "2", True])
def test_a_number_that_is_none(gpt2: splitbundle.Bundle, wrong: object) -> None:
    with pytest.raises(BundleError, match=r"\[input.value\] threads: expected 1 to 1024"):
        gpt2.stage(gpt2.shards[1].name, threads=wrong)  # type: ignore[call-overload]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_one_thread(gpt2: splitbundle.Bundle) -> None:
    """It would wait forever for the threads of its parent, so ``threads`` doesn't count there."""
    stage = gpt2.stage(gpt2.shards[1].name, threads=3)
    inside = seen(stage)
    child = os.fork()
    if not child:
        stage(torch.zeros(1, 2, gpt2.architecture.hidden_size))
        os._exit(0 if inside == [1] else 1)
    assert os.waitpid(child, 0)[1] == 0
