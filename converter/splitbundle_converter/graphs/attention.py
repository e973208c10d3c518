"""Add causal self-attention to a graph. The equations are in ``spec/v1/decoder.md``.

Shapes in comments: B rows, S positions of this call, T slots of keys, H query heads, K key heads, G = H / K query heads
for each key head, D channels.
"""

from __future__ import annotations

from splitbundle.format.architecture.attention import Attention, OutputGate
from splitbundle.format.architecture.positions import Alibi, AttentionSpan
from splitbundle.format.architecture.rotary import Rotary
from splitbundle_converter.graphs.builder import GraphBuilder
from splitbundle_converter.graphs.norms import add_head_norm, add_norm
from splitbundle_converter.graphs.operations import Operations
from splitbundle_converter.graphs.rotary import add_rotation


def add_attention(operations: Operations, layer: int, x: str, kind: Attention) -> str:
    """Add the attention of a layer, and return the name of its output.

    *Shape:* (batch · sequence, hidden) -> the same.
    """
    graph, positions, name = operations.graph, operations.positions, f"layers.{layer}.attention"
    heads, kv_heads, head_dim, size = kind.heads, kind.kv_heads, kind.head_dim, kind.value_size
    query = _add_heads(operations, name, "query", x, kind, heads)
    key = _add_heads(operations, name, "key", x, kind, kv_heads)
    value = _split_heads(
        operations,
        f"{name}.value",
        operations.clip(f"{name}.value", operations.linear(f"{name}.value", x, bias=kind.qkv_bias), kind.clip),
        size,
    )
    if kind.value_multiplier is not None:
        value = operations.times(f"{name}.value.scaled", value, kind.value_multiplier)
    if kind.query_temperature is not None:
        scale = graph.to_compute_dtype(positions.temperature(kind.query_temperature))
        query = graph.op("Mul", f"{name}.query.warmed", query, scale)
    keys = graph.op("TensorScatter", f"layers.{layer}.key.next", f"layers.{layer}.key", key, "past", axis=2)
    values = graph.op("TensorScatter", f"layers.{layer}.value.next", f"layers.{layer}.value", value, "past", axis=2)
    # The query heads of a group use the same keys. They become positions, so that no key is repeated in memory.
    query = operations.times(f"{name}.query.scaled", query, kind.scale)
    grouped = graph.op("Reshape", f"{name}.query.grouped", query, graph.integers(0, kv_heads, -1, head_dim))
    turned = graph.op("Transpose", f"{name}.key.transposed", keys, perm=[0, 1, 3, 2])
    scores = graph.to_float32(graph.op("MatMul", f"{name}.scores", grouped, turned))  # [B, K, G · S, T]
    if kind.logit_cap is not None:
        scores = operations.cap(f"{name}.scores.capped", scores, kind.logit_cap)
    alibi = kind.position if isinstance(kind.position, Alibi) else None
    bias = positions.bias(AttentionSpan(kind.window, kind.chunk), alibi, heads, kv_heads)
    shape = operations.grouped_shape(kv_heads, heads // kv_heads)
    scores = graph.op("Reshape", f"{name}.scores.by_head", scores, shape)  # [B, K, G, S, T]
    scores = graph.op("Add", f"{name}.scores.masked", scores, bias)
    weights = graph.to_compute_dtype(_add_softmax(graph, name, scores, kind))
    weights = graph.op(
        "Reshape", f"{name}.weights.grouped", weights, graph.op("Shape", f"{name}.scores.shape", f"{name}.scores")
    )
    mixed = graph.op("MatMul", f"{name}.mixed", weights, values)  # [B, K, G · S, D]
    mixed = graph.op("Reshape", f"{name}.mixed.by_head", mixed, operations.mixed_shape(heads, size))  # [B, H, S, D]
    mixed = graph.op("Transpose", f"{name}.mixed.transposed", mixed, perm=[0, 2, 1, 3])
    if kind.output_gate is not None:
        gate = _add_gate(operations, f"{name}.gate", x, kind, kind.output_gate)
        mixed = graph.op("Mul", f"{name}.mixed.gated", mixed, gate)
    flat = graph.op("Reshape", f"{name}.mixed.flat", mixed, graph.integers(-1, heads * size))
    return operations.linear(f"{name}.output", flat, bias=kind.output_bias)


def _add_gate(operations: Operations, name: str, x: str, kind: Attention, gate: OutputGate) -> str:
    """Add the factors of what the heads give.

    *Shape:* (batch · sequence, hidden) -> (batch, sequence, heads, 1 or value_dim).
    """
    graph, width = operations.graph, 1 if gate.width == "head" else kind.value_size
    logits = operations.linear(name, x, bias=False)
    logits = graph.op("Reshape", f"{name}.by_head", logits, operations.split_shape(width))
    if gate.bias:
        bias = graph.op("Unsqueeze", f"{name}_bias.by_head", graph.weight(f"{name}_bias"), graph.integers(1))
        logits = graph.op("Add", f"{name}.biased", logits, bias)
    return graph.op("Sigmoid" if gate.function == "sigmoid" else "Softplus", f"{name}.factors", logits)


def _add_softmax(graph: GraphBuilder, name: str, scores: str, kind: Attention) -> str:
    """Add the softmax of the scores, with sinks if the layer has them.

    *Shape:* (batch, kv_heads, heads / kv_heads, sequence, slots) -> the same.
    """
    if not kind.sinks:
        return graph.op("Softmax", f"{name}.weights", scores, axis=-1)
    groups = graph.integers(1, kind.kv_heads, kind.heads // kind.kv_heads, 1, 1)
    sinks = graph.op("Reshape", f"{name}.sinks.by_head", graph.weight(f"{name}.sinks", "float32"), groups)
    ends = graph.op(
        "Slice",
        f"{name}.sinks.shape",
        graph.op("Shape", f"{name}.by_head.shape", scores),
        graph.integers(0),
        graph.integers(4),
    )
    ends = graph.op("Concat", f"{name}.sinks.each", ends, graph.integers(1), axis=0)
    nothing = graph.op("Expand", f"{name}.sinks.expanded", sinks, ends)
    both = graph.op("Concat", f"{name}.scores.with_sinks", scores, nothing, axis=-1)
    weights = graph.op("Softmax", f"{name}.weights.with_sinks", both, axis=-1)
    return graph.op("Slice", f"{name}.weights", weights, graph.integers(0), graph.integers(-1), graph.integers(4))


def _add_heads(operations: Operations, name: str, part: str, x: str, kind: Attention, heads: int) -> str:
    """Add the queries or the keys: clipped, normalized and rotated.

    *Shape:* (…, hidden) -> (batch, heads, sequence, head_dim).
    """
    graph, own, full = operations.graph, kind.query_key_norm, f"{name}.{part}"
    x = operations.clip(full, operations.linear(full, x, bias=kind.qkv_bias), kind.clip)
    if own is not None and own.width == "full":
        x = add_norm(graph, f"{full}_norm", x, own.norm, heads * kind.head_dim)
    x = _split_heads(operations, full, x, kind.head_dim)
    if own is not None and own.width != "full" and not own.after_rotation:
        x = add_head_norm(graph, f"{full}_norm", x, own, heads, kind.head_dim)
    if isinstance(kind.position, Rotary):
        x = add_rotation(graph, full, x, operations.positions.rotation(kind.position), kind.position, kind.head_dim)
    if own is not None and own.width != "full" and own.after_rotation:
        x = add_head_norm(graph, f"{full}_norm", x, own, heads, kind.head_dim)
    return x


def _split_heads(operations: Operations, name: str, x: str, head_dim: int) -> str:
    """Split the channels into heads.

    *Shape:* (batch · sequence, heads · head_dim) -> (batch, heads, sequence, head_dim).
    """
    by_head = operations.graph.op("Reshape", f"{name}.by_head", x, operations.split_shape(head_dim))
    return operations.graph.op("Transpose", f"{name}.heads", by_head, perm=[0, 2, 1, 3])
