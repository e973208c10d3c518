"""The fuzzers run: for a moment here, and by hand for any time (see docs/contributing/fuzzing.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from splitbundle import BundleError
from tests.support import fuzzing

atheris = pytest.importorskip("atheris", reason="atheris is for Linux on x86-64")


@pytest.mark.parametrize("name", fuzzing.TARGETS)
@pytest.mark.parametrize("runs", [2000, pytest.param(50_000, marks=pytest.mark.long)])
def test_readers_take_or_refuse_whatever_comes(name: str, runs: int, tally: Callable[[str, int], None]) -> None:
    executions = fuzzing.run(name, seconds=600, runs=runs)
    assert executions >= runs
    tally("inputs made by fuzzers taken or refused", executions)


@pytest.mark.parametrize("name", [name for name in fuzzing.TARGETS if name not in fuzzing.MADE])
def test_what_fuzzers_begin_with_reaches_the_reader(name: str) -> None:
    """The small bundle's files and graphs are accepted, and each is refused if its end is missing."""
    target = fuzzing.TARGETS[name][0]()
    paths = sorted(fuzzing.BUNDLE.glob(fuzzing.TARGETS[name][1]))
    assert len(paths) == {"graph": 2, "weights": 4}.get(name, 1)
    for path in [fuzzing.BUNDLE / "layer-000.safetensors"] if name == "weights" else paths:
        assert path.stat().st_size < fuzzing.LENGTH
        target(path.read_bytes())
        with pytest.raises(BundleError):
            target(path.read_bytes()[:-3] if name != "weights" else path.read_bytes()[:4000])
        if name == "graph":
            target(fuzzing.with_loop(path.read_bytes()))


@pytest.mark.parametrize("name", fuzzing.MADE)
def test_what_is_made_to_begin_with_reaches_the_reader(name: str) -> None:
    target, data = fuzzing.TARGETS[name][0](), fuzzing.MADE[name]()
    assert len(data) < fuzzing.LENGTH
    target(data)
    if name not in fuzzing.ANSWERS:
        with pytest.raises(BundleError):
            target(data[: len(data) // 2])


def test_a_panic_that_is_no_error_of_the_bundle_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A panic of Rust derives only from BaseException."""
    monkeypatch.chdir(tmp_path)
    before = (
        "from splitbundle.text import huggingface\n"
        "class PanicException(BaseException): pass\n"
        "def encode(self, text): raise PanicException('index out of bounds')\n"
        "huggingface.TextTokenizer.encode = encode"
    )
    with pytest.raises(RuntimeError, match=r"tokenizer: exit status [1-9]"):
        fuzzing.run("tokenizer", seconds=300, before=before)
    assert "PanicException: index out of bounds" in capfd.readouterr().out
    assert list(tmp_path.glob("crash-*"))


def test_a_finding_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError, match=r"graph: exit status [1-9]"):
        fuzzing.run(
            "graph", seconds=300, before="from splitbundle.verification import onnx_rules; del onnx_rules.check"
        )
    assert list(tmp_path.glob("crash-*"))
