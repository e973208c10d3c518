"""Graphs with onnxruntime's own operator: only one variant may have it, and only over a stored matrix of its sizes."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import pytest
from onnx import ModelProto, helper

import splitbundle
from splitbundle import BundleError
from splitbundle.verification import onnx_rules
from tests.support.graph_case import Case, written
from tests.support.graph_cases import relist
from tests.support.graph_nbits_cases import CASES, DOMAIN, OPERATOR, products
from tests.support.models import scratch
from tests.support.quantized_bundles import quantized

pytestmark = pytest.mark.usefixtures("one_thread")
SHARD, GRAPH = "bottom", "bottom.onnx"


def judge(model: ModelProto, form: str = "blocks4_32") -> str:
    """Return the code of the refusal of a graph of the bundle in this form; none for a good graph."""
    bundle = quantized("tied", form)
    shard = bundle.shard(SHARD)
    assert shard.graph is not None
    try:
        onnx_rules.check(written(model), shard.graph, onnx_rules.used(shard, bundle.locate_tensors(shard)))
    except BundleError as error:
        (problem,) = error.problems
        assert problem.file == GRAPH
        assert len(str(problem)) < 1000
        return problem.code
    return ""


def good(form: str = "blocks4_32") -> ModelProto:
    return ModelProto.FromString((quantized("tied", form).path / GRAPH).read_bytes())


@cache
def copied() -> Path:
    return Path(shutil.copytree(quantized("tied", "blocks4_32").path, scratch() / "nbits-changed.splitbundle"))


def test_a_graph_as_it_should_be() -> None:
    assert judge(good()) == ""
    assert {(node.domain, len(node.input)) for node in products(good())} == {(DOMAIN, 3)}
    assert len(products(good())) == 7


@pytest.mark.rule("SB-O-009", "SB-O-010", "SB-O-021")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_hostile_graphs(case: Case) -> None:
    model = good()
    case.change(model)
    assert judge(model) == case.code
    if CASES.index(case) % 8 == 0:  # through every reader
        root = copied()
        relist(root, GRAPH, written(model))
        bundle = splitbundle.open(root)
        for read in (lambda: bundle.verify(SHARD), lambda: bundle.stage(SHARD, backend="onnxruntime", threads=1)):
            with pytest.raises(BundleError) as caught:
                read()
            assert [(problem.code, problem.file) for problem in caught.value.problems] == [(case.code, GRAPH)]


@pytest.mark.rule("SB-O-009", "SB-O-021")
@pytest.mark.parametrize("named", [False, True])
def test_a_standard_graph_has_no_other_domain(named: bool) -> None:
    """Neither the node alone, nor the domain alone, nor both."""
    model = good("rows8")
    assert judge(model, "rows8") == ""
    if named:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        assert judge(model, "rows8") == "graph.version"
    model.graph.node.insert(0, helper.make_node(OPERATOR, ["past"] * 3, ["more"], domain=DOMAIN))
    assert judge(model, "rows8") == ("graph.version" if named else "graph.operator")
