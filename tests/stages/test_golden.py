"""The comparison of golden vectors: what a difference is measured against."""

from __future__ import annotations

import math

import numpy
import pytest

from splitbundle import ParityError
from splitbundle.stages import golden

VECTORS = {
    "case.0.hidden.0": numpy.array([1.0, -2.0]),
    "case.0.hidden.1": numpy.array([700.0, 1.0]),
    "case.0.hidden.2": numpy.array([20.0, -3.0]),
    "case.0.logits": numpy.array([4.0, 5.0]),
}


def difference(where: str, by: float, vectors: dict[str, numpy.ndarray] = VECTORS) -> golden.Difference:
    outputs = {(where, 0): vectors[f"case.0.{where}"] + by}
    (found,) = golden.compare(outputs, golden.original_outputs(vectors, outputs), ("torch", "original"), vectors)
    return found


@pytest.mark.rule("SB-C-001", "SB-G-003")
@pytest.mark.parametrize(("where", "scale"), [("hidden.0", 2), ("hidden.1", 700), ("hidden.2", 700), ("logits", 5)])
def test_the_scale_is_the_largest_magnitude_up_to_a_place(where: str, scale: float) -> None:
    """Layers add to the hidden state, so it keeps the rounding of what was taken away again. Logits are a product."""
    assert difference(where, 1e-4).scale == scale
    golden.check([difference(where, 0.9e-5 * scale)], "vectors.safetensors")
    with pytest.raises(ParityError, match=r"\[parity\] vectors.safetensors"):
        golden.check([difference(where, 1.2e-5 * scale)], "vectors.safetensors")


@pytest.mark.rule("SB-G-003")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_fail(bad: float) -> None:
    vectors = VECTORS | {"case.0.hidden.1": numpy.array([bad, 1.0])}
    with pytest.raises(ParityError, match="got NaN or infinity"):
        golden.check([difference("hidden.2", 0.0, vectors)], "vectors.safetensors")
