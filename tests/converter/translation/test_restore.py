"""The source tensors come back to the bit, under the names of the source."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import splitbundle_converter
from tests.support.checkpoints import WEIGHTS, accepted
from tests.support.models import CONFIGURATIONS, checkpoint
from tests.support.tiers import FEW, TWO_PER_FAMILY, crossed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("dtype", "name"),
    crossed(
        ["float32", "bfloat16", "float16"],
        CONFIGURATIONS,
        kept=lambda dtype, name: name in FEW or (name in TWO_PER_FAMILY and dtype == "float32"),
    ),
)
def test_the_round_trip_is_exact(name: str, dtype: str, output: Path) -> None:
    """Names, shapes, dtypes and bits come back, for every configuration."""
    path = checkpoint(name, dtype)
    made = accepted(path, output, split=(1, 2), check=False)
    back = dict(splitbundle_converter.source_tensors(made))
    tensors = load_file(path / WEIGHTS)
    assert set(back) == set(tensors)
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype
        assert back[key].shape == tensor.shape
        assert torch.equal(back[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key
