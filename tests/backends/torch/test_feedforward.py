"""Activations, compared with the formulas of the specification."""

from __future__ import annotations

import pytest
import torch

from splitbundle.backends.torch.feedforward import ACTIVATIONS, Xielu
from tests.support.second_decoder import activate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.rule("SB-C-016")
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_the_formulas(name: str) -> None:
    x = torch.linspace(-12, 12, 481, dtype=torch.float64)
    expected = torch.tensor([activate(name, value) for value in x.tolist()], dtype=torch.float64)
    assert torch.allclose(ACTIVATIONS[name](x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.rule("SB-C-016")
def test_xielu_is_the_formula() -> None:
    module = Xielu()
    module.load_state_dict(
        {name: torch.tensor([value], dtype=torch.float64) for name, value in (("alpha_p", 0.3), ("alpha_n", -1.2))},
        assign=True,
    )
    x = torch.cat((torch.linspace(-12, 12, 480), torch.tensor([0.0, 1e-7, -1e-7, -1e-6, -2e-6]))).double()
    expected = torch.tensor([activate("xielu", value, 0.3, -1.2) for value in x.tolist()], dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(module(x), expected, rtol=1e-12, atol=1e-16)
