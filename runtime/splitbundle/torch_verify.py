"""Running the golden vectors: does what is stored compute what the original model computed?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from splitbundle.bundle import VECTORS
from splitbundle.errors import BundleError, ParityError, Problem
from splitbundle.torch_stage import load_stages
from splitbundle.torch_weights import map_tensors

if TYPE_CHECKING:
    from splitbundle.bundle import Bundle, Selection
    from splitbundle.files import Progress

TOLERANCE: Final = 1e-5
"""Of the largest magnitude: ten times what the original model itself differs by between two ways to compute it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The largest difference to the original at one place, over all cases."""

    where: str
    """``hidden.N``: before layer N; ``logits``."""
    largest: float
    scale: float
    """The largest magnitude there."""

    @property
    def relative(self) -> float:
        """The difference as a fraction of the scale."""
        return self.largest / self.scale if self.scale else self.largest


def run_vectors(bundle: Bundle, shard: str | None = None, progress: Progress | None = None) -> list[Difference]:
    """Computes the golden vectors in float32 through chained shards, or one shard from its golden input.

    One shard is in memory at a time.

    Raises:
        ParityError: ``parity`` where a boundary or the logits differ by more than the tolerance, or aren't numbers.
        BundleError: ``vectors.none`` for a bundle without vectors; what loading refuses.
    """
    vectors = bundle.manifest.vectors
    if vectors is None:
        hint = "It was converted with --no-check; convert it again without"
        raise BundleError(
            Problem(code="vectors.none", expected="golden vectors", got="a bundle without them", hint=hint)
        )
    golden = map_tensors(bundle, VECTORS)
    shards = [bundle.shard(shard)] if shard is not None else bundle.shards
    states: dict[int, Tensor] = {}
    found: dict[str, Difference] = {}
    for i, part in enumerate(shards):
        if progress is not None:
            progress("running the shards", i, len(shards))
        selection = bundle.select(part.name)
        stage = load_stages(bundle, [selection], dtype="float32")[0]
        for case in range(len(vectors.lengths)):
            given = states.get(case, _input(golden, case, selection))
            with torch.no_grad():
                states[case] = stage(given, logits="last")
            where, expected = _output(golden, case, selection)
            got = states[case][0, -1] if where == "logits" else states[case][0]
            _widen(found, where, got, expected)
    if progress is not None:
        progress("running the shards", len(shards), len(shards))
    wrong = [difference for difference in found.values() if not difference.relative <= TOLERANCE]
    if wrong:
        raise ParityError(_problem(difference, vectors.file) for difference in wrong)
    return list(found.values())


def _problem(difference: Difference, file: str) -> Problem:
    expected = f"a difference to the original model of at most {TOLERANCE:g} of {difference.scale:.4g}"
    got = f"{difference.largest:.4g}, {difference.relative:.3g} of it"
    hint = "These weights don't compute what the original model did: convert it again, and report it if it persists"
    if not math.isfinite(difference.scale):
        expected, got = "numbers from the original model", "NaN or infinity"
        hint = "The checkpoint's weights aren't all numbers; --no-check converts them all the same"
    return Problem(code="parity", file=file, argument=difference.where, expected=expected, got=got, hint=hint)


def _input(golden: dict[str, Tensor], case: int, selection: Selection) -> Tensor:
    name = "ids" if selection.embeds else f"hidden.{selection.layers[0]}"
    return golden[f"case.{case}.{name}"][None]


def _output(golden: dict[str, Tensor], case: int, selection: Selection) -> tuple[str, Tensor]:
    where = "logits" if selection.head else f"hidden.{selection.layers[1]}"
    return where, golden[f"case.{case}.{where}"]


def _widen(found: dict[str, Difference], where: str, got: Tensor, expected: Tensor) -> None:
    largest = (got - expected).abs().max().item()
    scale = expected.abs().max().item()
    difference, before = Difference(where=where, largest=largest, scale=scale), found.get(where)
    # A NaN must win and stay, and compares as larger than nothing.
    if before is None or math.isnan(difference.relative) or difference.relative > before.relative:
        found[where] = difference
