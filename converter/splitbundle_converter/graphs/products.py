"""Add products with quantized weights to a graph. ``spec/v1/bundle.md``, section "Encodings", has the equations.

A product with ``rows8`` multiplies integers: the stored codes, and each row of the input as two rows of integers. A
product with ``blocks4`` is onnxruntime's own operator, because ONNX has none that reads such blocks fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from splitbundle.format.encodings import Encoding
from splitbundle.format.graph import DOMAINS, NBITS
from splitbundle_converter.graphs.builder import GraphBuilder

LARGEST: Final = 63
"""The largest integer of an input. With 7 bits, the sum of two products fits into 16 bits. Processors without VNNI
add two products in 16 bits, and with 8 bits onnxruntime's results there are wrong."""
ZERO: Final = 64
"""The zero point of the integers of an input, which are unsigned."""
LEAST: Final = 1e-30
"""The least magnitude that a row is divided by, so that a row of zeros is no division by zero."""
(NBITS_DOMAIN,) = DOMAINS[NBITS]


def add_integer_product(graph: GraphBuilder, name: str, x: str, codes: str, scale: str, shape: Sequence[int]) -> str:
    """Add a product with ``rows8``. Both integers of an input go through one product.

    *Shape:* (rows, in), (out, in), (out) -> (rows, out). ``shape`` is that of the codes.
    """
    integers, steps = _split(graph, x, shape[1])
    turned = graph.op("Transpose", f"{codes}.transposed", codes, perm=[1, 0])  # onnxruntime does it when it loads
    both = graph.op("MatMulInteger", f"{name}.integers", integers, turned, graph.byte(ZERO))  # [rows, 2, out]
    summed = graph.op("MatMul", f"{name}.sum", steps, graph.float32(f"{name}.float32", both))  # [rows, 1, out]
    summed = graph.op("Reshape", f"{name}.rows", summed, graph.integers(-1, shape[0]))
    return graph.op("Mul", name, summed, scale)


def _split(graph: GraphBuilder, x: str, width: int) -> tuple[str, str]:
    """Return the integers h and l of an input, and their steps s and s / 126: x is s · h + s / 126 · l.

    All products with the same input share them.

    *Shape:* (rows, width) -> (rows, 2, width) in uint8, (rows, 1, 2).
    """
    integers, steps = f"{x}.split", f"{x}.split.steps"
    if graph.has(integers):
        return integers, steps
    largest = graph.op("ReduceMax", f"{x}.split.largest", graph.op("Abs", f"{x}.split.abs", x), graph.integers(1))
    least = graph.op("Max", f"{x}.split.divisor", largest, graph.number(LEAST))
    step = graph.op("Mul", f"{x}.split.step", least, graph.number(1 / LARGEST))
    scaled = graph.op("Div", f"{x}.split.scaled", x, step)
    high = graph.op("Round", f"{x}.split.high", scaled)
    rest = graph.op("Sub", f"{x}.split.rest", scaled, high)
    low = graph.op("Round", f"{x}.split.low", graph.op("Mul", f"{x}.split.wide", rest, graph.number(2.0 * LARGEST)))
    both = graph.op("Concat", f"{x}.split.both", high, low, axis=1)
    both = graph.op("Add", f"{x}.split.positive", both, graph.number(float(ZERO)))
    both = graph.cast(both, "float32", "uint8")
    graph.op("Reshape", integers, both, graph.integers(-1, 2, width))
    factors = graph.floats([[1.0, 1 / (2 * LARGEST)]])
    graph.op("Unsqueeze", steps, graph.op("Mul", f"{x}.split.factors", step, factors), graph.integers(1))
    return integers, steps


def add_nbits_product(graph: GraphBuilder, name: str, x: str, codes: str, scale: str, encoding: Encoding) -> str:
    """Add a product with ``blocks4``. *Shape:* (rows, in), (out, blocks, block / 2), (out, blocks) -> (rows, out)."""
    rows, blocks, half = graph.stored_shape(codes)
    return graph.op(
        "MatMulNBits",
        name,
        *(x, codes, scale),
        domain=NBITS_DOMAIN,
        K=2 * blocks * half,
        N=rows,
        bits=encoding.bits,
        block_size=2 * half,
        accuracy_level=4,
    )


def add_unpacked_product(graph: GraphBuilder, name: str, x: str, codes: str, scale: str, encoding: Encoding) -> str:
    """Add a product with ``blocks4`` codes that are no initializer. Even and odd columns are multiplied apart.

    *Shape:* (rows, in), (out, blocks, block / 2), (out, blocks) -> (rows, out).
    """
    columns = graph.op("Reshape", f"{name}.pairs", x, graph.integers(0, -1, 2))
    columns = graph.op("Transpose", f"{name}.columns", columns, perm=[2, 0, 1])  # [2, rows, in / 2]
    scale = graph.op("Unsqueeze", f"{scale}.column", scale, graph.integers(-1))
    y: list[str] = []
    for i, (part, nibble) in enumerate(zip(("even", "odd"), _nibbles(graph, codes), strict=True)):
        number = graph.op("Mul", f"{codes}.{part}", _centered(graph, nibble), scale)
        flat = graph.op("Reshape", f"{codes}.{part}.flat", number, graph.integers(0, -1))
        own = graph.op("Gather", f"{name}.{part}_columns", columns, graph.integer(i))
        y = [graph.op("Gemm", name if y else f"{name}.{part}", own, flat, *y, transB=1)]
    return y[0]


def add_numbers(graph: GraphBuilder, name: str, codes: str, scale: str, encoding: Encoding) -> str:
    """Add the numbers of gathered rows of a table, from their codes and scales in float32.

    *Shape:* (batch, sequence, …), (batch, sequence) or (batch, sequence, blocks) -> (batch, sequence, width).
    """
    scale = graph.op("Unsqueeze", f"{scale}.column", scale, graph.integers(-1))
    if encoding.block is None:
        return graph.op("Mul", name, graph.cast(codes, "int8", "float32"), scale)
    parts = [graph.op("Unsqueeze", f"{each}.column", each, graph.integers(-1)) for each in _nibbles(graph, codes)]
    both = graph.op("Concat", f"{codes}.nibbles", *parts, axis=-1)  # […, blocks, block / 2, 2]
    both = graph.op("Reshape", f"{codes}.whole", both, graph.integers(0, 0, -1, encoding.block))
    numbers = graph.op("Mul", f"{name}.by_block", _centered(graph, both), scale)
    return graph.op("Reshape", name, numbers, graph.integers(0, 0, -1))


def _nibbles(graph: GraphBuilder, codes: str) -> tuple[str, str]:
    """Return the low and the high nibbles of bytes. *Shape:* any -> twice the same."""
    low = graph.op("BitwiseAnd", f"{codes}.low", codes, graph.byte(15))
    return low, graph.op("BitShift", f"{codes}.high", codes, graph.byte(4), direction="RIGHT")


def _centered(graph: GraphBuilder, nibbles: str) -> str:
    return graph.op("Sub", f"{nibbles}.centered", graph.cast(nibbles, "uint8", "float32"), graph.number(8.0))
