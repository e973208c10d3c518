"""Graphs that a reader must refuse. Each is a good graph with a small change, and has the code of its refusal.

``python -m tests.support.graph_cases DIRECTORY`` writes each graph as a whole bundle, ``DIRECTORY/NAME.splitbundle``,
for readers in any language. The bundle's manifest and ``SHA256SUMS`` list the changed graph. ``NAME.json`` beside the
bundle has the shard and the code.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, TensorShapeProto, helper

import splitbundle
from splitbundle.format import names
from splitbundle.format.manifest import document
from splitbundle.verification import onnx_reader, onnx_rules
from splitbundle.writing.documents import write_file
from splitbundle_converter.graphs.add_graphs import add_graphs
from tests.support import graph_loop_cases  # noqa: F401  # adds its cases to the list
from tests.support.bundles import write_llama3
from tests.support.graph_case import CASES, Case, Change, case, changed, varint, written

SHARD: Final = "bottom"
"""The shard whose graph is changed: an embedding and a layer, in bfloat16."""
TABLE: Final = "embedding.token.weight"
FILE: Final = "embedding.safetensors"


# External data.


def tensor(model: ModelProto, name: str = TABLE) -> TensorProto:
    """An initializer."""
    return next(each for each in model.graph.initializer if each.name == name)


def entry(key: str, value: str | Callable[[str], str]) -> Change:
    """Change one entry of the token table's external data."""

    def change(model: ModelProto) -> None:
        (found,) = (each for each in tensor(model).external_data if each.key == key)
        found.value = value if isinstance(value, str) else value(found.value)

    return change


for _name, _location in {
    "parent": f"../{FILE}",
    "parent-after-a-part": f"weights/../../{FILE}",
    "parent-and-back": f"x/../{FILE}",
    "parent-backslash": f"..\\{FILE}",
    "parent-of-the-system": "../../../../../../../../etc/passwd",
    "absolute": "/etc/passwd",
    "absolute-twice": f"//{FILE}",
    "drive": f"C:\\{FILE}",
    "drive-relative": f"C:{FILE}",
    "share": f"\\\\server\\share\\{FILE}",
    "here": f"./{FILE}",
    "slash-at-end": f"{FILE}/",
    "stream": f"{FILE}::$DATA",
    "url": f"file:///{FILE}",
    "percent": f"%2e%2e/{FILE}",
    "home": f"~/{FILE}",
    "variable": f"$HOME/{FILE}",
    "nul": f"{FILE}\0.txt",
    "line-feed": f"{FILE}\n",
    "space": f" {FILE}",
    "upper": FILE.upper(),
    "full-width": f"\uff0e\uff0e/{FILE}",
    "empty": "",
    "long": "x" * 5000,
    "memory": "*/_ORT_MEM_ADDR_/*",  # onnxruntime's own word for an address in the process
    "pipe": "/dev/stdin",
    "process-memory": "/proc/self/mem",
    "not-listed": "notes.safetensors",
    "manifest": "manifest.json",
    "sums": "SHA256SUMS",
    "graph": f"{SHARD}.onnx",
    "another-unit": "layer-000.safetensors",
    "another-shard": "layer-001.safetensors",
}.items():
    case("graph.weights", f"location-{_name}", entry("location", _location))

for _name, _offset in {
    "negative": lambda text: f"-{text}",
    "hexadecimal": lambda text: hex(int(text)),
    "octal": lambda text: oct(int(text)),
    "plus": lambda text: f"+{text}",
    "leading-zero": lambda text: f"0{text}",
    "space": lambda text: f" {text}",
    "line-feed": lambda text: f"{text}\n",
    "underscore": lambda text: f"{text[0]}_{text[1:]}",
    "exponent": lambda text: f"{text}e0",
    "fraction": lambda text: f"{text}.0",
    "arabic": lambda text: "".join(chr(0x660 + int(digit)) for digit in text),
    "empty": "",
    "header": "0",
    "in-header": "8",
    "one-on": lambda text: str(int(text) + 1),
    "one-row-on": lambda text: str(int(text) + 48),
    "past-the-end": str(10**9),
    "wraps-at-64-bits": lambda text: str(int(text) + 2**64),
    "wraps-at-32-bits": lambda text: str(int(text) + 2**32),
    "all-of-64-bits": str(2**64 - 1),
    "all-of-63-bits": str(2**63 - 1),
    "a-million-digits": "9" * 1_000_000,
}.items():
    case("graph.weights", f"offset-{_name}", entry("offset", _offset))

for _name, _length in {
    "less": lambda text: str(int(text) - 1),
    "more": lambda text: str(int(text) + 1),
    "none": "0",
    "negative": "-1",
    "leading-zero": lambda text: f"0{text}",
    "hexadecimal": lambda text: hex(int(text)),
    "all-of-64-bits": str(2**64 - 1),
}.items():
    case("graph.weights", f"length-{_name}", entry("length", _length))


def without(key: str) -> Change:
    """Remove one entry of the token table's external data."""

    def change(model: ModelProto) -> None:
        kept = [each for each in tensor(model).external_data if each.key != key]
        tensor(model).ClearField("external_data")
        tensor(model).external_data.extend(kept)

    return change


for _key in ("location", "offset", "length"):
    case("graph.weights", f"external-without-{_key}", without(_key))


@changed("graph.weights")
def external_key_twice(model: ModelProto) -> None:
    entry("length", lambda text: text)(model)
    without("length")(model)
    tensor(model).external_data.add(key="location", value=FILE)


@changed("graph.weights")
def external_key_unknown(model: ModelProto) -> None:
    without("length")(model)
    tensor(model).external_data.add(key="basepath", value="/")


@changed("graph.size")
def external_key_more(model: ModelProto) -> None:
    tensor(model).external_data.add(key="prepacked_0", value="x|0|64|1")


@changed("graph.weights")
def external_empty(model: ModelProto) -> None:
    tensor(model).ClearField("external_data")


@changed("graph.weights")
def external_location_default(model: ModelProto) -> None:
    tensor(model).data_location = TensorProto.DEFAULT


@changed("graph.weights")
def external_with_raw_data(model: ModelProto) -> None:
    tensor(model).raw_data = b"\0" * 64


@changed("graph.weights")
def external_of_another_name(model: ModelProto) -> None:
    tensor(model).name = "embedding.token.table"


@changed("graph.weights")
def external_of_another_shard(model: ModelProto) -> None:
    model.graph.initializer.add().CopyFrom(tensor(model))
    model.graph.initializer[-1].name = "layers.1.mlp.up.weight"


@changed("graph.weights")
def external_of_a_constant(model: ModelProto) -> None:
    inline = next(each for each in model.graph.initializer if not each.external_data)
    inline.ClearField("raw_data")
    inline.data_location = TensorProto.EXTERNAL
    inline.external_data.extend(tensor(model).external_data)


@changed("graph.weights")
def weights_turned(model: ModelProto) -> None:
    tensor(model).dims.reverse()


@changed("graph.weights")
def weights_flat(model: ModelProto) -> None:
    size = 1
    for dimension in tensor(model).dims:
        size *= dimension
    tensor(model).ClearField("dims")
    tensor(model).dims.append(size)


@changed("graph.weights")
def weights_of_another_dtype(model: ModelProto) -> None:
    tensor(model).data_type = TensorProto.FLOAT16


@changed("graph.weights")
def weights_larger_than_memory(model: ModelProto) -> None:
    tensor(model).dims[0] = 2**62


@changed("graph.weights")
def weights_negative(model: ModelProto) -> None:
    tensor(model).dims[0] *= -1


@changed("graph.weights")
def weights_swapped(model: ModelProto) -> None:
    one, other = (tensor(model, f"layers.0.{part}.weight") for part in ("attention.key", "attention.value"))
    assert one.dims == other.dims
    one.name, other.name = other.name, one.name


@changed("graph.weights")
def weights_inline(model: ModelProto) -> None:
    norm = tensor(model, "layers.0.attention_norm.weight")
    norm.ClearField("external_data")
    norm.data_location = TensorProto.DEFAULT
    norm.data_type = TensorProto.FLOAT
    norm.raw_data = bytes(4 * norm.dims[0])


@changed("graph.weights")
def weights_missing(model: ModelProto) -> None:
    remove(model, "layers.0.mlp.down.weight")


def remove(model: ModelProto, name: str) -> None:
    """Remove an initializer."""
    kept = [each for each in model.graph.initializer if each.name != name]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(kept)


# Operators.


def added(code: str, name: str, kind: str, *inputs: str, domain: str | None = None, **attributes: object) -> None:
    """A case with one more node, before all others."""

    def change(model: ModelProto) -> None:
        node = helper.make_node(kind, list(inputs), ["more"], **attributes)
        if domain is not None:
            node.domain = domain
        model.graph.node.insert(0, node)

    case(code, name, change)


def outside() -> TensorProto:
    """Put external data where none may be."""
    value = TensorProto(name="passwd", data_type=TensorProto.UINT8, dims=[64], data_location=TensorProto.EXTERNAL)
    value.external_data.add(key="location", value="/etc/passwd")
    return value


def inner() -> GraphProto:
    """Make a graph inside a graph, with external data."""
    output = helper.make_tensor_value_info("passwd", TensorProto.UINT8, [64])
    return helper.make_graph([], "inner", [], [output], initializer=[outside()])


added("graph.operator", "operator-unknown", "NoSuchOperator", "past")
added("graph.operator", "operator-empty", "", "past")
added("graph.operator", "operator-of-other-case", "add", "past", "past")
added("graph.operator", "operator-not-listed", "Det", "past")
added("graph.operator", "operator-scan", "Scan", "past", body=inner(), num_scan_inputs=1)
added("graph.operator", "operator-if", "If", "past", then_branch=inner(), else_branch=inner())
added("graph.operator", "operator-constant", "Constant", value=outside())
added("graph.operator", "operator-random", "RandomUniform", shape=[1])
added("graph.operator", "operator-of-a-function", "Evil", "past", domain="local")
added("graph.operator", "domain-microsoft", "Gelu", "past", domain="com.microsoft")
added("graph.operator", "domain-of-another-name", "Relu", "past", domain="ai.onnx")
added("graph.operator", "domain-machine-learning", "Relu", "past", domain="ai.onnx.ml")
added("graph.operator", "inputs-none", "Add")
added("graph.operator", "inputs-one-more", "Relu", "past", "past")
added("graph.size", "inputs-many", "Concat", *["past"] * 17, axis=0)
added("graph.operator", "attribute-unknown", "Relu", "past", alpha=1.0)
added("graph.operator", "attribute-of-another-kind", "Cast", "past", to=1.0)
added("graph.syntax", "attribute-tensor", "Cast", "past", to=outside())
added("graph.syntax", "attribute-graph", "Cast", "past", to=inner())
added("graph.syntax", "attribute-floats", "Cast", "past", to=[1.0])
added("graph.operator", "attribute-cast-to-text", "Cast", "past", to=TensorProto.STRING)
added("graph.operator", "attribute-gelu-of-another-kind", "Gelu", "past", approximate="exact")


def first_attribute(code: str, name: str, change: Callable[[AttributeProto], None]) -> None:
    """A case that changes the first attribute of the graph."""

    def apply(model: ModelProto) -> None:
        change(next(attribute for node in model.graph.node for attribute in node.attribute))

    case(code, name, apply)


first_attribute("graph.operator", "attribute-of-two-values", lambda a: setattr(a, "f", 1.0))
first_attribute("graph.operator", "attribute-of-another-type", lambda a: setattr(a, "type", AttributeProto.INTS))
first_attribute("graph.operator", "attribute-without-value", lambda a: a.ClearField("i"))
first_attribute("graph.syntax", "attribute-of-a-function", lambda a: setattr(a, "ref_attr_name", "x"))
first_attribute("graph.syntax", "attribute-without-type", lambda a: a.ClearField("type"))
first_attribute("graph.syntax", "attribute-with-a-tensor-too", lambda a: a.t.CopyFrom(outside()))
first_attribute("graph.syntax", "attribute-with-a-graph-too", lambda a: a.g.CopyFrom(inner()))


@changed("graph.operator")
def attribute_twice(model: ModelProto) -> None:
    node = next(node for node in model.graph.node if node.attribute)
    node.attribute.append(node.attribute[0])


@changed("graph.syntax")
def node_overload(model: ModelProto) -> None:
    model.graph.node[0].overload = "x"


@changed("graph.syntax")
def node_of_two_outputs(model: ModelProto) -> None:
    model.graph.node[0].output.append("second")


# The model.


def model_field(code: str, name: str, change: Callable[[ModelProto], object]) -> None:
    """A case that changes fields of the model."""

    def apply(model: ModelProto) -> None:
        change(model)

    case(code, name, apply)


model_field("graph.version", "ir-version-next", lambda m: setattr(m, "ir_version", 13))
model_field("graph.version", "ir-version-old", lambda m: setattr(m, "ir_version", 3))
model_field("graph.version", "ir-version-negative", lambda m: setattr(m, "ir_version", -12))
model_field("graph.version", "operators-next", lambda m: setattr(m.opset_import[0], "version", 25))
model_field("graph.version", "operators-old", lambda m: setattr(m.opset_import[0], "version", 7))
model_field("graph.version", "operators-none", lambda m: m.ClearField("opset_import"))
model_field("graph.version", "operators-custom", lambda m: m.opset_import.add(domain="com.microsoft", version=1))
model_field("graph.version", "operators-twice", lambda m: m.opset_import.add(domain="", version=24))
model_field("graph.version", "operators-of-another-name", lambda m: setattr(m.opset_import[0], "domain", "ai.onnx"))
model_field("graph.syntax", "model-domain", lambda m: setattr(m, "domain", "x"))
model_field("graph.syntax", "model-version", lambda m: setattr(m, "model_version", 1))
model_field("graph.syntax", "model-metadata", lambda m: m.metadata_props.add(key="x", value="y"))
model_field("graph.syntax", "model-training", lambda m: m.training_info.add())
model_field(
    "graph.syntax",
    "model-function",
    lambda m: m.functions.append(
        helper.make_function(
            "local", "Evil", [], ["x"], [helper.make_node("Constant", [], ["x"], value=outside())], m.opset_import
        )
    ),
)
model_field("graph.values", "model-producer-long", lambda m: setattr(m, "producer_name", "x" * 257))
model_field("graph.values", "model-producer-control", lambda m: setattr(m, "producer_name", "\x1b[2J"))
model_field("graph.values", "graph-name-long", lambda m: setattr(m.graph, "name", "x" * 257))
model_field("graph.values", "node-name-long", lambda m: setattr(m.graph.node[0], "name", "x" * 257))
model_field("graph.size", "operators-nine", lambda m: [m.opset_import.add(domain=f"d{i}", version=1) for i in range(8)])
model_field("graph.values", "graph-name-control", lambda m: setattr(m.graph, "name", "a\nb"))
model_field("graph.syntax", "graph-without-name", lambda m: m.graph.ClearField("name"))
model_field("graph.syntax", "model-without-graph", lambda m: m.ClearField("graph"))
model_field("graph.syntax", "graph-sparse", lambda m: m.graph.sparse_initializer.add())
model_field("graph.syntax", "graph-quantised", lambda m: m.graph.quantization_annotation.add())
model_field("graph.syntax", "graph-value-info", lambda m: m.graph.value_info.add().CopyFrom(m.graph.output[0]))
model_field("graph.syntax", "graph-metadata", lambda m: m.graph.metadata_props.add(key="x", value="y"))
model_field("graph.ports", "graph-empty", lambda m: m.graph.CopyFrom(GraphProto(name="empty")))


# Inputs and outputs.


def shape(model: ModelProto, number: int, *, output: bool = False) -> list[TensorShapeProto.Dimension]:
    """The dimensions of an input, or of an output."""
    value = (model.graph.output if output else model.graph.input)[number]
    return list(value.type.tensor_type.shape.dim)


model_field("graph.ports", "input-missing", lambda m: m.graph.input.pop())
model_field("graph.ports", "input-more", lambda m: m.graph.input.add().CopyFrom(m.graph.input[0]))
model_field("graph.ports", "input-renamed", lambda m: setattr(m.graph.input[1], "name", "passed"))
model_field("graph.ports", "input-swapped", lambda m: m.graph.input.append(m.graph.input.pop(1)))
model_field("graph.ports", "input-dtype", lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 6))
model_field("graph.ports", "input-text", lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 8))
model_field("graph.ports", "input-rank", lambda m: m.graph.input[0].type.tensor_type.shape.dim.pop())
model_field(
    "graph.size", "input-of-many-sizes", lambda m: m.graph.input[0].type.tensor_type.shape.dim.extend(shape(m, 0) * 5)
)
model_field("graph.ports", "input-size", lambda m: setattr(shape(m, 3)[1], "dim_value", 3))
model_field("graph.ports", "input-size-named", lambda m: setattr(shape(m, 3)[1], "dim_param", "heads"))
model_field("graph.ports", "input-size-fixed", lambda m: setattr(shape(m, 0)[0], "dim_value", 1))
model_field("graph.ports", "input-size-renamed", lambda m: setattr(shape(m, 0)[0], "dim_param", "rows"))
model_field("graph.ports", "input-size-none", lambda m: shape(m, 0)[0].Clear())
model_field("graph.syntax", "input-without-type", lambda m: m.graph.input[0].ClearField("type"))
model_field("graph.syntax", "input-without-shape", lambda m: m.graph.input[0].type.tensor_type.ClearField("shape"))
model_field("graph.syntax", "input-sequence", lambda m: m.graph.input[0].type.sequence_type.SetInParent())
model_field(
    "graph.ports", "input-of-a-weight", lambda m: m.graph.input.add(name=TABLE).type.CopyFrom(m.graph.input[0].type)
)
model_field("graph.ports", "output-missing", lambda m: m.graph.output.pop())
model_field("graph.ports", "output-more", lambda m: m.graph.output.add().CopyFrom(m.graph.output[0]))
model_field("graph.ports", "output-renamed", lambda m: setattr(m.graph.output[0], "name", "stream"))
model_field("graph.ports", "output-swapped", lambda m: m.graph.output.append(m.graph.output.pop(0)))
model_field("graph.ports", "output-dtype", lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 11))
model_field("graph.ports", "output-size", lambda m: setattr(shape(m, 0, output=True)[2], "dim_value", 25))


# Values.


@changed("graph.values")
def value_twice(model: ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[0].output[0]


@changed("graph.values")
def value_of_an_input(model: ModelProto) -> None:
    model.graph.node[0].output[0] = "past"


@changed("graph.values")
def value_of_a_weight(model: ModelProto) -> None:
    model.graph.node[0].output[0] = TABLE


@changed("graph.values")
def value_of_a_weight_twice(model: ModelProto) -> None:
    model.graph.initializer.append(tensor(model))


@changed("graph.values")
def value_of_a_constant_and_an_input(model: ModelProto) -> None:
    constant = next(each for each in model.graph.initializer if not each.external_data)
    constant.name = "past"


@changed("graph.values")
def value_unknown(model: ModelProto) -> None:
    model.graph.node[3].input[0] = "nowhere"


@changed("graph.values")
def value_empty(model: ModelProto) -> None:
    model.graph.node[3].input[0] = ""


@changed("graph.values")
def value_named_nothing(model: ModelProto) -> None:
    model.graph.node[0].output[0] = ""


@changed("graph.values")
def value_of_itself(model: ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[0].output[0]


@changed("graph.values")
def nodes_turned_round(model: ModelProto) -> None:
    nodes = list(model.graph.node)[::-1]
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)


@changed("graph.values")
def node_missing(model: ModelProto) -> None:
    del model.graph.node[-1]


@changed("graph.values")
def nodes_none(model: ModelProto) -> None:
    model.graph.ClearField("node")


@changed("graph.values")
def value_of_a_long_name(model: ModelProto) -> None:
    model.graph.node[0].output[0] = "x" * 257


@changed("graph.values")
def value_of_a_name_with_a_space(model: ModelProto) -> None:
    model.graph.node[0].output[0] = "a b"


@changed("graph.values")
def value_of_a_name_in_unicode(model: ModelProto) -> None:
    model.graph.node[0].output[0] = "\u0430"


@changed("graph.values")
def constant_unused(model: ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("more", TensorProto.FLOAT, [1], bytes(4), raw=True))


# Numbers in the graph.


def constant(code: str, name: str, dtype: int, dims: list[int], raw: bytes | None) -> None:
    """A case with one more constant, which a node takes."""

    def change(model: ModelProto) -> None:
        more = model.graph.initializer.add(name="more", data_type=dtype, dims=dims)
        if raw is not None:
            more.raw_data = raw
        model.graph.node.append(helper.make_node("Relu", ["more"], ["rest"]))

    case(code, f"constant-{name}", change)


constant("graph.constants", "short", TensorProto.FLOAT, [4], bytes(15))
constant("graph.constants", "long", TensorProto.FLOAT, [4], bytes(17))
constant("graph.constants", "without-data", TensorProto.FLOAT, [4], None)
constant("graph.constants", "empty", TensorProto.FLOAT, [0], b"")
constant("graph.constants", "negative", TensorProto.FLOAT, [-1, -4], bytes(16))
constant("graph.constants", "overflow", TensorProto.FLOAT, [2**62, 4], bytes(0))
constant("graph.constants", "overflow-to-a-size", TensorProto.FLOAT, [2**62 + 1, 4], bytes(16))
constant("graph.constants", "text", TensorProto.STRING, [1], b"x")
constant("graph.constants", "double", TensorProto.DOUBLE, [1], bytes(8))
constant("graph.constants", "of-four-bits", TensorProto.INT4, [2], bytes(1))
constant("graph.constants", "of-no-dtype", 0, [1], bytes(4))
constant("graph.constants", "of-an-unknown-dtype", 99, [1], bytes(4))
constant("graph.size", "large", TensorProto.FLOAT, [2**18], bytes(2**20))
constant("graph.size", "of-many-sizes", TensorProto.FLOAT, [1] * 9, bytes(4))


@changed("graph.syntax")
def constant_in_numbers(model: ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("more", TensorProto.FLOAT, [1], [1.0]))


@changed("graph.syntax")
def constant_in_parts(model: ModelProto) -> None:
    tensor(model).segment.begin = 0


@changed("graph.weights")
def constant_from_elsewhere(model: ModelProto) -> None:
    model.graph.initializer.add(name="more", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)


# Bytes.


def bytes_case(code: str, name: str, change: Callable[[bytes], bytes]) -> None:
    """A case that changes the bytes."""
    case(code, f"bytes-{name}", lambda model: change(written(model)))


bytes_case("graph.syntax", "none", lambda data: b"")
bytes_case("graph.syntax", "truncated", lambda data: data[:-1])
bytes_case("graph.syntax", "truncated-in-the-middle", lambda data: data[: len(data) // 2])
bytes_case("graph.syntax", "one-more", lambda data: data + b"\0")
bytes_case("graph.syntax", "twice", lambda data: data * 2)
bytes_case("graph.syntax", "version-twice", lambda data: data + b"\x08\x0c")
bytes_case("graph.syntax", "graph-twice", lambda data: data + b"\x3a\x00")
bytes_case("graph.syntax", "field-unknown", lambda data: data + b"\xf8\x07\x01")
bytes_case("graph.syntax", "field-0", lambda data: data + b"\x00\x01")
bytes_case("graph.syntax", "field-larger-than-any", lambda data: data + b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
bytes_case("graph.syntax", "group", lambda data: data + b"\x0b\x0c")
bytes_case("graph.syntax", "nested-groups", lambda data: data + b"\x0b" * 100_000)
bytes_case("graph.syntax", "wire-type-of-a-number", lambda data: b"\x09" + bytes([12, 0, 0, 0, 0, 0, 0, 0]) + data[2:])
bytes_case("graph.syntax", "wire-type-of-text", lambda data: b"\x10\x01" + data)
bytes_case("graph.syntax", "number-in-two-bytes", lambda data: b"\x08\x8c\x00" + data[2:])
bytes_case("graph.syntax", "number-in-eleven-bytes", lambda data: b"\x08" + b"\x8c" + b"\x80" * 9 + b"\x00" + data[2:])
bytes_case("graph.syntax", "number-above-64-bits", lambda data: b"\x08" + b"\xff" * 9 + b"\x02" + data[2:])
bytes_case("graph.syntax", "number-without-end", lambda data: data + b"\x08\x80")
bytes_case("graph.syntax", "tag-in-two-bytes", lambda data: b"\x88\x00\x0c" + data[2:])
bytes_case("graph.syntax", "length-past-the-end", lambda data: data + b"\x42\x7f")
bytes_case("graph.syntax", "length-of-64-bits", lambda data: data + b"\x42" + b"\xff" * 9 + b"\x01")
bytes_case("graph.syntax", "length-that-wraps", lambda data: data + b"\x42" + b"\xfe" + b"\xff" * 8 + b"\x01")
bytes_case("graph.syntax", "json", lambda data: b'{"irVersion": "12"}')
bytes_case("graph.syntax", "text", lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
bytes_case("graph.syntax", "pickle", lambda data: b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.")
bytes_case("graph.size", "16-MiB-and-one", lambda data: data + bytes(onnx_rules.MAX_GRAPH + 1 - len(data)))


@changed("graph.syntax")
def bytes_packed(model: ModelProto) -> bytes:
    """Pack sizes into one field, as writers of protobuf 3 do."""
    more = b"\x42\x04more" + b"\x10\x01" + b"\x0a\x02\x01\x01" + b"\x4a\x04" + bytes(4)
    graph = model.graph.SerializeToString(deterministic=True) + b"\x2a" + bytes([len(more)]) + more
    model.ClearField("graph")
    return written(model) + b"\x3a" + varint(len(graph)) + graph


@changed("graph.size")
def nodes_too_many(model: ModelProto) -> None:
    more = [helper.make_node("Relu", ["past"], ["x"])] * onnx_reader.MAX_NODES
    model.graph.node.extend(more)


@changed("graph.size")
def initializers_too_many(model: ModelProto) -> None:
    one = helper.make_tensor("more", TensorProto.FLOAT, [1], bytes(4), raw=True)
    model.graph.initializer.extend([one] * onnx_reader.MAX_INITIALIZERS)


# Bundles of the cases.


def good_bundle(root: Path) -> Path:
    """Make a small bundle with good graphs."""
    write_llama3(root)
    add_graphs(root, "standard")
    return root


def changed_graph(root: Path, each: Case) -> bytes:
    """The bytes of a case, made from the bundle in ``root``."""
    model = ModelProto.FromString((root / f"{SHARD}.onnx").read_bytes())
    data = each.change(model)
    return written(model) if data is None else data


def relist(root: Path, path: str, data: bytes) -> None:
    """Write a file that no id depends on, and update every entry that lists it."""
    bundle = splitbundle.open(root)
    listed = {**bundle.manifest.files, path: write_file(root, path, data)}
    changed = replace(bundle.manifest, files=listed).to_bytes()
    write_file(root, names.MANIFEST, changed)
    lines = {path: file.sha256 for path, file in listed.items()} | {names.MANIFEST: hashlib.sha256(changed).hexdigest()}
    sums = "".join(document.sums_line(lines[path], path) for path in sorted(lines))
    write_file(root, names.SUMS, sums.encode("ascii"))


def write_all(directory: Path) -> None:
    """Write every case as a separate bundle."""
    directory.mkdir(parents=True, exist_ok=True)
    good = good_bundle(directory / "good.splitbundle")
    for each in CASES:
        root = Path(shutil.copytree(good, directory / f"{each.name}.splitbundle"))
        relist(root, f"{SHARD}.onnx", changed_graph(good, each))
        about = {"shard": SHARD, "code": each.code, "file": f"{SHARD}.onnx"}
        (directory / f"{each.name}.json").write_text(json.dumps(about, indent=2) + "\n", "ascii")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
