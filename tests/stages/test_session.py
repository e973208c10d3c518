"""Sessions: capacity, padding, rolling back, and calls that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from splitbundle import BundleError
from splitbundle.backends.torch.pipeline import Pipeline
from splitbundle.backends.torch.stage import Stage, load_stages
from tests.support.models import TOLERANCE, VOCAB, bundle, expected_logits, relative, token_rows
from tests.support.pipelines import left_padded, pipeline

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.rule("SB-B-010", "SB-B-011")
def test_a_call_that_does_not_fit_leaves_the_session_as_it_was() -> None:
    name = "qwen2-mixed"
    parts = pipeline(name)
    rows = token_rows(6, 6)
    session = parts.session(2, 8)
    parts(torch.tensor(rows), session=session)
    with pytest.raises(BundleError) as caught:
        parts(torch.tensor(token_rows(3, 3, seed=1)), session=session)
    assert str(caught.value) == (
        "[session.capacity] capacity: expected at least 9 slots, got 8. Open a session with more capacity"
    )
    assert session.past == [6, 6]
    more = token_rows(2, 2, seed=2)
    logits = parts(torch.tensor(more), session=session)
    for row in range(2):
        known = expected_logits(name, tuple(rows[row] + more[row]))
        assert relative(logits[row], known[6:]) <= TOLERANCE
    assert session.past == [8, 8]


@pytest.mark.rule("SB-B-011")
@pytest.mark.parametrize(
    "call",
    [
        lambda parts, ids, session: parts(ids, session=session, logits=0),
        lambda parts, ids, session: parts(ids.expand(3, -1), session=session),
        lambda parts, ids, session: parts(ids + VOCAB, session=session),
        lambda parts, ids, session: parts(ids.repeat(1, 9), session=session),
        lambda parts, ids, session: parts(ids, session=session, attention_mask=torch.tensor([[1, 0, 1]])),
    ],
    ids=["logits", "rows", "ids", "capacity", "mask"],
)
def test_a_refused_call_writes_nothing(call: Callable[..., Any]) -> None:
    """No stage's cache changes, whichever stage refused."""
    parts = pipeline("llama")
    session = parts.session(1, 8)
    parts(torch.tensor(token_rows(4)), session=session)

    def state() -> list[Any]:
        held = [tensor for kept in session.caches for tensor in (*kept.keys.values(), *kept.values.values())]
        return [session.past, [kept.lengths for kept in session.caches], [tensor.tolist() for tensor in held]]

    before = state()
    with pytest.raises(BundleError):
        call(parts, torch.tensor(token_rows(3, seed=1)), session)
    assert state() == before


@pytest.mark.rule("SB-B-011")
def test_a_stage_that_trains_refuses_before_the_first_has_written() -> None:
    """The stages before it don't train, and would have computed first."""
    whole = bundle("llama")
    parts = Pipeline([whole.stage(layers=(0, 2)), whole.stage(layers=(2, 4), trainable=True)])
    session = parts.session(1, 8)
    with pytest.raises(BundleError):
        parts(torch.tensor(token_rows(3)), session=session)
    assert [kept.lengths for kept in session.caches] == [[0], [0]]


@pytest.mark.rule("SB-B-006", "SB-B-007")
def test_capacity_counts_tokens_and_not_padding() -> None:
    """Rows of 5 and 3 tokens in a sequence of 12 need 5 slots, because padding enters no cache."""
    name = "llama-llama3"
    rows = token_rows(5, 3)
    ids, mask = left_padded(rows)
    ids, mask = functional.pad(ids, (4, 3)), functional.pad(mask, (4, 3))
    session = pipeline(name).session(2, 5)
    logits = pipeline(name)(ids, attention_mask=mask, session=session)
    assert logits.shape == (2, 12, VOCAB)
    for row, tokens in enumerate(rows):
        at = mask[row].bool()
        assert relative(logits[row, at], expected_logits(name, tuple(tokens))) <= TOLERANCE
        assert not logits[row, ~at].any()


@pytest.mark.rule("SB-B-006", "SB-B-010")
def test_capacity_counts_each_row_s_own_tokens() -> None:
    """Rows may have different pasts: the padding of the fuller row has no slot."""
    name = "qwen2-mixed"
    rows, more = token_rows(7, 2), token_rows(1, 5, seed=1)
    parts = pipeline(name)
    session = parts.session(2, 8)
    ids, mask = left_padded(rows)
    parts(ids, attention_mask=mask, session=session)
    ids, mask = left_padded(more)
    logits = parts(ids, attention_mask=mask, session=session)
    assert session.past == [8, 7]
    for row in range(2):
        known = expected_logits(name, tuple(rows[row] + more[row]))
        assert relative(logits[row, mask[row].bool()], known[len(rows[row]) :]) <= TOLERANCE


def test_a_full_row_waits_while_another_goes_on() -> None:
    """The row is at the model's last position. Computing in its place must look up nothing beyond it."""
    parts = pipeline("gpt2")
    limit = bundle("gpt2").architecture.position_limit
    assert limit == 48
    rows = token_rows(limit, 3)
    ids, mask = left_padded(rows)
    session = parts.session(2, limit)
    parts(ids, attention_mask=mask, session=session)
    logits = parts(torch.tensor([[1], [2]]), attention_mask=torch.tensor([[0], [1]]), session=session)
    assert not logits[0].any()
    assert relative(logits[1], expected_logits("gpt2", (*rows[1], 2))[3:]) <= TOLERANCE


@pytest.mark.rule("SB-B-012")
def test_a_model_has_no_more_positions_than_its_table() -> None:
    parts = pipeline("gpt2")
    with pytest.raises(BundleError) as caught:
        parts.session(1, 49)
    text = "[session.capacity] capacity: expected 1 to 48, the positions of the model, got 49"
    assert str(caught.value) == text
    with pytest.raises(BundleError) as caught:
        parts(torch.zeros(1, 49, dtype=torch.int64))
    assert str(caught.value) == (
        "[input.position] stage bottom, past + count: expected at most 48, the positions of the model, got 49"
    )


def test_rolling_back_too_far_is_refused() -> None:
    parts = pipeline("llama")
    session = parts.session(2, 8)
    ids, mask = left_padded(token_rows(4, 2))
    parts(ids, attention_mask=mask, session=session)
    for tokens, text in (
        (3, "[session.rollback] tokens: expected 0 to 2 tokens, all that row 1 has, got 3"),
        ([5, 0], "[session.rollback] tokens: expected 0 to 4 tokens, all that row 0 has, got 5"),
        ([0, -1], "[session.rollback] tokens: expected 0 to 2 tokens, all that row 1 has, got -1"),
        ([1], "[session.rollback] tokens: expected one number, or one for each of 2 rows, got [1]"),
    ):
        with pytest.raises(BundleError) as caught:
            session.rollback(tokens)
        assert str(caught.value) == text
        assert session.past == [4, 2]
    session.rollback(2)
    assert session.past == [2, 0]


def test_reordering_to_rows_that_do_not_exist_is_refused() -> None:
    session = pipeline("llama").session(2, 8)
    for rows in ([0], [0, 2], [-1, 0], [0, 1, 1]):
        with pytest.raises(BundleError) as caught:
            session.reorder(rows)
        assert str(caught.value) == f"[input.value] rows: expected 2 row numbers below 2, got {rows}"


def test_a_session_is_of_one_number_of_rows() -> None:
    parts = pipeline("llama")
    with pytest.raises(BundleError) as caught:
        parts(torch.zeros(3, 1, dtype=torch.int64), session=parts.session(2, 8))
    assert str(caught.value) == "[input.shape] stage bottom, past: expected 3 rows, as the tokens, got 2"


@pytest.mark.rule("SB-B-013")
def test_stages_that_do_not_tile_the_model_are_refused() -> None:
    def stages(*ranges: tuple[int, int]) -> list[Stage]:
        whole = bundle("llama")
        selections = [
            whole.select(layers=ends, embeds=i == 0, head=i == len(ranges) - 1) for i, ends in enumerate(ranges)
        ]
        return load_stages(whole, selections)

    bottom, middle, top = stages((0, 1), (1, 3), (3, 4))
    of_one = "expected a stage of one model from layer {} on, the first embeds, the last has the head, got layers {}"
    for given, text in (
        ([bottom, top], f"stages[1]: {of_one.format(1, '(3, 4), embeds=False, head=True')}"),
        ([bottom, middle], f"stages[1]: {of_one.format(1, '(1, 3), embeds=False, head=False')}"),
        ([middle, top], f"stages[0]: {of_one.format(0, '(1, 3), embeds=False, head=False')}"),
        ([], "stages: expected stages up to the last layer, got up to 0"),
    ):
        with pytest.raises(BundleError) as caught:
            Pipeline(given)
        assert str(caught.value) == f"[pipeline.tiling] {text}"
    assert isinstance(Pipeline([bottom, middle, top]), Pipeline)


def test_gradients_and_a_cache_do_not_go_together() -> None:
    """The cached keys and values would silently have no gradient."""
    parts = bundle("llama").pipeline(trainable=True)
    with pytest.raises(BundleError) as caught:
        parts(torch.zeros(1, 2, dtype=torch.int64), session=parts.session(1, 8))
    assert str(caught.value) == (
        "[input.grad] stage bottom, cache: expected a call without gradients: use torch.no_grad(), "
        "got gradients enabled"
    )
    with torch.no_grad():
        parts(torch.zeros(1, 2, dtype=torch.int64), session=parts.session(1, 8))
