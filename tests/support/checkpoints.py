"""Checkpoints that tests change before they convert them, and the results of converting them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle_converter.errors import AGAIN, HINTS

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
PIECES: Final = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MISSING: Final = "The checkpoint isn't whole, or its configuration is another model's: fetch both again from one place"
QUERY: Final = "model.layers.1.self_attn.q_proj.weight"

Tensors = dict[str, Tensor]


def refused(path: str | Path, output: Path, **named: Any) -> BundleError:
    """Return the error that a conversion ends with. It leaves no file behind, under any name."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(path, output, **({"check": False} | named))
    assert sorted(output.parent.iterdir()) == before
    assert all(problem.hint for problem in caught.value.problems), "each problem names a next step"
    return caught.value


def said(error: BundleError) -> str:
    """Return the message without the next steps that every problem of its kind has. Those of its own stay."""
    common = {*HINTS.values(), AGAIN}
    return "\n".join(
        str(replace(problem, hint=None) if problem.hint in common else problem) for problem in error.problems
    )


def accepted(path: Path, output: Path, **named: Any) -> Bundle:
    """Return the bundle, which has been compared with the original model."""
    return splitbundle_converter.convert(path, output, **named)


def change_config(path: Path, **fields: Any) -> None:
    """Set fields of config.json; ``...`` removes one."""
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in (config | fields).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))


def change_tensors(path: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    """Write the tensors that ``change`` changes or returns."""
    tensors = load_file(path / WEIGHTS)
    changed = change(tensors)
    tensors = tensors if changed is None else changed
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS, {"format": "pt"})


def replaced(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    """Return a change of one tensor."""

    def change(tensors: Tensors) -> None:
        tensors[name] = value(tensors[name])

    return change


def without(*names: str) -> Callable[[Tensors], None]:
    """Return a change that drops tensors."""

    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def digests(root: Path) -> dict[str, str]:
    """Return the sha256 of every file by its path."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
