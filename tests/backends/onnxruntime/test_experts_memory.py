"""Memory of mixtures of experts under onnxruntime: a token reads the weights of its experts, and of no others."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest

import splitbundle_converter
from tests.support.expert_models import MATRICES, STATUS, mapped, write_experts
from tests.support.graph_bundles import bundle

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not STATUS.exists(), reason="RssFile is Linux's"),
]
EXPERTS, CHOSEN = 64, 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_reads_its_own_experts(tmp_path: Path, dtype: str) -> None:
    """A layer has 64 experts of 1 MiB in float32, and a token uses 4 of them."""
    write_experts(tmp_path / "source", EXPERTS, CHOSEN)
    # The code of the library is in memory before anything is measured.
    warm = bundle("olmoe-one", ()).pipeline(backend="onnxruntime", threads=1)
    warm(numpy.array([[1]]), session=warm.session(1, 8))
    whole = splitbundle_converter.convert(tmp_path / "source", tmp_path / "b", dtype=dtype, check=False, onnx=True)
    chosen = CHOSEN * MATRICES * (4 if dtype == "float32" else 2)
    before = mapped()
    pipeline = whole.pipeline(backend="onnxruntime", threads=1)
    session = pipeline.session(1, 8)
    loaded = mapped() - before
    pipeline(numpy.array([[1]]), session=session)
    grown = mapped() - before - loaded
    print(f"{dtype}: loading {loaded / 2**20:.1f} MiB, a token {grown / 2**20:.1f} of {chosen / 2**20:.1f} MiB")
    assert loaded < chosen * EXPERTS / CHOSEN / 8
    assert 0.9 * chosen <= grown <= 3 * chosen
