"""Write a configuration and two small graphs, so that onnxruntime-genai can run a bundle's graphs as a pipeline.

The two graphs run before and after the graphs of the shards. The first converts genai's attention mask into the number
of past tokens and the number of new tokens of each row. The second gives the logits the shape that genai expects.
Weights and caches stay in place. ``spec/decisions/0010-genai-runs-the-directory.md`` describes the experiments.
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
from splitbundle.writing import documents
from splitbundle_converter.graphs.builder import GraphBuilder


def write_genai(manifest: Manifest, architecture: Architecture, root: Path) -> dict[str, File]:
    """Write the three files for a bundle whose shards have graphs. Return the manifest entry of each file by path.

    Raises:
        BundleError: ``usage.genai`` if the bundle has no stop ids. genai would then stop at a wrong id.
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
    """Return the graph that converts genai's mask into the inputs of the shards.

    The mask covers all tokens so far, the newest last. genai pads on the right, and keeps the padding in the mask as
    zeros. So the number of past tokens and the number of new tokens are counts of ones.

    *Shape:* (batch, sequence), (batch, total) -> three of (batch).
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
    """Return the graph that reshapes the logits. The 1 tells genai that only the last token of each row has logits.

    *Shape:* (batch, vocab) -> (batch, 1, vocab).
    """
    graph = GraphBuilder({})
    graph.input(shape.inputs[0])
    graph.op("Unsqueeze", LOGITS, "logits", graph.integers(1))
    graph.output(shape.outputs[0])
    data: bytes = graph.model(LOGITS).SerializeToString(deterministic=True)
    return data
