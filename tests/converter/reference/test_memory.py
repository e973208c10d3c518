"""The memory that the original model needs, and a machine that lacks it."""

from __future__ import annotations

from pathlib import Path

import pytest

import splitbundle_converter
from splitbundle import BundleError
from splitbundle_converter.reference import golden_vectors, memory
from tests.support.paths import ROOT

CHECKPOINT = ROOT / "examples" / "license-gpt2"


def test_a_model_that_memory_cannot_hold_names_no_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden_vectors, "available_memory", lambda: 2**20)
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(CHECKPOINT, tmp_path / "x.splitbundle")
    assert str(caught.value) == (
        "[memory] expected 0.0 GiB of free memory to check against the original model in float32, got 0.0 GiB. "
        "check=False converts without the original model, and without golden vectors"
    )
    assert not list(tmp_path.iterdir())
    splitbundle_converter.convert(CHECKPOINT, tmp_path / "x.splitbundle", check=False)


def test_available_memory_is_a_sensible_number() -> None:
    available = memory.available_memory()
    assert available is None or 2**24 < available < 2**48


pytestmark = pytest.mark.usefixtures("one_thread")
