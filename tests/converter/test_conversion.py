"""The arguments of a conversion, and its determinism."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import accepted, digests, refused, said
from tests.support.models import LAYERS, ONE_PER_FAMILY, bundle, checkpoint
from tests.support.tiers import FEW, thinned

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_dtype_that_does_not_exist(output: Path) -> None:
    text = "[usage.dtype] dtype: expected one of keep, float32, float16, bfloat16, got 'int8'"
    assert said(refused(checkpoint("llama"), output, dtype="int8")) == text


@pytest.mark.rule("SB-I-004")
@pytest.mark.parametrize("name", thinned(ONE_PER_FAMILY, FEW))
def test_the_same_input_makes_the_same_bundle(name: str, output: Path) -> None:
    """Every file is the same, except for golden vectors and their digests: threads change the last bits."""
    computed = {"vectors.safetensors", "manifest.json", "SHA256SUMS"}
    for check, left_out in ((False, set()), (True, computed)):
        made = []
        for i in range(2):
            torch.set_num_threads(1 + i)
            path = output.with_name(f"{i}-{check}.splitbundle")
            made.append(accepted(checkpoint(name), path, split=(1, 3), check=check))
        one, two = ({k: v for k, v in digests(b.path).items() if k not in left_out} for b in made)
        assert one == two
        assert len(one) >= LAYERS + 3
        assert made[0].fingerprint == made[1].fingerprint == bundle(name).fingerprint
