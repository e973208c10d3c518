"""Stages in other tools: PEFT, accelerate, DistributedDataParallel, frozen apps, notebooks, preloading servers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import splitbundle
import splitbundle_converter
from splitbundle.backends.torch.pipeline import Pipeline
from tests.support.models import make_model
from tests.support.paths import ROOT

APP = ROOT / "tests" / "environments" / "frozen_app.py"
PRELOAD = ROOT / "tests" / "environments" / "preload_and_fork.py"
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def license_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The license model as three shards, with golden vectors and graphs."""
    output = tmp_path_factory.mktemp("tools") / "license.splitbundle"
    return splitbundle_converter.convert(ROOT / "examples" / "license-gpt2", output, split=[2, 4], onnx=True).path


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    """A small model in three shards: one with an untied head, and one with a tied head."""
    place = tmp_path_factory.mktemp(request.param)
    make_model(request.param, tie_word_embeddings=request.param == "gpt2").save_pretrained(place / "source")
    return splitbundle_converter.convert(place / "source", place / "x.splitbundle", split=[1, 2], check=False)


def forward(stages: list[nn.Module]) -> Tensor:
    x = IDS
    for stage in stages:
        x = stage(x)
    return x


def test_lora_on_the_table_and_the_head(bundle: splitbundle.Bundle) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    stages = [bundle.stage(shard.name, trainable=True) for shard in bundle.shards]
    before = forward(stages).detach()
    targets = [["embedding.token"], ["attention.query", "mlp.up"], ["head.projection", "mlp.down"]]
    if bundle.architecture.head.tied:
        targets[2].remove("head.projection")  # it has no weight of its own
    adapted = [
        inject_adapter_in_model(LoraConfig(r=2, target_modules=names, init_lora_weights=False), stage)
        for names, stage in zip(targets, stages, strict=True)
    ]
    logits = forward(adapted)
    assert not torch.allclose(logits, before)
    logits.sum().backward()
    trained = [name for stage in adapted for name, p in stage.named_parameters() if p.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    assert any("embedding" in name for name in trained)


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
def test_offloaded_stages(bundle: splitbundle.Bundle, how: str, tmp_path: Path) -> None:
    import accelerate

    expected = bundle.pipeline()(IDS)
    stages = [bundle.stage(shard.name) for shard in bundle.shards]
    for i, stage in enumerate(stages):
        device = torch.device("cpu")
        if how == "cpu_offload":
            accelerate.cpu_offload(stage, execution_device=device)
        else:
            accelerate.disk_offload(stage, str(tmp_path / str(i)), execution_device=device)
        assert stage.device == device
        assert {parameter.device.type for parameter in stage.parameters()} == {"meta"}
    with torch.no_grad():
        assert torch.allclose(forward(stages), expected, atol=1e-5)
        pipeline = Pipeline(stages)
        session = pipeline.session(1, 8)
        pipeline(IDS[:, :4], session=session)
        assert torch.allclose(pipeline(IDS[:, 4:], session=session)[:, -1], expected[:, -1], atol=1e-4)


def test_stages_in_distributed_data_parallel(bundle: splitbundle.Bundle, tmp_path: Path) -> None:
    """In a group of one process: the wrapper is the same, and its gradients are checked elsewhere."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        stages = [bundle.stage(shard.name, trainable=True) for shard in bundle.shards]
        wrapped = [nn.parallel.DistributedDataParallel(stage) for stage in stages]
        pipeline = Pipeline(wrapped)  # type: ignore[arg-type]
        pipeline(IDS).sum().backward()
        assert all(
            stage.get_parameter(name).grad is not None for stage in stages for name, _ in stage.named_parameters()
        )
        with torch.no_grad():
            assert torch.allclose(pipeline(IDS), bundle.pipeline()(IDS), atol=1e-5)
            assert len(list(pipeline.generate(IDS, max_new_tokens=2))) == 2
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_an_app_in_a_zip(backend: str, license_bundle: Path, tmp_path: Path) -> None:
    """Only the zip has the package: this checkout is taken off the path."""
    (tmp_path / "app").mkdir()
    shutil.copytree(ROOT / "runtime" / "splitbundle", tmp_path / "app" / "splitbundle")
    shutil.copy(APP, tmp_path / "app" / "__main__.py")
    zipapp.create_archive(tmp_path / "app", tmp_path / "app.pyz")
    program = f"""
import runpy, sys
sys.path = [path for path in sys.path if not path.startswith({str(ROOT)!r}) or "site-packages" in path]
sys.path = [path for path in sys.path if path != ""]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.argv = ["app", {backend!r}, {str(license_bundle)!r}]
runpy.run_path({str(tmp_path / "app.pyz")!r}, run_name="__main__")
assert "app.pyz" in sys.modules["splitbundle"].__file__
"""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("all done [455, 270, 618]\n")


@pytest.mark.long
def test_an_app_that_pyinstaller_freezes(license_bundle: Path, tmp_path: Path) -> None:
    """No hidden import is named. torch is left out: it takes four minutes and 960 MB."""
    shutil.copy(APP, tmp_path / "app.py")
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--onedir", "--log-level", "ERROR"]
    left_out = ("torch", "transformers", "onnx", "scipy", "pandas", "matplotlib")
    command += [part for name in left_out for part in ("--exclude-module", name)]
    subprocess.run([*command, "--paths", str(ROOT / "runtime"), "app.py"], cwd=tmp_path, check=True, timeout=600)
    done = subprocess.run(
        [str(tmp_path / "dist" / "app" / "app"), "onnxruntime", str(license_bundle)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("all done [455, 270, 618]\n")


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_a_notebook(backend: str, license_bundle: Path) -> None:
    """Cells that load, generate, use DataLoader workers and start threads: in bounded time."""
    import nbformat
    from nbclient import NotebookClient

    cells = [
        f"import splitbundle, torch\nbundle = splitbundle.open({str(license_bundle)!r})",
        f"pipeline = bundle.pipeline(backend={backend!r})\nids = pipeline.token_ids([[44, 308, 68]])",
        "print([int(token[0]) for token in pipeline.generate(ids, max_new_tokens=3)])",
        "from torch.utils.data import DataLoader\n"
        "def collate(rows):\n"
        "    stage = bundle.stage('bottom')\n"
        "    with torch.no_grad():\n"
        "        return stage(torch.tensor(rows)).sum()\n"
        "loader = DataLoader([[44, 308]] * 4, batch_size=2, num_workers=2, collate_fn=collate, timeout=120)\n"
        "print(len(list(loader)))",
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as pool:\n"
        "    print(len(list(pool.map(lambda _: pipeline(ids), range(8)))))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    printed = ["".join(out.get("text", "") for out in cell["outputs"]).strip() for cell in notebook.cells]
    assert printed[2:] == ["[455, 270, 618]", "2", "8"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize(
    ("threads", "times"),
    [
        ("default", "2"),
        pytest.param("default", "50", marks=pytest.mark.long),
        pytest.param("4", "50", marks=pytest.mark.long),
    ],
)
def test_a_server_that_preloads_and_forks(backend: str, threads: str, times: str, license_bundle: Path) -> None:
    """The documented way: the master opens the bundle, and each worker loads its own pipeline."""
    command = [sys.executable, str(PRELOAD), backend, threads, times, str(license_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{times} workers ended well\n"
