"""Runs of the benchmark: one on a tiny model, and those that end with an error. No test asserts a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import benchmarks.__main__
import pytest
from benchmarks import cases, limits, machine, sets
from benchmarks.contenders import PREPACKED

import splitbundle
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
CHECKOUT = [str(ROOT / name) for name in (".", "runtime", "converter", "schemas")]


def run_of(*arguments: object, where: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *sys.path])
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=where,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run the benchmark and what it measures in this process, where libraries are imported already."""

    def measured_here(module: str, task: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = import_module(f"benchmarks.{module}").measure(task | {"started": time.time()})
        return found

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
        monkeypatch.setattr(cases, "measured", measured_here)
        monkeypatch.setattr(limits, "_REPETITIONS", 1)
        monkeypatch.setattr(limits, "_SHAPES", limits._SHAPES[:1])
        before = signal.getsignal(signal.SIGTERM)
        try:
            status = benchmarks.__main__.main()
        finally:
            signal.signal(signal.SIGTERM, before)
        return subprocess.CompletedProcess([], status, *capsys.readouterr())

    return run


@pytest.mark.parametrize("place", ["this process", pytest.param("processes of its own", marks=pytest.mark.long)])
def test_a_run(tmp_path: Path, run_here: Any, place: str) -> None:
    """Decoding on a tiny model, one round: a checkpoint, a bundle, a check against transformers, and the pages."""
    options = ["--model", "tiny", "--rounds", 1, "--threads", 1, "--only", "splitbundle torch", "--json"]
    # Relative paths are relative to the caller's directory, not to the directory of the measured processes.
    places = ["--directory", "models", "--results", "results", "--lock", "lock"]
    run_ = run_here if place == "this process" else partial(run_of, where=tmp_path)
    done = run_("decode", *options, *places)
    assert done.returncode == 0, done.stderr
    (document,) = json.loads(done.stdout)
    (run,) = document["runs"]
    assert run["splitbundle torch"]["decode 256"] > run[sets.LIMIT]["decode 256"] > 0
    assert run["the machine"]["read"] > 0
    assert document["differences"]["splitbundle torch"] < 1e-5
    assert document["machine"]["libraries"].keys() >= {"torch", "transformers"}
    assert document["machine"]["splitbundle"]["version"] == splitbundle.__version__
    assert (document["rounds"], document["rounds of the set"], document["interrupted"]) == (1, 5, False)
    assert (document["only"], document["not run"][:2]) == (
        ["splitbundle torch"],
        ["splitbundle onnxruntime", PREPACKED],
    )
    name = f"decode-tiny-float32.{machine.tag(machine.facts())}.json"
    assert json.loads((tmp_path / "results" / name).read_text("utf-8")) == document
    page = (tmp_path / "results" / "decode.md").read_text("utf-8")
    assert "| splitbundle torch |" in page
    place = f"{machine.processor(machine.facts())}, 1 thread"
    assert page.startswith(f"# decode\n\nMeasured on {place}.\n")
    assert f"## decode tiny float32: {place}, 1 of 5 rounds\n\nOne round has no spread.\n" in page
    assert " to " not in "".join(line for line in page.splitlines() if line.startswith("|"))
    assert "Not run: splitbundle onnxruntime, " in page
    assert "[decode](decode.md)" in (tmp_path / "results" / "README.md").read_text("utf-8")


@pytest.fixture
def nothing_else(tmp_path: Path) -> dict[str, str]:
    """An environment that can import this checkout, but none of the measured libraries."""
    for name in ("torch", "onnxruntime", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('no {name} here')", "utf-8")
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *CHECKOUT])}


def test_a_run_that_is_interrupted_ends_with_130(tmp_path: Path, nothing_else: dict[str, str]) -> None:
    results = tmp_path / "results"
    command = [sys.executable, "-m", "benchmarks", "import", "--results", str(results), "--rounds", "500"]
    with subprocess.Popen(command, env=nothing_else, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if line.startswith("round 1 "):
                running.send_signal(signal.SIGINT)
                break
        said = running.stderr.read()
    assert running.returncode == 130
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
    assert not list(results.iterdir())


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["decode", "--rounds", "0"], 2, "--rounds"),
        (["decode", "--threads", "none"], 2, "--threads"),
        (["decode", "--model", "other"], 2, "'other' isn't one of gpt2, "),
        (["size", "--dtype", "bfloat16"], 2, "takes no --dtype bfloat16"),
        (["decode", "--rounds", "1"], 2, "--results: "),
        (["load", "--dtype", "bfloat16", "--results", "results"], 1, "nothing was measured"),
        (["import", "--results", "file"], 1, "--results: "),
        (["import", "--directory", "file/models"], 1, "--directory: "),
        (["import", "--lock", "nowhere/lock"], 1, "--lock: "),
    ],
)
def test_errors_are_one_line(tmp_path: Path, arguments: list[str], status: int, told: str) -> None:
    (tmp_path / "file").touch()
    done = run_of(*arguments, where=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, 1), done.stderr
    assert told in done.stderr


def test_missing_libraries_are_told_with_what_brings_them(tmp_path: Path) -> None:
    def ran(*arguments: str, path: list[str]) -> tuple[int, str]:
        options = [sys.executable, "-S", "-m", "benchmarks", *arguments, "--results", str(tmp_path / "results")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        done = subprocess.run(options, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr.splitlines()[-1]

    told = 'not installed: pip install -e ".[bench]"'
    assert ran("decode", path=CHECKOUT) == (4, f"torch, transformers, safetensors {told}")
    assert ran("size", "--model", "tiny", path=CHECKOUT) == (4, f"torch, transformers {told}")
    assert ran("import", path=[str(ROOT)]) == (4, f"splitbundle {told}")
    assert not list((tmp_path / "results").iterdir())


def test_importing_needs_no_library(tmp_path: Path, nothing_else: dict[str, str]) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "import",
        "--rounds",
        "1",
        "--json",
        "--results",
        str(tmp_path / "r"),
    ]
    done = subprocess.run(command, env=nothing_else, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (document,) = json.loads(done.stdout)
    assert document["runs"][0].keys() == {"python -c pass", "import splitbundle"}
    assert document["left out"]["import torch"] == "ImportError: no torch here"
    assert document["goals"][0]["median"] is not None
