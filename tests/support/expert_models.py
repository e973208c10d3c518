"""Models with one wide layer of experts, for tests of memory and time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

STATUS: Final = Path("/proc/self/status")
HIDDEN, WIDTH = 256, 341
MATRICES: Final = 3 * HIDDEN * WIDTH
"""The numbers of an expert: 1 MiB in float32."""


def write_experts(path: Path, count: int, chosen: int, layers: int = 1) -> None:
    """Save a checkpoint of Qwen 3 with experts and random weights."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=64,
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=count,
        num_experts_per_tok=chosen,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)


def mapped() -> int:
    """Return the bytes of files that this process has in memory."""
    found = re.search(r"RssFile:\s+(\d+) kB", STATUS.read_text("ascii"))
    if found is None:
        pytest.skip("the system doesn't say how much of files is in memory")
    return int(found[1]) * 1024
