"""The torch decoder computes what the specification says, compared with a decoder that is written from it."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from splitbundle.backends.torch.cache import KVCache
from splitbundle.backends.torch.pipeline import Session
from splitbundle.backends.torch.positions import Positions
from splitbundle.errors import BundleError
from tests.support.second_decoder import Reference, Runtime, close, made
from tests.support.variants import LENGTH, THRESHOLD, VARIANTS, facts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.rule(
    "SB-C-001",
    "SB-C-002",
    "SB-C-003",
    "SB-C-004",
    "SB-C-005",
    "SB-C-006",
    "SB-C-008",
    "SB-C-009",
    "SB-C-010",
    "SB-C-011",
    "SB-C-013",
    "SB-C-014",
    "SB-C-015",
    "SB-C-016",
    "SB-C-017",
    "SB-C-019",
    "SB-C-020",
    "SB-C-021",
    "SB-C-022",
    "SB-C-023",
    "SB-C-032",
    "SB-C-024",
    "SB-C-026",
    "SB-C-027",
    "SB-C-028",
    "SB-C-029",
    "SB-C-030",
    "SB-C-033",
    "SB-C-034",
    "SB-C-039",
    "SB-C-040",
    "SB-C-041",
    "SB-C-042",
    "SB-C-035",
    "SB-C-036",
    "SB-C-037",
    "SB-C-038",
)
@pytest.mark.parametrize("name", ["gpt2", "llama3", *VARIANTS])
def test_the_decoder_computes_what_the_text_says(name: str) -> None:
    architecture = facts(name)
    tensors, ids = made(architecture)
    expected = Reference(architecture, tensors).run(ids[0].tolist())
    for got, reference in zip(Runtime(architecture, tensors).run(ids[:1]), expected, strict=True):
        assert close(got[0], reference)


@pytest.mark.rule("SB-C-025", "SB-B-004", "SB-B-006")
@pytest.mark.parametrize("name", ["llama3", *VARIANTS])
@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([(5, 5), (1, 1), (2, 2), (1, 1), (3, 3)], id="rows alike"),
        # Row 0 grows past THRESHOLD in the second call, row 1 in the third, which brings row 0 nothing.
        pytest.param([(7, 2), (4, 5), (0, 3), (1, 1)], id="rows of their own"),
    ],
)
def test_calls_with_a_cache_compute_what_the_text_says(name: str, counts: list[tuple[int, int]]) -> None:
    architecture = facts(name)
    tensors, ids = made(architecture)
    runtime, references = Runtime(architecture, tensors), [Reference(architecture, tensors) for _ in range(2)]
    cache = runtime.cache(2)
    for call in counts:
        length = max(call)
        brought = [row[start : start + n].tolist() for row, start, n in zip(ids, cache.lengths, call, strict=True)]
        padded = torch.tensor([[*tokens, *([0] * (length - len(tokens)))] for tokens in brought])
        states = runtime.run(padded, cache, list(call))
        for row, tokens in enumerate(brought):
            if tokens:
                for got, reference in zip(states, references[row].run(tokens), strict=True):
                    assert close(got[row, : len(tokens)], reference)
    assert cache.lengths == [list(accumulate(row))[-1] for row in zip(*counts, strict=True)]


@pytest.mark.rule("SB-C-031", "SB-B-008", "SB-B-011")
@pytest.mark.parametrize("name", ["dynamic", "longrope", "yarn"])
def test_rolling_back_across_a_change_of_scale_is_refused(name: str) -> None:
    runtime = Runtime(facts(name), made(facts(name))[0])
    ids = made(facts(name))[1]

    def filled(*lengths: int) -> tuple[KVCache, Session]:
        cache = runtime.cache(2)
        runtime.run(ids[:, : max(lengths)], cache, list(lengths))
        session = Session([cache], 2, LENGTH)
        session.past = list(lengths)
        return cache, session

    cache, _ = filled(LENGTH - 1, THRESHOLD)
    for past in range(LENGTH):
        positions = Positions([past, 3], [1, 1], 1, torch.device("cpu"), torch.float32)
        # Row 0 is longer than the threshold, row 1 isn't.
        if name == "yarn" or past == 0 or past > THRESHOLD:
            cache.check(positions)
        else:
            with pytest.raises(BundleError, match=r"session\.rollback"):
                cache.check(positions)
    assert cache.lengths == [LENGTH - 1, THRESHOLD]
    for back in ([LENGTH - 1, THRESHOLD], [2, 5], [0, 1]):
        _, session = filled(LENGTH - 1, THRESHOLD)
        session.rollback(back)
        assert session.past == [LENGTH - 1 - back[0], THRESHOLD - back[1]]
    if name != "yarn":
        _, session = filled(LENGTH - 1, THRESHOLD)
        with pytest.raises(BundleError, match=r"session\.rollback"):
            session.rollback([LENGTH - 1 - THRESHOLD, 0])
        assert session.past == [LENGTH - 1, THRESHOLD]
