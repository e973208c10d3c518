"""Tables of positions: rotations, sinusoids, temperatures and ALiBi."""

from __future__ import annotations

import math

import pytest
import torch

from splitbundle.backends.torch.positions import Positions
from splitbundle.format.architecture import positions, rotary
from splitbundle.format.architecture.positions import AttentionSpan
from tests.support.variants import SCALED

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.rule("SB-C-012", "SB-C-019", "SB-C-022", "SB-C-024")
@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
def test_tables_of_positions_are_computed_in_float32_and_then_rounded(default: torch.dtype) -> None:
    alibi = positions.Alibi(max_bias=8.0, multiplier=0.3)
    temperature = positions.QueryTemperature(beta=0.1, original_positions=3, offset=0)

    def tables(dtype: torch.dtype) -> list[torch.Tensor]:
        far = Positions([70_001], [5], 5, torch.device("cpu"), dtype)
        turned = [
            part
            for scaling in SCALED.values()
            for part in far.rotary(rotary.Rotary(base=500000.0, dim=128, layout="half", scaling=scaling))
        ]
        return [
            far.sinusoids(2, 30),
            far.temperature(temperature),
            far.biased_mask(alibi, 6, AttentionSpan(40, None))[1],
            *turned,
        ]

    exact = tables(torch.float32)
    angles = [70_003 * math.exp(i * -math.log(10000.0) / 14) for i in range(15)]
    assert exact[0][0, 0].tolist() == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=0.02)
    assert exact[1].flatten().tolist() == pytest.approx([1 + 0.1 * math.log(1 + p // 3) for p in range(70_001, 70_006)])
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        rounded = tables(torch.bfloat16)
    finally:
        torch.set_default_dtype(before)
    for wide, narrow in zip(exact, rounded, strict=True):
        assert wide.dtype == torch.float32
        assert torch.equal(wide.bfloat16(), narrow)
