"""Conversions of pickled checkpoints, and a pickle that calls a function."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final

import pytest
import torch
from torch import Tensor

import splitbundle_converter
from splitbundle import BundleError
from splitbundle_converter.checkpoint import pickles, unpickle

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


_LOAD: Final = torch.load


class Here:
    """What stands for the child process: the same code rewrote the files in this process, and these are its messages.

    A child takes a second or more, as it imports torch.
    """

    returncode = 0

    def __init__(self, messages: bytes) -> None:
        self.stdout = io.BytesIO(messages)

    def wait(self) -> int:
        return self.returncode


def read_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, IO[bytes]], Any]:
    """Return what takes the place of ``pickles._child``."""

    @contextlib.contextmanager
    def child(request: Path, errors: IO[bytes]) -> Iterator[Here]:
        messages: list[dict[str, object]] = []
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", _LOAD)
            unpickle.rewrite_all(json.loads(request.read_text("utf-8"))["files"], lambda **said: messages.append(said))
        here = Here("".join(f"{json.dumps(said)}\n" for said in messages).encode("ascii"))
        with here.stdout:
            yield here

    return child


class Call:
    """An attacker's pickle: reading it calls a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]
