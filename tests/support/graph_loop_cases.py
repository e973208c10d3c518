"""Graphs with a loop that a reader must refuse. Each is a good graph with a good loop and a small change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from splitbundle.verification import onnx_reader
from tests.support.graph_case import case, changed, varint, written

COUNT, SOME, LOOP = "loop.count", "loop.some", "loop"
CARRIED, GIVEN = "loop.carried", "loop.nothing"
ROWS: Final = ["rows", 3]


def value(name: str, dtype: int, shape: list[str | int] | None = None) -> object:
    """An input or an output of a body. By default it has no dimensions."""
    return helper.make_tensor_value_info(name, dtype, shape or [])


def body(prefix: str = LOOP) -> GraphProto:
    """A good body: it adds to the carried value what comes from outside."""
    nodes = [
        helper.make_node("Identity", [f"{prefix}.condition"], [f"{prefix}.goes_on"]),
        helper.make_node("Cast", [f"{prefix}.iteration"], [f"{prefix}.number"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{prefix}.number", GIVEN], [f"{prefix}.product"]),
        helper.make_node("Add", [f"{prefix}.carried", f"{prefix}.product"], [f"{prefix}.result"]),
    ]
    inputs = [
        value(f"{prefix}.iteration", TensorProto.INT64),
        value(f"{prefix}.condition", TensorProto.BOOL),
        value(f"{prefix}.carried", TensorProto.FLOAT, ROWS),
    ]
    outputs = [value(f"{prefix}.goes_on", TensorProto.BOOL), value(f"{prefix}.result", TensorProto.FLOAT, ROWS)]
    return helper.make_graph(nodes, f"{prefix}.body", inputs, outputs)


def add_loop(model: ModelProto) -> None:
    """Add a good loop, and before it the nodes that it needs, behind all other nodes."""
    model.graph.node.extend(
        [
            helper.make_node("Size", ["past"], [COUNT]),
            helper.make_node("Equal", [COUNT, COUNT], [SOME]),
            helper.make_node("Cast", ["past"], [GIVEN], to=TensorProto.FLOAT),
            helper.make_node("Loop", [COUNT, SOME, GIVEN], [LOOP], body=body()),
            helper.make_node("Relu", [LOOP], ["loop.after"]),
        ]
    )


def loop(model: ModelProto) -> NodeProto:
    """The loop."""
    return next(node for node in model.graph.node if node.op_type == "Loop")


def inner(model: ModelProto) -> GraphProto:
    """The body of the loop."""
    return loop(model).attribute[0].g


def looped(code: str, name: str, change: Callable[[ModelProto], object]) -> None:
    """A case that changes a graph with a good loop."""

    def apply(model: ModelProto) -> bytes | None:
        add_loop(model)
        found = change(model)
        return found if isinstance(found, bytes) else None

    case(code, f"loop-{name}", apply)


def node_in_body(code: str, name: str, *nodes: NodeProto, at: int = 0) -> None:
    """A case with more nodes in the body, before its node number ``at``."""

    def change(model: ModelProto) -> None:
        for node in reversed(nodes):
            inner(model).node.insert(at, node)

    looped(code, name, change)


def relu(given: str, result: str) -> NodeProto:
    """A node that takes one value and gives another."""
    return helper.make_node("Relu", [given], [result])


# Graphs inside graphs.

_OTHER = helper.make_node("Loop", [COUNT, SOME, GIVEN], ["more"], body=body("other"))
node_in_body("graph.operator", "in-a-loop", _OTHER)
node_in_body("graph.operator", "in-a-loop-without-a-body", helper.make_node("Loop", [COUNT, SOME, GIVEN], ["more"]))
node_in_body("graph.operator", "over-an-if", helper.make_node("If", [SOME], ["more"], then_branch=body("other")))
node_in_body("graph.operator", "over-a-scan", helper.make_node("Scan", [GIVEN], ["more"], body=body("other")))
node_in_body("graph.syntax", "over-a-graph-in-cast", helper.make_node("Cast", [GIVEN], ["more"], to=body("other")))
node_in_body("graph.operator", "over-another-domain", helper.make_node("Relu", [GIVEN], ["more"], domain="x"))
node_in_body("graph.operator", "over-a-constant", helper.make_node("Constant", [], ["more"], value_int=1))


@changed("graph.syntax")
def loop_body_of_relu(model: ModelProto) -> None:
    model.graph.node.append(helper.make_node("Cast", ["past"], ["more"], body=body()))


@changed("graph.operator")
def loop_nested_deeply(model: ModelProto) -> bytes:
    """Five hundred loops, each in the body of another one."""
    add_loop(model)
    outer = loop(model)
    del outer.attribute[:]
    head = node = outer.SerializeToString(deterministic=True)
    shell = body()
    del shell.node[:]
    rest = shell.SerializeToString(deterministic=True)
    for _ in range(500):
        graph = rest + b"\x0a" + varint(len(node)) + node
        attribute = b"\x0a\x04body" + b"\x32" + varint(len(graph)) + graph + b"\xa0\x01\x05"
        node = head + b"\x2a" + varint(len(attribute)) + attribute
    del model.graph.node[-2:]  # the loop, and the node that takes its result
    graph = model.graph.SerializeToString(deterministic=True) + b"\x0a" + varint(len(node)) + node
    model.ClearField("graph")
    return written(model) + b"\x3a" + varint(len(graph)) + graph


# The loop itself.


def attribute(code: str, name: str, change: Callable[[NodeProto], object]) -> None:
    """A case that changes the node of the loop."""
    looped(code, name, lambda model: change(loop(model)))


attribute("graph.operator", "without-body", lambda node: node.ClearField("attribute"))
attribute("graph.operator", "of-two-bodies", lambda node: node.attribute.add().CopyFrom(node.attribute[0]))
attribute("graph.operator", "body-of-another-name", lambda node: setattr(node.attribute[0], "name", "then_branch"))
attribute("graph.operator", "body-of-another-type", lambda node: setattr(node.attribute[0], "type", 10))
attribute("graph.syntax", "body-in-a-list", lambda node: node.attribute[0].graphs.add().CopyFrom(node.attribute[0].g))
attribute("graph.syntax", "body-missing", lambda node: node.attribute[0].ClearField("g"))
attribute("graph.syntax", "body-of-a-function", lambda node: setattr(node.attribute[0], "ref_attr_name", "body"))
attribute("graph.syntax", "body-and-a-number", lambda node: setattr(node.attribute[0], "i", 1))
attribute("graph.operator", "without-end", lambda node: node.input.__setitem__(0, "past"))
attribute("graph.operator", "of-no-count", lambda node: node.input.__setitem__(0, ""))
attribute("graph.values", "of-no-condition", lambda node: node.input.__setitem__(1, ""))
attribute("graph.operator", "that-carries-nothing", lambda node: node.input.pop())
attribute("graph.operator", "that-carries-two", lambda node: node.input.append(GIVEN))
attribute("graph.syntax", "of-two-outputs", lambda node: node.output.append("more"))
attribute("graph.syntax", "of-no-output", lambda node: node.output.pop())
attribute("graph.values", "of-itself", lambda node: node.input.__setitem__(2, LOOP))
attribute("graph.values", "called-as-a-value-of-its-body", lambda node: node.output.__setitem__(0, "loop.product"))


@changed("graph.operator")
def loop_count_of_a_constant(model: ModelProto) -> None:
    """A number that a stranger chooses would make a loop that doesn't end."""
    add_loop(model)
    model.graph.initializer.append(
        helper.make_tensor("more", TensorProto.INT64, [1], (2**62).to_bytes(8, "little"), raw=True)
    )
    loop(model).input[0] = "more"


# Parts of a body.


def in_body(code: str, name: str, change: Callable[[GraphProto], object]) -> None:
    """A case that changes the body."""
    looped(code, f"body-{name}", lambda model: change(inner(model)))


def weight(model: ModelProto) -> None:
    """Move a weight into the body."""
    moved = next(each for each in model.graph.initializer if each.external_data)
    inner(model).initializer.add().CopyFrom(moved)
    model.graph.initializer.remove(moved)


def size(graph: GraphProto, *, output: bool = False) -> object:
    """The first size of the carried value."""
    return (graph.output if output else graph.input)[-1].type.tensor_type.shape.dim[0]


looped("graph.weights", "body-with-a-weight", weight)
in_body(
    "graph.syntax",
    "with-an-initializer",
    lambda g: g.initializer.append(helper.make_tensor("more", TensorProto.FLOAT, [1], bytes(4), raw=True)),
)
in_body("graph.syntax", "with-a-sparse-initializer", lambda g: g.sparse_initializer.add())
in_body("graph.syntax", "with-value-info", lambda g: g.value_info.add().CopyFrom(g.output[0]))
in_body("graph.syntax", "with-metadata", lambda g: g.metadata_props.add(key="x", value="y"))
in_body("graph.syntax", "without-name", lambda g: g.ClearField("name"))
in_body("graph.values", "of-an-odd-name", lambda g: setattr(g, "name", "a\nb"))
in_body("graph.syntax", "with-a-quantised-value", lambda g: g.quantization_annotation.add())
in_body("graph.ports", "empty", lambda g: g.CopyFrom(GraphProto(name="empty")))
in_body("graph.values", "without-nodes", lambda g: g.ClearField("node"))
in_body("graph.ports", "without-inputs", lambda g: g.ClearField("input"))
in_body("graph.ports", "input-missing", lambda g: g.input.pop())
in_body("graph.size", "input-more", lambda g: g.input.add().CopyFrom(g.input[2]))
in_body("graph.values", "input-twice", lambda g: setattr(g.input[0], "name", CARRIED))
in_body("graph.ports", "input-swapped", lambda g: g.input.insert(0, g.input.pop(1)))
in_body("graph.ports", "input-dtype", lambda g: setattr(g.input[1].type.tensor_type, "elem_type", 7))
in_body("graph.ports", "input-size", lambda g: g.input[0].type.tensor_type.shape.dim.add(dim_value=1))
in_body("graph.syntax", "input-sequence", lambda g: g.input[2].type.sequence_type.SetInParent())
in_body("graph.syntax", "input-without-type", lambda g: g.input[2].ClearField("type"))
in_body("graph.ports", "output-missing", lambda g: g.output.pop())
in_body("graph.size", "output-more", lambda g: g.output.add().CopyFrom(g.output[1]))
in_body("graph.ports", "output-swapped", lambda g: g.output.insert(0, g.output.pop(1)))
in_body("graph.ports", "output-dtype", lambda g: setattr(g.output[1].type.tensor_type, "elem_type", 10))
in_body("graph.ports", "output-shape", lambda g: setattr(size(g, output=True), "dim_param", "others"))
in_body("graph.values", "output-of-nothing", lambda g: setattr(g.output[1], "name", "nowhere"))
in_body("graph.values", "output-of-an-input", lambda g: setattr(g.output[1], "name", CARRIED))
in_body("graph.values", "output-of-an-outer-value", lambda g: setattr(g.output[1], "name", GIVEN))
in_body("graph.ports", "carried-in-nothing", lambda g: size(g).Clear())
in_body("graph.ports", "carried-of-no-size", lambda g: setattr(size(g), "dim_value", 0))
in_body("graph.ports", "carried-of-a-negative-size", lambda g: setattr(size(g), "dim_value", -1))
in_body("graph.values", "carried-of-an-odd-size", lambda g: setattr(size(g), "dim_param", "a\x1bb"))


@changed("graph.ports")
def loop_body_carries_integers(model: ModelProto) -> None:
    add_loop(model)
    for port in (inner(model).input[2], inner(model).output[1]):
        port.type.tensor_type.elem_type = TensorProto.INT64


# Values of a body.

node_in_body("graph.values", "body-shadows-a-value", relu(GIVEN, SOME))
node_in_body("graph.values", "body-shadows-an-input", relu(GIVEN, "past"))
node_in_body("graph.values", "body-shadows-a-weight", relu(GIVEN, "embedding.token.weight"))
node_in_body("graph.values", "body-shadows-its-input", relu(GIVEN, CARRIED))
node_in_body("graph.values", "body-takes-what-nothing-gives", relu("nowhere", "more"))
node_in_body("graph.values", "body-takes-nothing", relu("", "more"))
node_in_body("graph.values", "body-takes-the-loop", relu(LOOP, "more"))
node_in_body("graph.values", "body-takes-what-comes-later", relu("loop.after", "more"))
node_in_body("graph.values", "body-node-of-itself", relu("more", "more"))
node_in_body("graph.values", "body-nodes-in-a-circle", relu("more", "most"), relu("most", "more"))
node_in_body("graph.values", "body-nodes-out-of-order", relu("loop.result", "more"))
in_body("graph.values", "input-shadows-a-value", lambda g: setattr(g.input[0], "name", SOME))
looped("graph.values", "outside-takes-from-the-body", lambda m: m.graph.node.append(relu("loop.product", "more")))
looped("graph.values", "outside-takes-the-carried-value", lambda m: m.graph.node.append(relu(CARRIED, "more")))
looped("graph.values", "outside-repeats-a-name-of-the-body", lambda m: m.graph.node.append(relu(GIVEN, CARRIED)))


def _second(prefix: str) -> Callable[[ModelProto], object]:
    node = helper.make_node("Loop", [COUNT, SOME, GIVEN], ["more"], body=body(prefix))
    return lambda model: model.graph.node.append(node)


looped("graph.values", "body-twice", _second(LOOP))


@changed("graph.values")
def loop_body_takes_from_another(model: ModelProto) -> None:
    add_loop(model)
    _second("other")(model)
    model.graph.node[-1].attribute[0].g.node.append(relu("loop.product", "most"))


# Sizes.


@changed("graph.size")
def loop_body_of_too_many_nodes(model: ModelProto) -> None:
    add_loop(model)
    more = [relu(GIVEN, f"x{i}") for i in range(onnx_reader.MAX_BODY_NODES)]
    inner(model).node.extend(more)


@changed("graph.size")
def loop_nodes_too_many(model: ModelProto) -> None:
    """Nodes of bodies count too."""
    add_loop(model)
    for i in range(onnx_reader.MAX_NODES // onnx_reader.MAX_BODY_NODES):
        _second(f"other{i}")(model)
        model.graph.node[-1].output[0] = f"more{i}"
        more = [relu(GIVEN, f"x{i}.{j}") for j in range(onnx_reader.MAX_BODY_NODES - 4)]
        model.graph.node[-1].attribute[0].g.node.extend(more)


# Nodes of two outputs.


def top(code: str, name: str, *outputs: str) -> None:
    """A case with one more node, of the operator that gives two values."""
    node = helper.make_node("TopK", [GIVEN, "past"], list(outputs))
    looped(code, f"beside-{name}", lambda model: model.graph.node.append(node))


top("graph.syntax", "largest-of-one-output", "more")
top("graph.size", "largest-of-three-outputs", "more", "most", "rest")
top("graph.values", "largest-of-one-name", "more", "more")
top("graph.values", "largest-of-no-name", "more", "")
