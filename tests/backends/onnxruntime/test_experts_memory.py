"""Memory of mixtures of experts under onnxruntime: a token reads the weights of its experts, and of no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import numpy
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import splitbundle_converter
from tests.support.graph_bundles import bundle

STATUS: Final = Path("/proc/self/status")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not STATUS.exists(), reason="RssFile is Linux's"),
]
EXPERTS, CHOSEN = 64, 4
HIDDEN, WIDTH = 256, 341


def mapped() -> int:
    """Return the bytes of files that this process has in memory."""
    found = re.search(r"RssFile:\s+(\d+) kB", STATUS.read_text("ascii"))
    if found is None:
        pytest.skip("the system doesn't say how much of files is in memory")
    return int(found[1]) * 1024


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_reads_its_own_experts(tmp_path: Path, dtype: str) -> None:
    """A layer has 64 experts of 1 MiB in float32, and a token uses 4 of them."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=64,
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    # The code of the library is in memory before anything is measured.
    warm = bundle("olmoe-one", ()).pipeline(backend="onnxruntime", threads=1)
    warm(numpy.array([[1]]), session=warm.session(1, 8))
    whole = splitbundle_converter.convert(tmp_path / "source", tmp_path / "b", dtype=dtype, check=False, onnx=True)
    chosen = CHOSEN * 3 * HIDDEN * WIDTH * (4 if dtype == "float32" else 2)
    before = mapped()
    pipeline = whole.pipeline(backend="onnxruntime", threads=1)
    session = pipeline.session(1, 8)
    loaded = mapped() - before
    pipeline(numpy.array([[1]]), session=session)
    grown = mapped() - before - loaded
    print(f"{dtype}: loading {loaded / 2**20:.1f} MiB, a token {grown / 2**20:.1f} of {chosen / 2**20:.1f} MiB")
    assert loaded < chosen * EXPERTS / CHOSEN / 8
    assert 0.9 * chosen <= grown <= 3 * chosen
