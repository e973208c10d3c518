"""Check the request for graphs before the work begins."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from splitbundle.errors import MissingExtra, quoted
from splitbundle.format import graph
from splitbundle.format.manifest.document import Storage
from splitbundle.opening import open_bundle
from splitbundle_converter.errors import refusal


@dataclass(frozen=True, slots=True)
class GraphWriter:
    """Adds graphs to a bundle that is being written, and the configuration for onnxruntime-genai if requested."""

    variant: str | None
    """The variant of the graphs. None: the usual one for the weights of the bundle."""
    genai: bool

    def check(self, storage: Storage) -> None:
        """Check that graphs of this variant can use weights that are stored in this way.

        Raises:
            BundleError: ``usage.onnx``.
        """
        usable = storage.graph_variants
        if self.variant is None or self.variant in usable:
            return
        if self.variant != graph.NBITS and not storage.encodings:
            dtype = graph.VARIANTS[self.variant]
            expected = f"weights that are all stored as {dtype}, for graphs that compute in it"
            got = f"some in {next(stored for stored in storage.dtypes if stored != dtype)}"
            hint = f'Standard graphs accept any such weights; dtype="{dtype}" stores all weights in {dtype}'
        else:
            kinds = " and ".join(dict.fromkeys(storage.encodings.values())) or "no quantized weights"
            expected, got = f"{' or '.join(usable)} for graphs over {kinds}", quoted(self.variant)
            hint = "Without the name of a variant, the graphs get the one that fits the weights"
        raise refusal("usage.onnx", None, expected, got, argument="onnx", hint=hint)

    def __call__(self, root: Path) -> None:
        """Add a graph to each shard of the bundle in ``root``."""
        from splitbundle_converter.graphs.add_graphs import add_graphs

        variant = self.variant or open_bundle(root).manifest.storage.graph_variants[0]
        add_graphs(root, variant, genai=self.genai)


def graph_writer(onnx: bool | str, *, genai: bool = False) -> GraphWriter | None:
    """Return a writer of the requested graphs, or None if no graphs are requested.

    Raises:
        BundleError: ``usage.onnx`` for an unknown variant.
        MissingExtra: onnx or onnxruntime is not installed.
    """
    if not onnx and not genai:
        return None
    variant = onnx if isinstance(onnx, str) else None
    if variant is not None and variant not in graph.VARIANTS:
        hint = "Weights in bfloat16 are widened to float32 by the standard graphs: onnxruntime can't multiply bfloat16"
        told = hint if variant == "bfloat16" else None
        expected = f"one of {', '.join(graph.VARIANTS)}"
        raise refusal("usage.onnx", None, expected, quoted(variant), argument="onnx", hint=told)
    for library in ("onnx", "onnxruntime"):  # onnxruntime checks the results of the graphs
        if importlib.util.find_spec(library) is None:
            raise MissingExtra.of(library, "onnx", "make graphs")
    return GraphWriter(variant, genai)
