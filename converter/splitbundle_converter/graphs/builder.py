"""Build an ONNX graph node by node, with readable names, shared constants, and weights that stay in their files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from splitbundle.format.dtypes import ONNX_CODES
from splitbundle.format.encodings import TABLE, Encoding
from splitbundle.format.graph import BODY_NAMES, DOMAINS, IR_VERSION, OPSET, STANDARD, VARIANTS, Port
from splitbundle.format.weight_layout import Stored


class GraphBuilder:
    """Collects nodes in order. A value has the name of its node, or this name and a suffix."""

    def __init__(self, stored: dict[str, Stored], variant: str = STANDARD) -> None:
        """Start an empty graph.

        Args:
            stored: The name of each tensor -> its place in a weight file.
            variant: The variant of the graph.
        """
        self._stored = stored
        self._domains = DOMAINS.get(variant, {})
        self.dtype = VARIANTS[variant]
        """The dtype that the graph computes in: "float32" or "float16"."""
        self._nodes: list[NodeProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._initializers: dict[str, TensorProto] = {}
        self._names: set[str] = set()
        self._visible: set[str] = set()
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []

    def op(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output, and return the name of the node, which is also the name of the output.

        Raises:
            ValueError: Another value has this name.
        """
        self._define(name)
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def largest(self, name: str, x: str, count: int) -> tuple[str, str]:
        """Add the largest values along the last axis, and return the names of the values and of their indices.

        The largest value is first. Among equal values, the one with the lowest index is first.

        *Shape:* (…, n) -> (…, count), (…, count).
        """
        for output in (name, f"{name}.indices"):
            self._define(output)
        inputs, outputs = [x, self.integers(count)], [name, f"{name}.indices"]
        self._nodes.append(helper.make_node("TopK", inputs, outputs, name=name))
        return outputs[0], outputs[1]

    def loop(self, name: str, count: str, start: str, width: int, body: Callable[[str, str], str]) -> str:
        """Add a loop that carries one value, and return the name of the value after the last iteration.

        Nodes of the body can take all values that come before the loop. No node outside can take a value of the body.

        *Shape:* (rows, width) -> the same.

        Args:
            name: The name of the loop.
            count: The number of iterations: the output of a ``Size`` node.
            start: The value before the first iteration, in the dtype of the graph.
            width: The last size of the value.
            body: Adds the nodes of one iteration. It takes the names of the iteration's number and of the value, and
                returns the name of the value after the iteration.
        """
        some = self.op("Greater", f"{name}.some", count, self.integer(0))
        outside, self._nodes, before = self._nodes, [], set(self._visible)
        given = [f"{name}.{each}" for each in BODY_NAMES]
        for each in given:
            self._define(each)
        results = [self.op("Identity", f"{name}.goes_on", given[1]), body(given[0], given[2])]
        shapes: list[list[str | int | None]] = [[], [], ["rows", width]]
        ports = list(zip((TensorProto.INT64, TensorProto.BOOL, ONNX_CODES[self.dtype]), shapes, strict=True))
        inputs = [helper.make_tensor_value_info(each, *port) for each, port in zip(given, ports, strict=True)]
        outputs = [helper.make_tensor_value_info(each, *port) for each, port in zip(results, ports[1:], strict=True)]
        inner = helper.make_graph(self._nodes, f"{name}.body", inputs, outputs)
        self._nodes, self._visible = outside, before
        return self.op("Loop", name, count, some, start, body=inner)

    def _define(self, name: str) -> None:
        if name in self._names or name in self._initializers or name in self._stored:
            raise ValueError(f"two values are called {name}")
        self._names.add(name)
        self._visible.add(name)

    def input(self, port: Port) -> None:
        """Add an input to the graph."""
        self.inputs.append(helper.make_tensor_value_info(port.name, ONNX_CODES[port.dtype], list(port.shape)))

    def output(self, port: Port) -> None:
        """Make a value an output of the graph."""
        self.outputs.append(helper.make_tensor_value_info(port.name, ONNX_CODES[port.dtype], list(port.shape)))

    def number(self, value: float, dtype: str = "float32") -> str:
        """Return the name of a constant scalar."""
        return self.floats(value, dtype)

    def floats(self, values: Any, dtype: str = "float32") -> str:
        """Return the name of constant floats. *Shape:* the shape of ``values``."""
        return self._constant(numpy.asarray(values, dtype=dtype), "number")

    def byte(self, value: int) -> str:
        """Return the name of a constant uint8 scalar."""
        return self._constant(numpy.asarray(value, dtype=numpy.uint8), "byte")

    def integers(self, *values: int) -> str:
        """Return the name of constant int64 values. *Shape:* (count of values)."""
        return self._constant(numpy.asarray(values, dtype=numpy.int64), "integers")

    def integer(self, value: int) -> str:
        """Return the name of a constant int64 scalar."""
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
        """Return the name of a tensor of a weight file, in its stored dtype."""
        if name not in self._initializers:
            where = self._stored[name]
            tensor = TensorProto(name=name, data_type=ONNX_CODES[where.tensor.dtype], dims=where.tensor.shape)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", where.file), ("offset", where.offset), ("length", where.tensor.size)):
                tensor.external_data.add(key=key, value=str(value))
            self._initializers[name] = tensor
        return name

    def weight(self, name: str, dtype: str | None = None) -> str:
        """Return the name of a tensor of a weight file, in the dtype of the graph or in ``dtype``.

        If this is not the stored dtype, the tensor is cast. onnxruntime casts it once, when it loads the graph.
        """
        return self.cast(self.stored(name), self.stored_dtype(name), dtype or self.dtype)

    def float32(self, name: str, value: str) -> str:
        """Cast a value to float32, and return the name of the result."""
        return self.op("Cast", name, value, to=TensorProto.FLOAT)

    def cast(self, value: str, old: str, new: str) -> str:
        """Cast a value from one dtype to another, and return the name of the result. Each value is cast only once."""
        name = f"{value}.{new}"
        return value if old == new else name if self.has(name) else self.op("Cast", name, value, to=ONNX_CODES[new])

    def to_float32(self, value: str) -> str:
        """Cast a value from the dtype of the graph to float32, for a step that is not accurate in 16 bits."""
        return self.cast(value, self.dtype, "float32")

    def to_compute_dtype(self, value: str) -> str:
        """Cast a float32 value to the dtype of the graph."""
        return self.cast(value, "float32", self.dtype)

    def model(self, name: str) -> ModelProto:
        """Return the complete ONNX model."""
        graph = helper.make_graph(
            self._nodes, name, self.inputs, self.outputs, initializer=list(self._initializers.values())
        )
        opsets = [helper.make_opsetid(*each) for each in {"": OPSET, **self._domains}.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="splitbundle")

    def stored_dtype(self, name: str) -> str:
        """Return the stored dtype of a tensor of a weight file."""
        return self._stored[name].tensor.dtype

    def encoding(self, name: str) -> Encoding | None:
        """Return the encoding of a tensor of a weight file, or None if it is not quantized."""
        tensor = self._stored[name].tensor
        if tensor.dtype == "int8":
            return TABLE["rows8"]
        return TABLE[f"blocks4_{2 * tensor.shape[-1]}"] if tensor.dtype == "uint8" else None

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the stored shape of a tensor of a weight file."""
        return self._stored[name].tensor.shape

    def has(self, name: str) -> bool:
        """Return whether a node that other nodes can use here has this name."""
        return name in self._visible
