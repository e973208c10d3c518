"""The configuration of onnxruntime-genai for a bundle, and the ports of the two graphs beside those of the shards.

onnxruntime-genai loads every file that its configuration names, libraries too. So ``verify`` compares the configuration
with the manifest: ``spec/v1/bundle.md``, section "Graphs". ``spec/decisions/0010-genai-runs-the-directory.md`` has the
reasons.
"""

from __future__ import annotations

from typing import Any, Final

from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.graph import OPSET, Graph, Port, next_name
from splitbundle.format.manifest.document import Manifest, Shard

GENAI: Final = ("genai_config.json", "genai.inputs.onnx", "genai.logits.onnx")
"""The files that onnxruntime-genai needs besides the shards' graphs. A shard's name has no dot."""
INPUTS: Final = "genai.inputs"
LOGITS: Final = "genai.logits"
ROWS: Final = ("past", "count", "selected")
"""The inputs of a shard besides tokens and caches."""

SESSION_OPTIONS: Final = {
    # Otherwise onnxruntime would copy every weight into a layout of its own. Quantized weights need that layout.
    "session.disable_prepacking": "1",
    # Each shard has its own threads. Those of a waiting shard would take the processor from the working one.
    "session.intra_op.allow_spinning": "0",
    "provider_options": [],
}
MAX_LENGTH: Final = 2048
"""The default number of slots. onnxruntime-genai makes a cache of all of them, and graphs attend to them all."""
UNBOUNDED: Final = 2**20
"""The number of positions if neither the architecture nor the source bounds it: genai requires a number."""


def graphs(architecture: Architecture) -> tuple[Graph, Graph]:
    """Return the ports of the graphs before and after those of the shards."""
    rows = tuple(Port(name=name, dtype="int64", shape=("batch",)) for name in ROWS)
    tokens = Port(name="token_ids", dtype="int64", shape=("batch", "sequence"))
    mask = Port(name="attention_mask", dtype="int64", shape=("batch", "total"))
    logits = Port(name="logits", dtype="float32", shape=("batch", architecture.vocab_size))
    last = Port(name=LOGITS, dtype="float32", shape=("batch", 1, architecture.vocab_size))
    _, before, after = GENAI
    return (
        Graph(file=before, variant="standard", opset=OPSET, inputs=(tokens, mask), outputs=rows),
        Graph(file=after, variant="standard", opset=OPSET, inputs=(logits,), outputs=(last,)),
    )


def configuration(manifest: Manifest, architecture: Architecture) -> dict[str, Any]:
    """Return the content of ``genai_config.json``."""
    text = manifest.text
    attention = architecture.kind_of(0).attention  # genai reads the sizes of other layers from the graphs
    context = architecture.position_limit or manifest.model.context_length or UNBOUNDED
    _, before, after = GENAI
    stages = [
        {INPUTS: {"filename": before, "inputs": ["token_ids", "attention_mask"], "outputs": list(ROWS)}},
        *(_stage(shard) for shard in manifest.shards),
        {LOGITS: {"filename": after, "inputs": ["logits"], "outputs": [LOGITS]}},
    ]
    # genai looks for fixed file names in the tokenizer's directory. Without that directory, it takes and returns ids.
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
                "session_options": SESSION_OPTIONS
                | ({"session.disable_prepacking": "0"} if manifest.storage.encodings else {}),
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
        # The buffer is shared, so TensorScatter writes into the cache that it reads.
        "search": {"do_sample": False, "max_length": min(context, MAX_LENGTH), "past_present_share_buffer": True},
    }


def _stage(shard: Shard) -> dict[str, Any]:
    if shard.graph is None:
        raise ValueError(f"shard {shard.name} has no graph")
    ports = {"inputs": shard.graph.inputs, "outputs": shard.graph.outputs}
    names: dict[str, Any] = {which: [port.name for port in some] for which, some in ports.items()}
    forwarded = {} if shard.head else {"output_names_forwarder": {next_name("hidden"): "hidden"}}
    return {shard.name: {"filename": shard.graph.file} | names | forwarded}
