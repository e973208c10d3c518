"""What onnxruntime-genai is told of a bundle: its configuration, and what the two graphs beside the shards' own take.

genai loads whatever its configuration names, libraries too. So verifying holds it against what the bundle itself says:
``spec/v1/bundle.md``, section "Graphs". ``spec/decisions/0010-genai-runs-the-directory.md`` has the reasons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import strict_json
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.graph import OPSET, next_name
from splitbundle.format.manifest.document import Graph, Manifest, Port, Shard
from splitbundle.storage import files
from splitbundle.verification import onnx_rules

if TYPE_CHECKING:
    from splitbundle.storage.reader import BundleReader

GENAI: Final = ("genai_config.json", "genai.inputs.onnx", "genai.logits.onnx")
"""What onnxruntime-genai needs besides the shards' graphs; its own name first. A shard's name has no dot."""
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


def check(bundle: BundleReader) -> None:
    """Judges the three files of a bundle that lists any of them.

    Raises:
        BundleError: ``genai.config``, ``graph.*``, ``file.*``, ``json.*``.
    """
    listed = bundle.manifest.files
    if not any(path in listed for path in GENAI):
        return
    absent = next((path for path in GENAI if path not in listed), None)
    if absent is not None or any(shard.graph is None for shard in bundle.shards):
        got = f"no {absent}" if absent is not None else "a shard without a graph"
        raise _problem("", f"{', '.join(GENAI)} together, and a graph a shard", got)
    limit = strict_json.MAX_BYTES
    found = strict_json.parse(files.read_listed(bundle.path, GENAI[0], listed[GENAI[0]], limit), GENAI[0])
    _compare(found, configuration(bundle.manifest, bundle.architecture), "")
    for graph in graphs(bundle.architecture):
        limit = onnx_rules.MAX_GRAPH
        onnx_rules.check(files.read_listed(bundle.path, graph.file, listed[graph.file], limit), graph, {})


def _compare(found: Any, expected: Any, pointer: str) -> None:
    """Whether a value is what is expected; of how to search, any numbers and booleans."""
    if pointer == "/search" and isinstance(found, dict):
        bad = next((name for name, value in found.items() if not isinstance(value, int | float)), None)
        if bad is not None:
            raise _problem(f"{pointer}/{bad}", "a number, true or false", type(found[bad]).__name__)
        return
    if isinstance(found, dict) and isinstance(expected, dict):
        for name in found.keys() ^ expected.keys():
            raise _problem(f"{pointer}/{name}", "a member" if name in expected else "no such member", "the contrary")
        for name, value in expected.items():
            _compare(found[name], value, f"{pointer}/{name}")
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            _compare(one, other, f"{pointer}/{i}")
    elif type(found) is not type(expected) or found != expected:
        raise _problem(pointer, quoted(expected), quoted(found))


def _problem(pointer: str, expected: str, got: str) -> BundleError:
    hint = "splitbundle add-onnx --genai writes it anew"
    return BundleError(
        Problem(code="genai.config", file=GENAI[0], pointer=pointer, expected=expected, got=got, hint=hint)
    )


def graphs(architecture: Architecture) -> tuple[Graph, Graph]:
    """What the graphs before and after the shards' take and give."""
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
    """``genai_config.json``."""
    text = manifest.text
    attention = architecture.kind_of(0).attention  # genai reads other layers' sizes off the graphs
    context = architecture.position_limit or manifest.model.context_length or UNBOUNDED
    _, before, after = GENAI
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
