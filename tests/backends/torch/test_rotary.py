"""Rotary frequencies and their scaling, compared with the formulas of the specification."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from splitbundle.backends.torch.positions import Positions
from splitbundle.backends.torch.rotary import frequencies
from splitbundle.format.architecture import rotary
from tests.support.second_decoder import frequency
from tests.support.variants import SCALED

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.rule(
    "SB-C-012", "SB-C-013", "SB-C-014", "SB-C-026", "SB-C-027", "SB-C-028", "SB-C-029", "SB-C-030", "SB-C-025"
)
@pytest.mark.parametrize("scaling", rotary.SCALINGS)
@pytest.mark.parametrize("length", [1, 8192, 8193, 100_002])
def test_frequencies_are_the_formulas_in_float32(scaling: str, length: int) -> None:
    position = rotary.Rotary(base=500000.0, dim=128, layout="half", scaling=SCALED[scaling])
    got = frequencies(position, length, torch.device("cpu"))
    assert got.dtype == torch.float32
    document = {"base": 500000.0, "dim": 128, "scaling": asdict(position.scaling)}
    expected = torch.tensor([frequency(document, i, length) for i in range(64)], dtype=torch.float64)
    assert torch.allclose(got.double(), expected, rtol=4e-6, atol=0)
    # Positions and products are float32 too, even where a stage computes in 16 bits: only cos and sin are rounded.
    row = Positions([length - 1], [1], 1, torch.device("cpu"), torch.bfloat16)
    cos, sin = row.rotary(position)
    angles = (torch.tensor(float(length - 1)) * got)[None, None, None]
    factor = getattr(position.scaling, "attention_factor", 1.0)
    assert torch.equal(cos, (angles.cos() * factor).bfloat16().repeat(1, 1, 1, 2))
    assert torch.equal(sin[..., 64:], (angles.sin() * factor).bfloat16())
    assert torch.equal(sin[..., :64], -sin[..., 64:])
