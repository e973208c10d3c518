"""Fixtures of the converter's tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from splitbundle_converter.checkpoint import pickles
from tests.support.models import checkpoint
from tests.support.pickled import read_here


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


@pytest.fixture
def child() -> None:
    """Let the test read pickles as users do, in a process of their own."""


@pytest.fixture
def pickles_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read pickles in the process of the test, which is much faster. A test that asks for ``child`` has a child."""
    if "child" not in request.fixturenames:
        monkeypatch.setattr(pickles, "_child", read_here(monkeypatch))
