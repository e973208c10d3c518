"""A torch stage's parameters: names, gradients, dtypes, and files that are mapped."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import splitbundle_converter
from splitbundle.backends.torch.pipeline import load_pipeline
from tests.support.models import ONE_PER_FAMILY, bundle, checkpoint, token_rows
from tests.support.tiers import USUAL, thinned

pytestmark = pytest.mark.usefixtures("one_thread")

one_per_family = pytest.mark.parametrize("name", thinned(ONE_PER_FAMILY, USUAL))


@one_per_family
def test_parameters_have_their_global_names(name: str) -> None:
    """For any layer range, the names are the architecture's, and none is renumbered."""
    whole = bundle(name)
    tensors = whole.architecture.unit_tensors()
    for start, stop in ((0, 2), (1, 3), (2, 4), (3, 4)):
        selection = whole.select(layers=(start, stop))
        expected = {n for unit in selection.units for n in tensors[unit]}
        if start and selection.head and whole.architecture.head.tied:
            # The embedding's unit is needed only for the token table.
            expected = {n for n in expected if not n.startswith("embedding.") or n == "embedding.token.weight"}
        assert set(whole.stage(layers=(start, stop)).state_dict()) == expected


@pytest.mark.rule("SB-B-014")
def test_a_range_computes_the_same_whatever_the_cuts_on_disk(tmp_path: Path) -> None:
    """Another cut is another manifest over the same weights."""
    name = "qwen2-mixed"
    other = splitbundle_converter.convert(checkpoint(name), tmp_path / "b.splitbundle", split=(3,), check=False)
    assert other.fingerprint == bundle(name).fingerprint
    hidden = torch.randn(2, 7, 36, generator=torch.Generator().manual_seed(0))
    for ends in ((0, 1), (1, 3), (2, 4), (3, 4)):
        given = torch.tensor(token_rows(7, 7)) if ends[0] == 0 else hidden
        assert torch.equal(other.stage(layers=ends)(given), bundle(name).stage(layers=ends)(given))


def test_parameters_take_gradients_only_where_asked() -> None:
    whole = bundle("llama")
    assert not any(p.requires_grad for p in whole.pipeline().parameters())
    assert not any(p.requires_grad for p in whole.stage("bottom").parameters())
    assert all(p.requires_grad for p in whole.pipeline(trainable=True).parameters())
    assert all(p.requires_grad for p in whole.stage("top", trainable=True).parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the mappings of a process are seen on Linux alone")
@pytest.mark.parametrize("trainable", [False, True])
def test_weights_are_mapped_and_not_copied(trainable: bool) -> None:
    whole = bundle("llama")
    parts = load_pipeline(whole, trainable=trainable)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) .* (/.*\.safetensors)$", line)
        if found and Path(found[4]).parent == whole.path:
            mapped.append((int(found[1], 16), int(found[2], 16), found[3], Path(found[4]).stem))
    units = {name: unit for unit, names in whole.architecture.unit_tensors().items() for name in names}
    for stage in parts.stages:
        for name, parameter in stage.named_parameters():
            start = parameter.data_ptr()
            stop = start + parameter.nbytes
            access = [(mode, unit) for low, high, mode, unit in mapped if low <= start and stop <= high]
            # The mapping is writable and private. A shared one would change the file.
            assert ("rw-p", units[name]) in access, f"{name}: {access}"


def test_another_dtype_is_computed_in() -> None:
    assert {p.dtype for p in bundle("llama").pipeline(dtype="bfloat16").parameters()} == {torch.bfloat16}
