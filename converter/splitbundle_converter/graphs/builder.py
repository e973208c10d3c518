"""Building an ONNX graph node by node: readable names, constants that are shared, weights that stay in their files."""

from __future__ import annotations

from typing import Any

import numpy
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from splitbundle.format.dtypes import ONNX_CODES
from splitbundle.format.graph import IR_VERSION, OPSET, Port
from splitbundle.format.weight_layout import Stored


class GraphBuilder:
    """Nodes in order. A value has the name of the node that gives it, or that name and a suffix."""

    def __init__(self, stored: dict[str, Stored], dtype: str = "float32") -> None:
        """Takes where weights lie, and what the graph computes in."""
        self._stored = stored
        self.dtype = dtype
        self._nodes: list[NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._initializers: dict[str, TensorProto] = {}
        self._names: set[str] = set()
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []

    def op(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        """A node of one output, which is called what the node is called."""
        if name in self._names or name in self._initializers or name in self._stored:
            raise ValueError(f"two values are called {name}")
        self._names.add(name)
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def input(self, port: Port) -> None:
        """An input of the graph."""
        self.inputs.append(helper.make_tensor_value_info(port.name, ONNX_CODES[port.dtype], list(port.shape)))

    def output(self, port: Port) -> None:
        """Makes a value an output of the graph."""
        self.outputs.append(helper.make_tensor_value_info(port.name, ONNX_CODES[port.dtype], list(port.shape)))

    def number(self, value: float, dtype: str = "float32") -> str:
        """A scalar."""
        return self.floats(value, dtype)

    def floats(self, values: Any, dtype: str = "float32") -> str:
        """Floats that are known now. *Shape:* that of the values."""
        return self._constant(numpy.asarray(values, dtype=dtype), "number")

    def integers(self, *values: int) -> str:
        """Integers that are known now. *Shape:* (how many)."""
        return self._constant(numpy.asarray(values, dtype=numpy.int64), "integers")

    def integer(self, value: int) -> str:
        """An int64 scalar."""
        return self._constant(numpy.asarray(value, dtype=numpy.int64), "integer")

    def _constant(self, values: Any, what: str) -> str:
        key = (str(values.dtype), values.shape, values.tobytes())
        if key not in self._constants:
            shown = "_".join(f"{value:g}" for value in values.flatten()[:4])
            name = f"constants.{what}.{shown}" + (f"_and_{values.size - 4}_more" if values.size > 4 else "")
            while name in self._initializers:
                name += "'"
            self._initializers[name] = numpy_helper.from_array(values, name)
            self._constants[key] = name
        return self._constants[key]

    def stored(self, name: str) -> str:
        """A tensor of a weight file, in the dtype that it is stored in."""
        if name not in self._initializers:
            where = self._stored[name]
            tensor = TensorProto(name=name, data_type=ONNX_CODES[where.tensor.dtype], dims=where.tensor.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", where.file), ("offset", where.offset), ("length", where.tensor.size)):
                tensor.external_data.add(key=key, value=str(value))
            self._initializers[name] = tensor
        return name

    def weight(self, name: str, dtype: str | None = None) -> str:
        """A tensor of a weight file in what the graph computes in, or in another dtype.

        Where that isn't the stored one it is cast, which a runtime does once, as it loads.
        """
        return self.cast(self.stored(name), self.stored_dtype(name), dtype or self.dtype)

    def float32(self, name: str, value: str) -> str:
        """A value cast to float32."""
        return self.op("Cast", name, value, to=TensorProto.FLOAT)

    def cast(self, value: str, old: str, new: str) -> str:
        """A value of one dtype in another, cast once."""
        name = f"{value}.{new}"
        return value if old == new else name if self.has(name) else self.op("Cast", name, value, to=ONNX_CODES[new])

    def to_float32(self, value: str) -> str:
        """A value of the dtype that the graph computes in, in float32, for what 16 bits would spoil."""
        return self.cast(value, self.dtype, "float32")

    def to_compute_dtype(self, value: str) -> str:
        """A float32 value in the dtype that the graph computes in."""
        return self.cast(value, "float32", self.dtype)

    def model(self, name: str) -> ModelProto:
        """The whole."""
        graph = helper.make_graph(
            self._nodes, name, self.inputs, self.outputs, initializer=list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="splitbundle")

    def stored_dtype(self, name: str) -> str:
        """The dtype that a tensor of a weight file is stored in."""
        return self._stored[name].tensor.dtype

    def has(self, name: str) -> bool:
        """Whether there is a node of this name."""
        return name in self._names
