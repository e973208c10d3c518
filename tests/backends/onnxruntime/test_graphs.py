"""The shards' graphs under onnxruntime: what they compute, how they are written, and what is refused of them."""

from __future__ import annotations

import itertools
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import splitbundle
import splitbundle_converter
from splitbundle import Bundle, BundleError, ParityError, onnxruntime_stage
from splitbundle.golden import FLOAT16_TOLERANCE
from splitbundle.graph_operators import CODES
from splitbundle.onnxruntime_pipeline import Pipeline
from splitbundle.onnxruntime_stage import load_stages
from splitbundle_converter import graph
from tests.support.models import (
    BY_PIECES,
    CONFIGURATIONS,
    LAYERS,
    ONE_PER_FAMILY,
    TOLERANCE,
    VOCAB,
    checkpoint,
    deviations,
    load_original,
    original_logits,
    scratch,
    token_rows,
)
from tests.support.models import bundle as torch_bundle
from tests.support.scenarios import Worst, run

pytestmark = pytest.mark.usefixtures("one_thread")
STEADY: Final = tuple(name for name in CONFIGURATIONS if name not in BY_PIECES)
FLOAT16: Final = (
    "gpt2",
    "llama",
    "gemma2-capped-biased",
    "bloom",
    "granite_swa-bases-biased",
    "llama4_text-tuned-biased",
    "apertus-biased",
    "cohere-normed",
)
"""Both norms, most placements, caps, offsets, ALiBi, sinks, chunks, temperatures, xIELU."""
ONE_EACH: Final = tuple(name for name in ONE_PER_FAMILY if name not in BY_PIECES)


def bundle(
    name: str, split: tuple[int, ...] = tuple(range(LAYERS + 1)), dtype: str = "float32", variant: str = "standard"
) -> Bundle:
    """The named model with a graph a shard; by default each layer is a shard, and so are the embedding and the head."""
    return _bundle(name, split, dtype, variant)


@cache
def _bundle(name: str, split: tuple[int, ...], dtype: str, variant: str) -> Bundle:
    output = scratch() / f"{name}-{'-'.join(map(str, split))}-{dtype}-{variant}.splitbundle"
    return splitbundle_converter.convert(checkpoint(name, dtype), output, split=split, check=False, onnx=variant)


class OverTensors:
    """A pipeline over numpy arrays that takes and gives tensors, so that it can be told what torch's is told."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.inner = pipeline

    def session(self, batch_size: int, capacity: int) -> Any:
        return self.inner.session(batch_size, capacity)

    def __call__(self, ids: Tensor, *, attention_mask: Tensor | None, **options: Any) -> Tensor:
        mask = None if attention_mask is None else attention_mask.numpy()
        return torch.from_numpy(self.inner(ids.numpy(), attention_mask=mask, **options))


def stages(whole: Bundle, *cuts: int) -> list[Any]:
    """Stages that meet at some cuts, each of several graphs in a row."""
    edges = (0, *cuts, LAYERS)
    selections = [
        whole.select(layers=(start, stop), embeds=i == 0, head=i == len(cuts))
        for i, (start, stop) in enumerate(itertools.pairwise(edges))
    ]
    return load_stages(whole, selections, threads=1)


# What graphs compute.


@pytest.mark.rule("SB-O-004", "SB-O-005", "SB-C-001")
@pytest.mark.parametrize("name", STEADY)
def test_scenarios_cut_everywhere(name: str) -> None:
    """Pieces, padding, rollback, reordering, last logits: as the original, with a graph a layer."""
    worst = Worst(name)
    run(OverTensors(Pipeline(stages(bundle(name), 2))), worst, "cut everywhere")
    worst.check()


@pytest.mark.rule("SB-O-004", "SB-O-005")
@pytest.mark.parametrize("name", ONE_EACH)
def test_scenarios_in_one_graph_and_mixed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model in one graph, prompts computed in pieces of a token or two; and every second shard with torch."""
    monkeypatch.setattr(onnxruntime_stage, "PIECE", 5)
    worst = Worst(name)
    run(OverTensors(bundle(name, ()).pipeline(backend="onnxruntime", threads=1)), worst, "uncut")
    cut = bundle(name, (1, 3))
    for backends in ({"bottom": "onnxruntime", "top": "onnxruntime"}, {"trunk": "onnxruntime"}):
        run(OverTensors(cut.pipeline(backend=backends, threads=1)), worst, f"{backends}")
    worst.check()


@pytest.mark.parametrize("name", sorted(BY_PIECES))
@pytest.mark.parametrize("split", [(), (1, 3)])
def test_rows_that_outgrow_a_threshold(name: str, split: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against torch, whose own test holds it against the original driven alike. Their calls stay whole."""
    monkeypatch.setattr(onnxruntime_stage, "PIECE", 5)
    whole = bundle(name, split)
    torch_pipeline, pipeline = whole.pipeline(), whole.pipeline(backend="onnxruntime", threads=1)
    ids = torch.tensor(token_rows(21, 21, 21, seed=5))
    mask = torch.tensor([[0] * 4 + [1] * 3, [1] * 7, [1] * 5 + [0] * 2])
    with torch.no_grad():
        sessions = torch_pipeline.session(3, 40), pipeline.session(3, 40)
        for start in range(0, 21, 7):
            piece = ids[:, start : start + 7]
            expected = torch_pipeline(piece, attention_mask=mask, session=sessions[0])
            got = pipeline(piece.numpy(), attention_mask=mask.numpy(), session=sessions[1])
            assert numpy.abs(got - expected.numpy()).max() <= TOLERANCE * expected.abs().max().item()


@pytest.mark.parametrize("name", ["llama", "gpt2-by-layer", "gemma2-capped-biased", "apertus-biased"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_of_16_bits_are_widened(name: str, dtype: str) -> None:
    """Float32 arithmetic on the stored weights: what torch computes when it is asked for float32."""
    whole = bundle(name, (2,), dtype)
    assert whole.manifest.storage.dtype == dtype
    ids = torch.tensor(token_rows(12, 12, seed=6))
    with torch.no_grad():
        expected = whole.pipeline(dtype="float32")(ids).numpy()
    got = whole.pipeline(backend="onnxruntime", threads=1)(ids.numpy())
    assert numpy.abs(got - expected).max() <= TOLERANCE * numpy.abs(expected).max()


@pytest.mark.rule("SB-O-004", "SB-O-005")
@pytest.mark.parametrize("name", FLOAT16)
def test_computing_in_float16(name: str) -> None:
    """As far from the float32 answer as transformers is in float16: in one call, in pieces, and padded."""
    pipeline = bundle(name, (2,), "float16", "float16").pipeline(backend="onnxruntime", threads=1)
    rows = token_rows(*[13] * 6, seed=1)
    ids, session = numpy.array(rows), pipeline.session(len(rows), 13)
    pieces = [pipeline(piece, session=session) for piece in numpy.split(ids, range(4, 13), axis=1)]
    assert {array.dtype for cache in session.caches for array in cache.arrays.values()} == {numpy.dtype("float16")}
    padded, mask = numpy.zeros((6, 18), numpy.int64), numpy.zeros((6, 18), numpy.int64)
    for i in range(6):
        padded[i, i : i + 13], mask[i, i : i + 13] = ids[i], 1
    among = pipeline(padded, attention_mask=mask)
    computed = {
        "prefill": pipeline(ids),
        "pieces": numpy.concatenate(pieces, axis=1),
        "padded": numpy.stack([among[i, i : i + 13] for i in range(6)]),
    }
    path = checkpoint(name, "float16")
    known, other = (
        torch.stack([original_logits(model, row) for row in rows])
        for model in (load_original(path), load_original(path, torch.float16))
    )
    allowed = deviations(other, known)
    for what, got in computed.items():
        assert got.dtype == numpy.float32
        ratio = float((deviations(torch.from_numpy(got), known) / allowed).log().mean().exp())
        assert 0.1 < ratio <= 1.25, what  # one far below would be of a graph that doesn't compute in float16


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8}])
def test_both_backends_draw_alike(sampling: dict[str, Any]) -> None:
    whole = bundle("llama")
    ids = torch.tensor(token_rows(5, 5, seed=7))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    drawn = [
        [
            token.tolist()
            for token in pipeline.generate(given, attention_mask=own, max_new_tokens=12, seed=4, **sampling)
        ]
        for pipeline, given, own in (
            (whole.pipeline(), ids, mask),
            (whole.pipeline(backend="onnxruntime"), ids.numpy(), mask.numpy()),
        )
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 12


@pytest.mark.parametrize("options", [{"prepack": True}, {"threads": 2}])
def test_options_change_no_number(options: dict[str, Any]) -> None:
    whole, ids = bundle("qwen2-mixed", (2,)), numpy.array(token_rows(9, 9))
    plain = whole.pipeline(backend="onnxruntime", threads=1)(ids)
    assert (
        numpy.abs(whole.pipeline(backend="onnxruntime", **options)(ids) - plain).max() <= TOLERANCE * abs(plain).max()
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_caches_are_extended_where_they_lie(dtype: str) -> None:
    """The session's memory is the graphs': no call but one that needs more slots makes another array."""
    whole = bundle("llama", (2,), dtype, "float16" if dtype == "float16" else "standard")
    pipeline = whole.pipeline(backend="onnxruntime", threads=1)
    session = pipeline.session(2, 50)
    pipeline(numpy.array(token_rows(5, 5)), session=session)
    cache = session.caches[1]
    assert {array.dtype.name for array in cache.arrays.values()} == {dtype}
    (name, *_), before = cache.arrays, {name: id(array) for name, array in cache.arrays.items()}
    row = cache.arrays[name][:, :, 5].copy()
    assert not row.any()
    pipeline(numpy.array(token_rows(1, 1)), session=session)
    assert {name: id(array) for name, array in cache.arrays.items()} == before
    assert cache.arrays[name][:, :, 5].all()


@pytest.mark.parametrize("logits", ["all", "last", 4])
def test_a_prompt_in_pieces_is_the_prompt(logits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows of other lengths and pasts."""
    whole = bundle("llama", (2,))
    pipeline = whole.pipeline(backend="onnxruntime", threads=1)
    rows, mask = numpy.array(token_rows(11, 11)), numpy.array([[1] * 11, [0] * 7 + [1] * 4])
    lengths: list[int] = []
    compute = onnxruntime_stage.LoadedGraph.run

    def watched(graph: Any, x: Any, *rest: Any) -> Any:
        lengths.append(x.shape[1])
        return compute(graph, x, *rest)

    monkeypatch.setattr(onnxruntime_stage.LoadedGraph, "run", watched)
    results = []
    for size, expected in ((1000, [11]), (6, [3, 3, 3, 2])):
        monkeypatch.setattr(onnxruntime_stage, "PIECE", size)
        session = pipeline.session(2, 40)
        pipeline(rows[:, :3], attention_mask=numpy.array([[1, 0, 0], [1, 1, 1]]), session=session)
        lengths.clear()
        results.append(pipeline(rows, attention_mask=mask, session=session, logits=logits))
        assert lengths == expected * 2  # two shards
    assert numpy.abs(results[0] - results[1]).max() <= TOLERANCE * numpy.abs(results[0]).max()


def test_a_session_that_memory_cannot_hold_is_refused_at_once() -> None:
    whole = bundle("llama", (2,))
    for backend in ("torch", "onnxruntime"):
        with pytest.raises(BundleError, match=r"\[session.capacity\] capacity: expected slots that memory can hold"):
            whole.pipeline(backend=backend).session(10**12, 40)


# How graphs are written.


@pytest.mark.rule("SB-O-002", "SB-O-003", "SB-O-006", "SB-O-013")
@pytest.mark.parametrize("name", ["gpt2", "llama-llama3", "gemma2-capped-biased", "granite_swa-bases-biased"])
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
                assert CODES[port.dtype] == value.type.tensor_type.elem_type
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
    from splitbundle.torch_weights import map_tensors

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
    """In place, or beside; what was there stays, and cutting again makes graphs of the new shards."""
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
    """Asked for, kept where a bundle is cut again, and refused over other weights."""
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
        assert "--dtype float16" in (problem.hint or "")
    with pytest.raises(BundleError, match=r"\[usage.onnx\] onnx: expected weights that are all stored as float16"):
        splitbundle_converter.add_onnx(bundle("llama", (2,)), tmp_path / "none", variant="float16")
    with pytest.raises(BundleError, match=r"expected standard or float16, got 'bfloat16'.*can't multiply bfloat16"):
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


# Golden vectors.


def test_golden_vectors_in_float16(tmp_path: Path) -> None:
    """What onnxruntime computes is held at what float16 can, torch at what float32 can."""
    path = tmp_path / "b"
    whole = splitbundle_converter.convert(checkpoint("llama", "float16"), path, split=[1], onnx="float16")
    for difference in whole.run_vectors(backend="all"):
        rough = "onnxruntime" in difference.between
        assert difference.tolerance == (FLOAT16_TOLERANCE if rough else TOLERANCE)
        assert difference.relative < (1e-2 if rough else TOLERANCE)
        assert (difference.relative > TOLERANCE) == rough


def test_new_graphs_are_held_against_the_golden_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By add-onnx and resplit too, unless told otherwise; and both keep the variant that is there."""
    plain = splitbundle_converter.convert(checkpoint("llama", "float16"), tmp_path / "plain", onnx="float16")
    added = splitbundle_converter.add_onnx(plain, tmp_path / "added")
    assert [shard.graph and shard.graph.variant for shard in added.shards] == ["float16"]

    def spoilt(architecture: Any, *rest: Any) -> Any:
        model = build(architecture, *rest)
        for node in model.graph.node:
            if node.name == "layers.0.mlp.gated":
                node.op_type = "Add"
        return model

    build = graph.build
    monkeypatch.setattr(graph, "build", spoilt)
    for make in (
        lambda **more: splitbundle_converter.add_onnx(plain, tmp_path / "b", **more),
        lambda **more: splitbundle_converter.resplit(plain, tmp_path / "b", split=[2], **more),
    ):
        with pytest.raises(ParityError, match="--variant standard computes in float32"):
            make()
        assert not (tmp_path / "b").exists()
        make(check=False)
        shutil.rmtree(tmp_path / "b")


def test_golden_vectors_in_both_backends(tmp_path: Path) -> None:
    whole = splitbundle_converter.convert(checkpoint("llama"), tmp_path / "b", split=[1], onnx=True)
    assert {d.between for d in whole.run_vectors(backend="onnxruntime")} == {("onnxruntime", "original")}
    both = whole.run_vectors(backend="all")
    assert [(d.where, d.between) for d in both] == [
        (where, between)
        for between in (("torch", "original"), ("onnxruntime", "original"), ("onnxruntime", "torch"))
        for where in ("hidden.1", "logits")
    ]
    assert all(0 < d.relative < TOLERANCE for d in both)
    assert [d.where for d in whole.run_vectors("top", backend="all")] == ["logits"] * 3


# What is refused.


@pytest.fixture
def whole() -> Bundle:
    return bundle("llama")


@pytest.mark.rule("SB-O-007")
@pytest.mark.parametrize("path", ["trunk-2.onnx", "layer-001.safetensors"])
def test_changed_files_are_refused(whole: Bundle, tmp_path: Path, path: str) -> None:
    import shutil

    copy = Path(shutil.copytree(whole.path, tmp_path / "copy"))
    data = bytearray((copy / path).read_bytes())
    data[40] ^= 1
    (copy / path).write_bytes(data)
    with pytest.raises(BundleError) as caught:
        splitbundle.open(copy).stage("trunk-2", backend="onnxruntime")
    assert caught.value.problems[0].file == path
    assert caught.value.codes[0] in ("file.digest", "file.header-digest")


def test_ranges_that_no_graph_computes(tmp_path: Path) -> None:
    cut = bundle("llama", (1, 3))
    assert cut.stage(layers=(1, 4), backend="onnxruntime").layer_range == (1, 4)
    for layers in ((1, 2), (0, 2), (2, 4)):
        with pytest.raises(BundleError) as caught:
            cut.stage(layers=layers, backend="onnxruntime")
        (problem,) = caught.value.problems
        assert problem.code == "stage.graph"
        assert problem.expected == "layers that shards' graphs compute: bottom [0, 1), trunk [1, 3), top [3, 4)"
        assert "splitbundle resplit makes them" in (problem.hint or "")
    with pytest.raises(BundleError, match=r"\[stage.graph\]"):  # the bottom's graph embeds
        cut.stage(layers=(0, 1), embeds=False, backend="onnxruntime")


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"backend": "onnx"}, "backend"),
        ({"backend": "onnxruntime", "trainable": True}, "trainable"),
        ({"backend": "onnxruntime", "device": "cuda"}, "device"),
        ({"backend": "torch", "threads": 2}, "threads"),
        ({"backend": "torch", "prepack": True}, "prepack"),
    ],
)
def test_options_of_another_backend(whole: Bundle, options: dict[str, Any], argument: str) -> None:
    with pytest.raises(BundleError) as caught:
        whole.pipeline(**options)
    assert (caught.value.codes, caught.value.problems[0].argument) == (("stage.backend",), argument)


@pytest.mark.parametrize(("variant", "other"), [("standard", "bfloat16"), ("float16", "float32")])
def test_graphs_compute_in_their_own_dtype(variant: str, other: str) -> None:
    whole = bundle("llama", (2,), "float16", variant)
    own = "float16" if variant == "float16" else "float32"
    assert len(whole.pipeline(backend="onnxruntime", dtype=own, threads=1).stages) == 2
    with pytest.raises(BundleError, match=rf"\[input.dtype\] dtype: expected {own}, in which the graph of shard"):
        whole.pipeline(backend="onnxruntime", dtype=other, threads=1)
    mixed = whole.pipeline(backend={"bottom": "onnxruntime"}, dtype=other, threads=1)  # torch's there
    assert str(mixed.stages[1].inner.dtype) == f"torch.{other}"


def test_a_provider_that_cannot_start_is_said(whole: Bundle, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """onnxruntime would go on with another one, and say so to stdout."""
    known = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: known)
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(BundleError) as caught:
        whole.pipeline(backend="onnxruntime", providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert caught.value.codes == ("input.device",)
    assert "CPUExecutionProvider alone: it couldn't be started here" in str(caught.value)
    with pytest.raises(BundleError, match=r"\[stage.graph\] .*'providers' values must be"):
        whole.pipeline(backend="onnxruntime", providers=[("CPUExecutionProvider",)])
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": "2"}, {"threads": 2**40}, {"threads": True}])
def test_thread_counts(whole: Bundle, options: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match=r"\[input.value\] threads: expected 1 to 1024"):
        whole.pipeline(backend="onnxruntime", **options)


def test_arrays_of_every_kind_for_mixed_pipelines() -> None:
    """What numpy can hold and torch can't; and what isn't an array of numbers at all."""
    cut = bundle("llama", (2,))
    ids = numpy.array(token_rows(6, 6))
    mixed, plain = (
        cut.pipeline(backend={"top": "onnxruntime"}, threads=1),
        cut.pipeline(backend="onnxruntime", threads=1),
    )
    frozen = ids.copy()
    frozen.flags.writeable = False
    for given in (
        ids[:, ::-1],
        ids.astype(">i8"),
        numpy.asfortranarray(ids),
        frozen,
        numpy.broadcast_to(ids[:1], (2, 6)),
    ):
        expected = plain(numpy.ascontiguousarray(given, numpy.int64))
        assert numpy.abs(mixed(given) - expected).max() <= TOLERANCE * numpy.abs(expected).max()
    for wrong in (numpy.array([["a"]]), numpy.array([[None]]), numpy.int64(3), [[1]]):
        with pytest.raises(BundleError, match=r"\[input.type\] token ids: expected a numpy.ndarray of numbers"):
            mixed(wrong)


def test_whole_numbers_of_numpy(whole: Bundle) -> None:
    pipeline = whole.pipeline(backend="onnxruntime", threads=1)
    session = pipeline.session(numpy.int64(2), numpy.int32(20))
    pipeline(numpy.array(token_rows(4, 4)), session=session, logits=numpy.int64(2))
    session.rollback(numpy.int64(1))
    assert session.past == [3, 3]
    assert len(list(pipeline.generate(numpy.array(token_rows(4)), max_new_tokens=numpy.int64(3)))) == 3
    assert whole.select(layers=(numpy.int64(0), numpy.int64(1))) == whole.select(layers=(0, 1))
    with pytest.raises(BundleError, match=r"\[input.cache\] session: expected what session\(\) gave, got str"):
        pipeline(numpy.array(token_rows(4)), session="x")


def test_a_graph_that_fails_as_it_runs_is_named(whole: Bundle) -> None:
    class Failing:
        def io_binding(self) -> Any:
            return onnxruntime.IOBinding(real)

        def run_with_iobinding(self, binding: Any) -> None:
            raise RuntimeError("shapes differ")

    pipeline = whole.pipeline(backend="onnxruntime", threads=1)
    graph = pipeline.stages[0].graphs[0]
    real, graph.session = graph.session, Failing()
    with pytest.raises(BundleError, match=rf"\[stage.graph\] {graph.file}: .* RuntimeError: shapes differ"):
        pipeline(numpy.array(token_rows(4)))


def test_unknown_providers(whole: Bundle) -> None:
    for nothing in ([], "CPUExecutionProvider"):
        with pytest.raises(BundleError, match=r"\[input.device\] providers: expected a list of some of"):
            whole.pipeline(backend="onnxruntime", providers=nothing)
    with pytest.raises(BundleError, match=r"\[input.device\] providers: expected some of .*CPUExecutionProvider"):
        whole.pipeline(backend="onnxruntime", providers=["NoSuchProvider"])
    assert whole.pipeline(backend="onnxruntime", providers=["CPUExecutionProvider"])


def test_boundary_checks_are_those_of_torch(whole: Bundle) -> None:
    """The same problems in the same words, but for what arrays are called."""
    ours = {"torch": whole.stage("trunk-2"), "onnxruntime": whole.stage("trunk-2", backend="onnxruntime")}
    embeds = {"torch": whole.stage("bottom"), "onnxruntime": whole.stage("bottom", backend="onnxruntime")}
    width = whole.architecture.hidden_size

    def said(stage: Any, given: Any, **options: Any) -> tuple[str, ...]:
        with pytest.raises(BundleError) as caught:
            stage(given, **options)
        (problem,) = caught.value.problems
        words = (problem.code, problem.argument, problem.expected, problem.got)
        return tuple((word or "").replace("torch.", "") for word in words)

    hidden = torch.zeros(1, 3, width)
    ids = torch.tensor([[1, 2, VOCAB]])
    for stage, given, options in (
        (ours, torch.zeros(1, 3, width + 1), {}),
        (ours, torch.zeros(3, width), {}),
        (ours, hidden.double(), {}),
        (ours, hidden, {"past": [1]}),
        (ours, hidden, {"count": [4]}),
        (ours, hidden, {"count": [1, 2]}),
        (embeds, ids, {}),
        (embeds, ids.float(), {}),
        (embeds, ids[0], {}),
    ):
        assert said(stage["torch"], given, **options) == said(stage["onnxruntime"], given.numpy(), **options)
    assert said(ours["onnxruntime"], [[0.0]])[0] == "input.type"
    caches = {backend: stage.cache(1, 8) for backend, stage in ours.items()}
    assert said(ours["torch"], hidden, cache=caches["onnxruntime"])[0] == "input.cache"
    assert said(ours["onnxruntime"], hidden.numpy(), cache=caches["torch"])[0] == "input.cache"
