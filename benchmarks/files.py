"""The files that are measured, made where they are missing: checkpoints of random weights, and what is made of them."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, Failed, say
from benchmarks.shapes import ITEM, SHAPES, Shape

import splitbundle

_COPIES = 4
"""Checkpoint, bundle, GGUF and the genai build: as many times the weights' bytes may be written."""


@dataclasses.dataclass(frozen=True, slots=True)
class Workshop:
    """A directory of models. What is there from an earlier run is taken, where this version reads it."""

    directory: Path

    def make(self, reads: str, model: str, dtype: str) -> Path:
        """What a contender reads: a checkpoint, bundle, shards (a bundle of three), gguf or genai."""
        makers: dict[str, tuple[str, Callable[[Path, str, str], None]]] = {
            "checkpoint": ("", _checkpoint),
            "bundle": (".splitbundle", self._bundle),
            "shards": ("-3.splitbundle", self._shards),
            "gguf": (".gguf", self._gguf),
            "genai": ("-genai", self._genai),
        }
        ending, maker = makers[reads]
        path = self.directory / f"{model}{'' if dtype == 'float32' else '-' + dtype}{ending}"
        if _there(path):
            if reads in ("bundle", "shards"):
                check_bundle(path)
            return path
        say(f"making {path}")
        self.directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"making-{path.name}")
        _remove(temporary)
        try:
            maker(temporary, model, dtype)
            _remove(path)  # an empty directory, at most
            os.rename(temporary, path)
        finally:
            _remove(temporary)
        return path

    def why_not(self, model: str, dtype: str) -> str | None:
        """Why a model can't be made and measured here; None where it can."""
        weights = SHAPES[model].parameters() * ITEM[dtype]
        self.directory.mkdir(parents=True, exist_ok=True)
        free, disk = _free_memory(), shutil.disk_usage(self.directory).free
        # Made in float32 by transformers, before it is rounded.
        memory = SHAPES[model].parameters() * 4 * 5 // 4 + weights
        if free is not None and free < memory:
            return f"it needs {memory / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free"
        if not _there(self.directory / model) and disk < _COPIES * weights:
            return f"it needs {_COPIES * weights / 1e9:.1f} GB on disk, and {disk / 1e9:.1f} are free"
        return None

    def _bundle(self, path: Path, model: str, dtype: str) -> None:
        import splitbundle_converter

        # Graphs compute in float32 alone on a CPU, so those of 16 bits aren't measured.
        source, graphs = self.make("checkpoint", model, dtype), dtype == "float32"
        splitbundle_converter.convert(source, path, check=False, genai=graphs)

    def _shards(self, path: Path, model: str, dtype: str) -> None:
        import splitbundle_converter

        layers = SHAPES[model].layers
        source, graphs = self.make("checkpoint", model, dtype), dtype == "float32"
        cuts = [max(1, layers // 6), layers - max(1, layers // 6)]
        splitbundle_converter.convert(source, path, split=cuts, check=False, onnx=graphs)

    def _gguf(self, path: Path, model: str, dtype: str) -> None:
        try:
            from benchmarks import gguf_file
        except ModuleNotFoundError as error:
            raise Failed(f"{error.name} isn't installed") from None
        gguf_file.write(SHAPES[model], self.make("checkpoint", model, dtype), path)

    def _genai(self, path: Path, model: str, dtype: str) -> None:
        source = self.make("checkpoint", model, dtype)
        command = ["-m", "onnxruntime_genai.models.builder", "-m", model, "-i", source, "-o", path]
        # Of a prompt everybody computes the last position's logits alone.
        command += ["-p", "fp32", "-e", "cpu", "-c", self.directory / "cache", "--extra_options", "prune_lm_head=true"]
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"its builder: {(done.stderr.strip() or 'failed').splitlines()[-1]}")


def _checkpoint(path: Path, model: str, dtype: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES[model]
    torch.manual_seed(0)
    models: Any = AutoModelForCausalLM
    made = models.from_config(AutoConfig.for_model(shape.family, **shape.config()))
    made.to(getattr(torch, dtype)).save_pretrained(path)
    for tokenizer in (ROOT / "examples" / "license-gpt2").glob("tokenizer*.json"):
        shutil.copy(tokenizer, path)  # onnxruntime-genai's builder wants one; no text is computed


def check_config(checkpoint: Path, shape: Shape) -> None:
    """Whether a checkpoint that was there is of this shape.

    Raises:
        Failed: it is another's.
    """
    config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    for name, value in {"model_type": shape.family, **shape.config()}.items():
        if config.get(name, value) != value:
            raise Failed(f"{checkpoint} is of another model: {name} is {config[name]!r} and not {value!r}. Remove it")


def check_bundle(path: Path) -> None:
    """Whether a bundle that was there has the layout that this version reads.

    Raises:
        Failed: it hasn't.
    """
    try:
        bundle = splitbundle.open(path)
        for group in bundle.weight_groups():
            for _ in bundle.open_weights(group):
                pass
    except splitbundle.BundleError as error:
        raise Failed(f"{path} was made by another version ({error}). Remove it, or take another directory") from None


def _there(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _free_memory() -> int | None:
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except FileNotFoundError:
        return None
