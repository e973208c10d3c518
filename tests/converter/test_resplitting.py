"""Cut again: any cuts, ten times, and back. No byte of a weight file changes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import splitbundle
import splitbundle_converter
from tests.support.checkpoints import digests
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLE = ROOT / "examples" / "license-gpt2"


@pytest.mark.parametrize("onnx", [False, True], ids=["weights", "graphs"])
def test_ten_times_any_cuts_and_back(tmp_path: Path, onnx: bool) -> None:
    """More or fewer shards, other names, by numbers, by number and by size; then the first cuts again."""
    path = tmp_path / "b.splitbundle"
    first = splitbundle_converter.convert(EXAMPLE, path, split=[2, 4], names=["a", "b", "c"], onnx=onnx, check=onnx)
    before, layers = digests(path), len(first.architecture.layers)
    weights = {name: before[name] for name in first.manifest.weight_files()}
    generator = random.Random(17)
    for round_ in range(10):
        if round_ % 4 == 2:
            made = splitbundle_converter.resplit(path, path, equal=generator.randint(1, layers + 2), force=True)
        elif round_ % 4 == 3:
            size = generator.randint(1_300_000, 3_200_000)
            made = splitbundle_converter.resplit(path, path, max_shard_size=size, force=True)
            assert max(shard.bytes for shard in made.shards) <= size
        else:
            cuts = sorted(generator.sample(range(layers + 1), generator.randint(0, layers + 1)))
            names = [f"part-{i}" for i in range(len(cuts) + 1)] if round_ % 4 else None
            made = splitbundle_converter.resplit(path, path, split=cuts, names=names, force=True)
            assert list(made.manifest.cuts) == cuts
        assert made.fingerprint == first.fingerprint
        found = digests(path)
        assert {name: found[name] for name in weights} == weights
        assert [shard.graph is not None for shard in made.shards] == [onnx] * len(made.shards)
        splitbundle.open(path).verify(exact=True)
    back = splitbundle_converter.resplit(path, path, split=[2, 4], names=["a", "b", "c"], force=True)
    assert digests(path) == before
    assert back.id == first.id
