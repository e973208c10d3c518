"""Add small steps that all parts of a graph use: products, factors, caps and shapes."""

from __future__ import annotations

import numpy

from splitbundle.format.weight_layout import SCALE
from splitbundle_converter.graphs.builder import GraphBuilder
from splitbundle_converter.graphs.positions import GraphPositions
from splitbundle_converter.graphs.products import add_integer_product, add_nbits_product, add_numbers


class Operations:
    """Adds nodes to a graph. Each method returns the name of the value that it adds."""

    def __init__(self, graph: GraphBuilder, positions: GraphPositions) -> None:
        self.graph, self.positions = graph, positions

    def rows(self, table: str, index: str) -> str:
        """Gather rows of a table. If they are stored in another dtype than the graph's, only these rows are cast.

        *Shape:* (…) -> (…, width).
        """
        graph, name = self.graph, f"{table}.weight"
        encoding = graph.encoding(name)
        if encoding is None:
            taken = graph.op("Gather", table, graph.stored(name), index)
            return graph.cast(taken, graph.stored_dtype(name), graph.dtype)
        codes = graph.op("Gather", f"{table}.codes", graph.stored(name), index)
        scale = graph.op("Gather", f"{table}.scale", graph.stored(f"{name}{SCALE}"), index)
        return add_numbers(graph, table, codes, graph.float32(f"{table}.scale.float32", scale), encoding)

    def linear(self, name: str, x: str, *, bias: bool) -> str:
        """Multiply by the stored weight ``name`` and add its bias. *Shape:* (rows, in) -> (rows, out)."""
        return self.product(name, x, f"{name}.weight", f"{name}.bias" if bias else None)

    def product(self, name: str, x: str, weight: str, bias: str | None = None) -> str:
        """Multiply by a stored weight and add a stored bias. *Shape:* (rows, in) -> (rows, out)."""
        graph, encoding = self.graph, self.graph.encoding(weight)
        biases = [] if bias is None else [graph.weight(bias)]
        if encoding is None:
            return graph.op("Gemm", name, x, graph.weight(weight), *biases, transB=1)
        own = f"{name}.product" if biases else name
        scale, codes = graph.weight(f"{weight}{SCALE}"), graph.stored(weight)
        if encoding.block is None:
            y = add_integer_product(graph, own, x, codes, scale, graph.stored_shape(weight))
        else:
            y = add_nbits_product(graph, own, x, codes, scale, encoding)
        return graph.op("Add", name, y, *biases) if biases else y

    def cap(self, name: str, x: str, cap: float) -> str:
        """Compute cap · tanh(x / cap), in float32. *Shape:* any -> the same."""
        graph = self.graph
        bent = graph.op("Tanh", f"{name}.tanh", graph.op("Div", f"{name}.small", x, graph.number(cap)))
        return graph.op("Mul", name, bent, graph.number(cap))

    def clip(self, name: str, x: str, clip: float | None) -> str:
        """Clip to ±``clip``. If it is None, return ``x``. *Shape:* any -> the same."""
        if clip is None:
            return x
        ends = (self.graph.number(end, self.graph.dtype) for end in (-clip, clip))
        return self.graph.op("Clip", f"{name}.clipped", x, *ends)

    def times(self, name: str, x: str, factor: float) -> str:
        """Multiply by a factor. If it is 1, return ``x``. *Shape:* any -> the same."""
        if factor == 1.0:
            return x
        graph = self.graph
        # A factor that is not exact in 16 bits would shift all values in the same direction. The product with such a
        # factor is computed in float32.
        dtype = graph.dtype if float(numpy.asarray(factor, graph.dtype)) == factor else "float32"
        x = graph.op("Mul", name, graph.cast(x, graph.dtype, dtype), graph.number(factor, dtype))
        return graph.cast(x, dtype, graph.dtype)

    # Shapes, each computed once.

    def split_shape(self, head_dim: int) -> str:
        """Return the shape (batch, sequence, -1, head_dim)."""
        return self.shape(f"shapes.split_{head_dim}", 0, 2, -1, head_dim)

    def mixed_shape(self, heads: int, head_dim: int) -> str:
        """Return the shape (batch, heads, sequence, head_dim)."""
        return self.shape(f"shapes.mixed_{heads}_{head_dim}", 0, 1, heads, None, head_dim)

    def grouped_shape(self, kv_heads: int, group: int) -> str:
        """Return the shape (batch, kv_heads, group, sequence, -1)."""
        return self.shape(f"shapes.grouped_{kv_heads}_{group}", 0, 1, kv_heads, group, None, -1)

    def shape(self, name: str, start: int, end: int, *sizes: int | None) -> str:
        """Return dimensions ``start`` to ``end`` of (batch, sequence), then ``sizes``. None means the sequence."""
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
