"""Writes what the cases of graphs change, and the cases themselves, as files that need none of this project's code.

    python tests/conformance/bundles/make_graphs.py

``graphs.splitbundle`` is a small model whose weights are zeros, with graphs. ``genai.splitbundle`` is
``tiny.splitbundle`` with the files for onnxruntime-genai. ``graphs/*.json`` are graphs with one fault each.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2]), str(HERE.parents[1])]

from onnx import ModelProto

import splitbundle_converter
from conformance.graphs import rebuilt
from tests.support import graph_cases, graph_nbits_cases
from tests.support.graph_case import Case, written

WINDOW = 12
"""The fewest equal bytes that are worth a reference."""
CANDIDATES = 16
"""How many places with equal bytes are compared."""
SKIPPED = {
    "loop-nodes-too-many": "32,768 different nodes would take a megabyte",
    "nbits-codes-of-another-shape": "the matrices of this bundle have one shape",
}
"""Cases that aren't written, and why."""
RULES = {
    "graph.constants": ["SB-O-014"],
    "graph.operator": ["SB-O-010"],
    "graph.ports": ["SB-O-011"],
    "graph.size": ["SB-O-008"],
    "graph.syntax": ["SB-O-008"],
    "graph.values": ["SB-O-012"],
    "graph.version": ["SB-O-009"],
    "graph.weights": ["SB-O-013"],
}


def main() -> None:
    """Write the bundles and the cases."""
    graphs = HERE.parent / "graphs"
    shutil.rmtree(graphs, ignore_errors=True)
    graphs.mkdir()
    for name in ("graphs", "genai"):
        shutil.rmtree(HERE / f"{name}.splitbundle", ignore_errors=True)
    graph_cases.good_bundle(HERE / "graphs.splitbundle")
    shutil.copytree(HERE / "tiny.splitbundle", HERE / "genai.splitbundle")
    splitbundle_converter.add_onnx(HERE / "genai.splitbundle", genai=True)
    for base, shard, cases in (
        ("graphs", graph_cases.SHARD, graph_cases.CASES),
        ("quantized", "top", graph_nbits_cases.CASES),
    ):
        file = f"{shard}.onnx"
        good = (HERE / f"{base}.splitbundle" / file).read_bytes()
        for case in cases:
            if case.name in SKIPPED:
                continue
            write(graphs / f"{case.name}.json", case, base, file, good)


def write(place: Path, case: Case, base: str, file: str, good: bytes) -> None:
    """Write one case."""
    model = ModelProto.FromString(good)
    data = case.change(model)
    data = written(model) if data is None else data
    rules = RULES[case.code] if base != "quantized" else [*RULES[case.code], "SB-O-021"]
    vector = {
        "about": case.name.replace("-", " "),
        "rules": ["SB-O-019", *rules] if case.name.startswith("loop-") else rules,
        "base": base,
        "file": file,
        "pieces": list(pieces(good, data)),
        "sha256": hashlib.sha256(data).hexdigest(),
        "expect": {"code": case.code},
    }
    assert rebuilt(good, vector["pieces"]) == data, case.name
    place.write_text(json.dumps(vector, indent=1) + "\n", "ascii")


def pieces(good: bytes, data: bytes) -> Iterator[list[int] | str | list[str | int]]:
    """Yield what a changed graph consists of: ranges of earlier bytes, new bytes, and bytes that are repeated.

    The earlier bytes are those of the good graph, followed by those that the pieces so far have made.
    """
    whole = good + data
    places: dict[bytes, list[int]] = {}
    known, new, at = 0, bytearray(), len(good)
    while at < len(whole):
        for place in range(known, at - WINDOW + 1):
            places.setdefault(whole[place : place + WINDOW], []).append(place)
        known = max(known, at - WINDOW + 1)
        repeated = longest_repeat(whole, at)
        start, length = max(
            ((p, equal(whole, p, at)) for p in places.get(whole[at : at + WINDOW], ())[-CANDIDATES:]),
            key=lambda found: found[1],
            default=(0, 0),
        )
        if max(repeated[1], length) < WINDOW:
            new.append(whole[at])
            at += 1
            continue
        if new:
            yield new.hex()
            new.clear()
        if repeated[1] > length:
            unit, length = repeated
            yield [whole[at : at + unit].hex(), length // unit]
        else:
            yield [start, start + length]
        at += length
    if new:
        yield new.hex()


def equal(whole: bytes, start: int, at: int) -> int:
    """Return how many bytes are equal from two places on; the first range ends before the second begins."""
    length = 0
    while at + length < len(whole) and start + length < at and whole[start + length] == whole[at + length]:
        length += 1
    return length


def longest_repeat(data: bytes, at: int) -> tuple[int, int]:
    """Return the size of a unit that is repeated many times from a place on, and how many bytes that are."""
    for unit in range(1, 65):
        piece = data[at : at + unit]
        if data[at + unit : at + 16 * unit] == piece * 15:
            count = 16
            while data[at + count * unit : at + (count + 1) * unit] == piece:
                count += 1
            return unit, count * unit
    return 1, 0


if __name__ == "__main__":
    main()
