"""The page's modules under Node: frames and encodings, the client of a stage, tokenizers and the pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.browser.conftest import run_node

NAMES = ("wire", "client", "tokenizer", "pipeline")


@pytest.mark.skipif(shutil.which("node") is None, reason="Node isn't installed")
@pytest.mark.rule("SB-X-007", "SB-X-013", "SB-X-017", "SB-X-018")
def test_the_modules_of_the_page() -> None:
    files = [Path(__file__).parent / f"{name}.test.mjs" for name in NAMES]
    assert "# fail 0" in run_node("--test", "--test-reporter=tap", *files)
