"""Norms whose stored weight is a difference from one."""

from __future__ import annotations

import pytest
import torch

from splitbundle.backends.torch.norms import Norm
from splitbundle.format.architecture import norms

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.rule("SB-C-007")
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_an_offset_is_added_in_float32(kind: str) -> None:
    norm = Norm(norms.Norm(kind=kind, eps=1e-6, affine=True, weight_offset=1.0, bias=kind == "layer_norm"), 64)
    generator = torch.Generator().manual_seed(2)
    # In bfloat16, 1 + w is 1 for these weights.
    small = {name: torch.full((64,), 2.0**-10, dtype=torch.bfloat16) for name in norm.state_dict()}
    norm.load_state_dict(small, assign=True)
    x = torch.randn(8, 64, generator=generator).bfloat16()
    with torch.no_grad():
        got = norm(x)
        mean = x.double().mean(-1, keepdim=True) if kind == "layer_norm" else 0.0
        centred = x.double() - mean
        exact = (1 + 2.0**-10) * centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = exact + 2.0**-10 if kind == "layer_norm" else exact
    assert got.dtype == torch.bfloat16
    lost = (exact / (1 + 2.0**-10)).bfloat16() if kind == "rms_norm" else None
    assert (got != exact.bfloat16()).float().mean() < 0.02  # a tie that falls to the other side
    assert lost is None or (got != lost).float().mean() > 0.05
