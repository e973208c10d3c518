"""The ONNX graph of a shard, built from ``architecture.json`` brick by brick, as the torch decoder is.

Only standard operators. The residual stream is (batch · sequence, hidden), so that every projection is a ``Gemm`` that
reads the stored weight, [out, in], where it lies. A graph that computes in float16 computes in float32 what the torch
decoder does (positions, masks, softmax, norms whose weight has an offset), caps and the GELU. The equations are in
``spec/v1/decoder.md``, the inputs and outputs in ``spec/v1/bundle.md``, section "Graphs".
"""

from __future__ import annotations

import numpy
from onnx import ModelProto

from splitbundle.backends.torch.positions import Reach
from splitbundle.format.architecture import decoder as facts
from splitbundle.format.architecture.decoder import Alibi, Architecture, Learned, Rotary, Sinusoidal
from splitbundle.format.graph import next_name, ports
from splitbundle.format.manifest.document import Shard
from splitbundle.format.selection import Selection
from splitbundle.format.weight_layout import Stored
from splitbundle_converter.graphs.builder import GraphBuilder
from splitbundle_converter.graphs.positions import GraphPositions


def build(
    architecture: Architecture, part: Shard | Selection, stored: dict[str, Stored], dtype: str = "float32"
) -> ModelProto:
    """The graph of a part of the model.

    Args:
        architecture: of the model.
        part: what the graph computes.
        stored: where each tensor of the part lies.
        dtype: what it computes in: float32, or float16.
    """
    return _Decoder(architecture, part, GraphBuilder(stored, dtype)).build()


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
        x = self.embed(tokens) if part.embeds else graph.narrow(tokens)
        x = graph.op("Reshape", "stream", x, graph.integers(-1, hidden))
        for i in range(*part.layers):
            x = self.layer(i, x)
        if part.head:
            self.head(x)
        else:
            shape = graph.op("Concat", "hidden.shape", self.positions.both, graph.integers(hidden), axis=0)
            graph.op("Reshape", next_name("hidden"), graph.wide(x), shape)
        for port in outputs:
            graph.output(port)
        return graph.model(part.name)

    # The ends.

    def embed(self, ids: str) -> str:
        """*Shape:* (batch, sequence) -> (batch, sequence, hidden)."""
        graph, embedding, hidden = self.graph, self.architecture.embedding, self.architecture.hidden_size
        x = self.rows("embedding.token", ids)
        x = self.times("embedding.scaled", x, embedding.multiplier)
        if embedding.token_size != hidden:
            flat = graph.op("Reshape", "embedding.flat", x, graph.integers(-1, embedding.token_size))
            x = self.linear("embedding.projection", flat, bias=False)
            shape = graph.op("Concat", "embedding.shape", self.positions.both, graph.integers(hidden), axis=0)
            x = graph.op("Reshape", "embedding.widened", x, shape)
        position = embedding.position
        if isinstance(position, Learned):
            moved = graph.op("Add", "embedding.position.rows", self.positions.slots, graph.integer(position.offset))
            x = graph.op("Add", "embedding.sum", x, self.rows("embedding.position", moved))
        elif isinstance(position, Sinusoidal):
            x = graph.op("Add", "embedding.sum", x, graph.narrow(self.positions.sinusoids(position.offset, hidden)))
        return self.norm("embedding.norm", x, embedding.norm, hidden)

    def rows(self, table: str, index: str) -> str:
        """Rows of a table: of one of another dtype, only what is taken is cast."""
        name = self.graph.stored(f"{table}.weight")
        taken = self.graph.op("Gather", table, name, index)
        return self.graph.cast(taken, self.graph.stored_dtype(name), self.graph.dtype)

    def head(self, x: str) -> str:
        """*Shape:* (batch · sequence, hidden) -> (selected, vocab)."""
        graph, head, architecture = self.graph, self.architecture.head, self.architecture
        x = graph.op("Gather", "head.selected", x, "selected")
        x = self.norm("head.norm", x, head.norm, architecture.hidden_size)
        if architecture.embedding.token_size != architecture.hidden_size:
            x = self.linear("head.narrowing", x, bias=False)
        table = "embedding.token.weight" if head.tied else "head.projection.weight"
        biases = [graph.weight("head.projection.bias")] if head.bias else []
        plain = head.multiplier == 1.0 and head.logit_cap is None
        name = "logits" if plain and graph.dtype == "float32" else "head.projection"
        x = graph.op("Gemm", name, x, graph.weight(table), *biases, transB=1)
        if graph.dtype != "float32":
            x = graph.float32("logits" if plain else "head.projection.float32", x)
        if head.multiplier != 1.0:
            name = "logits" if head.logit_cap is None else "head.scaled"
            x = graph.op("Mul", name, x, graph.number(head.multiplier))
        return x if head.logit_cap is None else self.cap("logits", x, head.logit_cap)

    # A layer.

    def layer(self, i: int, x: str) -> str:
        """*Shape:* (batch · sequence, hidden) -> the same."""
        kind, name, graph = self.architecture.kind_of(i), f"layers.{i}", self.graph
        names, hidden = facts.norm_names(kind.placement), self.architecture.hidden_size

        def norm(which: str, x: str) -> str:
            return self.norm(f"{name}.{which}", x, kind.norm, hidden) if which in names else x

        def added(block: str, x: str, result: str) -> str:
            result = self.times(f"{name}.{block}.scaled", result, kind.residual_multiplier)
            return graph.op("Add", f"{name}.{block}.residual", x, result)

        if kind.placement in ("parallel", "parallel_two"):
            normed = norm("attention_norm", x)
            other = norm("mlp_norm", x) if kind.placement == "parallel_two" else normed
            both = graph.op("Add", f"{name}.parallel", self.attention(i, normed), self.mlp(i, other))
            return added("parallel", x, both)
        for block, compute in (("attention", self.attention), ("mlp", self.mlp)):
            if kind.placement == "output":
                x = added(block, x, norm(f"{block}_norm", compute(i, x)))
            elif kind.placement == "post":
                x = norm(f"{block}_norm", added(block, x, compute(i, x)))
            else:
                result = compute(i, norm(f"{block}_norm", x))
                x = added(block, x, norm(f"{block}_output_norm", result))
        return x

    def attention(self, i: int, x: str) -> str:
        """*Shape:* (batch · sequence, hidden) -> the same."""
        graph, kind, name = self.graph, self.architecture.kind_of(i).attention, f"layers.{i}.attention"
        heads, kv_heads, head_dim = kind.heads, kind.kv_heads, kind.head_dim
        query = self.heads(name, "query", x, kind, heads)
        key = self.heads(name, "key", x, kind, kv_heads)
        value = self.split(
            f"{name}.value",
            self.clip(f"{name}.value", self.linear(f"{name}.value", x, bias=kind.qkv_bias), kind.clip),
            head_dim,
        )
        if kind.query_temperature is not None:
            warmth = graph.narrow(self.positions.temperature(kind.query_temperature))
            query = graph.op("Mul", f"{name}.query.warmed", query, warmth)
        keys = graph.op("TensorScatter", f"layers.{i}.key.next", f"layers.{i}.key", key, "past", axis=2)
        values = graph.op("TensorScatter", f"layers.{i}.value.next", f"layers.{i}.value", value, "past", axis=2)
        # The heads of a group see the same keys, so they stand as positions, and no key is repeated in memory.
        query = self.times(f"{name}.query.scaled", query, kind.scale)
        grouped = graph.op("Reshape", f"{name}.query.grouped", query, graph.integers(0, kv_heads, -1, head_dim))
        turned = graph.op("Transpose", f"{name}.key.transposed", keys, perm=[0, 1, 3, 2])
        scores = graph.wide(graph.op("MatMul", f"{name}.scores", grouped, turned))  # [B, K, G · S, T]
        if kind.logit_cap is not None:
            scores = self.cap(f"{name}.scores.capped", scores, kind.logit_cap)
        alibi = kind.position if isinstance(kind.position, Alibi) else None
        bias = self.positions.bias(Reach(kind.window, kind.chunk), alibi, heads, kv_heads)
        shape = self.grouped_shape(kv_heads, heads // kv_heads)
        scores = graph.op("Reshape", f"{name}.scores.by_head", scores, shape)  # [B, K, G, S, T]
        scores = graph.op("Add", f"{name}.scores.masked", scores, bias)
        weights = graph.narrow(self.softmax(name, scores, kind))
        weights = graph.op(
            "Reshape", f"{name}.weights.grouped", weights, graph.op("Shape", f"{name}.scores.shape", f"{name}.scores")
        )
        mixed = graph.op("MatMul", f"{name}.mixed", weights, values)  # [B, K, G · S, D]
        mixed = graph.op("Reshape", f"{name}.mixed.by_head", mixed, self.mixed_shape(heads, head_dim))  # [B, H, S, D]
        mixed = graph.op("Transpose", f"{name}.mixed.transposed", mixed, perm=[0, 2, 1, 3])
        flat = graph.op("Reshape", f"{name}.mixed.flat", mixed, graph.integers(-1, heads * head_dim))
        return self.linear(f"{name}.output", flat, bias=kind.output_bias)

    def softmax(self, name: str, scores: str, kind: facts.Attention) -> str:
        """*Shape:* (batch, kv_heads, heads / kv_heads, sequence, slots) -> the same."""
        graph = self.graph
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

    def heads(self, name: str, part: str, x: str, kind: facts.Attention, heads: int) -> str:
        """Queries or keys: clipped, normalised, turned. *Shape:* (…, hidden) -> (batch, heads, sequence, head_dim)."""
        own, full = kind.query_key_norm, f"{name}.{part}"
        x = self.clip(full, self.linear(full, x, bias=kind.qkv_bias), kind.clip)
        if own is not None and own.width == "full":
            x = self.norm(f"{full}_norm", x, own.norm, heads * kind.head_dim)
        x = self.split(full, x, kind.head_dim)
        if own is not None and own.width != "full" and not own.after_rotation:
            x = self.head_norm(f"{full}_norm", x, own, heads, kind.head_dim)
        if isinstance(kind.position, Rotary):
            x = self.rotate(full, x, kind.position, kind.head_dim)
        if own is not None and own.width != "full" and own.after_rotation:
            x = self.head_norm(f"{full}_norm", x, own, heads, kind.head_dim)
        return x

    def rotate(self, name: str, x: str, rotary: Rotary, head_dim: int) -> str:
        """*Shape:* (batch, heads, sequence, head_dim) -> the same."""
        attributes: dict[str, int] = {"interleaved": int(rotary.layout == "interleaved")}
        if rotary.dim != head_dim:
            attributes["rotary_embedding_dim"] = rotary.dim
        waves = [self.graph.narrow(wave) for wave in self.positions.rotation(rotary)]
        return self.graph.op("RotaryEmbedding", f"{name}.rotated", x, *waves, **attributes)

    def split(self, name: str, x: str, head_dim: int) -> str:
        """*Shape:* (batch · sequence, heads · head_dim) -> (batch, heads, sequence, head_dim)."""
        by_head = self.graph.op("Reshape", f"{name}.by_head", x, self.split_shape(head_dim))
        return self.graph.op("Transpose", f"{name}.heads", by_head, perm=[0, 2, 1, 3])

    def mlp(self, i: int, x: str) -> str:
        """*Shape:* (batch · sequence, hidden) -> the same."""
        mlp, name = self.architecture.kind_of(i).mlp, f"layers.{i}.mlp"
        up = self.linear(f"{name}.up", x, bias=mlp.bias)
        if not mlp.gated:
            return self.linear(f"{name}.down", self.activation(name, up, mlp.activation), bias=mlp.bias)
        gate = self.activation(name, self.linear(f"{name}.gate", x, bias=mlp.bias), mlp.activation)
        return self.linear(f"{name}.down", self.graph.op("Mul", f"{name}.gated", gate, up), bias=mlp.bias)

    # Bricks.

    def linear(self, name: str, x: str, *, bias: bool) -> str:
        """*Shape:* (rows, in) -> (rows, out)."""
        biases = [self.graph.weight(f"{name}.bias")] if bias else []
        return self.graph.op("Gemm", name, x, self.graph.weight(f"{name}.weight"), *biases, transB=1)

    def norm(self, name: str, x: str, norm: facts.Norm | None, size: int) -> str:
        """*Shape:* (…, size) -> the same."""
        if norm is None:
            return x
        # Statistics are of float32 in any case, by the operators' definition. In 16 bits, 1 + w would lose what w says.
        graph, dtype = self.graph, "float32" if norm.weight_offset else self.graph.dtype
        weight = graph.weight(f"{name}.weight", dtype) if norm.affine else graph.floats([1.0] * size, dtype)
        if norm.weight_offset:
            weight = graph.op("Add", f"{name}.whole_weight", weight, graph.number(norm.weight_offset))
        biases = [graph.weight(f"{name}.bias", dtype)] if norm.bias else []
        kind = {"layer_norm": "LayerNormalization", "rms_norm": "RMSNormalization"}[norm.kind]
        x = graph.cast(x, graph.dtype, dtype)
        return graph.cast(graph.op(kind, name, x, weight, *biases, axis=-1, epsilon=norm.eps), dtype, graph.dtype)

    def head_norm(self, name: str, x: str, own: facts.QueryKeyNorm, heads: int, head_dim: int) -> str:
        """*Shape:* (batch, heads, sequence, head_dim) -> the same."""
        if own.width == "head":
            return self.norm(name, x, own.norm, head_dim)
        graph, by_head = self.graph, self.graph.integers(heads, 1, head_dim)
        dtype = "float32" if own.norm.weight_offset else graph.dtype
        plain = facts.Norm(kind=own.norm.kind, eps=own.norm.eps, affine=False, weight_offset=0.0, bias=False)
        x = graph.cast(self.norm(f"{name}.plain", x, plain, head_dim), graph.dtype, dtype)
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

    def activation(self, name: str, x: str, kind: str) -> str:
        """*Shape:* any -> the same."""
        graph, name = self.graph, f"{name}.activation"
        if kind == "silu":
            return graph.op("Mul", name, x, graph.op("Sigmoid", f"{name}.sigmoid", x))
        if kind in ("gelu", "gelu_tanh"):
            # A function, which a runtime without a kernel expands: eight roundings to 16 bits in place of one.
            form = "tanh" if kind == "gelu_tanh" else "none"
            return graph.narrow(graph.op("Gelu", name, graph.wide(x), approximate=form))
        if kind in ("relu", "relu_squared"):
            positive = graph.op("Relu", name, x)
            return positive if kind == "relu" else graph.op("Mul", f"{name}.squared", positive, positive)
        return self.xielu(name, x)

    def xielu(self, name: str, x: str) -> str:
        graph, x = self.graph, self.graph.wide(x)  # exp(x) - 1 would lose a small x in 16 bits
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
        return graph.narrow(graph.op("Add", name, graph.op("Where", f"{name}.both", positive, above, below), half))

    def cap(self, name: str, x: str, cap: float) -> str:
        """cap · tanh(x / cap), in float32. *Shape:* any -> the same."""
        graph = self.graph
        bent = graph.op("Tanh", f"{name}.tanh", graph.op("Div", f"{name}.small", x, graph.number(cap)))
        return graph.op("Mul", name, bent, graph.number(cap))

    def clip(self, name: str, x: str, clip: float | None) -> str:
        """*Shape:* any -> the same."""
        if clip is None:
            return x
        ends = (self.graph.number(end, self.graph.dtype) for end in (-clip, clip))
        return self.graph.op("Clip", f"{name}.clipped", x, *ends)

    def times(self, name: str, x: str, factor: float) -> str:
        """*Shape:* any -> the same."""
        if factor == 1.0:
            return x
        graph = self.graph
        # A factor that 16 bits don't hold would err the same way everywhere: the product is taken in float32.
        dtype = graph.dtype if float(numpy.asarray(factor, graph.dtype)) == factor else "float32"
        x = graph.op("Mul", name, graph.cast(x, graph.dtype, dtype), graph.number(factor, dtype))
        return graph.cast(x, dtype, graph.dtype)

    # Shapes, each computed once.

    def split_shape(self, head_dim: int) -> str:
        """(batch, sequence, -1, head_dim)."""
        return self.shape(f"shapes.split_{head_dim}", 0, 2, -1, head_dim)

    def mixed_shape(self, heads: int, head_dim: int) -> str:
        """(batch, heads, sequence, head_dim)."""
        return self.shape(f"shapes.mixed_{heads}_{head_dim}", 0, 1, heads, None, head_dim)

    def grouped_shape(self, kv_heads: int, group: int) -> str:
        """(batch, kv_heads, group, sequence, -1)."""
        return self.shape(f"shapes.grouped_{kv_heads}_{group}", 0, 1, kv_heads, group, None, -1)

    def shape(self, name: str, start: int, end: int, *sizes: int | None) -> str:
        """Dimensions start to end of (batch, sequence), then sizes; None stands for the sequence."""
        if self.graph.has(name):
            return name
        graph, both = self.graph, self.positions.both
        parts = [graph.op("Slice", f"{name}.first", both, graph.integers(start), graph.integers(end))]
        for number, size in enumerate(sizes):
            if size is None:
                parts.append(graph.op("Slice", f"{name}.sequence_{number}", both, graph.integers(1), graph.integers(2)))
            else:
                parts.append(graph.integers(size))
        return graph.op("Concat", name, *parts, axis=0)
