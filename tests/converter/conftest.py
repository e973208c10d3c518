"""Fixtures of the converter's tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.models import checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], Path]:
    """Copy a named checkpoint for a test that damages it."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoint(name), tmp_path / "source"))

    return copy


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Return a path in an empty directory, so that a test sees leftover files."""
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "b.splitbundle"
