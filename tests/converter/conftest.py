"""Fixtures of the converter's tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.models import checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], Path]:
    """Copies a named checkpoint, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoint(name), tmp_path / "source"))

    return copy


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where nothing else is, so that a test sees whatever is left there."""
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "b.splitbundle"
