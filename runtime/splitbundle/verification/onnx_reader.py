"""A strict and bounded reader for the parts of ONNX's ``ModelProto`` that a bundle's graph may use.

The reader reads each message by a schema. It refuses a field that the schema lacks, a field of another wire type, and
a second value for a field that may occur once. It also refuses a number in more bytes than necessary. So a graph has
only one meaning, whichever parser reads it later. The reader is not recursive: the caller reads each nested message by
its offsets.
"""

from __future__ import annotations

import struct
from typing import Any, Final, NoReturn

from splitbundle.errors import BundleError, Problem

INTEGER: Final = 0
"""A varint, as an int64."""
FLOAT: Final = 1
"""Four bytes, as a float."""
TEXT: Final = 2
"""Bytes."""
PLACE: Final = 3
"""A message, or bytes that are not parsed: the offset of its first byte, and the offset after its last byte."""
_WIRE: Final = {INTEGER: 0, FLOAT: 5, TEXT: 2, PLACE: 2}

MAX_NODES: Final = 2**15
MAX_INITIALIZERS: Final = 2**14
MAX_PORTS: Final = 2**15
MAX_NODE_INPUTS: Final = 16
MAX_OPERATOR_SETS: Final = 8
MAX_ATTRIBUTES: Final = 8
MAX_OUTPUTS: Final = 2
MAX_BODY_NODES: Final = 256
MAX_BODY_INPUTS: Final = 3
MAX_DIMENSIONS: Final = 8
"""The most dimensions of a tensor, and also the most items in an attribute."""

Place = tuple[int, int]
Message = dict[str, Any]
"""The fields of a message: field name -> value, or a list of values if the field may be repeated."""


class Schema:
    """The fields that a message may have."""

    def __init__(self, name: str, refused: str, /, **fields: tuple[int, int, int] | tuple[int, int, int, bool]) -> None:
        """Define a message.

        A field is a tuple: its number, its kind, its largest number of values (0: a single value), and whether it may
        be absent. ``refused`` names, as ``number:name``, the fields that ONNX defines but a bundle doesn't allow.
        """
        self.name = name
        self.by_tag = {field[0] << 3 | _WIRE[field[1]]: (key, field[1], field[2]) for key, field in fields.items()}
        self.numbers = {field[0]: key for key, field in fields.items()}
        self.refused = {int(number): key for number, _, key in (each.partition(":") for each in refused.split())}
        self.required = frozenset(key for key, field in fields.items() if len(field) == 3 and not field[2])


MODEL: Final = Schema(
    "ModelProto",
    "4:domain 5:model_version 6:doc_string 14:metadata_props 20:training_info 25:functions 26:configuration",
    ir_version=(1, INTEGER, 0),
    producer_name=(2, TEXT, 0, True),
    producer_version=(3, TEXT, 0, True),
    graph=(7, PLACE, 0),
    opset_import=(8, PLACE, MAX_OPERATOR_SETS),
)
OPERATOR_SET: Final = Schema("OperatorSetIdProto", "", domain=(1, TEXT, 0, True), version=(2, INTEGER, 0))
GRAPH: Final = Schema(
    "GraphProto",
    "10:doc_string 13:value_info 14:quantization_annotation 15:sparse_initializer 16:metadata_props",
    node=(1, PLACE, MAX_NODES),
    name=(2, TEXT, 0),
    initializer=(5, PLACE, MAX_INITIALIZERS),
    input=(11, PLACE, MAX_PORTS),
    output=(12, PLACE, MAX_PORTS),
)
NODE: Final = Schema(
    "NodeProto",
    "6:doc_string 8:overload 9:metadata_props 10:device_configurations",
    input=(1, TEXT, MAX_NODE_INPUTS),
    output=(2, TEXT, MAX_OUTPUTS),
    name=(3, TEXT, 0, True),
    op_type=(4, TEXT, 0),
    attribute=(5, PLACE, MAX_ATTRIBUTES),
    domain=(7, TEXT, 0, True),
)
BODY: Final = Schema(
    "GraphProto of a Loop",
    "5:initializer 10:doc_string 13:value_info 14:quantization_annotation 15:sparse_initializer 16:metadata_props",
    node=(1, PLACE, MAX_BODY_NODES),
    name=(2, TEXT, 0),
    input=(11, PLACE, MAX_BODY_INPUTS),
    output=(12, PLACE, MAX_OUTPUTS),
)
BODY_ATTRIBUTE: Final = Schema(
    "AttributeProto of a Loop",
    "2:f 3:i 4:s 5:t 7:floats 8:ints 9:strings 10:tensors 11:graphs 13:doc_string 14:tp 15:type_protos "
    "21:ref_attr_name 22:sparse_tensor 23:sparse_tensors",
    name=(1, TEXT, 0),
    g=(6, PLACE, 0),
    type=(20, INTEGER, 0),
)
ATTRIBUTE: Final = Schema(
    "AttributeProto",
    "5:t 6:g 7:floats 9:strings 10:tensors 11:graphs 13:doc_string 14:tp 15:type_protos 21:ref_attr_name "
    "22:sparse_tensor 23:sparse_tensors",
    name=(1, TEXT, 0),
    f=(2, FLOAT, 0, True),
    i=(3, INTEGER, 0, True),
    s=(4, TEXT, 0, True),
    ints=(8, INTEGER, MAX_DIMENSIONS),
    type=(20, INTEGER, 0),
)
TENSOR: Final = Schema(
    "TensorProto",
    "3:segment 4:float_data 5:int32_data 6:string_data 7:int64_data 10:double_data 11:uint64_data 12:doc_string "
    "16:metadata_props",
    dims=(1, INTEGER, MAX_DIMENSIONS),
    data_type=(2, INTEGER, 0),
    name=(8, TEXT, 0),
    raw_data=(9, PLACE, 0, True),
    external_data=(13, PLACE, 3),
    data_location=(14, INTEGER, 0, True),
)
ENTRY: Final = Schema("StringStringEntryProto", "", key=(1, TEXT, 0), value=(2, TEXT, 0))
VALUE: Final = Schema("ValueInfoProto", "3:doc_string 4:metadata_props", name=(1, TEXT, 0), type=(2, PLACE, 0))
TYPE: Final = Schema(
    "TypeProto",
    "4:sequence_type 5:map_type 6:denotation 7:opaque_type 8:sparse_tensor_type 9:optional_type",
    tensor_type=(1, PLACE, 0),
)
TENSOR_TYPE: Final = Schema("TypeProto.Tensor", "", elem_type=(1, INTEGER, 0), shape=(2, PLACE, 0))
SHAPE: Final = Schema("TensorShapeProto", "", dim=(1, PLACE, MAX_DIMENSIONS))
DIMENSION: Final = Schema(
    "TensorShapeProto.Dimension", "3:denotation", dim_value=(1, INTEGER, 0, True), dim_param=(2, TEXT, 0, True)
)


class Reader:
    """Read messages from the bytes of a graph."""

    def __init__(self, data: bytes, file: str) -> None:
        self.data, self.file = data, file

    def refuse(self, code: str, offset: int, expected: str, got: str) -> NoReturn:
        """Raise BundleError about the byte at ``offset``."""
        raise BundleError(Problem(code=code, file=self.file, offset=offset, expected=expected, got=got))

    def message(self, schema: Schema, place: Place) -> Message:
        """Return the fields of the message at ``place``.

        Raises:
            BundleError: ``graph.syntax``; ``graph.size`` if a field is repeated too often.
        """
        data, by_tag = self.data, schema.by_tag
        at, stop = place
        found: Message = {}
        while at < stop:
            start = at
            tag = data[at]
            at += 1
            if tag > 127:
                tag, at = self._varint(start, stop)
            field = by_tag.get(tag)
            if field is None:
                self._refuse_field(schema, tag, start)
            name, kind, most = field
            value: Any
            if kind == FLOAT:
                if at + 4 > stop:
                    self.refuse("graph.syntax", start, f"4 bytes of {schema.name}.{name}", f"{stop - at}")
                (value,) = struct.unpack_from("<f", data, at)
                at += 4
            else:
                if at < stop and data[at] < 128:
                    value = data[at]
                    at += 1
                else:
                    value, at = self._varint(at, stop)
                if kind != INTEGER:
                    end = at + value
                    if value < 0 or end > stop:
                        self.refuse(
                            "graph.syntax",
                            start,
                            f"at most {stop - at} bytes of {schema.name}.{name}, which end at {stop}",
                            f"a length of {value % 2**64}",
                        )
                    value = data[at:end] if kind == TEXT else (at, end)
                    at = end
            if most:
                items = found.get(name)
                if items is None:
                    found[name] = [value]
                else:
                    items.append(value)
                    if len(items) > most:
                        self.refuse("graph.size", start, f"at most {most} of {schema.name}.{name}", "more")
            elif name in found:
                self.refuse("graph.syntax", start, f"{schema.name}.{name} once", "a second one")
            else:
                found[name] = value
        if not schema.required <= found.keys():
            missing = min(schema.required - found.keys())
            self.refuse("graph.syntax", place[0], f"a {schema.name} with a field {missing}", "one without it")
        return found

    def _varint(self, start: int, stop: int) -> tuple[int, int]:
        """Return the signed number at ``start``, and the offset after it."""
        value, shift, at = 0, 0, start
        while at < stop and shift < 70 and self.data[at] > 127:
            value |= (self.data[at] & 127) << shift
            shift, at = shift + 7, at + 1
        last = self.data[at] if at < stop and shift < 70 else 0
        value |= last << shift
        if (shift and not last) or at >= stop or value >= 2**64:
            expected = f"a 64-bit number in as few bytes as possible that ends by {stop}"
            self.refuse("graph.syntax", start, expected, "another number")
        return value - (value >> 63 << 64), at + 1

    def _refuse_field(self, schema: Schema, tag: int, start: int) -> NoReturn:
        number, wire = tag >> 3, tag & 7
        if number in schema.numbers:
            wanted = next(known & 7 for known in schema.by_tag if known >> 3 == number)
            expected = f"{schema.name}.{schema.numbers[number]} of wire type {wanted}"
            self.refuse("graph.syntax", start, expected, f"wire type {wire}")
        name = schema.refused.get(number)
        got = f"field {number}" if name is None else f"{name}, which graphs of a bundle don't have"
        self.refuse("graph.syntax", start, f"only {', '.join(schema.numbers.values())} in a {schema.name}", got)
