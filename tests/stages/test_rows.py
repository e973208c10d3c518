"""Calls that compute some rows of a session. The results are those of a session of its own with only these rows."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Sequence
from functools import cache
from typing import Any, Final, Literal

import pytest
import torch

from splitbundle import BundleError
from splitbundle.backends.onnxruntime.pipeline import Pipeline as ArrayPipeline
from tests.support import graph_bundles
from tests.support.models import LAYERS, TOLERANCE, bundle, token_rows
from tests.support.scenarios import Side, pad
from tests.support.stages import refusal
from tests.support.tiers import FEW, crossed, thinned

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS: Final = ("torch", "onnxruntime", "torch first", "onnxruntime first")
GROUPS: Final = ((4,), (5, 1), (0, 3, 2))
"""Rows of a session of six rows, in the order in which calls name them."""
NAMES: Final = (*sorted(FEW), "llama-dynamic", "llama-longrope", "gpt_oss")
SHORT: Final = {
    "torch": {"bloom-nine-heads-untied", "llama4_text-tuned-biased", "llama-dynamic", "gpt_oss", "qwen2-mixed"},
    "onnxruntime": {"bloom-nine-heads-untied", "llama4_text-tuned-biased", "llama-longrope"},
    "torch first": {"llama-dynamic"},
    "onnxruntime first": {"llama4_text-tuned-biased"},
}
"""ALiBi, windows, chunks, scaled rotations with thresholds, sinks, experts."""


@cache
def pipeline(name: str, backend: str) -> Any:
    """Return a pipeline of three stages under one backend, or under both in turn."""
    if backend == "torch":
        return bundle(name).pipeline(kernels="torch")
    whole = graph_bundles.bundle(name)
    between = {"torch first": "onnxruntime", "onnxruntime first": "torch"}.get(backend, "onnxruntime")
    ends = backend.removesuffix(" first")
    stages = [
        whole.stage(layers=layers, embeds=i == 0, head=i == 2, backend=between if i == 1 else ends, threads=1)  # type: ignore[call-overload]
        for i, layers in enumerate(((0, 1), (1, 3), (3, LAYERS)))
    ]
    return ArrayPipeline(stages)


def same(got: Any, expected: Any, *, exact: bool) -> None:
    """Fail unless two arrays of logits are equal, or differ by no more than the tolerance.

    Under onnxruntime, a row's last bits can depend on its place in the batch, and on the number of a cache's slots.
    """
    one, other = torch.as_tensor(got), torch.as_tensor(expected)
    assert one.shape == other.shape
    difference = float((one - other).abs().max())
    assert difference <= (0 if exact else TOLERANCE * float(other.abs().max())), difference


class Twins:
    """A session of six rows, and one of its own for each group of rows. Every call is given to both."""

    def __init__(self, parts: Any, capacity: int, *, exact: bool, grows: bool = False) -> None:
        self.parts, self.exact = parts, exact
        self.whole = parts.session(6, capacity, grows=grows)
        self.own = [parts.session(len(group), capacity, grows=grows) for group in GROUPS]

    def say(
        self, group: int, tokens: Sequence[Sequence[int]], side: Side | None, logits: Literal["all", "last"] | int
    ) -> None:
        """Give a group of rows some tokens, and compare the logits."""
        ids, mask, _ = pad(tokens, side)
        given = {"attention_mask": None if mask is None else self.parts.token_ids(mask.tolist()), "logits": logits}
        ids = self.parts.token_ids(ids.tolist())
        expected = self.parts(ids, session=self.own[group], **given)
        got = self.parts(ids, session=self.whole, rows=GROUPS[group], **given)
        same(got, expected, exact=self.exact or len(GROUPS[group]) == 1)
        self.compare()

    def compare(self) -> None:
        """Compare what is known about each row."""
        for rows, own in zip(GROUPS, self.own, strict=True):
            assert [self.whole.past[row] for row in rows] == own.past
            assert [self.whole.tokens[row] for row in rows] == own.tokens

    def forget(self, group: int, numbers: Sequence[int]) -> None:
        """Roll the rows of a group back, or see that both sessions refuse that."""
        back = [0] * 6
        for row, number in zip(GROUPS[group], numbers, strict=True):
            back[row] = number
        try:
            self.own[group].rollback(numbers)
        except BundleError:
            refusal(self.whole.rollback, back)
        else:
            self.whole.rollback(back)
        self.compare()

    def reorder(self, orders: Sequence[Sequence[int]]) -> None:
        """Let the rows of each group go on from rows of the group."""
        rows = list(range(6))
        for group, own, order in zip(GROUPS, self.own, orders, strict=True):
            own.reorder(order)
            for row, former in zip(group, order, strict=True):
                rows[row] = group[former]
        self.whole.reorder(rows)
        self.compare()


def converse(twins: Twins, steps: int, seed: int) -> None:
    """Make calls of all kinds in a random order."""
    chance = random.Random(seed)
    for _ in range(steps):
        group = chance.randrange(3)
        own, what = twins.own[group], chance.random()
        room = 30 - max(own.past)
        if what < 0.15 or room < 8:
            twins.forget(group, [chance.randint(0, past) for past in own.past])
        elif what < 0.25:
            twins.reorder([[chance.randrange(len(rows)) for _ in rows] for rows in GROUPS])
        elif what < 0.3:
            former, twins.whole = twins.whole, copy.copy(twins.whole)
            twins.parts(twins.parts.token_ids([[1]]), session=former, rows=[0])  # the copy must not see this
        else:
            number, ragged = chance.choice((1, 1, 2, 7)), chance.random() < 0.4
            lengths = [chance.randint(0, number) if ragged else number for _ in own.past]
            side: Side | None = chance.choice(("left", "right", "both")) if ragged else None
            logits: Literal["all", "last"] | int = chance.choice(("all", "last", 3))
            twins.say(group, token_rows(*lengths, seed=chance.randrange(10_000)), side, logits)


@pytest.mark.parametrize(
    ("backend", "name"), crossed(BACKENDS, NAMES, kept=lambda backend, name: name in SHORT[backend])
)
def test_rows_are_as_in_a_session_of_their_own(backend: str, name: str) -> None:
    """Prompts and tokens of some rows while others wait, padded and not, rolled back, reordered and copied.

    With torch's kernels, the results are the same to the bit. Under onnxruntime, those of one row are.
    """
    converse(Twins(pipeline(name, backend), 40, exact=backend == "torch"), 40, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_session_that_grows_does_so_for_the_rows_of_a_call(backend: str) -> None:
    twins = Twins(pipeline("qwen2-mixed", backend), 6, exact=backend == "torch", grows=True)
    twins.say(0, token_rows(6), None, "all")
    twins.say(1, token_rows(3, 5), "left", "all")
    assert twins.whole.capacity == 6  # the row that is full is not in this call
    for group, rows in ((1, token_rows(4, 4)), (0, token_rows(1)), (2, token_rows(7, 2, 0))):
        twins.say(group, rows, "right", 2)
    assert twins.whole.capacity == 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", thinned(NAMES, {"llama4_text-tuned-biased", "llama-longrope"}))
def test_any_rows_are_as_each_row_alone(backend: str, name: str) -> None:
    """Any rows in any order, and all rows of a call that doesn't name them."""
    parts, chance = pipeline(name, backend), random.Random(3)
    session, own = parts.session(5, 48), [parts.session(1, 48) for _ in range(5)]
    for step in range(12):
        rows = list(range(5)) if step % 4 == 3 else chance.sample(range(5), chance.randint(1, 5))
        new = token_rows(*(chance.randint(1, 5) for _ in rows), seed=step)
        ids, mask, starts = pad(new, "both")
        assert mask is not None
        given: dict[str, Any] = {} if step % 4 == 3 else {"rows": rows}
        mask_given = parts.token_ids(mask.tolist())
        got = parts(parts.token_ids(ids.tolist()), attention_mask=mask_given, session=session, **given)
        for i, row in enumerate(rows):
            expected = parts(parts.token_ids([new[i]]), session=own[row])
            same(got[i, starts[i] : starts[i] + len(new[i])], expected[0], exact=False)
    assert session.tokens == [alone.tokens[0] for alone in own]


def opened(name: str, backend: str) -> Any:
    """Return the stage of all layers."""
    if backend == "torch":
        return bundle(name).stage(layers=(0, LAYERS), kernels="torch")
    return graph_bundles.bundle(name).stage(layers=(0, LAYERS), backend="onnxruntime", threads=1)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_stage_takes_rows_by_hand(backend: str) -> None:
    stage, parts = opened("llama-llama3", backend), pipeline("llama-llama3", backend)
    cache, own = stage.cache(4, 20), stage.cache(2, 20)
    prompt, more = parts.token_ids(token_rows(7, 7)), parts.token_ids(token_rows(2, 2, seed=1))
    same(stage(prompt, count=[7, 4], cache=cache, rows=[3, 1]), stage(prompt, count=[7, 4], cache=own), exact=True)
    stage(parts.token_ids(token_rows(5, seed=2)), cache=cache, rows=[0])
    given: dict[str, Any] = {"past": [7, 4], "count": [1, 2], "logits": "last"}
    expected = stage(more, cache=own, **given)
    positions = stage.check(more, cache=cache, rows=parts.token_ids([[3, 1]])[0], **given)
    same(stage(more, positions=positions, cache=cache, logits="last"), expected, exact=backend == "torch")
    assert cache.lengths == [5, 6, 0, 8]


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_rows_are_moved_only_until_they_are_neighbors(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[int, int, int]] = []
    cache = opened("llama", backend).cache(8, 20)
    swap = cache._swap
    monkeypatch.setattr(cache, "_swap", lambda *given: (moved.append(given), swap(*given)))
    stage, parts = opened("llama", backend), pipeline("llama", backend)

    def call(*rows: int) -> list[tuple[int, int, int]]:
        """Give rows a token, and return what was moved for it: two places, and their slots."""
        moved.clear()
        stage(parts.token_ids([[1]] * len(rows)), past=[cache.lengths[row] for row in rows], cache=cache, rows=rows)
        return list(moved)

    assert [call(row) for row in (6, 7, 3, 6)] == [[]] * 4
    assert call(3, 6, 7) == [(3, 5, 1)]
    assert call(7, 3) == [(7, 4, 2)]
    assert [call(*rows) for rows in ((6, 3, 7), (3, 7), (6,), (7, 6, 3))] == [[]] * 4
    assert call(*range(8)) == []
    assert sorted(cache.places) == list(range(8))
    cache.reorder([7, 7, 0, 1, 2, 3, 4, 5])
    assert cache.places == list(range(8))
    assert cache.lengths == [7, 7, 1, 1, 1, 7, 1, 1]


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_an_interrupted_move_loses_both_rows_and_says_so(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = pipeline("llama", backend)
    session = parts.session(4, 8)
    ids, one = parts.token_ids(token_rows(3, 3, 3, 3)), parts.token_ids([[5]])
    expected = parts(ids, session=session)

    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(session.caches[0], "_swap", interrupt)
        with pytest.raises(KeyboardInterrupt):
            parts(parts.token_ids([[5], [6]]), session=session, rows=[0, 2])
    for row in (1, 2):
        assert "past[0]: expected at most 0, the positions that this stage's cache holds, got 3" in refusal(
            parts, one, session=session, rows=[row]
        )
    session.rollback([0, 3, 3, 3])
    same(parts(ids[2:], session=session, rows=[2, 1]), expected[2:], exact=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_cannot_be_are_refused(backend: str) -> None:
    parts = pipeline("llama", backend)
    session = parts.session(3, 4)
    ids = parts.token_ids(token_rows(3, 3))
    parts(ids, session=session, rows=[2, 0])
    before = [(list(kept.lengths), list(kept.places)) for kept in session.caches]
    values = "[input.value] rows: expected distinct row numbers from 0 to 2, at least one, got "
    for rows in ([0, 0], [0, 3], [-1, 0], []):
        assert refusal(parts, ids, session=session, rows=rows) == f"{values}{rows}"
    assert refusal(parts, ids, session=session, rows=["a", 1]).startswith("[input.value] rows: expected integers")
    assert refusal(parts, ids, rows=[0, 1]) == (
        "[input.value] rows: expected no rows without a session, whose rows they are, got [0, 1]"
    )
    assert "rows: expected 2 rows, as the tokens, got 1" in refusal(parts, ids, session=session, rows=[1])
    assert refusal(parts, ids, session=session, rows=[1, 2]).startswith("[session.capacity]")
    assert session.past == [3, 0, 3]
    assert [(kept.lengths, kept.places) for kept in session.caches] == before


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_stage_refuses_rows_that_its_cache_has_not(backend: str) -> None:
    stage, parts = opened("llama", backend), pipeline("llama", backend)
    ids, kept = parts.token_ids(token_rows(3, 3)), stage.cache(3, 4)
    for call in (stage, stage.check):
        assert "rows: expected no rows without a cache, whose rows they are, got [0, 1]" in refusal(
            call, ids, rows=[0, 1]
        )
        assert refusal(call, ids, cache=kept, rows=[0, 3]) == (
            "[input.value] rows: expected distinct row numbers from 0 to 2, at least one, got [0, 3]"
        )
        assert "past[1]: expected at most 0" in refusal(call, ids, past=[0, 1], cache=kept, rows=[1, 2])
    assert kept.lengths == [0, 0, 0]


class Foreign:
    """A stage that somebody else wrote before there were rows."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        for name in ("name", "fingerprint", "layer_range", "architecture", "embeds", "has_head", "cache"):
            setattr(self, name, getattr(inner, name))

    def over_numpy(self) -> Foreign:
        return self

    def convert_call(self, call: Any) -> Any:
        return call

    def check(self, inputs: Any, *, past: Any, count: Any, cache: Any, logits: Any) -> Any:
        return self.inner.check(inputs, past=past, count=count, cache=cache, logits=logits)

    def check_call(self, inputs: Any, call: Any, cache: Any, logits: Any = "all") -> None:
        self.inner.check_call(inputs, call, cache, logits)

    def __call__(self, inputs: Any, *, positions: Any, cache: Any, logits: Any) -> Any:
        return self.inner(inputs, positions=positions, cache=cache, logits=logits)


@pytest.mark.parametrize("which", range(3))
def test_a_stage_that_knows_no_rows_computes_all_of_them(which: int) -> None:
    known = pipeline("llama", "onnxruntime")
    stages = list(known.stages)
    stages[which] = Foreign(stages[which])
    parts = ArrayPipeline(stages)
    session, ids = parts.session(2, 8), known.token_ids(token_rows(3, 3))
    same(parts(ids, session=session), known(ids), exact=True)
    expected = f"no rows, because stage {stages[which].name} computes all rows of its cache"
    assert expected in refusal(parts, ids, session=session, rows=[1, 0])
    assert session.past == [3, 3]


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_session_can_be_pickled_after_rows_moved(backend: str) -> None:
    parts = pipeline("qwen2-mixed", backend)
    session = parts.session(4, 20)
    prompt, one = parts.token_ids(token_rows(4, 4)), parts.token_ids([[7], [8]])
    parts(prompt, session=session, rows=[3, 0])
    other = pickle.loads(pickle.dumps(session))
    assert session.caches[0].places != list(range(4))
    expected = parts(one, session=session, rows=[0, 3])
    same(parts(one, session=other, rows=[0, 3]), expected, exact=True)


def test_many_sets_of_rows_keep_few_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitbundle.backends.onnxruntime.cache.BINDINGS", 5)
    stage, parts = opened("llama", "onnxruntime"), pipeline("llama", "onnxruntime")
    kept = stage.cache(9, 8)
    for row in range(9):
        stage(parts.token_ids([[row]]), cache=kept, rows=[row])
        assert 0 < len(kept._bindings) <= 5
