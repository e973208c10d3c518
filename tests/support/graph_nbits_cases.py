"""Graphs with products over 4 bits that a reader must refuse. Each is a good graph with a small change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from onnx import ModelProto, NodeProto, helper

from splitbundle.format.weight_layout import SCALE
from tests.support.graph_case import Case

CASES: Final[list[Case]] = []
OPERATOR: Final = "MatMulNBits"
DOMAIN: Final = "com.microsoft"


def products(model: ModelProto) -> list[NodeProto]:
    """The products with codes of 4 bits."""
    return [node for node in model.graph.node if node.op_type == OPERATOR]


def case(code: str, name: str, change: Callable[[ModelProto], object]) -> None:
    """Add a case that changes the model."""

    def apply(model: ModelProto) -> None:
        change(model)

    CASES.append(Case(name=f"nbits-{name}", code=code, change=apply))


def product(code: str, name: str, change: Callable[[NodeProto], object]) -> None:
    """A case that changes the first product, of the queries."""
    case(code, name, lambda model: change(products(model)[0]))


def attribute(name: str, value: int) -> Callable[[NodeProto], object]:
    """Change the value of an attribute."""

    def change(node: NodeProto) -> None:
        next(each for each in node.attribute if each.name == name).i = value

    return change


def without(name: str) -> Callable[[NodeProto], object]:
    """Remove an attribute."""
    return lambda node: node.attribute.remove(next(each for each in node.attribute if each.name == name))


def added(name: str, kind: str, *inputs: str, domain: str = DOMAIN, **attributes: object) -> None:
    """A case with one more node before all others."""
    node = helper.make_node(kind, list(inputs), ["more"], domain=domain, **attributes)
    case("graph.operator", name, lambda model: model.graph.node.insert(0, node))


# The domain and the operator.

added("another-operator", "Gelu", "past")
added("another-product", "MatMulInteger16", "past", "past")
added("fused-attention", "GroupQueryAttention", "past", "past", "past")
added("an-operator-of-onnx", "Relu", "past")
added("in-another-domain", OPERATOR, "past", "past", "past", domain="com.microsoft.nchwc")
added("in-no-domain", OPERATOR, "past", "past", "past", domain="")
case("graph.version", "without-the-domain", lambda m: m.opset_import.pop())
case("graph.version", "without-onnx", lambda m: m.opset_import.pop(0))
case("graph.version", "domain-twice", lambda m: m.opset_import.append(m.opset_import[1]))
case("graph.version", "another-domain-too", lambda m: m.opset_import.add(domain="ai.onnx.ml", version=5))
case("graph.version", "another-domain", lambda m: setattr(m.opset_import[1], "domain", "com.microsoft.experimental"))
case("graph.version", "another-version", lambda m: setattr(m.opset_import[1], "version", 2))

# Attributes that aren't those of the stored matrix.

for _name, _value in {
    "K": (256, 0, -128, 2**40),
    "N": (256, 64, 0, -1),
    "block_size": (64, 16, 128, 0, 2**40),
    "bits": (8, 2, 0, -4),
    "accuracy_level": (0, 1, 5, -1),
}.items():
    for _each in _value:
        product("graph.operator", f"{_name}-{_each}".replace("_", "-"), attribute(_name, _each))
    product("graph.operator", f"without-{_name}".replace("_", "-"), without(_name))
product("graph.operator", "attribute-twice", lambda node: node.attribute.append(node.attribute[0]))
product(
    "graph.operator", "another-attribute", lambda n: n.attribute.append(helper.make_attribute("weight_prepacked", 1))
)
product(
    "graph.operator", "attribute-of-another-kind", lambda n: n.attribute[0].CopyFrom(helper.make_attribute("K", 1.0))
)
product("graph.operator", "without-attributes", lambda node: node.ClearField("attribute"))

# Inputs.

product("graph.operator", "two-inputs", lambda node: node.input.pop())
product("graph.operator", "zero-points", lambda node: node.input.append(node.input[1]))
product("graph.operator", "codes-of-8-bits", lambda n: n.input.__setitem__(1, "embedding.token.weight"))
product("graph.operator", "codes-of-a-node", lambda n: n.input.__setitem__(1, "stream"))
product("graph.operator", "codes-of-scales", lambda n: n.input.__setitem__(1, f"{n.input[1]}{SCALE}"))
product("graph.operator", "codes-of-another-shape", lambda n: n.input.__setitem__(1, "layers.0.mlp.down.weight"))
product("graph.values", "scales-of-nothing", lambda n: n.input.__setitem__(2, "nowhere"))
product("graph.syntax", "two-outputs", lambda node: node.output.append("more"))
