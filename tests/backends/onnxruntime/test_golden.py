"""Golden vectors of bundles with graphs, in both backends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import splitbundle_converter
from splitbundle import ParityError
from splitbundle.stages.golden import FLOAT16_TOLERANCE
from splitbundle_converter.graphs import decoder
from tests.support.models import TOLERANCE, checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_golden_vectors_in_float16(tmp_path: Path) -> None:
    """onnxruntime's results have the tolerance of float16, and torch's the tolerance of float32."""
    path = tmp_path / "b"
    whole = splitbundle_converter.convert(checkpoint("llama", "float16"), path, split=[1], onnx="float16")
    for difference in whole.run_vectors(backend="all"):
        rough = "onnxruntime" in difference.between
        assert difference.tolerance == (FLOAT16_TOLERANCE if rough else TOLERANCE)
        assert difference.relative < (1e-2 if rough else TOLERANCE)
        assert (difference.relative > TOLERANCE) == rough


def test_new_graphs_are_held_against_the_golden_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """add-onnx and resplit do so too, unless told otherwise. Both keep the existing variant."""
    plain = splitbundle_converter.convert(checkpoint("llama", "float16"), tmp_path / "plain", onnx="float16")
    added = splitbundle_converter.add_onnx(plain, tmp_path / "added")
    assert [shard.graph and shard.graph.variant for shard in added.shards] == ["float16"]

    def spoilt(architecture: Any, *rest: Any) -> Any:
        model = build(architecture, *rest)
        for node in model.graph.node:
            if node.name == "layers.0.mlp.gated":
                node.op_type = "Add"
        return model

    build = decoder.build
    monkeypatch.setattr(decoder, "build", spoilt)
    for make in (
        lambda **more: splitbundle_converter.add_onnx(plain, tmp_path / "b", **more),
        lambda **more: splitbundle_converter.resplit(plain, tmp_path / "b", split=[2], **more),
    ):
        with pytest.raises(ParityError, match=r"variant=\"standard\" computes in float32"):
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
