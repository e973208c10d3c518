"""Compare two bundles by their documents: no file but the documents is read here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from splitbundle.comparison import records
from splitbundle.comparison.fields import field_changes
from splitbundle.comparison.records import (
    Comparison,
    Cuts,
    Cutting,
    Fields,
    FileChange,
    Files,
    GoldenVectors,
    Identity,
    ShardOutline,
    TensorChange,
    Tokenizer,
    UnitChange,
    Values,
    VectorsOfBoth,
    Weights,
)
from splitbundle.comparison.texts import text_changes
from splitbundle.errors import quoted, wrong_argument
from splitbundle.format.manifest.document import TOKENIZER
from splitbundle.format.text_document import FILE as TEXT
from splitbundle.format.weight_layout import Tensor
from splitbundle.records import as_dict, record
from splitbundle.storage.files import Progress
from splitbundle.storage.reader import BundleReader

COVERED: Final = ("architecture", "fingerprint")
"""The fields of ``model`` that say nothing more: the facts and the weights are compared themselves."""


UnitPair = tuple[str, str, tuple[str, ...]]
"""A unit's name in A and in B, and the tensors whose values to compare: those with one shape in both."""
Measure = Callable[[BundleReader, BundleReader, Sequence[UnitPair], Progress | None], Mapping[str, Values] | None]
"""Compares values. It returns those tensors that differ, by name, or None if torch isn't installed."""


def compare(
    a: BundleReader,
    b: BundleReader,
    *,
    only: Iterable[str] = records.ASPECTS,
    measure: Measure,
    progress: Progress | None = None,
) -> Comparison:
    """Compare two bundles. See ``Bundle.diff``.

    Raises:
        BundleError: ``input.value`` for an unknown aspect; the errors of ``measure``.
    """
    wanted = tuple(only)
    for name in wanted:
        if name not in records.ASPECTS:
            raise wrong_argument("only", f"some of {', '.join(records.ASPECTS)}", quoted(name))
    if not wanted:
        raise wrong_argument("only", f"at least one of {', '.join(records.ASPECTS)}", "none")

    def chosen(aspect: str, compare: Callable[[BundleReader, BundleReader], Any]) -> Any:
        return compare(a, b) if aspect in wanted else None

    return Comparison(
        a=_identity(a),
        b=_identity(b),
        relation=_relation(a, b),
        model=chosen("model", _model),
        cuts=chosen("cuts", _cuts),
        facts=chosen("facts", _facts),
        weights=chosen("weights", lambda a, b: _weights(a, b, measure, progress)),
        tokenizer=chosen("tokenizer", _tokenizer),
        vectors=chosen("vectors", _vectors),
        files=chosen("files", _files),
    )


def _identity(bundle: BundleReader) -> Identity:
    model = bundle.manifest.model
    return Identity(
        bundle_id=bundle.id,
        fingerprint=bundle.fingerprint,
        parent=model.parent,
        architecture_id=bundle.architecture_id,
        name=model.name,
        family=model.family,
        source=model.source,
        revision=model.revision,
    )


def _relation(a: BundleReader, b: BundleReader) -> str:
    parents = a.manifest.model.parent, b.manifest.model.parent
    if a.id == b.id:
        return records.SAME_BUNDLE
    if a.fingerprint == b.fingerprint:
        return records.SAME_MODEL
    if parents[1] == a.fingerprint:
        return records.B_CHANGED_FROM_A
    if parents[0] == b.fingerprint:
        return records.A_CHANGED_FROM_B
    if parents[0] is not None and parents[0] == parents[1]:
        return records.CHANGED_FROM_ONE
    return records.SAME_ARCHITECTURE if a.architecture == b.architecture else records.OTHER_MODEL


def _model(a: BundleReader, b: BundleReader) -> Fields:
    def described(bundle: BundleReader) -> dict[str, Any]:
        manifest = bundle.manifest
        model = {key: value for key, value in as_dict(manifest.model).items() if key not in COVERED}
        names = as_dict(manifest.source_names)
        return {
            "model": model,
            "producer": manifest.producer,
            "source_names": names,
            "extensions": manifest.extensions,
        }

    return Fields(changes=tuple(field_changes(described(a), described(b))))


def _cuts(a: BundleReader, b: BundleReader) -> Cuts:
    def cutting(bundle: BundleReader) -> Cutting:
        shards = tuple(
            ShardOutline(
                name=shard.name,
                layers=shard.layers,
                embeds=shard.embeds,
                head=shard.head,
                variant=None if shard.graph is None else shard.graph.variant,
                opset=None if shard.graph is None else shard.graph.opset,
            )
            for shard in bundle.shards
        )
        return Cutting(cuts=bundle.manifest.cuts, shards=shards)

    return Cuts(a=cutting(a), b=cutting(b))


def _facts(a: BundleReader, b: BundleReader) -> Fields:
    return Fields(changes=tuple(field_changes(a.architecture.as_json(), b.architecture.as_json())))


@record(frozen=True, slots=True, kw_only=True)
class _Unit:
    """A unit whose files differ, with its name and its tensors in each bundle that has it."""

    layer: int | None
    a: str | None
    b: str | None
    of_a: dict[str, Tensor]
    of_b: dict[str, Tensor]
    absent: bool

    @property
    def common(self) -> tuple[str, ...]:
        return tuple(
            name for name, tensor in self.of_a.items() if name in self.of_b and tensor.shape == self.of_b[name].shape
        )

    def change(self, values: Mapping[str, Values] | None) -> UnitChange:
        names, common = {**self.of_a, **self.of_b}, self.common
        reason = None
        if common and (self.absent or values is None):
            reason = records.ABSENT if self.absent else records.NO_TORCH
        return UnitChange(
            unit=self.a or self.b or "",
            layer=self.layer,
            only_in=None if self.a and self.b else "a" if self.a else "b",
            tensors=len(names),
            not_compared=reason,
            changes=tuple(
                TensorChange(name=name, a=self.of_a.get(name), b=self.of_b.get(name), values=(values or {}).get(name))
                for name in names
                if name not in common or name in (values or {})
            ),
        )


def _weights(a: BundleReader, b: BundleReader, measure: Measure, progress: Progress | None) -> Weights:
    absent = set(a.absent()), set(b.absent())
    units = [
        _Unit(
            layer=layer,
            a=unit_a,
            b=unit_b,
            of_a=a.logical(unit_a) if unit_a else {},
            of_b=b.logical(unit_b) if unit_b else {},
            absent=not (absent[0].isdisjoint(_paths(a, unit_a)) and absent[1].isdisjoint(_paths(b, unit_b))),
        )
        for layer, unit_a, unit_b in _unit_pairs(a, b)
        if _digests(a, unit_a) != _digests(b, unit_b)
    ]
    pairs = [
        (unit.a, unit.b, common) for unit in units if unit.a and unit.b and not unit.absent and (common := unit.common)
    ]
    values = measure(a, b, pairs, progress) if pairs else {}
    return Weights(a=a.manifest.storage, b=b.manifest.storage, units=tuple(unit.change(values) for unit in units))


def _unit_pairs(a: BundleReader, b: BundleReader) -> Iterator[tuple[int | None, str | None, str | None]]:
    """Yield each unit: its layer, and its name in A and in B. The digits of a layer depend on the number of layers."""
    layers = len(a.architecture.layers), len(b.architecture.layers)
    yield None, "embedding", "embedding"
    for i in range(max(layers)):
        yield (
            i,
            a.architecture.layer_unit(i) if i < layers[0] else None,
            b.architecture.layer_unit(i) if i < layers[1] else None,
        )
    yield None, "head", "head"


def _paths(bundle: BundleReader, unit: str | None) -> tuple[str, ...]:
    return bundle.manifest.units[unit] if unit else ()


def _digests(bundle: BundleReader, unit: str | None) -> list[str]:
    return [bundle.manifest.files[path].sha256 for path in _paths(bundle, unit)]


def _tokenizer(a: BundleReader, b: BundleReader) -> Tokenizer:
    text = as_dict(a.manifest.text), as_dict(b.manifest.text)
    return Tokenizer(
        changes=tuple(field_changes(*text, "/text")),
        files=tuple(
            change for change in _file_changes(a, b) if change.path.startswith(TOKENIZER) or change.path == TEXT
        ),
        texts=tuple(text_changes(a, b)),
    )


def _vectors(a: BundleReader, b: BundleReader) -> VectorsOfBoth:
    def golden(bundle: BundleReader) -> GoldenVectors | None:
        vectors = bundle.manifest.vectors
        if vectors is None:
            return None
        return GoldenVectors(
            lengths=vectors.lengths,
            origin=vectors.origin,
            sha256=bundle.manifest.files[vectors.file].sha256,
        )

    return VectorsOfBoth(a=golden(a), b=golden(b))


def _files(a: BundleReader, b: BundleReader) -> Files:
    return Files(changes=tuple(_file_changes(a, b)), absent_in_a=a.absent(), absent_in_b=b.absent())


def _file_changes(a: BundleReader, b: BundleReader) -> Iterator[FileChange]:
    of_a, of_b = a.manifest.files, b.manifest.files
    for path in sorted({*of_a, *of_b}):
        one, other = of_a.get(path), of_b.get(path)
        if one is None or other is None or one.sha256 != other.sha256:
            yield FileChange(path=path, a=one, b=other)
