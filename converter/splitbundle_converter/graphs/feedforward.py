"""Add the feed-forward block to a graph. The equations are in ``spec/v1/decoder.md``."""

from __future__ import annotations

from splitbundle.format.architecture.feedforward import Mlp
from splitbundle_converter.graphs.builder import GraphBuilder
from splitbundle_converter.graphs.operations import Operations


def add_mlp(operations: Operations, name: str, x: str, mlp: Mlp) -> str:
    """Add a feed-forward block, and return the name of its output. *Shape:* (batch · sequence, hidden) -> the same."""
    linear, graph = operations.linear, operations.graph
    up = linear(f"{name}.up", x, bias=mlp.bias)
    if not mlp.gated:
        return linear(f"{name}.down", add_activation(graph, name, up, mlp.activation), bias=mlp.bias)
    gate = add_activation(graph, name, linear(f"{name}.gate", x, bias=mlp.bias), mlp.activation)
    return linear(f"{name}.down", graph.op("Mul", f"{name}.gated", gate, up), bias=mlp.bias)


def add_activation(graph: GraphBuilder, name: str, x: str, kind: str) -> str:
    """Add an activation, and return the name of its output. *Shape:* any -> the same."""
    name = f"{name}.activation"
    if kind == "silu":
        return graph.op("Mul", name, x, graph.op("Sigmoid", f"{name}.sigmoid", x))
    if kind in ("gelu", "gelu_tanh"):
        # Gelu is an ONNX function. A runtime without a kernel for it expands it, and then rounds to 16 bits eight
        # times instead of once.
        form = "tanh" if kind == "gelu_tanh" else "none"
        return graph.to_compute_dtype(graph.op("Gelu", name, graph.to_float32(x), approximate=form))
    if kind in ("relu", "relu_squared"):
        positive = graph.op("Relu", name, x)
        return positive if kind == "relu" else graph.op("Mul", f"{name}.squared", positive, positive)
    return _add_xielu(graph, name, x)


def _add_xielu(graph: GraphBuilder, name: str, x: str) -> str:
    x = graph.to_float32(x)  # in 16 bits, exp(x) - 1 would lose a small x
    slopes = [
        graph.op("Softplus", f"{name}.{part}.softplus", graph.weight(f"{name}.{part}", "float32"))
        for part in ("alpha_p", "alpha_n")
    ]
    half = graph.op("Mul", f"{name}.half", x, graph.number(0.5))
    square = graph.op("Mul", f"{name}.square", x, x)
    above = graph.op("Mul", f"{name}.above", square, slopes[0])
    least = graph.op("Min", f"{name}.least", x, graph.number(-1e-6))
    grown = graph.op("Sub", f"{name}.expm1", graph.op("Exp", f"{name}.exp", least), graph.number(1.0))
    below = graph.op("Sub", f"{name}.bent", grown, x)
    below = graph.op("Mul", f"{name}.below", below, graph.op("Add", f"{name}.slope", slopes[1], graph.number(0.5)))
    positive = graph.op("Greater", f"{name}.is_positive", x, graph.number(0.0))
    return graph.to_compute_dtype(
        graph.op("Add", name, graph.op("Where", f"{name}.both", positive, above, below), half)
    )
