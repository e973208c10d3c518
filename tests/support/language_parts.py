"""Conversions of language parts, and changes of their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import splitbundle_converter
from splitbundle import Bundle, BundleError
from tests.support.models_composite import make_composite, make_config, save, stored_tensors

Tensors = dict[str, Tensor]


def convert(source: Path, name: str = "b", **named: Any) -> Bundle:
    """Convert a checkpoint's language part, and compare it with the original model."""
    output = source.parent / f"{name}.splitbundle"
    return splitbundle_converter.convert(source, output, **({"part": "language"} | named))


def refused(source: Path, **named: Any) -> BundleError:
    """Return the error that a conversion ends with. It leaves no file behind."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(BundleError) as caught:
        convert(source, **({"check": False} | named))
    assert sorted(source.parent.iterdir()) == before
    return caught.value


def make(tmp_path: Path, model_type: str, change: Callable[[Tensors], Tensors] | None = None, **changes: Any) -> Path:
    """Write a checkpoint of the type, with changes to its tensors and its config.json."""
    config = make_config(model_type)
    tensors = stored_tensors(make_composite(config))
    return save(tmp_path / "source", config, tensors if change is None else change(tensors), **changes)
