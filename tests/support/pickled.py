"""Conversions of pickled checkpoints, and a pickle that calls a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
from torch import Tensor

import splitbundle_converter
from splitbundle import BundleError
from splitbundle_converter.checkpoint import pickles

SAFE: Final = "model.safetensors"
BIN: Final = "pytorch_model.bin"
INDEX: Final = "pytorch_model.bin.index.json"
WHOLE: Final = pickles.WHOLE

Tensors = dict[str, Tensor]


def convert(path: Path, output: Path, **named: Any) -> Any:
    """Convert a checkpoint, and leave only the bundle."""
    made = splitbundle_converter.convert(path, output, allow_pickle=True, **named)
    assert [entry.name for entry in output.parent.iterdir()] == [output.name]
    return made


def refused(path: Path, output: Path, *, allow_pickle: bool = True, **named: Any) -> BundleError:
    """Return the error that a conversion ends with. It leaves no file."""
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(path, output, allow_pickle=allow_pickle, **({"check": False} | named))
    assert not list(output.parent.iterdir())
    return caught.value


class Call:
    """An attacker's pickle: reading it calls a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]
