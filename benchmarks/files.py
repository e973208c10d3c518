"""The files that are measured, made where they are missing: checkpoints of random weights, and what is made of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, Failed, Missing, require, say
from benchmarks.shapes import ITEM, SHAPES, Shape

_COPIES = 4
"""Checkpoint, bundle, GGUF and the genai build: as many times the weights' bytes may be written."""
_VERSION = 2
"""In the names: what an earlier version made, with biases of 0 and norms of 1, isn't taken."""


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
        path = self._path(model, dtype, ending)
        if _there(path):
            if reads == "checkpoint":
                check_checkpoint(path, SHAPES[model])
            if reads in ("bundle", "shards"):
                check_bundle(path)
            return path
        say(f"making {path}")
        self.directory.mkdir(parents=True, exist_ok=True)
        # Another run may make the same: each under a name of its own, and who comes second drops what it made.
        temporary = path.with_name(f"making-{secrets.token_hex(4)}-{path.name}")
        try:
            maker(temporary, model, dtype)
            if path.is_dir() and not _there(path):
                path.rmdir()
            if not _there(path):
                os.rename(temporary, path)
        except OSError as error:  # a disk that is full, or the other was here first
            if not _there(path):
                raise Failed(f"{path} can't be made: {error}") from None
        finally:
            _remove(temporary)
        return path

    def _path(self, model: str, dtype: str, ending: str = "") -> Path:
        return self.directory / f"{model}-v{_VERSION}{'' if dtype == 'float32' else '-' + dtype}{ending}"

    def why_not(self, model: str, dtype: str) -> str | None:
        """Why a model can't be made and measured here; None where it can."""
        weights = SHAPES[model].parameters() * ITEM[dtype]
        self.directory.mkdir(parents=True, exist_ok=True)
        free, disk = _free_memory(), shutil.disk_usage(self.directory).free
        # Made in float32 by transformers, before it is rounded.
        memory = SHAPES[model].parameters() * 4 * 5 // 4 + weights
        if free is not None and free < memory:
            return f"it needs {memory / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free"
        if not _there(self._path(model, dtype)) and disk < _COPIES * weights:
            return f"it needs {_COPIES * weights / 1e9:.1f} GB on disk, and {disk / 1e9:.1f} are free"
        return None

    def _bundle(self, path: Path, model: str, dtype: str) -> None:
        # Graphs compute in float32 alone on a CPU, so those of 16 bits aren't measured.
        source, graphs = self.make("checkpoint", model, dtype), dtype == "float32"
        _convert(source, path, genai=graphs)

    def _shards(self, path: Path, model: str, dtype: str) -> None:
        layers = SHAPES[model].layers
        source, graphs = self.make("checkpoint", model, dtype), dtype == "float32"
        cuts = [max(1, layers // 6), layers - max(1, layers // 6)]
        _convert(source, path, split=cuts, onnx=graphs)

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
    require("torch", "transformers")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES[model]
    torch.manual_seed(0)
    models: Any = AutoModelForCausalLM
    made = models.from_config(AutoConfig.for_model(shape.family, **shape.config()))
    for name, parameter in made.named_parameters():
        # It makes biases 0 and norms 1: who left them out would compute the same.
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.1)
        elif parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    made.to(getattr(torch, dtype)).save_pretrained(path)
    for tokenizer in (ROOT / "examples" / "license-gpt2").glob("tokenizer*.json"):
        shutil.copy(tokenizer, path)  # onnxruntime-genai's builder wants one; no text is computed


def _convert(source: Path, path: Path, **options: Any) -> None:
    require("splitbundle_converter", "torch", "transformers", "safetensors", "jsonschema")
    import splitbundle
    import splitbundle_converter

    try:
        splitbundle_converter.convert(source, path, check=False, **options)
    except splitbundle.MissingExtra as error:
        raise Missing(str(error)) from None
    except splitbundle.BundleError as error:
        raise Failed(f"{source} can't be converted: {error}") from None


def check_config(checkpoint: Path, shape: Shape) -> None:
    """Whether a checkpoint that was there is of this shape.

    Raises:
        Failed: it is another's, or none.
    """
    try:
        config = json.loads((checkpoint / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise Failed(f"{checkpoint} has no configuration ({error}). Remove it") from None
    if not isinstance(config, dict):
        raise Failed(f"{checkpoint} has no configuration. Remove it")
    for name, value in {"model_type": shape.family, **shape.config()}.items():
        if config.get(name, value) != value:
            raise Failed(f"{checkpoint} is of another model: {name} is {config[name]!r} and not {value!r}. Remove it")


def check_checkpoint(checkpoint: Path, shape: Shape) -> None:
    """Whether a checkpoint that was there is of this shape, and its weights are whole.

    Raises:
        Failed: it isn't.
    """
    require("safetensors")
    from safetensors import SafetensorError, safe_open

    check_config(checkpoint, shape)
    count = 0
    for file in checkpoint.glob("*.safetensors"):
        try:
            with safe_open(file, "numpy") as opened:
                count += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise Failed(f"{file} can't be read ({error}). Remove {checkpoint}") from None
    if count != shape.parameters():
        raise Failed(f"{checkpoint} has {count:,} of {shape.parameters():,} parameters. Remove it")


def check_bundle(path: Path) -> None:
    """Whether a bundle that was there has the layout that this version reads.

    Raises:
        Failed: it hasn't.
    """
    import splitbundle

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
