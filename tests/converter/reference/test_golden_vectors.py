"""A conversion that computes something else than the original model is refused, and leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import splitbundle
from splitbundle import ParityError
from splitbundle.backends.torch.weights import map_tensors
from splitbundle.storage.reader import VECTORS
from splitbundle_converter import conversion
from splitbundle_converter.translation.translate import Translation, translate
from tests.support.checkpoints import QUERY, accepted, change_tensors, digests, refused, replaced
from tests.support.models import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def query_and_key_exchanged(*arguments: Any) -> Translation:
    """Put a mistake into the table that only the original model can show."""
    right = translate(*arguments)
    pair = ("layers.2.attention.query.weight", "layers.2.attention.key.weight")
    exchanged = dict(zip(pair, (right.origins[name] for name in reversed(pair)), strict=True))
    return replace(right, origins=right.origins | exchanged)


@pytest.mark.rule("SB-G-003", "SB-D-009")
def test_a_wrong_translation_does_not_get_out(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says where the shards differ from the original model, and no file is left."""
    monkeypatch.setattr(conversion, "translate", query_and_key_exchanged)
    error = refused(checkpoint("gpt2"), output, split=(1, 3), check=True)
    assert isinstance(error, ParityError)
    # Before the mistake all is well; from the first boundary after layer 2 nothing is.
    assert [problem.argument for problem in error.problems] == ["hidden.3", "logits"]
    assert set(error.codes) == {"parity"}
    text = str(error).splitlines()[0]
    assert text.startswith(
        "[parity] vectors.safetensors hidden.3: expected a difference to the original model of at most 1e-05 of "
    )
    # Without the check it does, which is what the check is for.
    accepted(checkpoint("gpt2"), output, check=False)


@pytest.mark.rule("SB-D-009")
def test_a_wrong_translation_does_not_replace_a_bundle(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = accepted(checkpoint("gpt2"), output, split=(1,))
    before = digests(output)
    monkeypatch.setattr(conversion, "translate", query_and_key_exchanged)
    assert isinstance(refused(checkpoint("gpt2"), output, check=True, force=True), ParityError)
    assert digests(output) == before
    assert splitbundle.open(output).id == made.id
    made.verify(exact=True)


@pytest.mark.rule("SB-G-003")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_fail_the_check(source: Callable[[str], Path], output: Path, value: float) -> None:
    """A NaN must not pass as a small difference, although no comparison with it is true."""
    path = source("llama")
    change_tensors(path, replaced(QUERY, lambda x: torch.full_like(x, value)))
    assert isinstance(refused(path, output, check=True), ParityError)


@pytest.mark.rule("SB-G-003")
def test_one_token_that_is_no_number_fails_the_check(source: Callable[[str], Path], output: Path) -> None:
    """Only the first case has a NaN, and the results of the others must not hide it."""
    path = source("llama")
    golden = map_tensors(accepted(path, output), VECTORS)
    shutil.rmtree(output)
    (token,) = golden["case.0.ids"].tolist()
    assert not any((golden[f"case.{case}.ids"] == token).any() for case in (1, 2))

    def spoil(table: Tensor) -> Tensor:
        table[token] = float("nan")
        return table

    change_tensors(path, replaced("model.embed_tokens.weight", spoil))
    error = refused(path, output, split=(2,), check=True)
    assert [problem.argument for problem in error.problems] == ["hidden.2", "logits"]
