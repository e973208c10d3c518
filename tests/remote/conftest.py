"""The trained example of the project, cut before and after every layer, with a graph a shard."""

from __future__ import annotations

from pathlib import Path

import pytest

import splitbundle
import splitbundle_converter
from tests.support.paths import ROOT

LAYERS = 6


@pytest.fixture(scope="session")
def every_cut(tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    """A shard for the embedding, for each layer, and for the head."""
    output: Path = tmp_path_factory.mktemp("remote") / "license.splitbundle"
    cuts = list(range(LAYERS + 1))
    return splitbundle_converter.convert(ROOT / "examples" / "license-gpt2", output, split=cuts, onnx=True)
