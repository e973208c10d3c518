"""Run the golden vectors, and compare the results with those of the original model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from splitbundle.errors import BundleError, ParityError, Problem
from splitbundle.records import record

if TYPE_CHECKING:
    from splitbundle.format.selection import Selection
    from splitbundle.storage.files import Progress
    from splitbundle.storage.reader import BundleReader

ORIGINAL: Final = "original"
ITSELF: Final = "itself"
"""The other side of a comparison, if the golden vectors come from the bundle itself, as a changed one has them."""
TOLERANCE: Final = 1e-5
"""A share of the scale: ten times the difference between two ways to compute the original model."""
BFLOAT16_TOLERANCE: Final = TOLERANCE * 2**13
"""bfloat16 has three bits less than float16."""
FLOAT16_TOLERANCE: Final = TOLERANCE * 2**10
"""1.7 times the need of float16: the largest known difference, of 175 configurations, is 0.006 of the largest value.
A smaller change of a number can't be told from rounding."""
QUANTIZED_TOLERANCE: Final = 2e-2
"""Graphs over quantized weights keep 13 bits of what they multiply ``rows8`` by. The largest difference of 43 random
models is 0.0026, and that of SmolLM2-135M, whose inputs have channels of outliers, is 0.007. Products with
``blocks4``, which keep 8 bits, are computed with exact factors for the comparison."""
Outputs = dict[tuple[str, int], Any]
"""``hidden.N`` or ``logits``, and the case -> the result at that place."""


@record(frozen=True, slots=True, kw_only=True)
class RouterTie:
    """A token for which a router's scores are so near that a rounding decides."""

    layer: int
    case: int
    token: int
    chosen: tuple[int, ...]
    """The experts that are chosen here."""
    original: tuple[int, ...]
    """Those with which the result is the original model's."""


@record(frozen=True, slots=True, kw_only=True)
class Difference:
    """The largest difference at one place, over all cases."""

    where: str
    """``hidden.N``: before layer N; ``logits``."""
    largest: float
    scale: float
    """The largest magnitude of the original model at that place and, for a hidden state, at the places before it.

    Layers add to the hidden state. So it keeps the rounding of its largest term, even where that term is taken away
    again: in SmolLM2-135M, 729 is followed by 19.
    """
    between: tuple[str, str]
    """The two sides of the comparison: a backend, and a backend, the "original", or "itself" for the bundle's own
    results when it was written."""
    tolerance: float = TOLERANCE
    """The largest relative difference that rounding explains."""
    ties: tuple[RouterTie, ...] = ()
    """The near ties that were decided as the original did. If there are any, each layer was compared alone."""

    @property
    def relative(self) -> float:
        """Return the difference as a fraction of the scale."""
        return self.largest / self.scale if self.scale else self.largest


def compute(
    bundle: BundleReader,
    shard: str | None,
    golden: Mapping[str, Any],
    load: Callable[[Selection], Callable[..., Any]],
    progress: Progress | None,
) -> Outputs:
    """Compute the golden vectors through chained shards, or one shard from its golden input. Load one at a time.

    Args:
        bundle: the bundle that has the vectors.
        shard: the only shard to run, or None for all.
        golden: the tensors of the golden vectors, as arrays of a backend.
        load: loads the stage of a selection, which computes in float32.
        progress: called with the name of the work, the amount that is done, and the total amount.

    Raises:
        BundleError: ``vectors.none`` for a bundle without vectors.
    """
    vectors = bundle.manifest.vectors
    if vectors is None:
        hint = "It was written without them, by check=False or vectors=False; write it again without this option"
        raise BundleError(
            Problem(code="vectors.none", expected="golden vectors", got="a bundle without them", hint=hint)
        )
    shards = [bundle.shard(shard)] if shard is not None else bundle.shards
    outputs: Outputs = {}
    states: dict[int, Any] = {}
    for i, part in enumerate(shards):
        if progress is not None:
            progress("running the shards", i, len(shards))
        selection = bundle.select(part.name)
        stage = load(selection)
        where = "logits" if selection.head else f"hidden.{selection.layers[1]}"
        name = "ids" if selection.embeds else f"hidden.{selection.layers[0]}"
        for case in range(len(vectors.lengths)):
            states[case] = stage(states.get(case, golden[f"case.{case}.{name}"][None]), logits="last")
            outputs[where, case] = states[case][0, -1] if where == "logits" else states[case][0]
    if progress is not None:
        progress("running the shards", len(shards), len(shards))
    return outputs


def compare(
    got: Outputs,
    expected: Mapping[tuple[str, int], Any],
    between: tuple[str, str],
    golden: Mapping[str, Any],
    tolerance: float = TOLERANCE,
    ties: tuple[RouterTie, ...] = (),
) -> list[Difference]:
    """Return the largest difference at each place. ``golden`` are the tensors of the golden vectors."""
    found: dict[str, Difference] = {}
    for (where, case), value in got.items():
        other = expected[where, case]
        largest, size = float(abs(value - other).max()), scale(golden, where, case)
        own = tuple(tie for tie in ties if where == f"hidden.{tie.layer + 1}")
        difference = Difference(
            where=where, largest=largest, scale=size, between=between, tolerance=tolerance, ties=own
        )
        before = found.get(where)
        # A NaN must win and stay, but no comparison with it is true.
        if before is None or math.isnan(difference.relative) or difference.relative > before.relative:
            found[where] = difference
    return list(found.values())


def scale(golden: Mapping[str, Any], where: str, case: int) -> float:
    """Return the scale of a place in a case; see ``Difference.scale``."""
    if where == "logits":
        return float(abs(golden[f"case.{case}.logits"]).max())
    last = int(where.removeprefix("hidden."))
    found = [float(abs(golden[f"case.{case}.hidden.{layer}"]).max()) for layer in range(last + 1)]
    return max(found) if all(map(math.isfinite, found)) else math.nan


def check(differences: list[Difference], file: str, *, by_layer: bool = False) -> None:
    """Check that all differences are small.

    Args:
        differences: the differences.
        file: the file of the golden vectors.
        by_layer: whether each layer was computed alone, so that an error can name the layer that is wrong.

    Raises:
        ParityError: ``parity`` for a difference above the tolerance, or for NaN.
    """
    found = wrong(differences)
    if found:
        raise ParityError(_problem(each, file, part(each.where) if by_layer else each.where) for each in found)


def part(where: str) -> str:
    """Return the part of the model that computes what is at a place: "layer 3" computes ``hidden.4``."""
    if where == "logits":
        return "the head"
    before = int(where.removeprefix("hidden."))
    return f"layer {before - 1}" if before else "the embedding"


def wrong(differences: list[Difference]) -> list[Difference]:
    """Return the differences above the tolerance, and those that aren't numbers."""
    return [difference for difference in differences if not difference.relative <= difference.tolerance]


def of_dtype(dtype: str) -> float:
    """Return the tolerance for a stage that computes in a dtype."""
    return {"float16": FLOAT16_TOLERANCE, "bfloat16": BFLOAT16_TOLERANCE}.get(dtype, TOLERANCE)


def file_of(bundle: BundleReader) -> str:
    """Return the file of the golden vectors, for messages."""
    return "" if bundle.manifest.vectors is None else bundle.manifest.vectors.file


def side(bundle: BundleReader) -> str:
    """Return what the golden vectors of a bundle came from: "original" or "itself"."""
    vectors = bundle.manifest.vectors
    return ITSELF if vectors is not None and vectors.of_itself else ORIGINAL


def described(name: str) -> str:
    """Return a side of a comparison in words."""
    known = {ORIGINAL: "the original model", ITSELF: "the bundle's own results when it was written"}
    return known.get(name, name)


def _problem(difference: Difference, file: str, where: str) -> Problem:
    other = described(difference.between[1])
    expected = f"a difference to {other} of at most {difference.tolerance:g} of {difference.scale:.4g}"
    got = f"{difference.largest:.4g}, {difference.relative:.3g} of it"
    hint = "These weights give other results than the original model: convert it again, and report it if it persists"
    if difference.tolerance == FLOAT16_TOLERANCE:
        hint = 'float16 ends at 65,504 and has 11 bits: variant="standard" computes in float32'
    elif difference.between[1] == ITSELF:
        hint = "Another machine or version gives other results than the one that wrote it: report it"
    elif difference.between[1] != ORIGINAL:
        hint = f"{difference.between[0]} gives other results here: report it with this bundle's architecture.json"
    if not math.isfinite(difference.scale):
        expected, got = f"numbers from {other}", "NaN or infinity"
        hint = "Some weights of the checkpoint are NaN or infinite; check=False converts them anyway"
    return Problem(code="parity", file=file, argument=where, expected=expected, got=got, hint=hint)


def check_original(bundle: BundleReader) -> None:
    """Check that the golden vectors come from the original model.

    Raises:
        BundleError: ``vectors.none`` if they come from the bundle itself.
    """
    if side(bundle) == ITSELF:
        expected, got = "golden vectors of the original model", "those of the bundle itself, which was changed"
        hint = f"They prove that it gives the same results again. Its parent was {bundle.manifest.model.parent}"
        raise BundleError(Problem(code="vectors.none", expected=expected, got=got, hint=hint))


def distances(bundle: BundleReader, own: Mapping[str, Any], before: Mapping[str, Any]) -> list[Difference]:
    """Return how far the golden vectors of a quantized bundle are from those of the model before.

    Args:
        bundle: the quantized bundle, which has both.
        own: the bundle's own golden vectors, by name.
        before: those of the model before it was quantized.
    """
    vectors = bundle.manifest.vectors
    cases = range(0 if vectors is None else len(vectors.lengths))
    places = [*(f"hidden.{layer}" for layer in range(len(bundle.architecture.layers) + 1)), "logits"]
    outputs = {(where, case): own[f"case.{case}.{where}"] for where in places for case in cases}
    return compare(outputs, original_outputs(before, outputs), (ITSELF, ORIGINAL), before, math.inf)


def original_outputs(golden: Mapping[str, Any], outputs: Outputs) -> Outputs:
    """Return the results of the original model at the same places."""
    return {(where, case): golden[f"case.{case}.{where}"] for where, case in outputs}
