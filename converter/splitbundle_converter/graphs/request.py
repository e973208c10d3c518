"""Check the request for graphs before the work begins."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from splitbundle.errors import MissingExtra, quoted
from splitbundle.format import graph
from splitbundle.format.manifest.document import Storage
from splitbundle_converter.errors import refusal


@dataclass(frozen=True, slots=True)
class GraphWriter:
    """Adds graphs to a bundle that is being written, and the configuration for onnxruntime-genai if requested."""

    variant: str
    genai: bool

    def check(self, storage: Storage) -> None:
        """Check that graphs of this variant can use weights with these stored dtypes.

        Raises:
            BundleError: ``usage.onnx``.
        """
        dtype = graph.VARIANTS[self.variant]
        others = [stored for stored in storage.dtypes if stored != dtype]
        if self.variant != "standard" and others:
            expected = f"weights that are all stored as {dtype}, for graphs that compute in it"
            hint = f'Standard graphs accept any weights; dtype="{dtype}" stores all weights in {dtype}'
            raise refusal("usage.onnx", None, expected, f"some in {others[0]}", argument="onnx", hint=hint)

    def __call__(self, root: Path) -> None:
        """Add a graph to each shard of the bundle in ``root``."""
        from splitbundle_converter.graphs.add_graphs import add_graphs

        add_graphs(root, self.variant, genai=self.genai)


def graph_writer(onnx: bool | str, *, genai: bool = False) -> GraphWriter | None:
    """Return a writer of the requested graphs, or None if no graphs are requested.

    Raises:
        BundleError: ``usage.onnx`` for an unknown variant.
        MissingExtra: onnx or onnxruntime is not installed.
    """
    if not onnx and not genai:
        return None
    variant = onnx if isinstance(onnx, str) else "standard"
    if variant not in graph.VARIANTS:
        hint = "Weights in bfloat16 are widened to float32 by the standard graphs: onnxruntime can't multiply bfloat16"
        told = hint if variant == "bfloat16" else None
        raise refusal("usage.onnx", None, " or ".join(graph.VARIANTS), quoted(variant), argument="onnx", hint=told)
    for library in ("onnx", "onnxruntime"):  # onnxruntime checks the results of the graphs
        if importlib.util.find_spec(library) is None:
            raise MissingExtra.of(library, "onnx", "make graphs")
    return GraphWriter(variant, genai)
