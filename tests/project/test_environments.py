"""Places where users meet deadlocks: torch alone, no model zoo, threads, forks, two OpenMP libraries, two machines.

Each test has a time limit.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import splitbundle
import splitbundle_converter
from tests.support.pages import programs
from tests.support.paths import ROOT

ENVIRONMENTS = ROOT / "tests" / "environments"
WORKERS = ENVIRONMENTS / "workers.py"
CHECKPOINT = ROOT / "examples" / "license-gpt2"
SECONDS = 600


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The license model as three shards, with graphs and golden vectors."""
    output = tmp_path_factory.mktemp("environments") / "license.splitbundle"
    return splitbundle_converter.convert(CHECKPOINT, output, split=[2, 4], onnx=True).path


def run(*command: str | Path, timeout: float = SECONDS, **variables: str) -> str:
    """Return a command's standard output; it must end well, and in time."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **variables},
        cwd=ROOT.parent,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    ("library", "folder", "absent"),
    [
        ("torch", "runtime", ("numpy", "onnxruntime", "transformers", "safetensors", "jsonschema", "tokenizers")),
        ("onnxruntime", "onnxruntime_alone", ("torch", "onnx", "transformers", "safetensors", "jsonschema")),
    ],
)
def test_a_backends_suite_passes_with_it_alone(
    tmp_path: Path, library: str, folder: str, absent: tuple[str, ...]
) -> None:
    """Run in a separate environment, with only the backend, pytest and their dependencies."""
    environment = tmp_path / "alone"
    venv.create(environment, with_pip=True)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--constraint", ROOT / "constraints.txt", library, "pytest", timeout=600)
    run(*pip, "--no-deps", ROOT, timeout=600)
    listed = run(python, "-m", "pip", "list", "--format", "freeze").lower()
    assert f"{library}==" in listed
    for other in absent:
        assert f"\n{other}==" not in f"\n{listed}"
    suite = run(python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", ROOT / "tests" / folder, timeout=600)
    assert " passed" in suite
    skipped = [line for line in suite.splitlines() if line.startswith("SKIPPED")]
    beside = ("could not import", "this kernel doesn't compute such products")
    assert [line for line in skipped if not any(reason in line for reason in beside)] == [] or os.name == "nt"


@pytest.mark.parametrize("part", ["stages", pytest.param("", marks=pytest.mark.long, id="everything")])
def test_the_runtime_suite_passes_with_model_zoos_barred(tmp_path: Path, part: str) -> None:
    """Run in this environment, where the libraries are installed but can't be imported."""
    plugin = tmp_path / "barred.py"
    plugin.write_text(
        "import sys\n"
        "for name in ('transformers', 'safetensors', 'jsonschema', 'onnx', 'onnxruntime', 'huggingface_hub'):\n"
        "    sys.modules[name] = None  # any import of it raises ModuleNotFoundError\n"
    )
    suite = run(
        sys.executable, "-m", "pytest", "-q", "-p", "barred", "-p", "no:cacheprovider",
        ROOT / "tests" / "runtime" / part, timeout=600, PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert " passed" in suite


WORKER_KINDS = ["thread", "spawn"] + ([] if os.name == "nt" else ["fork", "forkserver"])


@pytest.mark.parametrize(
    ("way", "worker", "options"),
    [
        # Other programs hang after a fork, and a parent that has computed is the common case: all of these are short.
        pytest.param(
            *(way, worker, () if how == "warm" else (f"--{how}",)),
            marks=() if how == "warm" or worker == "fork" else pytest.mark.long,
            id=f"{way}-{worker}-{how}",
        )
        for way in ("splitbundle", "splitbundle-onnxruntime")
        for worker in WORKER_KINDS
        for how in ("warm", "cold", "intel-openmp")
    ],
)
def test_generating_works_in_every_worker(bundle: Path, way: str, worker: str, options: tuple[str, ...]) -> None:
    if "--intel-openmp" in options and not Path(sys.prefix, "lib", "libiomp5.so").exists():
        pytest.skip("intel-openmp isn't made for this platform")
    out = run(sys.executable, WORKERS, way, worker, bundle, *options)
    lines = out.splitlines()
    tokens = {line.partition(" ")[2] for line in lines if line.startswith(("parent ", "worker "))}
    assert tokens == {"[12, 221, 54, 268, 419, 593, 14, 16]"}, out  # , Version 2.0 (
    assert any(line.startswith("worker ") for line in lines)


def test_the_contrast_runs_the_same_script() -> None:
    """The usual way gives the same tokens where it works.

    After a fork it is known to hang, so the test doesn't wait for it.
    """
    out = run(sys.executable, WORKERS, "transformers", "thread", CHECKPOINT)
    assert "worker [12, 221, 54, 268, 419, 593, 14, 16]" in out


@pytest.mark.parametrize(("library", "other"), [("torch", "onnxruntime"), ("onnxruntime", "torch")])
def test_a_second_machine_computes_the_trunk(bundle: Path, tmp_path: Path, library: str, other: str) -> None:
    """It has the files of its shard, one library, and the program that the guide shows. The tokens are the same."""
    there, barred = tmp_path / "trunk.splitbundle", (sys.executable, ENVIRONMENTS / "barred.py")
    if library == "torch":
        run(sys.executable, "-m", "splitbundle", "extract", bundle, "--shard", "trunk", "-o", there)
    else:
        listed = run(sys.executable, "-m", "splitbundle", "files", bundle, "--shard", "trunk", "--verify")
        for path in listed.splitlines():
            (there / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / path, there / path)
    assert splitbundle.open(there).whole_shards() == ("trunk",)

    verify = (*barred, library, "-m", "splitbundle", "verify", "--shard", "trunk", "--run", there)
    assert f"hidden.4     {library} differs" in run(*verify)
    lacking = subprocess.run([*verify, "--backend", other], capture_output=True, text=True, timeout=SECONDS)
    assert lacking.returncode == 4, lacking.stderr  # the other backend is barred

    program = tmp_path / f"trunk_{library}.py"
    program.write_text(programs("docs/guides/pipe.md")[program.name], "utf-8")
    # The first machine needs no more than torch, either.
    first = (*barred, "torch", ENVIRONMENTS / "first_machine.py", bundle)
    out = run(*first, *barred, library, program, there)
    by_two_machines, by_one = map(ast.literal_eval, out.splitlines())
    assert by_two_machines == by_one
    assert [len(row) for row in by_one] == [12, 12]
