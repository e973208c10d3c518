"""Cuts, names and file sizes of shards; any cut gives the same model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import splitbundle_converter
from tests.support.checkpoints import accepted, refused, said
from tests.support.models import LAYERS, bundle, checkpoint
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("cuts", [(2, 1), (5,), (-1,), (1, 1), (0, 2, 9), (1.5,), ("1",), (True,)])
def test_cuts(output: Path, cuts: tuple[int, ...]) -> None:
    assert str(refused(checkpoint("llama"), output, split=cuts)) == (
        "[usage.cut] split: expected rising layer numbers from 0 to 4, the model's number of layers, "
        f"got {','.join(map(str, cuts))}. A cut is the number of the first layer of the next shard"
    )


@pytest.mark.parametrize("size", [0, -1, 1.5, "1"])
def test_a_size_of_files_that_is_none(output: Path, size: Any) -> None:
    text = str(refused(checkpoint("llama"), output, max_file_size=size))
    assert text.startswith("[usage.size] max_file_size: expected a number of bytes from 1, got")


@pytest.mark.parametrize(
    "names",
    [
        ("a",),
        ("a", "b", "c"),
        ("a", "a"),
        ("A", "b"),
        ("a", ""),
        ("a", "../x"),
        ("a", "-b"),
        ("a", "b.c"),
        ("a", "con"),
    ],
)
def test_names(output: Path, names: tuple[str, ...]) -> None:
    text = said(refused(checkpoint("llama"), output, split=(2,), names=names))
    assert text.startswith("[usage.names] names: expected 2 different names, one for each shard, each 1 to 64 of")
    assert text.endswith(f", got {', '.join(names)}. Give one name more than there are cuts, or none")


def test_a_unit_in_parts_computes_the_same(output: Path) -> None:
    """A layer above the largest file size is divided between tensors, and is loaded as one."""
    made = accepted(checkpoint("llama"), output, split=(2,), max_file_size=12_000)
    assert made.manifest.units["layer-000"][0] == "layer-000-part-001.safetensors"
    assert all(len(files) > 1 for unit, files in made.manifest.units.items() if unit.startswith("layer"))
    made.verify(exact=True)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(made.pipeline(kernels="torch")(ids), bundle("llama").pipeline(kernels="torch")(ids))


def test_every_pair_of_cuts_has_the_fingerprint_of_the_model(output: Path) -> None:
    for cuts in itertools.combinations(range(LAYERS + 1), 2):
        path = output.with_name(f"{cuts[0]}-{cuts[1]}.splitbundle")
        assert accepted(checkpoint("llama"), path, split=cuts, check=False).fingerprint == bundle("llama").fingerprint


CHECKPOINT = ROOT / "examples" / "license-gpt2"


def test_large_units_have_parts(tmp_path: Path) -> None:
    parted = splitbundle_converter.convert(
        CHECKPOINT, tmp_path / "x.splitbundle", split=[3], max_file_size=200_000, check=True
    )
    files = parted.manifest.units["layer-000"]
    assert files == tuple(f"layer-000-part-{i:03d}.safetensors" for i in range(1, len(files) + 1))
    assert len(files) > 1
    # A tensor is never divided: the token table alone is larger.
    sizes = {path: parted.manifest.files[path].size for path in parted.manifest.weight_files()}
    assert [path for path, size in sizes.items() if size > 200_000] == ["embedding-part-001.safetensors"]
    parted.verify(exact=True)
    whole = splitbundle_converter.convert(CHECKPOINT, tmp_path / "whole.splitbundle", check=False)
    ids = torch.tensor([[44, 308, 68]])
    assert torch.equal(parted.pipeline()(ids), whole.pipeline()(ids))
    assert parted.architecture_id == whole.architecture_id
