"""Graphs over quantized weights under onnxruntime: their numbers, what they read, and which variant they are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from onnx import ModelProto, NodeProto

import splitbundle
import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.backends.onnxruntime import stage
from splitbundle.format.manifest.document import EMBEDDING
from splitbundle.format.weight_layout import SCALE
from splitbundle.stages import golden
from splitbundle.verification import onnx_rules
from tests.support.quantized_bundles import FORMS, MODELS, VOCABULARY, plain, quantized

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = [form for form in FORMS if form != "rows8"]
CASES = [
    (name, form) for name in MODELS for form in (FORMS if name in ("tied", "experts") else ("rows8", "blocks4_32"))
]
MASK = numpy.array([[0] * 4 + [1] * 14, [1] * 18, [1] * 15 + [0] * 3])
ROWS8, NBITS = 1e-3, 3e-2
"""The largest difference to torch, as a share of the largest logit."""


def ids() -> numpy.ndarray:
    return numpy.random.default_rng(3).integers(0, VOCABULARY, MASK.shape)


def by_torch(bundle: Bundle) -> numpy.ndarray:
    """Return torch's logits with the numbers of the weights, without rounding anything else."""
    with torch.no_grad():
        pipeline = bundle.pipeline(dtype="float32", kernels="torch")
        return pipeline(torch.from_numpy(ids()), attention_mask=torch.from_numpy(MASK)).numpy()  # type: ignore[no-any-return]


def by_graphs(bundle: Bundle, size: int = 99) -> numpy.ndarray:
    """Return the logits of the graphs, which take ``size`` tokens of each row at a time."""
    pipeline = bundle.pipeline(backend="onnxruntime", threads=1)
    session = pipeline.session(len(MASK), MASK.shape[1])
    pieces = [
        pipeline(ids()[:, i : i + size], attention_mask=MASK[:, i : i + size], session=session)
        for i in range(0, MASK.shape[1], size)
    ]
    return numpy.concatenate(pieces, axis=1)


def relative(got: numpy.ndarray, expected: numpy.ndarray) -> float:
    return float(numpy.abs(got - expected).max() / numpy.abs(expected).max())


def graph(bundle: Bundle, shard: str) -> ModelProto:
    return ModelProto.FromString((bundle.path / f"{shard}.onnx").read_bytes())


def takers(model: ModelProto, value: str) -> list[NodeProto]:
    """Return the nodes that take a value."""
    return [node for node in model.graph.node if value in node.input]


# Numbers.


@pytest.mark.rule("SB-O-004", "SB-O-005")
@pytest.mark.parametrize(("name", "form"), CASES)
def test_graphs_compute_what_torch_computes(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one call, in calls of a few tokens of padded rows, and in pieces of a call."""
    bundle = quantized(name, form)
    assert form in bundle.manifest.storage.encodings.values()
    expected, limit = by_torch(bundle), ROWS8 if form == "rows8" else NBITS
    found = {"whole": relative(by_graphs(bundle), expected), "called": relative(by_graphs(bundle, 7), expected)}
    monkeypatch.setattr(stage, "PIECE", 10)
    found["pieces"] = relative(by_graphs(bundle), expected)
    print({what: f"{value:.1e}" for what, value in found.items()})
    assert max(found.values()) < limit
    assert min(found.values()) > limit / 1000  # the graphs don't compute with the numbers of the weights


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("form", BLOCKS)
def test_what_is_lost_is_lost_by_rounding_inputs(form: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With inputs that aren't rounded to 8 bits, products with blocks differ as little as those with rows."""
    bundle, read = quantized("tied", form), onnx_rules.read

    def exact(*args: Any) -> bytes:
        model = ModelProto.FromString(read(*args))
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = level
        return model.SerializeToString()

    monkeypatch.setattr(onnx_rules, "read", exact)
    assert relative(by_graphs(bundle), by_torch(bundle)) < 2e-3


@pytest.mark.parametrize(("name", "form"), CASES[::3])
def test_golden_vectors(name: str, form: str) -> None:
    found = quantized(name, form).run_vectors(backend="onnxruntime", threads=1)
    assert {difference.tolerance for difference in found} == {golden.QUANTIZED_TOLERANCE}
    assert max(difference.relative for difference in found) < 1e-3  # no product rounds to 8 bits for a comparison
    assert {difference.between for difference in found} == {("onnxruntime", "itself")}


@pytest.mark.parametrize(("name", "form"), CASES[::3])
def test_both_backends_are_compared_without_the_rounding_of_fast_products(name: str, form: str) -> None:
    found = quantized(name, form).run_vectors(backend="all", threads=1)
    sides = {difference.between for difference in found}
    assert sides == {("torch", "itself"), ("onnxruntime", "itself"), ("onnxruntime", "torch")}
    assert all(difference.relative <= difference.tolerance for difference in found)
    assert max(difference.relative for difference in found if difference.between == ("torch", "itself")) < 1e-6


# What graphs read.


def test_a_table_is_read_in_place() -> None:
    """A shard without the head converts only the rows that it looks up."""
    bundle = quantized("tied", "blocks4_32")
    bottom, top = graph(bundle, "bottom"), graph(bundle, "top")
    for name in (EMBEDDING, f"{EMBEDDING}{SCALE}"):
        assert [node.op_type for node in takers(bottom, name)] == ["Gather"]
    assert [node.op_type for node in takers(top, EMBEDDING)] == ["Transpose"]
    whole = quantized("tied", "rows8", ())
    (shard,) = whole.shards
    both = graph(whole, shard.name)
    assert [node.op_type for node in takers(both, EMBEDDING)] == ["Gather", "Transpose"]
    assert sum(each.name == EMBEDDING for each in both.graph.initializer) == 1
    assert relative(by_graphs(whole), by_torch(whole)) < ROWS8


def test_products_with_one_input_share_its_integers() -> None:
    """A layer has four inputs of products: those of q, k and v, of the output, of gate and up, and of down."""
    model = graph(quantized("tied", "rows8"), "bottom")
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("MatMulInteger"), kinds.count("ReduceMax")) == (7, 4)


# Variants.


@pytest.mark.rule("SB-O-020")
def test_the_variant_follows_the_weights(tmp_path: Path) -> None:
    for form in FORMS:
        bundle = quantized("tied", form)
        variant = "standard" if form == "rows8" else "matmul_nbits"
        again = splitbundle_converter.add_onnx(bundle, tmp_path / form, check=False)
        named = splitbundle_converter.add_onnx(bundle, tmp_path / f"{form}-named", variant=variant, check=False)
        cut = splitbundle_converter.resplit(bundle, tmp_path / f"{form}-cut", split=[], onnx=True, check=False)
        for one in (bundle, again, named, cut):
            assert {shard.graph.variant for shard in one.shards if shard.graph is not None} == {variant}


@pytest.mark.rule("SB-O-017", "SB-O-020")
@pytest.mark.parametrize(
    ("form", "variant", "expected"),
    [
        ("rows8", "float16", "expected standard for graphs over rows8, got 'float16'"),
        ("rows8", "matmul_nbits", "expected standard for graphs over rows8, got 'matmul_nbits'"),
        ("blocks4_64", "standard", "expected matmul_nbits for graphs over rows8 and blocks4_64, got 'standard'"),
        ("blocks4_64", "float16", "expected matmul_nbits for graphs over rows8 and blocks4_64, got 'float16'"),
        (None, "matmul_nbits", "expected standard for graphs over no quantized weights, got 'matmul_nbits'"),
    ],
)
def test_other_variants_are_refused(form: str | None, variant: str, expected: str, tmp_path: Path) -> None:
    bundle = plain("tied") if form is None else quantized("tied", form)
    with pytest.raises(BundleError, match=rf"\[usage.onnx\] onnx: {expected}\. Without the name of a variant"):
        splitbundle_converter.add_onnx(bundle, tmp_path / "none", variant=variant)
    root = Path(shutil.copytree(bundle.path, tmp_path / "changed"))
    own = (root / "manifest.json").read_text("utf-8")
    (root / "manifest.json").write_text(re.sub('"variant": "[a-z_]+"', f'"variant": "{variant}"', own), "utf-8")
    with pytest.raises(BundleError) as caught:
        splitbundle.open(root)
    found = [problem.pointer for problem in caught.value.problems if problem.got == variant]
    assert found == [f"/shards/{i}/graph/variant" for i in range(2)]
    assert set(caught.value.codes) == {"manifest.graphs"}
