"""Make the files for the measurements if they are missing: checkpoints of random weights, and conversions of them."""

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
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, Failed, Missing, require, say
from benchmarks.shapes import ITEM, SHAPES, Shape

_COPIES = 4
"""The number of copies of the weights on disk: checkpoint, bundle, GGUF and the genai build."""
_VERSION = 2
"""The version in the file names. Version 1 had biases of 0 and norms of 1, and must not be used."""


@dataclasses.dataclass(frozen=True, slots=True)
class Workshop:
    """A directory of models. Files of an earlier run are used again if this version can read them."""

    directory: Path

    def make(self, reads: str, model: str, dtype: str) -> Path:
        """Return the path of a contender's files: a checkpoint, bundle, shards (a bundle of three), gguf or genai.

        Raises:
            Failed: The files can't be made, or the present files are not usable.
            Missing: A library is not installed.
        """
        makers: dict[str, tuple[str, Callable[[Path, str, str], None]]] = {
            "checkpoint": ("", _checkpoint),
            "bundle": (".splitbundle", self._bundle),
            "shards": ("-3.splitbundle", self._shards),
            "gguf": (".gguf", self._gguf),
            "genai": ("-genai", self._genai),
            "int8": ("-int8.splitbundle", partial(self._quantized, to="int8")),
            "int4": ("-int4.splitbundle", partial(self._quantized, to="int4")),
            "gguf-int8": ("-int8.gguf", partial(self._gguf, to="int8")),
            "gguf-int4": ("-int4.gguf", partial(self._gguf, to="int4")),
            "genai-int4": ("-int4-genai", partial(self._genai, precision="int4")),
        }
        ending, maker = makers[reads]
        path = self._path(model, dtype, ending)
        if _there(path):
            if reads == "checkpoint":
                check_checkpoint(path, SHAPES[model])
            if reads in ("bundle", "shards", "int8", "int4"):
                check_bundle(path)
            return path
        say(f"making {path}")
        self.directory.mkdir(parents=True, exist_ok=True)
        # Another run may make the same files. Each run uses its own temporary name, and the second one drops its files.
        temporary = path.with_name(f"making-{secrets.token_hex(4)}-{path.name}")
        try:
            maker(temporary, model, dtype)
            if path.is_dir() and not _there(path):
                path.rmdir()
            if not _there(path):
                os.rename(temporary, path)
        except OSError as error:  # the disk is full, or another run was first
            if not _there(path):
                raise Failed(f"{path} can't be made: {error}") from None
        finally:
            _remove(temporary)
        return path

    def _path(self, model: str, dtype: str, ending: str = "") -> Path:
        return self.directory / f"{model}-v{_VERSION}{'' if dtype == 'float32' else '-' + dtype}{ending}"

    def why_not(self, model: str, dtype: str) -> str | None:
        """Return the reason why a model can't be made and measured here, or None if it can."""
        weights = SHAPES[model].parameters() * ITEM[dtype]
        self.directory.mkdir(parents=True, exist_ok=True)
        free, disk = _free_memory(), shutil.disk_usage(self.directory).free
        # transformers makes the weights in float32 before they are rounded.
        memory = SHAPES[model].parameters() * 4 * 5 // 4 + weights
        if free is not None and free < memory:
            return f"it needs {memory / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free"
        if not _there(self._path(model, dtype)) and disk < _COPIES * weights:
            return f"it needs {_COPIES * weights / 1e9:.1f} GB on disk, and {disk / 1e9:.1f} are free"
        return None

    def _bundle(self, path: Path, model: str, dtype: str) -> None:
        # On a CPU, graphs compute only in float32, so graphs of 16 bits are not measured.
        source, graphs = self.make("checkpoint", model, dtype), dtype == "float32"
        _convert(source, path, genai=graphs)

    def _shards(self, path: Path, model: str, dtype: str) -> None:
        layers = SHAPES[model].layers
        source, graphs = self.make("checkpoint", model, dtype), dtype == "float32"
        cuts = [max(1, layers // 6), layers - max(1, layers // 6)]
        _convert(source, path, split=cuts, onnx=graphs)

    def _quantized(self, path: Path, model: str, dtype: str, to: str) -> None:
        _convert(self.make("checkpoint", model, dtype), path, onnx=True, quantize=to)

    def _gguf(self, path: Path, model: str, dtype: str, to: str | None = None) -> None:
        try:
            from benchmarks import gguf_file
        except ModuleNotFoundError as error:
            raise Failed(f"{error.name} isn't installed") from None
        gguf_file.write(SHAPES[model], self.make("checkpoint", model, dtype), path, to)

    def _genai(self, path: Path, model: str, dtype: str, precision: str = "fp32") -> None:
        source = self.make("checkpoint", model, dtype)
        command = ["-m", "onnxruntime_genai.models.builder", "-m", model, "-i", source, "-o", path]
        # All contenders compute only the logits of a prompt's last position.
        command += [
            "-p",
            precision,
            "-e",
            "cpu",
            "-c",
            self.directory / "cache",
            "--extra_options",
            "prune_lm_head=true",
        ]
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
        # By default, biases are 0 and norms are 1. Then a contender without them would have the same results.
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.1)
        elif parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    made.to(getattr(torch, dtype)).save_pretrained(path)
    for tokenizer in (ROOT / "examples" / "license-gpt2").glob("tokenizer*.json"):
        shutil.copy(tokenizer, path)  # onnxruntime-genai's builder requires a tokenizer; no text is computed


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
    """Check that a present checkpoint has this shape.

    Raises:
        Failed: It has another shape, or no configuration.
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
    """Check that a present checkpoint has this shape, and that its weights are complete.

    Raises:
        Failed: It has another shape, or parameters are missing.
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
    """Check that this version can read a present bundle.

    Raises:
        Failed: Another version made the bundle.
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
