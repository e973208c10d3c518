"""Build the ONNX graph of a shard from ``architecture.json``, in the same steps as the torch decoder.

The residual stream has the shape (batch · sequence, hidden), so that each projection is a ``Gemm`` that reads the
stored weight, [out, in], in place. Those with quantized weights are in ``products``. A float16 graph computes some
steps in float32: the steps that the torch decoder also computes in float32 (positions, masks, softmax, norms whose
weight has an offset), and also caps and the GELU. The equations are in ``spec/v1/decoder.md``; the inputs and outputs
are in ``spec/v1/bundle.md``, section "Graphs".
"""

from __future__ import annotations

from onnx import ModelProto

from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.experts import Experts
from splitbundle.format.architecture.norms import norm_names
from splitbundle.format.architecture.positions import Learned, Sinusoidal
from splitbundle.format.graph import STANDARD, next_name, ports
from splitbundle.format.manifest.document import Shard
from splitbundle.format.selection import Selection
from splitbundle.format.weight_layout import Stored
from splitbundle_converter.graphs.attention import add_attention
from splitbundle_converter.graphs.builder import GraphBuilder
from splitbundle_converter.graphs.experts import add_experts
from splitbundle_converter.graphs.feedforward import add_mlp
from splitbundle_converter.graphs.norms import add_norm
from splitbundle_converter.graphs.operations import Operations
from splitbundle_converter.graphs.positions import GraphPositions


def build(
    architecture: Architecture, part: Shard | Selection, stored: dict[str, Stored], variant: str = STANDARD
) -> ModelProto:
    """Return the graph of a part of the model.

    Args:
        architecture: The architecture of the model.
        part: The shard or the selection that the graph computes.
        stored: The name of each tensor of the part -> its place in a weight file.
        variant: The variant of the graph.
    """
    return _Decoder(architecture, part, GraphBuilder(stored, variant)).build()


class _Decoder:
    def __init__(self, architecture: Architecture, part: Shard | Selection, graph: GraphBuilder) -> None:
        self.architecture, self.part, self.graph = architecture, part, graph

    def build(self) -> ModelProto:
        graph, part, hidden = self.graph, self.part, self.architecture.hidden_size
        inputs, outputs = ports(self.architecture, part.layers, embeds=part.embeds, head=part.head, dtype=graph.dtype)
        for port in inputs:
            graph.input(port)
        tokens = inputs[0].name
        self.positions = GraphPositions(graph, tokens, f"layers.{part.layers[0]}.key")
        self.operations = Operations(graph, self.positions)
        x = self.embed(tokens) if part.embeds else graph.to_compute_dtype(tokens)
        x = graph.op("Reshape", "stream", x, graph.integers(-1, hidden))
        for i in range(*part.layers):
            x = self.layer(i, x)
        if part.head:
            self.head(x)
        else:
            shape = graph.op("Concat", "hidden.shape", self.positions.both, graph.integers(hidden), axis=0)
            graph.op("Reshape", next_name("hidden"), graph.to_float32(x), shape)
        for port in outputs:
            graph.output(port)
        return graph.model(part.name)

    # The embedding and the head.

    def embed(self, ids: str) -> str:
        """Add the embedding. *Shape:* (batch, sequence) -> (batch, sequence, hidden)."""
        graph, embedding, hidden = self.graph, self.architecture.embedding, self.architecture.hidden_size
        x = self.operations.rows("embedding.token", ids)
        x = self.operations.times("embedding.scaled", x, embedding.multiplier)
        if embedding.token_size != hidden:
            flat = graph.op("Reshape", "embedding.flat", x, graph.integers(-1, embedding.token_size))
            x = self.operations.linear("embedding.projection", flat, bias=False)
            shape = graph.op("Concat", "embedding.shape", self.positions.both, graph.integers(hidden), axis=0)
            x = graph.op("Reshape", "embedding.widened", x, shape)
        position = embedding.position
        if isinstance(position, Learned):
            moved = graph.op("Add", "embedding.position.rows", self.positions.slots, graph.integer(position.offset))
            x = graph.op("Add", "embedding.sum", x, self.operations.rows("embedding.position", moved))
        elif isinstance(position, Sinusoidal):
            x = graph.op(
                "Add", "embedding.sum", x, graph.to_compute_dtype(self.positions.sinusoids(position.offset, hidden))
            )
        return add_norm(graph, "embedding.norm", x, embedding.norm, hidden)

    def head(self, x: str) -> str:
        """Add the head. *Shape:* (batch · sequence, hidden) -> (selected, vocab)."""
        graph, head, architecture = self.graph, self.architecture.head, self.architecture
        x = graph.op("Gather", "head.selected", x, "selected")
        x = add_norm(graph, "head.norm", x, head.norm, architecture.hidden_size)
        if architecture.embedding.token_size != architecture.hidden_size:
            x = self.operations.linear("head.narrowing", x, bias=False)
        table = "embedding.token.weight" if head.tied else "head.projection.weight"
        bias = "head.projection.bias" if head.bias else None
        plain = head.multiplier == 1.0 and head.logit_cap is None
        name = "logits" if plain and graph.dtype == "float32" else "head.projection"
        x = self.operations.product(name, x, table, bias)
        if graph.dtype != "float32":
            x = graph.float32("logits" if plain else "head.projection.float32", x)
        if head.multiplier != 1.0:
            name = "logits" if head.logit_cap is None else "head.scaled"
            x = graph.op("Mul", name, x, graph.number(head.multiplier))
        return x if head.logit_cap is None else self.operations.cap("logits", x, head.logit_cap)

    # A layer.

    def layer(self, i: int, x: str) -> str:
        """Add a layer. *Shape:* (batch · sequence, hidden) -> the same."""
        kind, name, graph = self.architecture.kind_of(i), f"layers.{i}", self.graph
        names, hidden = norm_names(kind.placement), self.architecture.hidden_size

        def norm(which: str, x: str) -> str:
            return add_norm(graph, f"{name}.{which}", x, kind.norm, hidden) if which in names else x

        def added(block: str, x: str, result: str) -> str:
            result = self.operations.times(f"{name}.{block}.scaled", result, kind.residual_multiplier)
            if kind.residual_scales is not None:
                scale = kind.residual_scales.attention if block == "attention" else kind.residual_scales.mlp
                x = self.operations.times(f"{name}.{block}.kept", x, scale.kept)
                result = self.operations.times(f"{name}.{block}.added", result, scale.added)
            return graph.op("Add", f"{name}.{block}.residual", x, result)

        def attention(x: str) -> str:
            return add_attention(self.operations, i, x, kind.attention)

        def mlp(x: str) -> str:
            if isinstance(kind.mlp, Experts):
                return add_experts(self.operations, f"{name}.mlp", x, kind.mlp, hidden)
            return add_mlp(self.operations, f"{name}.mlp", x, kind.mlp)

        if kind.placement in ("parallel", "parallel_two"):
            normed = norm("attention_norm", x)
            other = norm("mlp_norm", x) if kind.placement == "parallel_two" else normed
            both = graph.op("Add", f"{name}.parallel", attention(normed), mlp(other))
            return added("parallel", x, both)
        for block, compute in (("attention", attention), ("mlp", mlp)):
            if kind.placement == "output":
                x = added(block, x, norm(f"{block}_norm", compute(x)))
            elif kind.placement == "post":
                x = norm(f"{block}_norm", added(block, x, compute(x)))
            else:
                result = compute(norm(f"{block}_norm", x))
                x = added(block, x, norm(f"{block}_output_norm", result))
        return x
