"""Check a graph against the manifest and the weight files: ``spec/v1/bundle.md``, section "Graphs".

A graph may come from an untrusted source, and a runtime opens any external data that the graph names. So this module
checks each graph before it is used or verified. It needs only the standard library.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format.dtypes import ITEM_SIZES, ONNX_CODES
from splitbundle.format.graph import DOMAINS, IR_VERSION, Graph, Port
from splitbundle.format.graph_operators import (
    BODY,
    BOOL,
    KINDS,
    LOOP,
    OF_DOMAINS,
    OPERATORS,
    SIZE,
    VALUES,
    Operator,
)
from splitbundle.format.manifest.document import EMBEDDING, Shard
from splitbundle.format.weight_layout import SCALE, Stored
from splitbundle.storage import files
from splitbundle.verification import onnx_reader as reader
from splitbundle.verification.onnx_reader import Message, Place, Reader

if TYPE_CHECKING:
    from splitbundle.storage.reader import BundleReader

MAX_GRAPH: Final = 16 * 2**20
"""In bytes. A graph holds no weights, so it is small."""
MAX_CONSTANTS: Final = 2**20
"""In bytes, for all numbers inside the graph itself."""
CONSTANTS: Final = ("float32", "float16", "int64", "uint8")
CARRIED: Final = ("float32", "float16")
"""The dtypes of the value that a loop carries."""
_NAME: Final = re.compile(rb"[!-~]{1,256}")
_TEXT: Final = re.compile(rb"[ -~]{0,256}")
_DTYPES: Final = {code: dtype for dtype, code in ONNX_CODES.items()}
_DEFAULT, _EXTERNAL = 0, 1  # values of ONNX's TensorProto.DataLocation
_Kind = tuple[int, tuple[int | bytes, ...]]  # the number of a dtype, and the sizes or their names
_NUMBER, _CONDITION = (ONNX_CODES["int64"], ()), (BOOL, ())
_BODY_PORTS: Final[dict[str, tuple[_Kind, ...]]] = {"input": (_NUMBER, _CONDITION), "output": (_CONDITION,)}


def read(bundle: BundleReader, shard: Shard, graph: Graph) -> bytes:
    """Check a shard's graph and the headers of its weight files, and return the bytes of the graph.

    Raises:
        BundleError: ``graph.*``, ``file.*``, ``weights.*``.
    """
    listed = bundle.manifest.files[graph.file]
    _check_size(listed.size, graph.file)
    data = files.read_listed(bundle.path, graph.file, listed, MAX_GRAPH)
    check(data, graph, used(shard, bundle.locate_tensors(shard)))
    return data


def used(shard: Shard, places: dict[str, Stored]) -> dict[str, Stored]:
    """Return the tensors that a shard's graph uses.

    These are all tensors of its units, with one exception. If the shard needs the embedding only for a tied head, its
    graph uses only the token table of the embedding, and its scales if it is quantized.
    """
    if shard.embeds or "embedding" not in shard.units:
        return places
    table = EMBEDDING, f"{EMBEDDING}{SCALE}"
    return {name: place for name, place in places.items() if name in table or not name.startswith("embedding.")}


def check(data: bytes, graph: Graph, weights: Mapping[str, Stored]) -> None:
    """Check the bytes of a graph.

    Args:
        data: any bytes.
        graph: the graph's entry in the manifest.
        weights: the tensors that the graph must have as external data, and their locations.

    Raises:
        BundleError: ``graph.*``, for the first broken rule, with the offset of the message that breaks it.
    """
    _check_size(len(data), graph.file)
    _Check(data, graph, weights).model()


def _check_size(size: int, file: str) -> None:
    if size > MAX_GRAPH:
        raise BundleError(
            Problem(
                code="graph.size", file=file, offset=MAX_GRAPH, expected=f"at most {MAX_GRAPH} bytes", got=f"{size}"
            )
        )


class _Check:
    def __init__(self, data: bytes, graph: Graph, weights: Mapping[str, Stored]) -> None:
        self.reader = Reader(data, graph.file)
        self.size = len(data)
        self.graph = graph
        self.weights = {name.encode("ascii"): place for name, place in weights.items()}
        self.values: set[bytes] = set()
        self.taken: set[bytes] = set()
        self.constants = 0
        self.attributes: dict[tuple[bytes, bytes], bytes] = {}
        self.nodes = 0
        self.inside: set[bytes] | None = None
        """The values of the body that is being checked. None: the nodes are of the graph itself."""
        self.ended: set[bytes] = set()
        """The values of bodies that were checked, which no other node can take."""
        self.sizes: set[bytes] = set()
        """The outputs of ``Size`` nodes. Only these can be numbers of iterations."""

    def model(self) -> None:
        refuse = self.reader.refuse
        model = self.reader.message(reader.MODEL, (0, self.size))
        if model["ir_version"] != IR_VERSION:
            refuse("graph.version", 0, f"ir_version {IR_VERSION}", str(model["ir_version"]))
        for text in (model.get("producer_name", b""), model.get("producer_version", b"")):
            self.text(text, 0)
        left = {b"": self.graph.opset}
        left |= {name.encode("ascii"): version for name, version in DOMAINS.get(self.graph.variant, {}).items()}
        shown = " and ".join(f"{version} of {_shown(name)}" for name, version in left.items())
        wanted = f"these operator sets, each once: {shown}"
        for at in model.get("opset_import", []):
            found = self.reader.message(reader.OPERATOR_SET, at)
            domain = found.get("domain", b"")
            if left.pop(domain, None) != found["version"]:
                refuse("graph.version", at[0], wanted, f"{found['version']} of {_shown(domain)}")
        if left:
            refuse("graph.version", 0, wanted, f"none of {_shown(min(left))}")
        self.whole(model["graph"])

    def whole(self, place: Place) -> None:
        refuse = self.reader.refuse
        graph = self.reader.message(reader.GRAPH, place)
        self.text(graph["name"], place[0])
        self.ports("input", graph.get("input", []), self.graph.inputs, place)
        initializers = {self.initializer(at) for at in graph.get("initializer", ())}
        if left := self.weights.keys() - initializers:
            expected = "an initializer for every weight that the shard computes with"
            refuse("graph.weights", place[0], expected, f"none called {_shown(min(left))}")
        results = self.nodes_of(graph.get("node", []), place)
        self.ports("output", graph.get("output", []), self.graph.outputs, place)
        for port in self.graph.outputs:
            if port.name.encode("utf-8") not in results:
                refuse("graph.values", place[0], f"a node that gives {quoted(port.name)}", "none")
        if unused := initializers - self.taken:
            refuse("graph.values", place[0], "initializers that nodes take", f"{_shown(min(unused))}, which none does")

    def text(self, text: bytes, offset: int) -> None:
        """Check a text that is only a description, such as the producer's name."""
        if not _TEXT.fullmatch(text):
            expected = "at most 256 printable characters of ASCII"
            self.reader.refuse("graph.values", offset, expected, _shown(text))

    def define(self, name: bytes, offset: int) -> None:
        """Record the name of a value, which must be unique."""
        if not _NAME.fullmatch(name):
            self.reader.refuse("graph.values", offset, "a name of 1 to 256 of the characters ! to ~", _shown(name))
        if name in self.values or name in self.ended:
            self.reader.refuse("graph.values", offset, "a name that no other value has", f"{_shown(name)} again")
        self.values.add(name)
        if self.inside is not None:
            self.inside.add(name)

    def ports(self, which: str, found: list[Place], ports: tuple[Port, ...], place: Place) -> None:
        """Check the inputs or the outputs. Inputs are then values that nodes can take."""
        for at, port in zip(found, ports, strict=False):
            name, kind = self.port(at)
            wanted = tuple(size if isinstance(size, int) else size.encode("utf-8") for size in port.shape)
            if (name, kind) != (port.name.encode("utf-8"), (ONNX_CODES[port.dtype], wanted)):
                self.reader.refuse("graph.ports", at[0], f"the {which} {port}", f"{_shown(name)}: {_shown_kind(kind)}")
            if which == "input":
                self.define(name, at[0])
        if len(found) != len(ports):
            self.reader.refuse("graph.ports", place[0], f"{len(ports)} {which}s", str(len(found)))

    def port(self, at: Place) -> tuple[bytes, _Kind]:
        """Return the name of an input or an output, and its dtype and shape."""
        value = self.reader.message(reader.VALUE, at)
        kind = self.reader.message(reader.TYPE, value["type"])
        tensor = self.reader.message(reader.TENSOR_TYPE, kind["tensor_type"])
        shape = self.reader.message(reader.SHAPE, tensor["shape"])
        return value["name"], (tensor["elem_type"], tuple(map(self.size_of, shape.get("dim", ()))))

    def size_of(self, at: Place) -> int | bytes:
        """Return the size of a dimension, or its name."""
        found = self.reader.message(reader.DIMENSION, at)
        if len(found) != 1:
            self.reader.refuse("graph.ports", at[0], "a dimension that has a size or a name", f"{len(found)} of them")
        value: int | bytes = found.popitem()[1]
        return value

    def initializer(self, at: Place) -> bytes:
        """Check an initializer, either a weight or numbers inside the graph, and return its name."""
        tensor = self.reader.message(reader.TENSOR, at)
        name: bytes = tensor["name"]
        self.define(name, at[0])
        where = tensor.get("data_location", _DEFAULT)
        if where == _EXTERNAL:
            self.weight(name, tensor, at[0])
        elif where != _DEFAULT:
            self.reader.refuse("graph.weights", at[0], "data_location DEFAULT or EXTERNAL", str(where))
        elif "external_data" in tensor or name in self.weights:
            self.reader.refuse("graph.weights", at[0], "a weight in external data, as data_location says", "DEFAULT")
        else:
            self.constant(name, tensor, at[0])
        return name

    def weight(self, name: bytes, tensor: Message, offset: int) -> None:
        stored = self.weights.get(name)
        if stored is None:
            expected = "external data only for the weights that the shard computes with"
            self.reader.refuse("graph.weights", offset, expected, _shown(name))
        shape, code = list(stored.tensor.shape), ONNX_CODES[stored.tensor.dtype]
        if (tensor["data_type"], tensor.get("dims", [])) != (code, shape):
            dtype = _DTYPES.get(tensor["data_type"], f"type {tensor['data_type']}")
            expected = f"{_shown(name)} as it is stored, {stored.tensor}"
            self.reader.refuse("graph.weights", offset, expected, f"{dtype} {tensor.get('dims', [])}")
        if "raw_data" in tensor:
            self.reader.refuse("graph.weights", offset, "external data or raw_data", "both")
        wanted = {b"location": stored.file, b"offset": str(stored.offset), b"length": str(stored.tensor.size)}
        entries = [self.reader.message(reader.ENTRY, at) for at in tensor.get("external_data", ())]
        found = {entry["key"]: entry["value"] for entry in entries}
        for key, value in wanted.items():
            if found.get(key) != value.encode("ascii"):
                expected = f"{key.decode('ascii')} {quoted(value)} of {_shown(name)}"
                self.reader.refuse("graph.weights", offset, expected, _shown(found[key]) if key in found else "none")
        if len(entries) != len(wanted):
            keys = ", ".join(_shown(entry["key"]) for entry in entries)
            self.reader.refuse("graph.weights", offset, "location, offset and length, each once", keys)

    def constant(self, name: bytes, tensor: Message, offset: int) -> None:
        dtype = _DTYPES.get(tensor["data_type"], "")
        if dtype not in CONSTANTS:
            expected, got = f"{' or '.join(CONSTANTS)} numbers", dtype or f"type {tensor['data_type']}"
            self.reader.refuse("graph.constants", offset, f"{expected} for {_shown(name)}", got)
        dims = tensor.get("dims", [])
        start, stop = tensor.get("raw_data", (0, 0))
        if "raw_data" not in tensor or min(dims, default=1) < 1 or math.prod(dims) * ITEM_SIZES[dtype] != stop - start:
            expected = f"raw_data of the size of {dtype} {quoted(dims)} for {_shown(name)}"
            self.reader.refuse("graph.constants", offset, expected, f"{stop - start} bytes")
        self.constants += stop - start
        if self.constants > MAX_CONSTANTS:
            self.reader.refuse("graph.size", offset, f"at most {MAX_CONSTANTS} bytes of numbers", "more")

    def nodes_of(self, places: list[Place], place: Place) -> set[bytes]:
        """Check nodes in their order, and return the names of their values."""
        self.nodes += len(places)
        if self.nodes > reader.MAX_NODES:
            self.reader.refuse("graph.size", place[0], f"at most {reader.MAX_NODES} nodes with those of bodies", "more")
        return {name for at in places for name in self.node(at)}

    def node(self, at: Place) -> list[bytes]:
        """Check a node, and return the names of its values."""
        node = self.reader.message(reader.NODE, at)
        domain: bytes = node.get("domain", b"")
        operator = OF_DOMAINS.get((self.graph.variant, domain, node["op_type"]))
        if not domain:
            operator = OPERATORS.get(node["op_type"])
        if operator is None:
            got = f"{_shown(node['op_type'])} of the domain {_shown(domain)}"
            self.reader.refuse("graph.operator", at[0], "an operator of the specification's list", got)
        if "name" in node:
            self.text(node["name"], at[0])
        outputs: list[bytes] = node.get("output", [])
        if len(outputs) != operator.outputs:
            expected = f"{operator.outputs} of NodeProto.output in a node of {_shown(node['op_type'])}"
            self.reader.refuse("graph.syntax", at[0], expected, str(len(outputs)))
        inputs = node.get("input", [])
        if not operator.minimum <= len(inputs) <= operator.maximum:
            expected = f"{operator.minimum} to {operator.maximum} inputs of {_shown(node['op_type'])}"
            self.reader.refuse("graph.operator", at[0], expected, str(len(inputs)))
        if node["op_type"] == LOOP:
            self.loop(node, at)
        elif "attribute" in node:
            self.attributes_of(node["op_type"], operator, node["attribute"])
        if domain:
            self.matmul_nbits(inputs[1], operator, node.get("attribute", []), at)
        if not self.values.issuperset(inputs):
            got = next(_shown(name) for name in inputs if name not in self.values)
            expected = f"inputs of {_shown(outputs[0])} that come before it"
            self.reader.refuse("graph.values", at[0], expected, f"{got}, which doesn't")
        self.taken.update(inputs)
        for output in outputs:
            self.define(output, at[0])
        if node["op_type"] == SIZE:
            self.sizes.add(outputs[0])
        return outputs

    def loop(self, node: Message, at: Place) -> None:
        """Check the body of a loop. Bodies have no loops, so this doesn't nest."""
        refuse, places = self.reader.refuse, node.get("attribute", [])
        if self.inside is not None:
            refuse("graph.operator", at[0], "no Loop in the body of a Loop", "one")
        if node["input"][0] not in self.sizes:
            expected, got = "the output of a Size node as the number of iterations", _shown(node["input"][0])
            refuse("graph.operator", at[0], expected, got)
        if len(places) != 1:
            refuse("graph.operator", at[0], "one attribute of Loop, body", str(len(places)))
        found = self.reader.message(reader.BODY_ATTRIBUTE, places[0])
        if (found["name"], found["type"]) != (BODY, KINDS["g"]):
            got = f"{_shown(found['name'])} of type {found['type']}"
            refuse("graph.operator", places[0][0], f"{_shown(BODY)} in the field g, of type {KINDS['g']}", got)
        self.inside = set()
        self.body(found["g"])
        self.values -= self.inside
        self.ended |= self.inside
        self.inside = None

    def body(self, place: Place) -> None:
        """Check a body. Its nodes take its inputs, and every value that comes before the loop."""
        refuse = self.reader.refuse
        body = self.reader.message(reader.BODY, place)
        self.text(body["name"], place[0])
        inputs, carried = self.body_ports("input", body.get("input", []), place)
        for name in inputs:
            self.define(name, place[0])
        results = self.nodes_of(body.get("node", []), place)
        outputs, kind = self.body_ports("output", body.get("output", []), place)
        if kind != carried:
            refuse("graph.ports", place[0], f"a carried output of {_shown_kind(carried)}", _shown_kind(kind))
        for name in outputs:
            if name not in results:
                refuse("graph.values", place[0], f"a node of the body that gives {_shown(name)}", "none")

    def body_ports(self, which: str, found: list[Place], place: Place) -> tuple[list[bytes], _Kind]:
        """Check the inputs or the outputs of a body. Return their names, and dtype and shape of the carried value."""
        refuse = self.reader.refuse
        wanted = _BODY_PORTS[which]
        if len(found) != len(wanted) + 1:
            refuse("graph.ports", place[0], f"{len(wanted) + 1} {which}s of a body", str(len(found)))
        ports = [self.port(at) for at in found]
        for at, (_, kind), expected in zip(found, ports, wanted, strict=False):
            if kind != expected:
                refuse("graph.ports", at[0], f"an {which} of {_shown_kind(expected)}", _shown_kind(kind))
        code, sizes = carried = ports[-1][1]
        if _DTYPES.get(code) not in CARRIED:
            refuse("graph.ports", found[-1][0], f"a carried value of {' or '.join(CARRIED)}", _shown_kind(carried))
        for size in sizes:
            if isinstance(size, bytes):
                self.text(size, found[-1][0])
            elif size < 1:
                refuse("graph.ports", found[-1][0], "sizes of at least 1", str(size))
        return [name for name, _ in ports], carried

    def matmul_nbits(self, codes: bytes, operator: Operator, places: list[Place], at: Place) -> None:
        """Check that a product reads a stored matrix of blocks of 4 bits, with this matrix's own sizes."""
        stored = self.weights.get(codes)
        shape = () if stored is None else stored.tensor.shape
        if stored is None or stored.tensor.dtype != "uint8" or len(shape) != 3:
            got = _shown(codes) if stored is None else f"{_shown(codes)}, {stored.tensor}"
            self.reader.refuse("graph.operator", at[0], "a weight of blocks of 4 bits as the second input", got)
        wanted = {b"K": 2 * shape[1] * shape[2], b"N": shape[0], b"block_size": 2 * shape[2]}
        found = {each["name"]: each["i"] for each in (self.reader.message(reader.ATTRIBUTE, at) for at in places)}
        for name in operator.attributes:
            if name not in found or found[name] != wanted.get(name, found[name]):
                expected = f"{_shown(name)} as {_shown(codes)} asks for: {wanted.get(name, 'a value')}"
                self.reader.refuse("graph.operator", at[0], expected, str(found.get(name, "none")))

    def attributes_of(self, kind: bytes, operator: Operator, places: list[Place]) -> None:
        names = {self.attribute(kind, operator, at) for at in places}
        if len(names) != len(places):
            self.reader.refuse("graph.operator", places[0][0], f"each attribute of {_shown(kind)} once", "one twice")

    def attribute(self, kind: bytes, operator: Operator, at: Place) -> bytes:
        """Check an attribute, and return its name."""
        data = self.reader.data[at[0] : at[1]]
        if (known := self.attributes.get((kind, data))) is not None:
            return known  # most nodes of an operator have the same attributes
        found = self.reader.message(reader.ATTRIBUTE, at)
        name: bytes = found["name"]
        holder = operator.attributes.get(name)
        if holder is None:
            shown = ", ".join(map(_shown, operator.attributes)) or "none"
            self.reader.refuse("graph.operator", at[0], f"attributes of {_shown(kind)}: {shown}", _shown(name))
        if found["type"] != KINDS[holder] or found.keys() != {"name", "type", holder}:
            expected = f"{_shown(name)} in the field {holder}, of type {KINDS[holder]}"
            self.reader.refuse("graph.operator", at[0], expected, f"{', '.join(found)} of type {found['type']}")
        if found[holder] not in VALUES.get((kind, name), (found[holder],)):
            shown = ", ".join(sorted(map(str, VALUES[kind, name])))
            self.reader.refuse("graph.operator", at[0], f"{_shown(name)} of {shown}", quoted(found[holder]))
        self.attributes[kind, data] = name
        return name


def _shown_kind(kind: _Kind) -> str:
    dtype = "bool" if kind[0] == BOOL else _DTYPES.get(kind[0], f"type {kind[0]}")
    return f"{dtype} [{', '.join(_shown(size) if isinstance(size, bytes) else str(size) for size in kind[1])}]"


def _shown(text: bytes) -> str:
    return quoted(text[:1024].decode("ascii", "backslashreplace"))
