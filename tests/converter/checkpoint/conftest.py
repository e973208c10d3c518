"""Fixtures of the tests of pickled checkpoints."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.models import checkpoint
from tests.support.pickled import BIN, SAFE, Tensors


@pytest.fixture(autouse=True)
def _no_unpickling_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every attempt to unpickle in this process an error, that of transformers too."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this process has unpickled something")

    for module, name in ((torch, "load"), (torch.serialization, "load"), (pickle, "load")):
        monkeypatch.setattr(module, name, refuse)


@pytest.fixture
def pickled(tmp_path: Path) -> Callable[..., Path]:
    """Copy a named checkpoint with its weights in one pickle. ``change`` may edit the content."""

    def copy(name: str, change: Callable[[Tensors], Any] = lambda tensors: tensors, **named: Any) -> Path:
        path = Path(shutil.copytree(checkpoint(name), tmp_path / "source"))
        tensors = load_file(path / SAFE)
        (path / SAFE).unlink()
        torch.save(change(tensors), path / BIN, **named)
        return path

    return copy
