"""What onnxruntime-genai needs to run a bundle's graphs as a decoder pipeline: a configuration, and two small graphs.

The graphs stand before and after the shards' own: the first says of each row what it has behind it and what it brings,
which genai knows as a mask; the other gives logits the shape that genai wants. Weights and caches stay where they are.
``spec/decisions/0010-genai-runs-the-directory.md`` has what was tried.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from splitbundle.errors import BundleError, Problem
from splitbundle.format import strict_json
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.genai import GENAI, INPUTS, LOGITS, configuration, graphs
from splitbundle.format.graph import Graph
from splitbundle.format.manifest.document import FILE, File, Manifest
from splitbundle_converter.graphs.builder import GraphBuilder
from splitbundle_converter.writing import documents


def write_genai(manifest: Manifest, architecture: Architecture, root: Path) -> dict[str, File]:
    """Writes the three files for a bundle whose shards have graphs.

    Raises:
        BundleError: ``usage.genai`` where no id is known that ends a text: genai would end at any other.
    """
    if not manifest.text.stop_ids:
        expected, hint = "an id that ends a text", "The source's generation_config.json or config.json has eos_token_id"
        raise BundleError(
            Problem(code="usage.genai", file=FILE, pointer="/text/stop_ids", expected=expected, got="none", hint=hint)
        )
    config = strict_json.dump(configuration(manifest, architecture))
    before, after = graphs(architecture)
    contents = config, inputs_graph(before), logits_graph(after)
    listed = {path: documents.write_file(root, path, data) for path, data in zip(GENAI, contents, strict=True)}
    for path in GENAI[1:]:
        onnx.checker.check_model(str(root / path), full_check=True)
    return listed


def inputs_graph(shape: Graph) -> bytes:
    """From genai's mask to what shards take: *Shape:* (batch, sequence), (batch, total) -> three of (batch).

    The mask is of all tokens so far, the newest last. genai pads on the right, and keeps the padding in the mask as
    zeros: what a row has behind it, and what it brings, are counts of ones.
    """
    graph = GraphBuilder({})
    for port in shape.inputs:
        graph.input(port)
    one = graph.integers(1)
    sequence = graph.op("Shape", "sequence", "token_ids", start=1, end=2)
    start = graph.op("Neg", "mask.start", sequence)
    before = graph.op("Slice", "mask.before", "attention_mask", graph.integers(0), start, one)
    now = graph.op("Slice", "mask.now", "attention_mask", start, graph.integers(2**62), one)
    graph.op("ReduceSum", "past", before, one, keepdims=0)
    count = graph.op("ReduceSum", "count", now, one, keepdims=0)
    batch = graph.op("Squeeze", "batch", graph.op("Shape", "batch.shape", "token_ids", start=0, end=1))
    rows = graph.op("Range", "rows", graph.integer(0), batch, graph.integer(1))
    after = graph.op("Add", "rows.end", graph.op("Mul", "rows.start", rows, sequence), count)
    graph.op("Sub", "selected", after, one)  # each row's last token
    for port in shape.outputs:
        graph.output(port)
    data: bytes = graph.model(INPUTS).SerializeToString(deterministic=True)
    return data


def logits_graph(shape: Graph) -> bytes:
    """*Shape:* (batch, vocab) -> (batch, 1, vocab): by the 1, genai knows that the last tokens' alone are computed."""
    graph = GraphBuilder({})
    graph.input(shape.inputs[0])
    graph.op("Unsqueeze", LOGITS, "logits", graph.integers(1))
    graph.output(shape.outputs[0])
    data: bytes = graph.model(LOGITS).SerializeToString(deterministic=True)
    return data
