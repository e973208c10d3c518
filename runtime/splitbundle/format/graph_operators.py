"""The closed list of operators that a graph of a bundle may have, all of ONNX's own domain."""

from __future__ import annotations

from typing import Final

from splitbundle.format.dtypes import ONNX_CODES
from splitbundle.records import field, record

KINDS: Final = {"f": 1, "i": 2, "s": 3, "ints": 7}
"""The field that holds an attribute's value -> its number in ``AttributeProto.AttributeType``."""
VALUES: Final[dict[tuple[bytes, bytes], frozenset[object]]] = {
    (b"Cast", b"to"): frozenset(ONNX_CODES.values()),
    (b"Gelu", b"approximate"): frozenset((b"none", b"tanh")),
}
"""(operator, attribute) -> the allowed values. The runtime decides about other attributes."""


@record(frozen=True, slots=True, kw_only=True)
class Operator:
    """The number of inputs of an operator, and its attributes with the fields that hold their values."""

    minimum: int
    maximum: int
    attributes: dict[bytes, str] = field(default_factory=dict)


def _listed() -> dict[bytes, Operator]:
    operators: dict[str, Operator] = {}

    def add(names: str, minimum: int, maximum: int | None = None, **attributes: str) -> None:
        own = {name.encode("ascii"): kind for name, kind in attributes.items()}
        for name in names.split():
            operators[name] = Operator(minimum=minimum, maximum=maximum or minimum, attributes=own)

    add("Cos Exp Log Neg Reciprocal Relu Sigmoid Sin Softplus Squeeze Tanh", 1)
    add("Cast", 1, to="i")
    add("Gelu", 1, approximate="s")
    add("Shape", 1, start="i", end="i")
    add("Softmax", 1, axis="i")
    add("Transpose", 1, perm="ints")
    add("Add And Div Equal Expand Gather Greater LessOrEqual MatMul Max Min Mul Pow Reshape Sub Unsqueeze", 2)
    add("Concat", 2, 16, axis="i")
    add("Gemm", 2, 3, transB="i")
    add("LayerNormalization RMSNormalization", 2, 3, axis="i", epsilon="f")
    add("Clip Range Where", 3)
    add("RotaryEmbedding", 3, interleaved="i", rotary_embedding_dim="i")
    add("ReduceSum", 2, keepdims="i")
    add("Slice", 3, 4)
    add("TensorScatter", 3, axis="i")
    return {name.encode("ascii"): operator for name, operator in operators.items()}


OPERATORS: Final = _listed()
"""``spec/v1/bundle.md``, section "Graphs", has the same table."""
