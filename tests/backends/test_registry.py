"""Backends, dtypes and devices that a stage can and cannot have."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import splitbundle_converter
from splitbundle import Bundle
from tests.support.models import checkpoint
from tests.support.stages import refusal


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bottom [0, 1), trunk [1, 3), top [3, 4); the head is its own matrix."""
    output = tmp_path_factory.mktemp("stages") / "llama.splitbundle"
    return splitbundle_converter.convert(checkpoint("llama"), output, split=(1, 3), check=False)


@pytest.mark.parametrize("open_part", ["stage", "pipeline"])
def test_backends_and_dtypes_that_do_not_exist(whole: Bundle, open_part: str) -> None:
    name = ("bottom",) if open_part == "stage" else ()
    call = getattr(whole, open_part)
    text = refusal(call, *name, backend="tensorflow")
    assert text.startswith("[stage.backend] backend: expected torch")
    assert text.endswith(", got 'tensorflow'")
    text = "[input.dtype] dtype: expected one of float32, float16, bfloat16, got "
    assert refusal(call, *name, dtype="int8") == f"{text}'int8'"
    assert refusal(call, *name, dtype="float64") == f"{text}'float64'"
    assert refusal(call, *name, dtype=torch.int64) == f"{text}'torch.int64'"


def test_a_device_that_is_not_here(whole: Bundle) -> None:
    for device in ("nonsense", "cuda:99"):
        text = refusal(whole.pipeline, device=device)
        assert text.startswith(f"[input.device] device: expected a device that torch has here, got '{device}': ")
    assert whole.stage("bottom", device="cpu").device == torch.device("cpu")


def test_a_backend_that_is_not_installed(whole: Bundle) -> None:
    """The error gives the command to type, in a process where torch can't be imported."""
    program = f"""
import sys
sys.modules["torch"] = None
import splitbundle
try:
    splitbundle.open({str(whole.path)!r}).stage("bottom", backend="torch")
except splitbundle.MissingExtra as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == (
        '[backend.missing] expected the library torch, to compute with backend="torch", '
        'got no such library in this environment. Install it: pip install "splitbundle[torch]"\n'
    )


def test_type_checkers_know_the_stages_of_each_backend(tmp_path: Path) -> None:
    program = """
import splitbundle
bundle = splitbundle.open("x")
reveal_type(bundle.stage("a"))
reveal_type(bundle.pipeline(dtype="float32"))
reveal_type(bundle.stage(layers=(0, 1), backend="onnxruntime", threads=1))
reveal_type(bundle.pipeline(backend="onnxruntime"))
"""
    (tmp_path / "consumer.py").write_text(program)
    # The types of the libraries below play no part, and reading them takes much longer than the rest.
    libraries = "[mypy-torch.*,numpy.*,onnxruntime.*]\nfollow_imports = skip\n"
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nfollow_imports = silent\n{libraries}")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "consumer.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    revealed = re.findall(r'Revealed type is "splitbundle\.(\S+)"', done.stdout)
    expected = [
        "backends.torch.stage.Stage",
        "backends.torch.pipeline.Pipeline",
        "backends.onnxruntime.stage.Stage",
        "backends.onnxruntime.pipeline.Pipeline",
    ]
    assert revealed == expected, done.stdout
