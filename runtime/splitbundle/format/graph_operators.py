"""The closed lists of operators that a graph of a bundle may have: ONNX's own, and one more for one variant."""

from __future__ import annotations

from typing import Final

from splitbundle.format.dtypes import ONNX_CODES
from splitbundle.format.graph import NBITS
from splitbundle.records import field, record

KINDS: Final = {"f": 1, "i": 2, "s": 3, "g": 5, "ints": 7}
"""The field that holds an attribute's value -> its number in ``AttributeProto.AttributeType``."""
LOOP, BODY, SIZE = b"Loop", b"body", b"Size"
"""The only operator with a graph, the attribute that holds this graph, and the operator that counts iterations."""
BOOL: Final = 9
"""The number of bool in ``TensorProto.DataType``. Only values between nodes have this dtype."""
VALUES: Final[dict[tuple[bytes, bytes], frozenset[object]]] = {
    (b"Cast", b"to"): frozenset(ONNX_CODES.values()),
    (b"Gelu", b"approximate"): frozenset((b"none", b"tanh")),
    (b"BitShift", b"direction"): frozenset((b"RIGHT",)),
    (b"MatMulNBits", b"bits"): frozenset((4,)),
    (b"MatMulNBits", b"block_size"): frozenset((32, 64, 128)),
    (b"MatMulNBits", b"accuracy_level"): frozenset((4,)),
}
"""(operator, attribute) -> the allowed values. The runtime decides about other attributes."""


@record(frozen=True, slots=True, kw_only=True)
class Operator:
    """The number of inputs and of outputs of an operator, and its attributes with the fields that hold their values."""

    minimum: int
    maximum: int
    attributes: dict[bytes, str] = field(default_factory=dict)
    outputs: int = 1


def _listed() -> dict[bytes, Operator]:
    operators: dict[str, Operator] = {}

    def add(names: str, minimum: int, maximum: int | None = None, outputs: int = 1, **attributes: str) -> None:
        own = {name.encode("ascii"): kind for name, kind in attributes.items()}
        for name in names.split():
            one = Operator(minimum=minimum, maximum=maximum or minimum, attributes=own, outputs=outputs)
            operators[name] = one

    add("Abs Cos Exp Identity Log Neg NonZero Reciprocal Relu Round Sigmoid Sin Size Softplus Squeeze Tanh Unique", 1)
    add("Cast", 1, to="i")
    add("Gelu", 1, approximate="s")
    add("Shape", 1, start="i", end="i")
    add("Softmax", 1, axis="i")
    add("Transpose", 1, perm="ints")
    add("Add And BitwiseAnd Div Equal Expand Gather GatherND Greater LessOrEqual MatMul Max Min Mul Pow", 2)
    add("Reshape Sub Unsqueeze", 2)
    add("BitShift", 2, direction="s")
    add("Concat", 2, 16, axis="i")
    add("Gemm", 2, 3, transB="i")
    add("LayerNormalization RMSNormalization", 2, 3, axis="i", epsilon="f")
    add("Clip MatMulInteger Range ScatterND Where", 3)
    add("GatherElements", 2, axis="i")
    add("RotaryEmbedding", 3, interleaved="i", rotary_embedding_dim="i")
    add("ReduceMax ReduceSum", 2, keepdims="i")
    add("Slice", 3, 4)
    add("TensorScatter", 3, axis="i")
    add("TopK", 2, outputs=2)
    add("Loop", 3, body="g")
    return {name.encode("ascii"): operator for name, operator in operators.items()}


OPERATORS: Final = _listed()
"""``spec/v1/bundle.md``, section "Graphs", has the same table."""
_NBITS_ATTRIBUTES: Final = ("K", "N", "bits", "block_size", "accuracy_level")
OF_DOMAINS: Final = {
    (NBITS, b"com.microsoft", b"MatMulNBits"): Operator(
        minimum=3, maximum=3, attributes={name.encode("ascii"): "i" for name in _NBITS_ATTRIBUTES}
    )
}
"""(variant, domain, operator) -> what only graphs of this variant may have."""
