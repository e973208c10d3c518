"""Blocks of experts in graphs, compared with torch: every field of the format, also those that no family sets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from splitbundle.backends.onnxruntime.graph import FOLDER
from splitbundle.backends.torch.experts import MixtureOfExperts
from splitbundle.format import weight_layout
from splitbundle.format.architecture.experts import Experts, Groups, Router, Shared, experts_tensors
from splitbundle.format.graph import OPSET, Graph, Port
from splitbundle.format.weight_layout import Stored
from splitbundle.verification import onnx_rules
from splitbundle_converter.graphs.builder import GraphBuilder
from splitbundle_converter.graphs.experts import add_experts
from splitbundle_converter.graphs.operations import Operations
from tests.support.models import TOLERANCE, relative
from tests.support.variants import PLAIN_EXPERTS, PLAIN_ROUTER

pytestmark = pytest.mark.usefixtures("one_thread")
HIDDEN: Final = 12


def facts(router: dict[str, Any] | None = None, **fields: Any) -> Experts:
    """Return the facts of a block with these fields, and else the simplest ones."""
    return Experts(**PLAIN_EXPERTS | fields | {"router": Router(**PLAIN_ROUTER | (router or {}))})


def _shared(*, gate: bool = False, average: bool = False) -> Shared:
    return Shared(intermediate_size=7, gate=gate, average=average)


BLOCKS: Final = {
    "plain": facts(),
    "one": facts(per_token=1),
    "all": facts(per_token=8),
    "only": facts(count=1, per_token=1),
    "gelu": facts(activation="gelu"),
    "ungated": facts(gated=False, activation="relu_squared"),
    "ungated-clamped-biased": facts(gated=False, activation="gelu_tanh", clamp=0.3, bias=True),
    "clamped": facts(clamp=0.3),
    "steep": facts(gate_slope=1.702),
    "moved": facts(up_offset=1.0),
    "gpt_oss": facts({"bias": True, "normalised": True}, bias=True, clamp=0.3, gate_slope=1.702, up_offset=1.0),
    "sigmoid": facts({"function": "sigmoid", "normalised": True, "epsilon": 0.25, "scale": 2.5}),
    "capped": facts({"logit_cap": 0.7}),
    "corrected": facts({"function": "sigmoid", "correction": "score"}),
    "corrected-logits": facts({"correction": "logit", "normalised": True}),
    "groups-max": facts({"groups": Groups(count=4, kept=2, score="max")}),
    "groups-corrected": facts(
        {"function": "sigmoid", "correction": "score", "groups": Groups(count=2, kept=1, score="top_two")}
    ),
    "groups-of-one": facts({"groups": Groups(count=8, kept=5, score="max")}),
    "input": facts({"function": "sigmoid", "weighs": "input"}, per_token=2),
    "sparsemixer": facts({"function": "sparsemixer", "epsilon": 0.1}, per_token=2),
    "sparsemixer-scaled": facts({"function": "sparsemixer", "epsilon": 0.01, "scale": 0.5, "bias": True}, per_token=2),
    "shared": facts(shared=_shared()),
    "shared-gated": facts(shared=_shared(gate=True), bias=True),
    "shared-averaged": facts({"scale": 3.0}, shared=_shared(gate=True, average=True)),
    "everything": facts(
        {"function": "sigmoid", "bias": True, "logit_cap": 2.0, "correction": "score", "normalised": True}
        | {"epsilon": 1e-20, "scale": 2.5, "groups": Groups(count=4, kept=2, score="top_two")},
        bias=True,
        clamp=0.4,
        gate_slope=1.702,
        up_offset=1.0,
        shared=_shared(gate=True, average=True),
    ),
}


@dataclass(frozen=True, slots=True)
class Block:
    """A block's weights, and its graph in a session of onnxruntime."""

    weights: dict[str, Tensor]
    model: onnx.ModelProto
    session: onnxruntime.InferenceSession


def make(root: Path, block: Experts, stored: str = "float32", dtype: str = "float32", spread: float = 1.0) -> Block:
    """Write random weights and the graph of a block. The graph passes the rules for graphs."""
    generator = torch.Generator().manual_seed(1)
    weights, places, data = {}, {}, b""
    for name, shape in experts_tensors("mlp", block, HIDDEN).items():
        size = spread if name.startswith("mlp.router") else 0.4
        weights[name] = (size * torch.randn(shape, generator=generator)).to(getattr(torch, stored))
        raw = weights[name].contiguous().view(torch.uint8).numpy().tobytes()
        tensor = weight_layout.Tensor(dtype=stored, shape=tuple(shape))
        places[name] = Stored(file="weights.bin", offset=len(data), tensor=tensor)
        data += raw
    (root / "weights.bin").write_bytes(data)
    graph = GraphBuilder(places, "standard" if dtype == "float32" else dtype)
    ports = [Port(name=name, dtype=dtype, shape=("rows", HIDDEN)) for name in ("x", "y")]
    graph.input(ports[0])
    graph.op("Identity", "y", add_experts(Operations(graph, cast("Any", None)), "mlp", "x", block, HIDDEN))
    graph.output(ports[1])
    model = graph.model("block")
    own = Graph(file="block.onnx", variant="", opset=OPSET, inputs=(ports[0],), outputs=(ports[1],))
    onnx_rules.check(model.SerializeToString(deterministic=True), own, places)
    onnx.save(model, str(root / "block.onnx"))
    onnx.checker.check_model(str(root / "block.onnx"), full_check=True)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(FOLDER, str(root))
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Block(weights, model, session)


def expected(block: Experts, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return what torch computes in float32 with these weights. *Shape:* (rows, hidden) -> the same."""
    module = MixtureOfExperts(block, HIDDEN)
    module.load_state_dict({name.removeprefix("mlp."): one.float() for name, one in weights.items()}, assign=True)
    with torch.no_grad():
        return module(x[None])[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", BLOCKS)
def test_every_field_is_as_in_torch(name: str, tmp_path: Path) -> None:
    made = make(tmp_path, BLOCKS[name])
    for rows in (1, 2, 40):
        x = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))
        (got,) = made.session.run(None, {"x": x.numpy()})
        assert relative(torch.from_numpy(got), expected(BLOCKS[name], made.weights, x)) <= TOLERANCE


@pytest.mark.parametrize("name", ["plain", "gpt_oss", "everything"])
def test_weights_of_16_bits(name: str, tmp_path: Path) -> None:
    """The graph casts one expert at a time, or computes in float16."""
    x = torch.randn(40, HIDDEN, generator=torch.Generator().manual_seed(0)).half()
    for stored, dtype, tolerance in (
        ("bfloat16", "float32", TOLERANCE),
        ("float16", "float32", TOLERANCE),
        ("float16", "float16", 5e-3),
    ):
        made = make(tmp_path, BLOCKS[name], stored, dtype)
        (got,) = made.session.run(None, {"x": x.numpy().astype(dtype)})
        assert got.dtype == dtype
        assert relative(torch.from_numpy(got), expected(BLOCKS[name], made.weights, x.float())) <= tolerance


@pytest.mark.parametrize("name", ["plain", "groups-max", "groups-corrected", "sparsemixer"])
def test_equal_scores_choose_the_first_experts(name: str, tmp_path: Path) -> None:
    """All scores are equal, so only the order of equal ones decides."""
    made = make(tmp_path, BLOCKS[name], spread=0.0)
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    (got,) = made.session.run(None, {"x": x.numpy()})
    assert relative(torch.from_numpy(got), expected(BLOCKS[name], made.weights, x)) <= TOLERANCE


def test_no_rows(tmp_path: Path) -> None:
    made = make(tmp_path, BLOCKS["shared-gated"])
    (got,) = made.session.run(None, {"x": numpy.zeros((0, HIDDEN), numpy.float32)})
    assert got.shape == (0, HIDDEN)


@pytest.mark.rule("SB-O-008", "SB-O-019")
def test_a_body_takes_matrices_of_one_expert(tmp_path: Path) -> None:
    """Bodies have no weights of their own, and nothing outside a body takes stacked weights."""
    for name, block in BLOCKS.items():
        model = make(tmp_path, block).model
        stacked = {each.name for each in model.graph.initializer if each.name.startswith("mlp.experts.")}
        (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
        body = loop.attribute[0].g
        assert not body.initializer
        assert not stacked.intersection(value for node in model.graph.node for value in node.input), name
        takers = [node for node in body.node if stacked.intersection(node.input)]
        assert {node.op_type for node in takers} <= {"Gather", "GatherND"}
        assert len(takers) == len(stacked)
        assert len(body.node) <= 60
        assert len(model.graph.node) <= 60
