"""The memory that the original model needs, and a machine that lacks it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import splitbundle
import splitbundle_converter
from splitbundle import BundleError
from splitbundle_converter import original_check
from splitbundle_converter.reference import golden_vectors, memory
from splitbundle_converter.reference.original_errors import BY_LAYER, UNCHECKED
from tests.support.command_line import run
from tests.support.paths import ROOT

CHECKPOINT = ROOT / "examples" / "license-gpt2"


def test_a_model_that_memory_cannot_hold_names_the_check_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check by layer needs a part of the memory. Where this doesn't suffice either, no check is left."""
    monkeypatch.setattr(golden_vectors, "available_memory", lambda: 2**20)
    assert refused(tmp_path / "x.splitbundle") == (
        "[memory] expected 0.0 GiB of free memory to check against the original model in float32, got 0.0 GiB. "
        'check="layers" compares one layer at a time, and needs memory for that layer alone'
    )
    monkeypatch.setattr(golden_vectors, "available_memory", lambda: 2**16)
    assert refused(tmp_path / "x.splitbundle", check="layers") == (
        "[memory] expected 0.0 GiB of free memory to check against the original model in float32, one layer at a time, "
        "got 0.0 GiB. check=False converts without the original model, and without golden vectors"
    )
    assert not list(tmp_path.iterdir())
    splitbundle_converter.convert(CHECKPOINT, tmp_path / "x.splitbundle", check=False)
    architecture = splitbundle.open(tmp_path / "x.splitbundle").architecture
    assert golden_vectors.layer_bytes(architecture) < golden_vectors.model_bytes(architecture) / 2
    monkeypatch.setattr(golden_vectors, "available_memory", lambda: golden_vectors.model_bytes(architecture))
    refused(tmp_path / "y.splitbundle")
    splitbundle_converter.convert(CHECKPOINT, tmp_path / "y.splitbundle", check="layers")


def test_the_command_names_its_own_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(golden_vectors, "available_memory", lambda: 2**20)
    status, _, err = run(capsys, "convert", CHECKPOINT, "-o", tmp_path / "x.splitbundle")
    assert status == 1
    assert err.endswith(". --check layers compares one layer at a time, and needs memory for that layer alone\n")


def test_an_allocation_that_fails_names_the_next_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise MemoryError

    monkeypatch.setattr(original_check, "reference_vectors", fail)
    monkeypatch.setattr(original_check, "layered_vectors", fail)
    assert BY_LAYER in refused(tmp_path / "x.splitbundle")
    assert UNCHECKED in refused(tmp_path / "x.splitbundle", check="layers")


def test_the_peak_of_some_blocks() -> None:
    if memory.private_memory() is None:
        pytest.skip("RssAnon is Linux's")
    peak = memory.PeakMemory()
    assert peak.bytes is None
    for _ in range(2):
        with peak.watch():
            held = bytearray(64 * 2**20)
            time.sleep(0.05)
        del held
    assert peak.bytes is not None
    assert 60 * 2**20 <= peak.bytes <= 80 * 2**20
    memory.give_back_freed_memory()


def refused(output: Path, **named: str) -> str:
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(CHECKPOINT, output, **named)  # type: ignore[arg-type]
    assert caught.value.codes == ("memory",)
    return str(caught.value)


def test_available_memory_is_a_sensible_number() -> None:
    available = memory.available_memory()
    assert available is None or 2**24 < available < 2**48


pytestmark = pytest.mark.usefixtures("one_thread")
