"""Calls that a stage refuses, and the messages: the place, the expected value, and the given value."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import splitbundle_converter
from splitbundle import Bundle
from splitbundle.backends.torch.stage import Stage
from tests.support.models import VOCAB, checkpoint, token_rows
from tests.support.stages import refusal

HIDDEN = 36


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bottom [0, 1), trunk [1, 3), top [3, 4); the head is its own matrix."""
    output = tmp_path_factory.mktemp("stages") / "llama.splitbundle"
    return splitbundle_converter.convert(checkpoint("llama"), output, split=(1, 3), check=False)


@pytest.fixture(scope="module")
def bottom(whole: Bundle) -> Stage:
    """Takes token ids."""
    return whole.stage("bottom")


@pytest.fixture(scope="module")
def trunk(whole: Bundle) -> Stage:
    """Takes hidden states."""
    return whole.stage("trunk")


@pytest.mark.rule("SB-B-012")
@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([[1]], "[input.type] stage bottom, token ids: expected a torch.Tensor, got list"),
        (torch.zeros(1, 2), "[input.dtype] stage bottom, token ids: expected an integer dtype, got torch.float32"),
        (
            torch.zeros(1, 2, dtype=torch.bool),
            "[input.dtype] stage bottom, token ids: expected an integer dtype, got torch.bool",
        ),
        (
            torch.tensor([1, 2]),
            "[input.shape] stage bottom, token ids: expected (batch, sequence), both above 0, got (2,)",
        ),
        (
            torch.zeros(2, 0, dtype=torch.int64),
            "[input.shape] stage bottom, token ids: expected (batch, sequence), both above 0, got (2, 0)",
        ),
        (
            torch.zeros(0, 2, dtype=torch.int64),
            "[input.shape] stage bottom, token ids: expected (batch, sequence), both above 0, got (0, 2)",
        ),
        (torch.tensor([[1, VOCAB]]), "[input.value] stage bottom, token ids: expected ids from 0 to 60, got 61"),
        (torch.tensor([[1, -1]]), "[input.value] stage bottom, token ids: expected ids from 0 to 60, got -1"),
        (
            torch.zeros(1, 2, dtype=torch.int64, device="meta"),
            "[input.device] stage bottom, token ids: expected cpu, where this stage is, got meta",
        ),
    ],
)
def test_token_ids(bottom: Stage, given: Any, text: str) -> None:
    hint = ". Move it with .to(...), or open the stage with device=" if text.startswith("[input.device]") else ""
    assert refusal(bottom, given) == text + hint


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_any_integer_dtype_will_do(bottom: Stage, dtype: torch.dtype) -> None:
    ids = torch.tensor([[1, 60, 0]])
    assert torch.equal(bottom(ids.to(dtype)), bottom(ids))


@pytest.mark.rule("SB-B-001")
@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            torch.zeros(1, 2, HIDDEN, dtype=torch.bfloat16),
            "[input.dtype] stage trunk, hidden at layer 1: expected torch.float32, as this stage computes, "
            "got torch.bfloat16",
        ),
        (
            torch.zeros(1, 2, dtype=torch.int64),
            "[input.dtype] stage trunk, hidden at layer 1: expected torch.float32, as this stage computes, "
            "got torch.int64",
        ),
        (
            torch.zeros(1, 2, HIDDEN + 1),
            "[input.shape] stage trunk, hidden at layer 1: expected (batch, sequence, 36), got (1, 2, 37)",
        ),
        (
            torch.zeros(2, HIDDEN),
            "[input.shape] stage trunk, hidden at layer 1: expected (batch, sequence, 36), got (2, 36)",
        ),
        (
            torch.zeros(1, 0, HIDDEN),
            "[input.shape] stage trunk, hidden at layer 1: expected (batch, sequence, 36), got (1, 0, 36)",
        ),
        (
            torch.zeros(1, 1, 2, HIDDEN),
            "[input.shape] stage trunk, hidden at layer 1: expected (batch, sequence, 36), got (1, 1, 2, 36)",
        ),
        (
            None,
            "[input.type] stage trunk, hidden at layer 1: expected a torch.Tensor, got NoneType",
        ),
    ],
)
def test_hidden_states(trunk: Stage, given: Any, text: str) -> None:
    hints = {
        "input.dtype": "Convert it with .to(stage.dtype), or open the stage with dtype=",
        "input.shape": "It must be the output of the stage before, of the same model",
        "input.device": "Move it with .to(...), or open the stage with device=",
    }
    hint = hints.get(text[1 : text.index("]")])
    assert refusal(trunk, given) == (f"{text}. {hint}" if hint else text)


@pytest.mark.rule("SB-B-002", "SB-B-009")
@pytest.mark.parametrize(
    ("named", "text"),
    [
        (
            {"past": [1, 0]},
            "[input.position] stage trunk, past: expected 0 for every row without a cache, got [1, 0]",
        ),
        ({"past": [0]}, "[input.shape] stage trunk, past: expected 2 rows, as the tokens, got 1"),
        ({"past": [-1, 0]}, "[input.value] stage trunk, past: expected integers from 0 to 2147483648, got [-1, 0]"),
        (
            {"past": torch.zeros(2)},
            "[input.dtype] stage trunk, past: expected (batch) of an integer dtype, got torch.float32 (2,)",
        ),
        (
            {"past": torch.zeros(2, 1, dtype=torch.int64)},
            "[input.dtype] stage trunk, past: expected (batch) of an integer dtype, got torch.int64 (2, 1)",
        ),
        ({"count": [3, 4]}, "[input.value] stage trunk, count: expected integers from 0 to 3, got [3, 4]"),
        ({"count": [3, -1]}, "[input.value] stage trunk, count: expected integers from 0 to 3, got [3, -1]"),
        ({"count": [3, True]}, "[input.value] stage trunk, count: expected integers from 0 to 3, got [3, True]"),
        ({"count": [3, 3, 3]}, "[input.shape] stage trunk, count: expected 2 rows, as the tokens, got 3"),
    ],
)
def test_past_and_count(trunk: Stage, named: dict[str, Any], text: str) -> None:
    assert refusal(trunk, torch.zeros(2, 3, HIDDEN), **named) == text


@pytest.mark.rule("SB-B-009")
def test_a_past_that_the_cache_does_not_hold(trunk: Stage) -> None:
    """A stage that was restarted, or missed a call, must not go on after a gap."""
    cache = trunk.cache(2, 16)
    trunk(torch.ones(2, 3, HIDDEN), cache=cache, count=[3, 2])
    text = refusal(trunk, torch.ones(2, 1, HIDDEN), past=[3, 3], cache=cache)
    assert text == "[input.position] past[1]: expected at most 2, the positions that this stage's cache holds, got 3"
    trunk(torch.ones(2, 1, HIDDEN), past=[3, 2], cache=cache)


@pytest.mark.rule("SB-B-010")
def test_a_cache_that_is_too_small(trunk: Stage) -> None:
    cache = trunk.cache(1, 4)
    text = refusal(trunk, torch.ones(1, 5, HIDDEN), cache=cache)
    assert text == "[session.capacity] capacity: expected at least 5 slots, got 4. Open a session with more capacity"
    assert refusal(trunk.cache, 1, 0) == "[session.capacity] capacity: expected at least 1, got 0"


def test_a_cache_of_other_rows(trunk: Stage) -> None:
    text = refusal(trunk, torch.ones(1, 2, HIDDEN), cache=trunk.cache(3, 4))
    assert text == "[input.shape] batch: expected 3 rows, as the cache, got 1"


@pytest.mark.rule("SB-B-011")
def test_a_stage_by_hand_that_refuses_writes_nothing(whole: Bundle) -> None:
    top = whole.stage("top")
    cache = top.cache(1, 8)
    refusal(top, torch.ones(1, 2, HIDDEN), cache=cache, logits=0)
    assert cache.lengths == [0]
    assert not any(tensor.any() for tensor in (*cache.keys.values(), *cache.values.values()))


@pytest.mark.parametrize("logits", ["first", 0, -1, 1.0, None, True])
def test_logits_that_cannot_be_wanted(whole: Bundle, logits: Any) -> None:
    text = refusal(whole.stage("top"), torch.zeros(1, 2, HIDDEN), logits=logits)
    assert (
        text == f'[input.value] stage top, logits: expected "all", "last" or a number from 1 to 1048576, got {logits!r}'
    )


@pytest.mark.rule("SB-B-005")
@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (
            torch.tensor([[1, 1, 1], [1, 0, 1]]),
            "[input.mask] attention_mask: expected one run of ones, the rest zeros, in row 1, got [1, 0, 1]",
        ),
        (
            torch.tensor([[1, 2, 1], [1, 0, 0]]),
            "[input.mask] attention_mask: expected one run of ones, the rest zeros, in row 0, got [1, 2, 1]",
        ),
        (
            torch.tensor([[0.0, 0.5, 1.0], [1, 0, 0]]),
            "[input.mask] attention_mask: expected one run of ones, the rest zeros, in row 0, got [0.0, 0.5, 1.0]",
        ),
        (
            torch.ones(2, 5),
            "[input.shape] attention_mask: expected (2, 3), as token_ids: the mask covers this call's tokens only, "
            "got (2, 5)",
        ),
        (
            torch.ones(3),
            "[input.shape] attention_mask: expected (2, 3), as token_ids: the mask covers this call's tokens only, "
            "got (3,)",
        ),
        (
            [[1, 1, 1], [1, 1, 1]],
            "[input.shape] attention_mask: expected (2, 3), as token_ids: the mask covers this call's tokens only, "
            "got list",
        ),
    ],
)
def test_masks(whole: Bundle, mask: Any, text: str) -> None:
    ids = torch.tensor(token_rows(3, 3))
    assert refusal(whole.pipeline(), ids, attention_mask=mask) == text


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8])
def test_a_mask_of_any_dtype_will_do(whole: Bundle, dtype: torch.dtype) -> None:
    ids = torch.tensor(token_rows(3))
    mask = torch.tensor([[0, 1, 1]])
    pipeline = whole.pipeline()
    assert torch.equal(pipeline(ids, attention_mask=mask.to(dtype)), pipeline(ids, attention_mask=mask))


@pytest.mark.rule("SB-B-002", "SB-B-003")
def test_padding_crosses_a_boundary_as_zeros(bottom: Stage, trunk: Stage) -> None:
    """Any values may be at padding: another runtime may be at the other end, and nothing of it may leak or matter."""
    ids = torch.tensor(token_rows(5, 5, 5))
    count = [5, 2, 0]
    hidden = bottom(ids, count=count)
    noise = hidden.clone()
    for row, number in enumerate(count):
        assert not hidden[row, number:].any()
        assert hidden[row, :number].all(dim=-1).all()
        noise[row, number:] = 1e3
    assert torch.equal(trunk(noise, count=count), trunk(hidden, count=count))
    assert torch.equal(bottom(ids)[0], hidden[0])


def test_sessions_of_no_rows_or_slots(whole: Bundle) -> None:
    pipeline = whole.pipeline()
    assert refusal(pipeline.session, 0) == "[input.value] batch_size: expected a number from 1, got 0"
    assert refusal(pipeline.session, 1, 0).startswith("[session.capacity] capacity: expected ")
