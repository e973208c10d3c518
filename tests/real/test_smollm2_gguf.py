"""The GGUF file of SmolLM2-135M-Instruct (Q4_1 and Q8_0) converts, runs in both backends, and chats."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import splitbundle_converter
from splitbundle.cli import main

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("one_thread")]


def test_it_converts_and_comes_back(
    smollm2_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    notes: list[str] = []
    made = splitbundle_converter.convert(
        smollm2_gguf, tmp_path / "b.splitbundle", split=[10, 20], onnx=True, notes=notes.append
    )
    assert "211 weights of the source are quantized (gguf)" in notes[0]
    assert made.manifest.text.stop_ids == (2,)
    splitbundle_converter.export(made, tmp_path / "exported")
    back = load_file(tmp_path / "exported/model.safetensors")
    original: Any = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    theirs = original.state_dict()
    for name, tensor in back.items():
        assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name
    for backend in ("torch", "onnxruntime"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What is the capital of France?\n"), "utf-8"))
        assert main.main(["chat", str(made.path), "--backend", backend, "--threads", "1", "--no-defaults"]) == 0
        assert "Paris" in capsys.readouterr().out
