"""Write a comparison of two bundles for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from splitbundle.bundle import Bundle
from splitbundle.cli.console import Console
from splitbundle.comparison import records
from splitbundle.comparison.records import Comparison, Cutting, FieldChange, FileChange, UnitChange, Weights
from splitbundle.format.manifest.document import Storage

RELATIONS: Final = {
    records.SAME_BUNDLE: "A and B are the same bundle",
    records.SAME_MODEL: "A and B are the same model",
    records.B_CHANGED_FROM_A: "B is a changed copy of A",
    records.A_CHANGED_FROM_B: "A is a changed copy of B",
    records.CHANGED_FROM_ONE: "A and B are changed copies of the same bundle",
    records.SAME_ARCHITECTURE: "A and B have the same architecture",
    records.OTHER_MODEL: "A and B are different models",
}
LONGEST: Final = 60
"""Characters of a value that are shown."""


def write(
    comparison: Comparison, bundles: tuple[Bundle, Bundle], given: tuple[str, str], console: Console, *, tensors: bool
) -> None:
    """Write the differences, a section for each aspect, and then the aspects without one.

    ``given`` are the paths or references of the bundles. ``tensors`` asks for a line for each tensor in place of one
    for each layer.
    """
    console.text(_headline(comparison))
    ids = [
        (side, place, own.name, own.fingerprint[:19], own.bundle_id[:19])
        for side, place, own in zip("AB", given, (comparison.a, comparison.b), strict=True)
    ]
    console.table(("", "bundle", "name", "fingerprint", "bundle id"), ids)
    for side, bundle in zip("AB", bundles, strict=True):
        if absent := bundle.absent():
            whole = ", ".join(bundle.whole_shards()) or "none"
            console.text(f"  {side} is partial: {len(absent)} listed files aren't here; whole shards: {whole}")
    compared = comparison.compared
    for name, lines in _sections(comparison, tensors):
        if compared[name].differs or (name == "weights" and compared[name].units):
            console.text("")
            console.text(f"{name}{_same_values(compared[name]) if name == 'weights' else ''}")
            for heads, rows in lines:
                console.table(heads, rows)
    same = [name for name, aspect in compared.items() if not aspect.differs]
    console.text("")
    console.text(f"no difference in {', '.join(same)}" if same else "every compared aspect differs")
    if comparison.differs and len(same) == len(compared):
        console.text("The manifests are written differently, but say the same.")


Table = tuple[Sequence[str], Sequence[Sequence[object]]]
"""The heads of some columns, and the rows."""


def _headline(comparison: Comparison) -> str:
    text = RELATIONS[comparison.relation]
    if comparison.relation != records.SAME_MODEL or comparison.cuts is None:
        return text
    return f"{text}, with other cuts" if comparison.cuts.a.cuts != comparison.cuts.b.cuts else text


def _sections(comparison: Comparison, tensors: bool) -> Iterator[tuple[str, list[Table]]]:
    """Yield the name and the tables of each compared aspect."""
    if comparison.model is not None:
        yield "model", [_fields(comparison.model.changes)]
    if comparison.cuts is not None:
        yield "cuts", [_cutting(comparison.cuts.a, comparison.cuts.b)]
    if comparison.facts is not None:
        yield "facts", [_fields(comparison.facts.changes)]
    if comparison.weights is not None:
        yield "weights", _weights(comparison.weights, tensors)
    if comparison.tokenizer is not None:
        of_text = comparison.tokenizer
        yield (
            "tokenizer",
            [
                *([_fields(of_text.changes)] if of_text.changes else []),
                *([_files(of_text.files)] if of_text.files else []),
                *([_texts(of_text.texts)] if of_text.texts else []),
            ],
        )
    if comparison.vectors is not None:
        sides = (("A", comparison.vectors.a), ("B", comparison.vectors.b))
        rows = [
            (side, "none", "", "")
            if own is None
            else (side, _origin(own.origin), ", ".join(map(str, own.lengths)), own.sha256[:16])
            for side, own in sides
        ]
        yield "vectors", [(("", "origin", "lengths", "sha256"), rows)]
    if comparison.files is not None:
        yield "files", [_files(comparison.files.changes)]


def _origin(origin: str) -> str:
    return "the original model" if origin == "original" else "this bundle itself"


def _texts(changes: Sequence[FieldChange]) -> Table:
    """Return what differs in text.json. A golden text is named, and its ids aren't shown."""
    (_, *heads), rows = _fields(changes)
    return ("in text.json", *heads), [(_unescaped(pointer), *values) for pointer, *values in rows]


def _unescaped(pointer: object) -> str:
    return str(pointer).removeprefix("/").replace("/", " ", 1).replace("~1", "/").replace("~0", "~")


def _fields(changes: Sequence[FieldChange]) -> Table:
    rows = [
        (
            change.pointer,
            "-" if change.only_in == "b" else shown(change.a),
            "-" if change.only_in == "a" else shown(change.b),
        )
        for change in changes
    ]
    return ("field", "A", "B"), rows


def shown(value: Any) -> str:
    """Return a JSON value on one line. Repeated texts are counted, and a long value is cut."""
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        runs = [(item, len(list(group))) for item, group in groupby(value)]
        text = ", ".join(item if count == 1 else f"{count} × {item}" for item, count in runs)
    else:
        text = json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _cutting(a: Cutting, b: Cutting) -> Table:
    rows = []
    for side, own in (("A", a), ("B", b)):
        for shard in own.shards:
            ends = " and ".join(end for end, there in (("embedding", shard.embeds), ("head", shard.head)) if there)
            graph = "-" if shard.variant is None else f"{shard.variant}, opset {shard.opset}"
            rows.append((side, shard.name, f"[{shard.layers[0]}, {shard.layers[1]})", ends or "-", graph))
    return ("", "shard", "layers", "with", "graph"), rows


def _files(changes: Sequence[FileChange]) -> Table:
    """Return a line for each file. More than two weight files are only counted, as the units show them."""
    rows: list[tuple[str, str, str]] = []
    counted: dict[tuple[str, str], int] = {}
    weights = [change for change in changes if change.path.endswith(".safetensors")]
    for change in changes:
        digests = [own.sha256[:16] if own else "-" for own in (change.a, change.b)]
        if len(weights) <= 2 or change not in weights:
            rows.append((change.path, digests[0], digests[1]))
            continue
        there = ("…" if change.a else "-", "…" if change.b else "-")
        counted[there] = counted.get(there, 0) + 1
    rows += [(f"{count} .safetensors files", *there) for there, count in counted.items()]
    return ("file", "sha256 in A", "sha256 in B"), rows


def _same_values(weights: Weights) -> str:
    if not weights.units or any(unit.differs for unit in weights.units):
        return ""
    return ": the same values in other files" if weights.a == weights.b else ": the same values in another dtype"


def _weights(weights: Weights, tensors: bool) -> list[Table]:
    tables: list[Table] = []
    if weights.a != weights.b:
        rows = [(side, own.dtype, _others(own)) for side, own in (("A", weights.a), ("B", weights.b))]
        tables.append((("", "stored dtype", ""), rows))
    if tensors:
        rows_ = [row for unit in weights.units for row in _tensor_rows(unit)]
        heads = ("tensor", "values that differ", "largest", "relative", "")
    else:
        rows_ = _unit_rows(weights.units)
        heads = ("where", "tensors that differ", "largest", "relative", "")
    return [*tables, (heads, rows_)] if rows_ else tables


def _unit_rows(units: Sequence[UnitChange]) -> list[tuple[str, ...]]:
    """Return a row for each unit. Successive layers that say the same share one."""
    rows: list[tuple[str, ...]] = []
    first = 0
    for i, unit in enumerate(units):
        said = _unit_row(unit)
        if unit.layer is None:
            rows.append((unit.unit, *said))
            continue
        before = units[i - 1] if i else unit
        if rows and before.layer == unit.layer - 1 and rows[-1][1:] == said:
            rows[-1] = (f"layers {first} to {unit.layer}", *said)
        else:
            first = unit.layer
            rows.append((f"layer {first}", *said))
    return rows


def _unit_row(unit: UnitChange) -> tuple[str, str, str, str]:
    if unit.only_in is not None:
        return f"{unit.tensors} of {unit.tensors}", "", "", f"only in {unit.only_in.upper()}"
    values = [change.values for change in unit.changes if change.values is not None]
    notes = []
    for side, other in (("A", "b"), ("B", "a")):
        if count := sum(getattr(change, other) is None for change in unit.changes):
            notes.append(f"{count} only in {side}")
    if count := sum(
        each.a is not None and each.b is not None and each.a.shape != each.b.shape for each in unit.changes
    ):
        notes.append(f"{count} of other shapes")
    if count := sum(each.not_finite for each in values):
        notes.append(f"NaN or infinite: {count:,}")
    if unit.not_compared is not None:
        notes.append("a file isn't here" if unit.not_compared == records.ABSENT else "other digests")
    if not unit.differs:
        notes.append("the same values")
    relative = [each.relative for each in values if each.relative is not None]
    return (
        "?" if unit.not_compared is not None else f"{len(unit.changes)} of {unit.tensors}",
        f"{max(each.largest for each in values):.3g}" if values else "",
        f"{max(relative):.3g}" if relative else "",
        ", ".join(notes),
    )


def _tensor_rows(unit: UnitChange) -> Iterator[tuple[str, ...]]:
    for change in unit.changes:
        values = change.values
        if values is None:
            shapes = ["-" if own is None else str(own) for own in (change.a, change.b)]
            yield change.name, "", "", "", f"A: {shapes[0]}; B: {shapes[1]}"
            continue
        relative = "" if values.relative is None else f"{values.relative:.3g}"
        odd = f"NaN or infinite: {values.not_finite:,}" if values.not_finite else ""
        yield change.name, f"{values.differing:,} of {values.count:,}", f"{values.largest:.3g}", relative, odd
    if unit.not_compared is not None:
        yield unit.unit, "?", "", "", "a file isn't here" if unit.not_compared == records.ABSENT else "other digests"


def _others(storage: Storage) -> str:
    """Return how many tensors are stored otherwise than the rest."""
    counts = Counter(storage.encodings.values())
    found = [f"{len(storage.exceptions)} exceptions"] if storage.exceptions else []
    return ", ".join([*found, *(f"{count} in {name}" for name, count in sorted(counts.items()))])
