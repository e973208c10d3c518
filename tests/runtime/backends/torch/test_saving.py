"""Saving a bundle with changed weights: what is written, what is taken over, and what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import splitbundle
from splitbundle import BundleError
from splitbundle.backends.torch.stage import Stage

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[5, 3, 9, 1]])


def change(stage: nn.Module, by: float = 0.01) -> None:
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(by)


def files(bundle: splitbundle.Bundle) -> dict[str, bytes]:
    return {path: (bundle.path / path).read_bytes() for path in bundle.manifest.files}


@torch.no_grad()
def test_one_changed_stage(golden: splitbundle.Bundle, tmp_path: Path) -> None:
    pipeline = golden.pipeline()
    changed = pipeline.stages[1]
    change(changed)
    before, path = files(golden), tmp_path / "new.splitbundle"
    made = golden.save_as(path, changed)
    assert made.path == path
    assert torch.equal(made.pipeline()(IDS), pipeline(IDS))
    after = files(made)
    different = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    written = {file for unit in golden.shards[1].units for file in golden.manifest.units[unit]}
    assert different == written | {"README.md", "vectors.safetensors"}
    assert made.fingerprint != golden.fingerprint
    assert made.manifest.model.parent == golden.fingerprint
    assert made.verify(exact=True).unlisted == ()
    assert splitbundle.open(path).id == made.id


@pytest.mark.rule("SB-G-004")
@torch.no_grad()
def test_golden_vectors_are_the_bundles_own(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    stage = gpt2.stage("trunk")
    change(stage)
    made = gpt2.save_as(tmp_path / "new.splitbundle", [stage])
    assert made.manifest.vectors is not None
    assert made.manifest.vectors.of_itself
    differences = made.run_vectors()
    assert {difference.between for difference in differences} == {("torch", "itself")}
    assert max(difference.relative for difference in differences) < 1e-6
    with pytest.raises(BundleError, match=r"\[vectors.none\] expected golden vectors of the original model"):
        made.run_vectors(require_original=True)
    gpt2.run_vectors(require_original=True)
    without = gpt2.save_as(tmp_path / "without.splitbundle", [stage], vectors=False)
    assert without.manifest.vectors is None
    assert "vectors.safetensors" not in without.manifest.files
    without.verify(exact=True)


def test_nothing_changed(golden: splitbundle.Bundle, tmp_path: Path) -> None:
    """Stages as they were loaded give the same bundle: the same files, and so the same ids and golden vectors."""
    made = golden.save_as(tmp_path / "same.splitbundle", golden.pipeline(trainable=True))
    assert (made.fingerprint, made.manifest.model.parent) == (golden.fingerprint, None)
    before, after = files(golden), files(made)
    assert {name for name in before if before[name] != after[name]} <= {"README.md"}
    assert made.manifest.vectors == golden.manifest.vectors


def test_stages_of_one_pipeline_share_the_table(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    pipeline = gpt2.pipeline(trainable=True)
    pipeline(IDS).square().mean().backward()
    torch.optim.SGD(pipeline.parameters(), lr=0.1).step()
    made = gpt2.save_as(tmp_path / "new.splitbundle", pipeline)
    with torch.no_grad():
        assert torch.equal(made.pipeline(kernels="torch")(IDS), pipeline(IDS))


def test_two_values_of_a_tied_table_are_refused(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    ends = [gpt2.stage("bottom"), gpt2.stage("top")]
    gpt2.save_as(tmp_path / "equal.splitbundle", ends)
    change(ends[0])
    with pytest.raises(BundleError, match=r"one value for 'embedding.token.weight', which bottom and top share"):
        gpt2.save_as(tmp_path / "two.splitbundle", ends)
    assert not (tmp_path / "two.splitbundle").exists()


@torch.no_grad()
@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["keep", "float32", "bfloat16", "float16"])
def test_dtypes(dtype: str, computed: str, gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    """``keep`` rounds to the stored dtype. Another dtype rounds every weight, changed or not."""
    stage = gpt2.stage("trunk", dtype=computed)
    change(stage)
    notes: list[str] = []
    made = gpt2.save_as(tmp_path / "new.splitbundle", stage, dtype=dtype, notes=notes.append)
    stored = "float32" if dtype == "keep" else dtype
    assert made.manifest.storage.dtype == stored
    for name, value in made.stage("trunk").named_parameters():
        assert torch.equal(value, stage.get_parameter(name).to(getattr(torch, stored))), name
    whole, old = made.stage("top"), gpt2.stage("top")
    assert all(torch.equal(p, old.get_parameter(n).to(p.dtype)) for n, p in whole.named_parameters())
    made_new = bool(entry_points(group="splitbundle.graphs")) and find_spec("onnx") is not None
    graphs = [shard.graph for shard in made.shards]
    assert all(graph is None for graph in graphs) == (stored != "float32" and not made_new)
    assert bool(notes) == (stored != "float32" and not made_new)
    made.verify(exact=True)
    made.run_vectors()


def test_a_value_that_the_stored_dtype_cannot_hold(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    stage = gpt2.stage("trunk")
    change(stage, 1e6)
    with pytest.raises(BundleError, match=r"\[input.overflow\]"):
        gpt2.save_as(tmp_path / "new.splitbundle", stage, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_range_of_layers_and_wrappers(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    stage = gpt2.stage(layers=(1, 3), head=False)
    change(stage)
    compiled = torch.compile(stage, backend="eager")
    made = gpt2.save_as(tmp_path / "new.splitbundle", [compiled])  # type: ignore[list-item]
    with torch.no_grad():
        whole = made.pipeline()(IDS)
        parts = gpt2.stage("bottom")(IDS)
        assert torch.equal(made.stage(layers=(1, 3), head=False)(parts), stage(parts))
    assert whole.isfinite().all()


def test_the_bundle_itself_is_replaced(copy: Path) -> None:
    bundle = splitbundle.open(copy)
    stage = bundle.stage("trunk")
    change(stage)
    with pytest.raises(BundleError, match=r"\[output.exists\]"):
        bundle.save_as(copy, stage)
    made = bundle.save_as(copy, stage, force=True)
    assert splitbundle.open(copy).id == made.id != bundle.id
    with torch.no_grad():
        hidden = torch.ones(1, 2, bundle.architecture.hidden_size)
        assert torch.equal(made.stage("trunk")(hidden), stage(hidden))  # still mapped from the old files


def test_a_partial_bundle(copy: Path, tmp_path: Path) -> None:
    """A participant has the files of one shard. It can save that shard, and nothing else of the bundle is needed."""
    whole = splitbundle.open(copy)
    keep = {"architecture.json", "manifest.json", "SHA256SUMS", *whole.files_of(whole.shard("trunk"))}
    for path in sorted(copy.rglob("*")):
        if path.is_file() and path.relative_to(copy).as_posix() not in keep:
            path.unlink()
    part, notes = splitbundle.open(copy), list[str]()
    stage = part.stage("trunk")
    change(stage)
    made = part.save_as(tmp_path / "new.splitbundle", stage, notes=notes.append)
    assert made.manifest.vectors is None
    assert notes == ["The bundle is partial, so it has no golden vectors: they need every shard."]
    assert made.whole_shards() == ("trunk",)
    made.verify("trunk")
    hidden = torch.ones(1, 2, part.architecture.hidden_size)
    with torch.no_grad():
        assert torch.equal(made.stage("trunk")(hidden), stage(hidden))
    with pytest.raises(BundleError, match=r"\[file.missing\]"):
        part.save_as(tmp_path / "other.splitbundle", stage, dtype="bfloat16")


def test_single_stages_in_different_processes(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    """Two of the three are in processes of their own."""
    script = (
        "import sys, torch, splitbundle\n"
        "bundle = splitbundle.open(sys.argv[1])\n"
        "stage = bundle.stage(sys.argv[3], trainable=True)\n"
        "torch.nn.init.constant_(next(iter(stage.layers.values())).mlp.down.bias, float(sys.argv[4]))\n"
        "bundle.save_as(sys.argv[2], stage)\n"
    )
    path, values = gpt2.path, {"bottom": 0.25, "trunk": 0.5, "top": 0.75}
    for i, (shard, value) in enumerate(values.items()):
        target = tmp_path / f"{i}.splitbundle"
        if shard == "trunk":
            bundle = splitbundle.open(path)
            stage = bundle.stage(shard, trainable=True)
            nn.init.constant_(next(iter(stage.layers.values())).mlp.down.bias, value)
            bundle.save_as(target, stage)
        else:
            subprocess.run([sys.executable, "-c", script, path, target, shard, str(value)], check=True, env=os.environ)
        path = target
    made = splitbundle.open(path)
    own = gpt2.pipeline()
    for stage, value in zip(own.stages, values.values(), strict=True):
        assert isinstance(stage, Stage)
        nn.init.constant_(next(iter(stage.layers.values())).mlp.down.bias, value)
    with torch.no_grad():
        assert torch.equal(made.pipeline()(IDS), own(IDS))
    assert made.manifest.model.parent != gpt2.fingerprint  # the parent is the bundle before
    made.run_vectors()


def test_the_ends_of_a_tied_table_one_after_another(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    """An end that didn't change the table keeps what the other end learned. Two different changes are refused."""

    def ends() -> tuple[Stage, Stage]:
        return gpt2.stage("bottom", trainable=True), gpt2.stage("top", trainable=True)

    bottom, top = ends()
    change(bottom)
    first = gpt2.save_as(tmp_path / "1.splitbundle", bottom)
    with torch.no_grad():
        top.layers["2"].mlp.up.bias.add_(1)
    second = first.save_as(tmp_path / "2.splitbundle", top)
    table = second.stage("bottom").embedding.token.weight
    assert torch.equal(table, bottom.embedding.token.weight)
    assert torch.equal(second.stage("top").layers["2"].mlp.up.bias, top.layers["2"].mlp.up.bias)
    bottom, top = ends()
    change(bottom, 0.25)
    change(top, 0.5)
    first = gpt2.save_as(tmp_path / "3.splitbundle", bottom)
    with pytest.raises(
        BundleError, match=r"one value for 'embedding.token.weight', which is tied, got another in 3.split"
    ):
        first.save_as(tmp_path / "4.splitbundle", top)
    with torch.no_grad():
        top.embedding.token.weight.copy_(bottom.embedding.token.weight)  # as sum_tied_gradients keeps them
    first.save_as(tmp_path / "4.splitbundle", top)
    again = first.stage("top", trainable=True)
    change(again)
    first.save_as(tmp_path / "5.splitbundle", again)  # it was loaded from there


def test_weights_that_are_no_numbers(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    stage = gpt2.stage("trunk")
    change(stage, float("nan"))
    with pytest.warns(UserWarning, match="no golden vectors: its weights give NaN or infinity"):
        made = gpt2.save_as(tmp_path / "nan.splitbundle", stage)
    assert made.manifest.vectors is None
    made.verify(exact=True)


def test_saving_and_training_need_torch_alone(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    """No numpy, no safetensors, no jsonschema, no onnx."""
    script = (
        "import sys\n"
        "for name in ('numpy', 'safetensors', 'jsonschema', 'onnx', 'onnxruntime', 'transformers', 'peft'):\n"
        "    sys.modules[name] = None\n"
        "import splitbundle\n"
        "bundle = splitbundle.open(sys.argv[1])\n"
        "stage = bundle.stage('trunk', trainable=True)\n"
        "import torch\n"
        "from splitbundle.training import Checkpoints, load_lora, save_lora\n"
        "stage.add_lora(2, 4, ['c_attn'])\n"
        "optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=0.1)\n"
        "stage(torch.ones(1, 3, 48)).square().mean().backward()\n"
        "optimizer.step()\n"
        "checkpoints = Checkpoints(sys.argv[2] + '/run')\n"
        "checkpoints.save(1, stage, optimizer)\n"
        "assert checkpoints.load(stage, optimizer).step == 1\n"
        "save_lora(sys.argv[2] + '/lora', stage)\n"
        "load_lora(sys.argv[2] + '/lora', bundle.stage('trunk'))\n"
        "stage.merge_lora()\n"
        "made = bundle.save_as(sys.argv[2] + '/new.splitbundle', stage, notes=print)\n"
        "made.verify(exact=True)\n"
        "made.run_vectors()\n"
    )
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", script, str(gpt2.path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


class Adapter(nn.Module):
    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


def test_what_cannot_be_saved(gpt2: splitbundle.Bundle, golden: splitbundle.Bundle, tmp_path: Path) -> None:
    path = tmp_path / "new.splitbundle"
    adapted = gpt2.stage("trunk")
    adapted.layers["1"].attention.query = Adapter(adapted.layers["1"].attention.query)
    less = gpt2.stage("trunk")
    less.layers["1"].mlp.down.bias = None
    for stages, message in (
        ([], "expected at least one stage, got none"),
        (nn.Linear(2, 2), "Linear"),
        ([gpt2.stage("trunk"), 3], "expected torch stages, or a pipeline of them, got int"),
        (adapted, r"'layers.1.attention.query.base_layer.*Merge adapters into their layers first"),
        (less, r"no 'layers.1.mlp.down.bias'"),
    ):
        with pytest.raises(BundleError, match=rf"\[input.value\] stages: .*{message}"):
            gpt2.save_as(path, stages)  # type: ignore[arg-type]
    if golden.architecture != gpt2.architecture:
        with pytest.raises(BundleError, match="of another architecture"):
            gpt2.save_as(path, golden.stage(layers=(0, 1)))
    with pytest.raises(BundleError, match=r"\[input.value\] dtype: expected keep, or one of float32"):
        gpt2.save_as(path, gpt2.stage("trunk"), dtype="int8")
    with pytest.raises(BundleError, match=r"\[output.failed\]"):
        gpt2.save_as(gpt2.path / "inside.splitbundle", gpt2.stage("trunk"))
    assert not path.exists()


def test_a_unit_in_several_files(tmp_path: Path) -> None:
    pytest.importorskip("splitbundle_converter")
    pytest.importorskip("transformers")
    import splitbundle_converter
    from tests.support.paths import ROOT

    bundle = splitbundle_converter.convert(
        ROOT / "examples" / "license-gpt2", tmp_path / "parts.splitbundle", split=[1], max_file_size=50_000
    )
    assert any(len(paths) > 1 for paths in bundle.manifest.units.values())
    pipeline = bundle.pipeline()
    change(pipeline)
    made = bundle.save_as(tmp_path / "new.splitbundle", pipeline)
    assert made.manifest.units == bundle.manifest.units
    made.verify(exact=True)
    with torch.no_grad():
        assert torch.equal(made.pipeline()(IDS), pipeline(IDS))


def test_a_strict_bundle(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    strict = splitbundle.open(gpt2.path, verify="always")
    stage = strict.stage("trunk")
    change(stage)
    assert strict.save_as(tmp_path / "new.splitbundle", stage).verify().unlisted == ()
    shutil.rmtree(tmp_path / "new.splitbundle")
