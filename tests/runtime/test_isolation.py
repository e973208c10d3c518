"""The modules that importing and generating load: torch when it is needed, and never a model zoo."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
ZOOS = {"transformers", "safetensors", "jsonschema", "onnx", "onnxruntime", "huggingface_hub", "tokenizers"}


def modules_after(code: str) -> set[str]:
    """Return the top-level modules of a fresh process after some code, run with warnings as errors."""
    script = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


def test_importing_brings_no_backend() -> None:
    assert not modules_after("import splitbundle") & (ZOOS | {"torch", "numpy"})


def test_opening_and_verifying_bring_no_backend() -> None:
    code = f"import splitbundle; splitbundle.open({str(GOLDEN)!r}).verify()"
    assert not modules_after(code) & (ZOOS | {"torch", "numpy"})


def test_generating_brings_no_model_zoo() -> None:
    code = (
        f"import splitbundle; p = splitbundle.open({str(GOLDEN)!r}).pipeline();"
        "list(p.generate(p.token_ids([[1, 2, 3]]), max_new_tokens=3))"
    )
    found = modules_after(code)
    assert "torch" in found
    assert not found & ZOOS


@pytest.mark.parametrize("command", [["inspect"], ["verify", "--run"], ["generate", "--ids", "1,2,3"]])
def test_commands_work_without_a_model_zoo(command: list[str]) -> None:
    bar = f"import sys; sys.modules.update(dict.fromkeys({sorted(ZOOS)!r}))"
    run = f"{bar}; from splitbundle.cli.main import main; sys.exit(main({[command[0], str(GOLDEN), *command[1:]]!r}))"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout
