"""Measure what quantization changed: in the weights, in the hidden states of the golden vectors, and on a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from splitbundle.backends.torch.pipeline import Pipeline
from splitbundle.backends.torch.quantized import dequantized
from splitbundle.backends.torch.stage import load_stages
from splitbundle.backends.torch.weights import map_tensors
from splitbundle.errors import quoted, wrong_argument
from splitbundle.format.weight_layout import SCALE
from splitbundle.records import as_dict, record
from splitbundle.storage.files import Progress
from splitbundle.storage.reader import ORIGINAL_VECTORS, VECTORS, BundleReader

WINDOW: Final = 256
"""How many tokens of the text are computed at once."""


@record(frozen=True, slots=True, kw_only=True)
class PartError:
    """What quantization changed in one unit."""

    part: str
    weight: float
    """√(Σ (W - W')² / Σ W²) over the quantized matrices; 0 if there are none."""
    hidden: float | None
    """√(Σ (h - h')² / Σ h²) of what the unit gives for the golden vectors: hidden states, or logits for the head."""


@record(frozen=True, slots=True, kw_only=True)
class TextQuality:
    """How the model predicts a text before and after."""

    tokens: int
    """The number of predicted tokens."""
    perplexity_before: float
    perplexity_after: float
    divergence: float
    """The mean over the tokens of Σ p · ln(p / q), with p before and q after: the Kullback-Leibler divergence."""
    same_first: float
    """The share of the tokens for which the likeliest token is the same."""


@record(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """What quantization changed."""

    bytes_before: int
    """The size of all weight files."""
    bytes_after: int
    bits_per_weight: float
    """The bits of codes and scales for each number of the quantized matrices."""
    quantized: int
    """How many numbers of the model are quantized."""
    parameters: int
    parts: tuple[PartError, ...]
    text: TextQuality | None

    def as_json(self) -> dict[str, Any]:
        """Return the report as an object for JSON."""
        found: dict[str, Any] = as_dict(self)
        return found


def measure(
    original: BundleReader,
    quantized: BundleReader,
    token_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> QuantizationReport:
    """Compare a quantized bundle with the one that it was made from.

    Args:
        original: the bundle that was quantized.
        quantized: the new bundle.
        token_ids: a text to predict; None for none.
        progress: called with the name of the work, the amount that is done, and the total amount.

    Raises:
        BundleError: ``input.value`` for bundles with different architectures.
    """
    if original.architecture != quantized.architecture:
        expected = f"a bundle with the architecture of {quoted(original.path.name)}"
        raise wrong_argument("quantized", expected, quoted(quantized.path.name))
    hidden = _hidden_errors(quantized)
    parts, bits, numbers = [], 0, 0
    units = list(quantized.manifest.units)
    for at, unit in enumerate(units):
        if progress is not None:
            progress("comparing", at, len(units))
        off, size, own_bits, own_numbers = _weight_errors(original, quantized, unit)
        bits, numbers = bits + own_bits, numbers + own_numbers
        parts.append(PartError(part=unit, weight=math.sqrt(off / size) if size else 0.0, hidden=hidden.get(unit)))
    return QuantizationReport(
        bytes_before=_bytes(original),
        bytes_after=_bytes(quantized),
        bits_per_weight=bits / numbers if numbers else 0.0,
        quantized=numbers,
        parameters=quantized.manifest.model.parameters,
        parts=tuple(parts),
        text=None if token_ids is None else _text(original, quantized, list(token_ids), progress),
    )


def _bytes(bundle: BundleReader) -> int:
    return sum(bundle.manifest.files[path].size for path in bundle.manifest.weight_files())


def _weight_errors(original: BundleReader, quantized: BundleReader, unit: str) -> tuple[float, float, int, int]:
    """Return Σ (W - W')², Σ W², the bits and the numbers of a unit's quantized matrices."""
    before, after, storage = map_tensors(original, unit), map_tensors(quantized, unit), quantized.manifest.storage
    off = size = 0.0
    bits = numbers = 0
    for name, weight in before.items():
        encoding = storage.encoding_of(name)
        if encoding is None:
            continue
        codes, scale = after[name], after[f"{name}{SCALE}"]
        bits, numbers = bits + 8 * (codes.nbytes + scale.nbytes), numbers + weight.numel()
        stacks = zip(*(part if weight.ndim == 3 else part[None] for part in (weight, codes, scale)), strict=True)
        for own, own_codes, own_scale in stacks:
            rounded = dequantized(own_codes, own_scale, encoding, torch.float32)
            off += float((own.float() - rounded).square().sum(dtype=torch.float64))
            size += float(own.float().square().sum(dtype=torch.float64))
    return off, size, bits, numbers


def _hidden_errors(bundle: BundleReader) -> dict[str, float]:
    """Return the error of what each unit gives for the golden vectors, if the bundle has both kinds of them."""
    vectors = bundle.manifest.vectors
    if vectors is None or vectors.original is None or any(path in bundle.absent() for path in vectors.files):
        return {}
    before, after = map_tensors(bundle, ORIGINAL_VECTORS), map_tensors(bundle, VECTORS)
    layers = len(bundle.architecture.layers)
    places = {"embedding": "hidden.0", "head": "logits"}
    places |= {bundle.architecture.layer_unit(i): f"hidden.{i + 1}" for i in range(layers)}
    found = {}
    for unit, where in places.items():
        names = [f"case.{case}.{where}" for case in range(len(vectors.lengths))]
        off = sum(float((before[name] - after[name]).double().square().sum()) for name in names)
        size = sum(float(before[name].double().square().sum()) for name in names)
        found[unit] = math.sqrt(off / size) if size else math.sqrt(off)
    return found


def _text(original: BundleReader, quantized: BundleReader, ids: list[int], progress: Progress | None) -> TextQuality:
    """Predict a text with both bundles, in float32 and with exact products, in windows that don't see each other."""
    if len(ids) < 2:
        raise wrong_argument("token_ids", "a text of at least two tokens", f"{len(ids)}")
    window = min(
        WINDOW, original.architecture.position_limit or WINDOW, original.manifest.model.context_length or WINDOW
    )
    before, after = _pipeline(original), _pipeline(quantized)
    starts = [start for start in range(0, len(ids), window) if len(ids) - start > 1]
    losses = [0.0, 0.0]
    divergence, same, count = 0.0, 0, 0
    for at, start in enumerate(starts):
        if progress is not None:
            progress("predicting the text", at, len(starts))
        row = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            p, q = (_log_probabilities(pipeline(row)[0, :-1]) for pipeline in (before, after))
        targets = row[0, 1:, None]
        for i, each in enumerate((p, q)):
            losses[i] -= float(each.gather(1, targets).sum(dtype=torch.float64))
        divergence += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(targets)
    return TextQuality(
        tokens=count,
        perplexity_before=math.exp(losses[0] / count),
        perplexity_after=math.exp(losses[1] / count),
        divergence=divergence / count,
        same_first=same / count,
    )


def _log_probabilities(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def _pipeline(bundle: BundleReader) -> Pipeline:
    selections = [bundle.select(shard.name) for shard in bundle.shards]
    return Pipeline(load_stages(bundle, selections, dtype="float32", kernels="torch"))
