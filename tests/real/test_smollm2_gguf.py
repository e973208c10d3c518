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


@pytest.mark.parametrize("to", ["plain", "int8", "int4"])
def test_llama_cpp_runs_what_was_exported(smollm2_gguf: Path, tmp_path: Path, to: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python isn't installed")
    made = splitbundle_converter.convert(
        smollm2_gguf, tmp_path / "b.splitbundle", check="none", notes=lambda text: None
    )
    if to != "plain":
        made = made.quantize(tmp_path / "small.splitbundle", to, method="rtn")
    path = splitbundle_converter.export(made, tmp_path / "model.gguf", to="gguf")
    model = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    text = "The capital of France is a city; naïve café, 日本語 🙂 1234.\n\n  It's"
    ids = made.tokenizer().encode(text)
    assert model.tokenize(text.encode(), add_bos=False, special=False) == ids
    model.eval(ids)
    theirs = torch.from_numpy(model.scores[: len(ids)].copy())
    with torch.inference_mode():
        mine = made.pipeline(dtype="float32", kernels="torch")(torch.tensor([ids]))[0]
    # llama.cpp rounds the inputs of products to 8 bits, or to bfloat16.
    moved = (mine.softmax(-1) - theirs.softmax(-1)).abs().sum(-1) / 2
    assert moved.mean() < 0.1
    question = [{"role": "user", "content": "What is the capital of France?"}]
    said = model.create_chat_completion(question, max_tokens=16, temperature=0)
    assert "Paris" in said["choices"][0]["message"]["content"]
