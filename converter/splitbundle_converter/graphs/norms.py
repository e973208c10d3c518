"""Add norms to a graph. The equations are in ``spec/v1/decoder.md``."""

from __future__ import annotations

from splitbundle.format.architecture.attention import QueryKeyNorm
from splitbundle.format.architecture.norms import Norm
from splitbundle_converter.graphs.builder import GraphBuilder


def add_norm(graph: GraphBuilder, name: str, x: str, norm: Norm | None, size: int) -> str:
    """Add a norm, and return the name of its output. Without a norm, return ``x``. *Shape:* (…, size) -> the same."""
    if norm is None:
        return x
    # The operators compute the statistics in float32 by definition. In 16 bits, 1 + w would lose the digits of w.
    dtype = "float32" if norm.weight_offset else graph.dtype
    weight = graph.weight(f"{name}.weight", dtype) if norm.affine else graph.floats([1.0] * size, dtype)
    if norm.weight_offset:
        weight = graph.op("Add", f"{name}.whole_weight", weight, graph.number(norm.weight_offset))
    biases = [graph.weight(f"{name}.bias", dtype)] if norm.bias else []
    kind = {"layer_norm": "LayerNormalization", "rms_norm": "RMSNormalization"}[norm.kind]
    x = graph.cast(x, graph.dtype, dtype)
    return graph.cast(graph.op(kind, name, x, weight, *biases, axis=-1, epsilon=norm.eps), dtype, graph.dtype)


def add_head_norm(graph: GraphBuilder, name: str, x: str, own: QueryKeyNorm, heads: int, head_dim: int) -> str:
    """Add a norm of queries or keys in each head, and return the name of its output.

    *Shape:* (batch, heads, sequence, head_dim) -> the same.
    """
    if own.width == "head":
        return add_norm(graph, name, x, own.norm, head_dim)
    by_head = graph.integers(heads, 1, head_dim)
    dtype = "float32" if own.norm.weight_offset else graph.dtype
    plain = Norm(kind=own.norm.kind, eps=own.norm.eps, affine=False, weight_offset=0.0, bias=False)
    x = graph.cast(add_norm(graph, f"{name}.plain", x, plain, head_dim), graph.dtype, dtype)
    if own.norm.affine:
        weight = graph.weight(f"{name}.weight", dtype)
        if own.norm.weight_offset:
            weight = graph.op("Add", f"{name}.whole_weight", weight, graph.number(own.norm.weight_offset))
        weight = graph.op("Reshape", f"{name}.by_head", weight, by_head)
        x = graph.op("Mul", name, x, weight)
    if own.norm.bias:
        bias = graph.op("Reshape", f"{name}.bias.by_head", graph.weight(f"{name}.bias", dtype), by_head)
        x = graph.op("Add", f"{name}.biased", x, bias)
    return graph.cast(x, dtype, graph.dtype)
