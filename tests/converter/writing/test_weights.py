"""The dtypes of written weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import splitbundle_converter
from tests.support.checkpoints import QUERY, WEIGHTS, accepted, change_tensors, refused, replaced
from tests.support.models import LAYERS, checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_values_that_float16_cannot_hold(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    change_tensors(path, replaced(QUERY, lambda x: torch.full_like(x, 70_000.0)))
    text = str(refused(path, output, dtype="float16"))
    assert text == (
        f"[input.overflow] model.safetensors /{QUERY}: expected values that float16 can hold, got 70000. "
        "bfloat16 holds larger ones"
    )
    accepted(path, output, dtype="bfloat16", check=False)


def test_mixed_dtypes_are_kept(source: Callable[[str], Path], output: Path) -> None:
    """Some checkpoints have norms in float32 beside matrices in bfloat16."""
    path = Path(shutil.copytree(checkpoint("llama", "bfloat16"), output.parent.parent / "source"))
    change_tensors(path, lambda tensors: {k: t.float() if "norm" in k else t for k, t in tensors.items()})
    made = accepted(path, output, split=(2,))
    assert made.manifest.storage.dtype == "bfloat16"
    norms = 2 * LAYERS + 1
    assert list(made.manifest.storage.exceptions.values()) == ["float32"] * norms
    back = dict(splitbundle_converter.source_tensors(made))
    for key, tensor in load_file(path / WEIGHTS).items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor)
