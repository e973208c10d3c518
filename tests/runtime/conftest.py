"""The runtime's own suite. It needs only torch, pytest and the golden bundles."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import splitbundle
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0"
ALL = sorted(path.name for path in GOLDEN.glob("*.splitbundle"))
NAMES = [name for name in ALL if name not in ("experts.splitbundle", "int4.splitbundle")]
"""The bundles of plain dense models, on which everything is tried."""


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> splitbundle.Bundle:
    """Each golden bundle in turn."""
    return splitbundle.open(GOLDEN / request.param)


@pytest.fixture
def gpt2() -> splitbundle.Bundle:
    """The golden GPT-2: tied head, learned positions, three layers cut at 1 and 2."""
    return splitbundle.open(GOLDEN / "gpt2.splitbundle")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the golden GPT-2, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "gpt2.splitbundle", tmp_path / "gpt2.splitbundle"))
