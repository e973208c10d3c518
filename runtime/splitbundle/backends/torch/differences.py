"""Compare the values of two bundles' tensors, a piece at a time, over the mapped files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from splitbundle.backends.torch.changes import same_bits
from splitbundle.backends.torch.logical import LogicalTensors
from splitbundle.comparison.documents import UnitPair
from splitbundle.comparison.records import Values
from splitbundle.storage.files import Progress
from splitbundle.storage.reader import BundleReader

PIECE: Final = 2**18
"""Values that are compared at once. They take about 25 MB."""


def measure(
    a: BundleReader, b: BundleReader, units: Sequence[UnitPair], progress: Progress | None
) -> dict[str, Values]:
    """Compare the tensors of units that both bundles have.

    The files are mapped. Their headers are checked, and not their digests (but in a bundle that was opened strictly).

    Args:
        a: the bundle A.
        b: the bundle B.
        units: each unit's name in A and in B, and the tensors to compare. Each has one shape in both bundles.
        progress: called with the name of the work, the number of tensors that are done, and their total.

    Returns:
        The tensors that differ in a value, by name.

    Raises:
        BundleError: as for ``Bundle.weight_bytes``.
    """
    found: dict[str, Values] = {}
    total, done = sum(len(names) for _, _, names in units), 0
    for unit_a, unit_b, names in units:
        of_a, of_b = LogicalTensors(a, unit_a), LogicalTensors(b, unit_b)
        for name in names:
            if progress is not None:
                progress("comparing weights", done, total)
            done += 1
            values = compare_values(of_a[name], of_b[name])
            if values is not None:
                found[name] = values
    if progress is not None and total:
        progress("comparing weights", total, total)
    return found


def compare_values(one: Tensor, other: Tensor) -> Values | None:
    """Compare two tensors of one shape and any floating dtypes. Return None if no value differs.

    float64 holds each value of the stored dtypes, so a value is never rounded before it is compared.
    """
    if same_bits(one, other):
        return None
    differing = not_finite = 0
    largest = scale = 0.0
    one, other = one.reshape(-1), other.reshape(-1)
    for start in range(0, one.numel(), PIECE):
        x, y = (tensor[start : start + PIECE].double() for tensor in (one, other))
        # x != y is true for two NaN, and false for 0 and -0.
        unequal = ((x != y) | (x.signbit() != y.signbit())) & ~(x.isnan() & y.isnan())
        finite = x.isfinite() & y.isfinite()
        differing += int(unequal.sum())
        not_finite += int((unequal & ~finite).sum())
        largest = max(largest, float((x - y).abs_().where(finite, 0.0).max()))
        scale = max(scale, float(x.abs().where(x.isfinite(), 0.0).max()))
    if not differing:
        return None
    return Values(
        count=one.numel(),
        differing=differing,
        not_finite=not_finite,
        largest=largest,
        scale=scale,
        relative=largest / scale if scale else None,
    )
