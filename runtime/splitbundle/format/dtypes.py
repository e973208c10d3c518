"""The dtypes of tensors in one table: their names, their sizes, and the codes that other formats use for them."""

from __future__ import annotations

from typing import Final

from splitbundle.records import record


@record(frozen=True, slots=True, kw_only=True)
class Dtype:
    """A dtype of a tensor. Its name is the one that torch and numpy use."""

    name: str
    size: int
    """Bytes of one number."""
    safetensors: str
    """The code in the header of a safetensors file."""
    onnx: int | None = None
    """The number in ONNX's ``TensorProto.DataType``, or None if no graph of a bundle may use the dtype."""


TABLE: Final = {
    dtype.name: dtype
    for dtype in (
        Dtype(name="float64", size=8, safetensors="F64"),
        Dtype(name="float32", size=4, safetensors="F32", onnx=1),
        Dtype(name="float16", size=2, safetensors="F16", onnx=10),
        Dtype(name="bfloat16", size=2, safetensors="BF16", onnx=16),
        Dtype(name="float8_e4m3fn", size=1, safetensors="F8_E4M3"),
        Dtype(name="float8_e5m2", size=1, safetensors="F8_E5M2"),
        Dtype(name="int64", size=8, safetensors="I64", onnx=7),
        Dtype(name="int32", size=4, safetensors="I32"),
        Dtype(name="int16", size=2, safetensors="I16"),
        Dtype(name="int8", size=1, safetensors="I8", onnx=3),
        Dtype(name="uint8", size=1, safetensors="U8", onnx=2),
        Dtype(name="bool", size=1, safetensors="BOOL"),
    )
}
"""Name -> dtype: every dtype that a checkpoint may have. A bundle stores only some of them."""
WEIGHTS: Final = ("float32", "float16", "bfloat16")
"""The dtypes of stored weights."""
TENSORS: Final = (*WEIGHTS, "int64", "int8", "uint8")
"""The dtypes of all stored tensors: token ids of golden vectors are int64, and codes of quantized weights 8 bits."""
PORTS: Final = ("float32", "float16", "int64")
"""The dtypes of a graph's inputs and outputs."""
ITEM_SIZES: Final = {name: TABLE[name].size for name in TENSORS}
"""Dtype of a stored tensor -> bytes of one number."""
SAFETENSORS_CODES: Final = {name: TABLE[name].safetensors for name in TENSORS}
"""Dtype of a stored tensor -> its code in a safetensors header."""
ONNX_CODES: Final = {name: code for name in TENSORS if (code := TABLE[name].onnx) is not None}
"""Dtype -> its number in a graph."""
