"""How far the weights of two bundles are from each other."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

import splitbundle
from splitbundle import BundleError
from splitbundle.backends.torch import differences
from splitbundle.backends.torch.differences import compare_values
from splitbundle.backends.torch.weights import map_tensors
from splitbundle.comparison.records import Comparison, Values

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = math.nan, math.inf


def tensors(comparison: Comparison) -> dict[str, Values | None]:
    """Return the changed tensors of a comparison."""
    assert comparison.weights is not None
    return {change.name: change.values for unit in comparison.weights.units for change in unit.changes}


def test_a_trained_bundle_and_its_parent(golden: splitbundle.Bundle, tmp_path: Path) -> None:
    stage = golden.stage(golden.shards[1].name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    made = golden.save_as(tmp_path / "made.splitbundle", stage, vectors=False)
    found = golden.diff(made)
    assert found.relation == "b_changed_from_a"
    assert found.weights is not None
    units = {unit.unit for unit in found.weights.units}
    assert units == set(golden.shards[1].units)
    changed = tensors(found)
    expected = {name for unit in units for name in golden.architecture.tensors_of(unit)}
    assert changed.keys() == expected
    for unit in units:
        before, after = map_tensors(golden, unit), map_tensors(made, unit)
        for name, old in before.items():
            gap, values = (old.double() - after[name].double()).abs(), changed[name]
            assert values is not None
            assert values.largest == gap.max().item() > 0
            assert values.scale == old.double().abs().max().item()
            assert values.differing == int((gap > 0).sum())
            assert values.count == old.numel()
            assert values.relative == (values.largest / values.scale if values.scale else None)
    backwards = made.diff(golden)
    assert backwards.relation == "a_changed_from_b"
    assert [each and each.largest for each in tensors(backwards).values()] == [
        each and each.largest for each in changed.values()
    ]


def test_one_value(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    stage = gpt2.stage("trunk")
    bias = stage.get_parameter("layers.1.mlp.down.bias")
    with torch.no_grad():
        bias[5] += 0.25
    made = gpt2.save_as(tmp_path / "made.splitbundle", stage, vectors=False)
    ((name, values),) = tensors(gpt2.diff(made)).items()
    assert (name, values and values.differing) == ("layers.1.mlp.down.bias", 1)


def test_another_dtype(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    """Rounding differs by at most 2^-9 of a value, and bfloat16 is the same in float32."""
    notes: list[str] = []
    short = gpt2.save_as(tmp_path / "1", gpt2.stage("trunk"), dtype="bfloat16", vectors=False, notes=notes.append)
    found = gpt2.diff(short, only=["weights"])
    assert found.weights is not None
    assert (found.weights.a.dtype, found.weights.b.dtype) == ("float32", "bfloat16")
    changed = tensors(found)
    assert len(changed) > 30
    assert all(values is not None and 0 < (values.relative or 1) <= 2**-8 for values in changed.values())
    long = short.save_as(tmp_path / "2", short.stage("trunk"), dtype="float32", vectors=False, notes=notes.append)
    found = short.diff(long, only=["weights"])
    assert found.weights is not None
    assert len(found.weights.units) == 5
    assert tensors(found) == {}
    assert not any(unit.differs for unit in found.weights.units)
    assert found.differs  # the stored dtype does


def test_the_same_values_in_other_files(tmp_path: Path) -> None:
    pytest.importorskip("splitbundle_converter")
    pytest.importorskip("transformers")
    import splitbundle_converter
    from tests.support.paths import ROOT

    checkpoint = ROOT / "examples" / "license-gpt2"
    one, other = (
        splitbundle_converter.convert(checkpoint, tmp_path / f"{size}.splitbundle", max_file_size=size, check=False)
        for size in (None, 50_000)
    )
    found = one.diff(other)
    assert one.fingerprint != other.fingerprint
    assert found.relation == "same_architecture"
    assert found.weights is not None
    assert len(found.weights.units) == 7
    assert (tensors(found), found.weights.differs) == ({}, False)
    assert found.files is not None
    assert found.files.differs


def test_weights_that_are_no_numbers(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    stage = gpt2.stage("trunk")
    with torch.no_grad():
        stage.get_parameter("layers.1.mlp.down.bias")[:2] = torch.tensor([NAN, -INF])
        stage.get_parameter("layers.1.mlp.up.bias").fill_(NAN)
    made = gpt2.save_as(tmp_path / "nan.splitbundle", stage, vectors=False)
    found = tensors(gpt2.diff(made))
    down, up = found["layers.1.mlp.down.bias"], found["layers.1.mlp.up.bias"]
    assert down is not None
    assert (down.differing, down.not_finite, down.largest) == (2, 2, 0)
    assert up is not None
    assert (up.differing, up.not_finite, up.largest) == (72, 72, 0)
    again = made.save_as(tmp_path / "again.splitbundle", made.stage("bottom"), vectors=False)
    assert tensors(made.diff(again)) == {}


@pytest.mark.parametrize("piece", [1, 3, 100])
def test_every_kind_of_value(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair is compared as Python compares it, in pieces of any size."""
    monkeypatch.setattr(differences, "PIECE", piece)
    kinds = [0.0, -0.0, 1.0, -2.5, 3.0e38, -3.0e38, 1e-45, NAN, INF, -INF]
    pairs = [(x, y) for x in kinds for y in kinds]
    one, other = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
    exact = list(zip(one.tolist(), other.tolist(), strict=True))  # as float32 rounds them

    def unequal(x: float, y: float) -> bool:
        if math.isnan(x) or math.isnan(y):
            return math.isnan(x) != math.isnan(y)
        return x != y or math.copysign(1, x) != math.copysign(1, y)

    different = [(x, y) for x, y in exact if unequal(x, y)]
    finite = [(x, y) for x, y in exact if math.isfinite(x) and math.isfinite(y)]
    values = compare_values(one.view(10, 10), other.view(10, 10))
    assert values is not None
    assert values.differing == len(different)
    assert values.not_finite == len([pair for pair in different if pair not in finite])
    assert values.largest == max(abs(x - y) for x, y in finite) > 5e38
    assert values.scale == max(abs(x) for x, _ in exact if math.isfinite(x))


def test_equal_values_of_other_bits() -> None:
    """NaN of another payload is NaN, too. A zero of another sign is another value."""
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert compare_values(nan, nan.flip(0)) is None
    zero = compare_values(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert zero is not None
    assert (zero.differing, zero.largest, zero.scale, zero.relative) == (1, 0.0, 0.0, None)
    assert compare_values(torch.tensor([1.5]).bfloat16(), torch.tensor([1.5])) is None


def test_a_header_that_is_not_the_one(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    stage = gpt2.stage("trunk")
    with torch.no_grad():
        stage.get_parameter("layers.1.mlp.down.bias").add_(1)
    made = gpt2.save_as(tmp_path / "made.splitbundle", stage, vectors=False)
    path = made.path / "layer-001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"mlp.down.bias", b"mlp.damn.bias"))
    with pytest.raises(BundleError, match=r"\[file.header-digest\] layer-001.safetensors"):
        gpt2.diff(made)
    path.write_bytes(data[:-1])
    with pytest.raises(BundleError, match=r"\[file.size\] layer-001.safetensors"):
        gpt2.diff(made)
    assert gpt2.diff(made, only=["cuts"]).differs is False


def test_what_the_digests_promise(gpt2: splitbundle.Bundle, copy: Path) -> None:
    """Equal digests aren't looked behind: a changed byte is a matter of ``verify``, or of a strict opening."""
    path = copy / "layer-001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert gpt2.diff(splitbundle.open(copy)).differs is False
    with pytest.raises(BundleError, match=r"\[file.digest\]"):
        splitbundle.open(copy).verify()
    stage = gpt2.stage("trunk")
    with torch.no_grad():
        stage.get_parameter("layers.1.mlp.down.bias").add_(1)
    made = gpt2.save_as(copy.parent / "made.splitbundle", stage, vectors=False)
    assert made.diff(splitbundle.open(copy)).differs
    with pytest.raises(BundleError, match=r"\[file.digest\]"):
        made.diff(splitbundle.open(copy, verify="always"))


def test_progress_and_a_replaced_bundle(gpt2: splitbundle.Bundle, copy: Path, tmp_path: Path) -> None:
    stage = gpt2.stage("trunk")
    with torch.no_grad():
        stage.get_parameter("layers.1.mlp.down.bias").add_(1)
    made = gpt2.save_as(tmp_path / "made.splitbundle", stage, vectors=False)
    steps: list[tuple[str, int, int]] = []
    gpt2.diff(made, progress=lambda *step: steps.append(step))
    count = len(gpt2.architecture.layer_tensors(1))
    assert steps == [("comparing weights", i, count) for i in range(count + 1)]
    shutil.rmtree(made.path)
    shutil.copytree(copy, made.path)
    (made.path / "layer-001.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match="The bundle was replaced or removed since it was opened"):
        gpt2.diff(made)
