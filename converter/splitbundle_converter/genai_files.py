"""What onnxruntime-genai needs to run a bundle's graphs as a decoder pipeline: a configuration, and two small graphs.

The graphs stand before and after the shards' own: the first says of each row what it has behind it and what it brings,
which genai knows as a mask; the other gives logits the shape that genai wants. Weights and caches stay where they are.
``spec/decisions/0010-genai-runs-the-directory.md`` has what was tried.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import onnx

from splitbundle import strict_json
from splitbundle.architecture import Architecture
from splitbundle.errors import BundleError, Problem
from splitbundle.graphs import next_name
from splitbundle.manifest import FILE, File, Manifest, Port, Shard
from splitbundle_converter import write
from splitbundle_converter.graph_builder import GraphBuilder

INPUTS: Final = "genai.inputs"
LOGITS: Final = "genai.logits"
ROWS: Final = ("past", "count", "selected")
"""What a shard takes besides tokens and caches."""

SESSION_OPTIONS: Final = {
    # Or every weight would be copied into a layout of onnxruntime's own.
    "session.disable_prepacking": "1",
    # Each shard has threads of its own: those of one that waits would take the processor from the one that works.
    "session.intra_op.allow_spinning": "0",
    "provider_options": [],
}
MAX_LENGTH: Final = 2048
"""Slots by default: genai makes a cache of all of them at once, and graphs attend to them all."""
UNBOUNDED: Final = 2**20
"""Positions, where neither the architecture nor the source bounds them: genai wants a number."""


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
    contents = config, inputs_graph(), logits_graph(architecture.vocab_size)
    listed = {path: write.write_file(root, path, data) for path, data in zip(write.GENAI, contents, strict=True)}
    for path in write.GENAI[1:]:
        onnx.checker.check_model(str(root / path), full_check=True)
    return listed


def configuration(manifest: Manifest, architecture: Architecture) -> dict[str, Any]:
    """``genai_config.json``."""
    text = manifest.text
    attention = architecture.kind_of(0).attention  # genai reads other layers' sizes off the graphs
    context = architecture.position_limit or manifest.model.context_length or UNBOUNDED
    _, before, after = write.GENAI
    stages = [
        {INPUTS: {"filename": before, "inputs": ["token_ids", "attention_mask"], "outputs": list(ROWS)}},
        *(_stage(shard) for shard in manifest.shards),
        {LOGITS: {"filename": after, "inputs": ["logits"], "outputs": [LOGITS]}},
    ]
    # genai finds its own names in a tokenizer's directory. Where there is none, it takes and gives ids.
    tokenizer = {} if text.tokenizer is None else {"tokenizer_dir": text.tokenizer.rpartition("/")[0]}
    return {
        "model": {
            "type": "decoder-pipeline",
            **tokenizer,
            "eos_token_id": list(text.stop_ids),
            "pad_token_id": text.stop_ids[0],
            "vocab_size": architecture.vocab_size,
            "context_length": context,
            "decoder": {
                "session_options": SESSION_OPTIONS,
                "hidden_size": architecture.hidden_size,
                "num_hidden_layers": len(architecture.layers),
                "num_attention_heads": attention.heads,
                "num_key_value_heads": attention.kv_heads,
                "head_size": attention.head_dim,
                "inputs": {
                    "input_ids": "token_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "layers.%d.key",
                    "past_value_names": "layers.%d.value",
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": next_name("layers.%d.key"),
                    "present_value_names": next_name("layers.%d.value"),
                },
                "pipeline": stages,
            },
        },
        # Shared: TensorScatter then writes into the cache that it reads.
        "search": {"do_sample": False, "max_length": min(context, MAX_LENGTH), "past_present_share_buffer": True},
    }


def _stage(shard: Shard) -> dict[str, Any]:
    if shard.graph is None:
        raise ValueError(f"shard {shard.name} has no graph")
    ports = {"inputs": shard.graph.inputs, "outputs": shard.graph.outputs}
    names: dict[str, Any] = {which: [port.name for port in some] for which, some in ports.items()}
    forwarded = {} if shard.head else {"output_names_forwarder": {next_name("hidden"): "hidden"}}
    return {shard.name: {"filename": shard.graph.file} | names | forwarded}


def inputs_graph() -> bytes:
    """From genai's mask to what shards take: *Shape:* (batch, sequence), (batch, total) -> three of (batch).

    The mask is of all tokens so far, the newest last. genai pads on the right, and keeps the padding in the mask as
    zeros: what a row has behind it, and what it brings, are counts of ones.
    """
    graph = GraphBuilder({})
    graph.input(Port(name="token_ids", dtype="int64", shape=("batch", "sequence")))
    graph.input(Port(name="attention_mask", dtype="int64", shape=("batch", "total")))
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
    for name in ROWS:
        graph.output(Port(name=name, dtype="int64", shape=("batch",)))
    data: bytes = graph.model(INPUTS).SerializeToString(deterministic=True)
    return data


def logits_graph(vocab_size: int) -> bytes:
    """*Shape:* (batch, vocab) -> (batch, 1, vocab): by the 1, genai knows that the last tokens' alone are computed."""
    graph = GraphBuilder({})
    graph.input(Port(name="logits", dtype="float32", shape=("batch", vocab_size)))
    graph.op("Unsqueeze", LOGITS, "logits", graph.integers(1))
    graph.output(Port(name=LOGITS, dtype="float32", shape=("batch", 1, vocab_size)))
    data: bytes = graph.model(LOGITS).SerializeToString(deterministic=True)
    return data
