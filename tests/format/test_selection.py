"""The parts of a model that a name or a range of layers selects, and those that do not exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import splitbundle_converter
from splitbundle import Bundle
from tests.support.models import LAYERS, TOLERANCE, bundle, checkpoint, expected_logits, relative, token_rows
from tests.support.stages import refusal


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bottom [0, 1), trunk [1, 3), top [3, 4); the head is its own matrix."""
    output = tmp_path_factory.mktemp("stages") / "llama.splitbundle"
    return splitbundle_converter.convert(checkpoint("llama"), output, split=(1, 3), check=False)


def test_a_shard_that_does_not_exist(whole: Bundle) -> None:
    assert refusal(whole.stage, "middle") == (
        "[stage.name] shard: expected a shard of llama-float32: bottom, trunk, top, got 'middle'. "
        "Any other part: stage(layers=(start, stop)) within 0..4"
    )


@pytest.mark.parametrize(
    ("layers", "got"),
    [
        ((0, 5), "(0, 5)"),
        ((3, 2), "(3, 2)"),
        ((-1, 2), "(-1, 2)"),
        ((1, 2, 3), "(1, 2, 3)"),
        ((0, 2.0), "(0, 2.0)"),
        ((False, True), "(False, True)"),
        (3, "3"),
    ],
)
def test_a_range_out_of_bounds(whole: Bundle, layers: Any, got: str) -> None:
    text = f"[stage.range] layers: expected (start, stop) with 0 <= start <= stop <= 4, got {got}"
    assert refusal(whole.stage, layers=layers) == text


@pytest.mark.parametrize(
    "named",
    [
        {"layers": (2, 2)},
        {"layers": (1, 3), "embeds": True},
        {"layers": (1, 3), "head": True},
        {"layers": (0, 0), "embeds": False},
        {"layers": (4, 4), "head": False},
    ],
    ids=str,
)
def test_a_range_that_computes_nothing_or_cannot_begin_there(whole: Bundle, named: dict[str, Any]) -> None:
    start, stop = named["layers"]
    embeds, head = named.get("embeds", start == 0), named.get("head", stop == LAYERS)
    assert refusal(whole.stage, **named) == (
        "[stage.range] layers: expected a range with a layer, the embedding (at 0) or the head (at 4), "
        f"got layers=({start}, {stop}), embeds={embeds}, head={head}"
    )


def test_a_name_and_a_range_at_once(whole: Bundle) -> None:
    text = "[stage.range] layers: expected a shard's name or layers=, got both or neither"
    assert refusal(whole.stage, "bottom", layers=(0, 1)) == text
    assert refusal(whole.stage) == text


def test_the_ends_alone(whole: Bundle) -> None:
    """A stage may be only the embedding, or only the head, and another stage the rest."""
    embedding, layers, head = (
        whole.stage(layers=(0, 0)),
        whole.stage(layers=(0, 4), embeds=False, head=False),
        whole.stage(layers=(4, 4)),
    )
    ids = token_rows(5)
    logits = head(layers(embedding(torch.tensor(ids))))
    assert relative(logits[0], expected_logits("llama", tuple(ids[0]))) <= TOLERANCE


def test_a_tied_head_alone_has_its_table() -> None:
    """The head's shard lists the embedding's unit, but the stage embeds nothing."""
    whole = bundle("gpt2")
    top = whole.stage(layers=(2, 4))
    assert "embedding" in whole.select(layers=(2, 4)).units
    text = refusal(top, torch.zeros(1, 2, dtype=torch.int64))
    assert text == (
        "[input.dtype] stage layers[2:4], hidden at layer 2: expected torch.float32, as this stage computes, "
        "got torch.int64. Convert it with .to(stage.dtype), or open the stage with dtype="
    )
