"""How graphs are written: names, rules, determinism, and graphs that are added to a bundle."""

from __future__ import annotations

import re
from pathlib import Path

import numpy
import onnx
import pytest
import torch
from torch import Tensor

import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.format.dtypes import ONNX_CODES
from tests.support.graph_bundles import bundle
from tests.support.models import bundle as torch_bundle
from tests.support.models import checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.rule("SB-O-002", "SB-O-003", "SB-O-006", "SB-O-013")
@pytest.mark.parametrize(
    "name", ["gpt2", "llama-llama3", "gemma2-capped-biased", "granite_swa-bases-biased", "qwen2_moe"]
)
@pytest.mark.parametrize("variant", ["standard", "float16"])
def test_a_graph_by_its_rules(name: str, variant: str) -> None:
    whole = bundle(name, (0, 1, 3), "float32" if variant == "standard" else "float16", variant)
    for shard in whole.shards:
        assert shard.graph is not None
        path = whole.path / shard.graph.file
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        assert [(each.domain, each.version) for each in model.opset_import] == [("", 24)]
        for ports, values in ((shard.graph.inputs, model.graph.input), (shard.graph.outputs, model.graph.output)):
            assert [port.name for port in ports] == [value.name for value in values]
            for port, value in zip(ports, values, strict=True):
                assert ONNX_CODES[port.dtype] == value.type.tensor_type.elem_type
                sizes = value.type.tensor_type.shape.dim
                assert list(port.shape) == [size.dim_param or size.dim_value for size in sizes]
        units = [unit for unit in shard.units if unit != "embedding" or shard.embeds]
        expected = {tensor for unit in units for tensor in whole.architecture.tensors_of(unit)}
        expected |= {"embedding.token.weight"} if len(units) < len(shard.units) else set()
        external = {each.name: each for each in model.graph.initializer if each.external_data}
        assert external.keys() == expected
        stored = torch_tensors(whole, shard.units)
        for tensor, initializer in external.items():
            where = {each.key: each.value for each in initializer.external_data}
            data = (whole.path / where["location"]).read_bytes()[int(where["offset"]) :][: int(where["length"])]
            assert data == stored[tensor].contiguous().view(torch.uint8).numpy().tobytes()


def torch_tensors(whole: Bundle, units: tuple[str, ...]) -> dict[str, Tensor]:
    from splitbundle.backends.torch.weights import map_tensors

    return {name: tensor.reshape(-1) for unit in units for name, tensor in map_tensors(whole, unit).items()}


def test_weights_in_float16_are_used_as_they_are() -> None:
    """No projection, norm or table of a graph that computes in float16 has its weights cast."""
    for shard in (whole := bundle("llama", (2,), "float16", "float16")).shards:
        assert shard.graph is not None
        model = onnx.load(str(whole.path / shard.graph.file), load_external_data=False)
        weights = {each.name for each in model.graph.initializer if each.external_data}
        assert weights
        assert [node.name for node in model.graph.node if node.op_type == "Cast" and node.input[0] in weights] == []


@pytest.mark.parametrize("variant", ["standard", "float16"])
def test_names_say_where_a_node_is(variant: str) -> None:
    dtype = "float16" if variant == "float16" else "float32"
    model = onnx.load(str(bundle("llama", (1, 3), dtype, variant).path / "trunk.onnx"), load_external_data=False)
    names = [node.name for node in model.graph.node]
    assert "layers.1.attention.query" in names
    assert "layers.2.mlp.down" in names
    assert len(set(names)) == len(names)
    known = re.compile(r"layers\.[12]\.|positions|rotation\.|mask\.|shapes\.|stream|hidden\.")
    assert [name for name in names if not known.match(name)] == []
    assert all(node.output[0] == node.name for node in model.graph.node)


def test_a_bundle_with_graphs_is_hardly_larger(tmp_path: Path) -> None:
    """Every weight is stored once."""
    plain, graphs = torch_bundle("llama"), bundle("llama")
    assert plain.fingerprint == graphs.fingerprint
    added = sum(file.size for path, file in graphs.manifest.files.items() if path.endswith(".onnx"))
    weights = {path: file for path, file in graphs.manifest.files.items() if path.endswith(".safetensors")}
    assert weights == {path: plain.manifest.files[path] for path in weights}
    assert added < 30_000 * len(graphs.shards)


def test_graphs_are_deterministic(tmp_path: Path) -> None:
    one = splitbundle_converter.convert(checkpoint("llama"), tmp_path / "a", split=[2], check=False, onnx=True)
    other = splitbundle_converter.convert(checkpoint("llama"), tmp_path / "b", split=[2], check=False, onnx=True)
    assert one.id == other.id


def test_adding_graphs_to_a_bundle(tmp_path: Path) -> None:
    """Graphs are added in place or in a copy. Other files stay, and a resplit makes graphs for the new shards."""
    plain = splitbundle_converter.convert(checkpoint("gpt2"), tmp_path / "plain", split=[1, 3])
    with pytest.raises(BundleError, match=r"\[stage.graph\] layers \[0, 1\): expected a graph a shard"):
        plain.stage("bottom", backend="onnxruntime")
    added = splitbundle_converter.add_onnx(plain, tmp_path / "added")
    assert added.fingerprint == plain.fingerprint
    assert [shard.graph and shard.graph.file for shard in added.shards] == ["bottom.onnx", "trunk.onnx", "top.onnx"]
    inside = splitbundle_converter.add_onnx(tmp_path / "plain")
    assert inside.id == added.id
    assert inside.verify(exact=True).unlisted == ()
    again = splitbundle_converter.resplit(inside, tmp_path / "again", split=[2])
    assert [shard.graph and shard.graph.file for shard in again.shards] == ["bottom.onnx", "top.onnx"]
    assert not (again.path / "trunk.onnx").exists()
    without = splitbundle_converter.resplit(inside, tmp_path / "without", split=[2], onnx=False)
    assert not list(without.path.glob("*.onnx"))


@pytest.mark.rule("SB-O-017")
def test_graphs_in_float16(tmp_path: Path) -> None:
    """The variant is made on request, kept by a resplit, and refused for weights of another dtype."""
    plain = splitbundle_converter.convert(checkpoint("llama", "float16"), tmp_path / "plain", split=[2], check=False)
    added = splitbundle_converter.add_onnx(plain, tmp_path / "added", variant="float16")
    again = splitbundle_converter.resplit(added, tmp_path / "again", split=[1, 3])
    assert [shard.graph and shard.graph.variant for shard in again.shards] == ["float16"] * 3
    standard = splitbundle_converter.resplit(again, tmp_path / "standard", split=[2], onnx=True)
    assert [shard.graph and shard.graph.variant for shard in standard.shards] == ["standard"] * 2
    for dtype, stored in (("float32", "float32"), ("bfloat16", "bfloat16")):
        path = checkpoint("llama", dtype)
        with pytest.raises(BundleError) as caught:
            splitbundle_converter.convert(path, tmp_path / "none", onnx="float16")
        (problem,) = caught.value.problems
        assert (problem.code, problem.argument, problem.got) == ("usage.onnx", "onnx", f"some in {stored}")
        assert 'dtype="float16"' in (problem.hint or "")
    with pytest.raises(BundleError, match=r"\[usage.onnx\] onnx: expected weights that are all stored as float16"):
        splitbundle_converter.add_onnx(bundle("llama", (2,)), tmp_path / "none", variant="float16")
    with pytest.raises(BundleError, match=r"standard, float16, matmul_nbits, got 'bfloat16'.*can't multiply bfloat16"):
        splitbundle_converter.add_onnx(plain, tmp_path / "none", variant="bfloat16")
    assert not (tmp_path / "none").exists()


def test_a_cache_of_another_variant_is_refused() -> None:
    """Two stages of the same layers, whose graphs keep keys in different dtypes."""
    narrow, wide = (
        bundle("llama", (2,), "float16", variant).stage("bottom", backend="onnxruntime", threads=1)
        for variant in ("float16", "standard")
    )
    with pytest.raises(BundleError) as caught:
        narrow(numpy.array([[1, 2]]), cache=wide.cache(1, 8))
    (problem,) = caught.value.problems
    assert problem.code == "input.cache"
    assert problem.expected == "a cache of layers (0, 2) in float16 for onnxruntime"
    assert problem.got == "one of layers (0, 2) in float32"
