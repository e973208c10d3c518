"""A bundle that was trained in stages runs under onnxruntime, with the trained numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import splitbundle_converter
from splitbundle.training import label_count, next_labels, token_loss
from tests.support.models import TOLERANCE, checkpoint, token_rows

pytestmark = pytest.mark.usefixtures("one_thread")


def test_graphs_of_another_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New graphs are written where onnx is installed. Elsewhere they are left out, and a note says so."""
    bundle = splitbundle_converter.convert(checkpoint("llama-llama3"), tmp_path / "0.splitbundle", split=[2], onnx=True)
    stage, ids, notes = bundle.stage("bottom"), torch.tensor(token_rows(5)), list[str]()
    made = bundle.save_as(tmp_path / "1.splitbundle", stage, dtype="bfloat16", notes=notes.append)
    assert notes == []
    assert [shard.graph is not None for shard in made.shards] == [True, True]
    with torch.no_grad():
        expected = made.pipeline(dtype="float32")(ids)
    got = torch.from_numpy(made.pipeline(backend="onnxruntime")(ids.numpy()))
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()
    made.verify(exact=True)
    made.run_vectors(backend="all")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))
    made = bundle.save_as(tmp_path / "2.splitbundle", stage, dtype="bfloat16", notes=notes.append)
    assert [shard.graph for shard in made.shards] == [None, None]
    assert "The graphs are left out, as they name the old dtype" in notes[0]
    made.verify(exact=True)


@pytest.mark.parametrize("name", ["gpt2-by-layer", "llama-llama3", "bloom-nine-heads-untied"])
def test_a_trained_bundle_under_onnxruntime(name: str, tmp_path: Path) -> None:
    """Its graphs are those from before, over the new weights. Each shard is saved by itself."""
    bundle = splitbundle_converter.convert(checkpoint(name), tmp_path / "0.splitbundle", split=[1, 3], onnx=True)
    before = bundle
    ids = torch.tensor(token_rows(9, 9))
    pipeline = bundle.pipeline(trainable=True)
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=1e-2)
    token_loss(pipeline(ids), next_labels(ids), label_count(next_labels(ids))).backward()
    optimizer.step()
    for i, stage in enumerate(pipeline.stages, 1):
        others = [bundle.stage(shard.name) for shard in bundle.shards]
        if i == 3 and bundle.architecture.head.tied:
            stage.embedding.token.weight.data.copy_(others[0].embedding.token.weight)  # saved with the first one
        bundle = bundle.save_as(tmp_path / f"{i}.splitbundle", stage)
    assert [shard.graph for shard in bundle.shards] == [shard.graph for shard in before.shards]
    graphs = [shard.graph.file for shard in bundle.shards if shard.graph is not None]
    assert all((bundle.path / path).read_bytes() == (before.path / path).read_bytes() for path in graphs)
    with torch.no_grad():
        expected = pipeline(ids)
        assert torch.equal(bundle.pipeline(kernels="torch")(ids), expected)
        got = torch.from_numpy(bundle.pipeline(backend="onnxruntime")(ids.numpy()))
        assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()
        old = torch.from_numpy(before.pipeline(backend="onnxruntime")(ids.numpy()))
        assert (old - expected).abs().max() > 1e-3 * expected.abs().max()
    bundle.verify(exact=True)
    assert {side for difference in bundle.run_vectors(backend="all") for side in difference.between} == {
        "torch",
        "onnxruntime",
        "itself",
    }
