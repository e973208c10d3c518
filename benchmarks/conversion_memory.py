"""Measure the private memory of conversions, for sharded checkpoints of growing size: it does not grow.

    python -m benchmarks.conversion_memory --gigabytes 1,2,4

For each size, this makes a Llama-like checkpoint of random bfloat16 weights, in several files with an index. A child
process converts the checkpoint. Meanwhile, this process samples the private memory of the child (``RssAnon`` of
``/proc``, so only on Linux). It needs disk space of twice the largest size, and removes its files. It does not measure
times.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTHS: Final[dict[str, Any]] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""The widths of a model with about one billion parameters. The number of layers sets the size of the checkpoint."""
INTERVAL: Final = 0.01
"""Seconds between two samples."""
CHILD: Final = """
import sys
import jsonschema, transformers
import splitbundle_converter.conversion as conversion

# Imported when they are asked for; and a configuration's rotary parameters import much more, whatever is converted.
transformers.AutoConfig, transformers.LlamaConfig().to_dict()
print("ready", flush=True)
sys.stdin.readline()
conversion.convert(sys.argv[1], sys.argv[2], split=[1], dtype=sys.argv[3], check=sys.argv[4])
"""


def main() -> int:
    """Measure each size, and print a table or one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", default="1,2,4", help="sizes of checkpoints (default: %(default)s)")
    parser.add_argument("--files", type=int, default=5, help="files of each checkpoint (default: %(default)s)")
    parser.add_argument("--dtype", default="keep", help="dtype to convert to (default: %(default)s)")
    parser.add_argument(
        "--check",
        choices=("none", "whole", "layers"),
        default="none",
        help="also run the original, with all of its weights or with one layer at a time (default: %(default)s)",
    )
    parser.add_argument("--directory", help="where to write (default: the system's temporary directory)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    measured = []
    for size in given.gigabytes.split(","):
        with tempfile.TemporaryDirectory(prefix="splitbundle-benchmark-", dir=given.directory) as folder:
            found = measure(Path(folder), float(size), given.files, given.dtype, given.check)
        measured.append(found)
        if not given.json:
            if len(measured) == 1:
                print("| checkpoint | files | layers | largest tensor | bare imports | peak | over the imports |")
                print("|---|---|---|---|---|---|---|")
            print(
                f"| {found['bytes'] / 1e9:.2f} GB | {found['files']} | {found['layers']} "
                f"| {found['largest_tensor'] / 2**20:.0f} MiB | {found['imports'] / 2**20:.1f} MiB "
                f"| {found['peak'] / 2**20:.1f} MiB | {found['over'] / 2**20:.1f} MiB |",
                flush=True,
            )
    if given.json:
        print(json.dumps(measured))
    return 0


def measure(folder: Path, gigabytes: float, files: int, dtype: str, check: str) -> dict[str, int]:
    """Measure the conversion of a checkpoint of about this size. Return its sizes and the memory, in bytes."""
    source = folder / "source"
    found = write_checkpoint(source, gigabytes, files)
    imports, peak = convert(source, folder / "made.splitbundle", dtype, check)
    return found | {"imports": imports, "peak": peak, "over": peak - imports}


def write_checkpoint(directory: Path, gigabytes: float, files: int) -> dict[str, int]:
    """Write a Llama checkpoint of about this size, in at most ``files`` files.

    Returns:
        Its size in bytes, its numbers of files and layers, and the size of its largest tensor in bytes.
    """
    from transformers import LlamaConfig

    ends = sum(2 * rows * columns for rows, columns in (_embedding(), _embedding()))
    each = sum(2 * torch.Size(shape).numel() for _, shape in _layer(0))
    layers = max(1, round((gigabytes * 1e9 - ends) / each))
    directory.mkdir()
    LlamaConfig(**WIDTHS, num_hidden_layers=layers, architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    room = (ends + layers * each) / files
    random, weight_map = Random(), {}
    part: dict[str, Tensor] = {}
    written = total = largest = 0

    def flush() -> None:
        nonlocal written
        written += 1
        name = f"model-{written:05d}-of-{files:05d}.safetensors"
        save_file(part, directory / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
        part.clear()

    for name, shape in _tensors(layers):
        part[name] = random.tensor(shape)
        total += part[name].nbytes
        largest = max(largest, part[name].nbytes)
        if total >= room * (written + 1) and written < files - 1:
            flush()
    if part:
        flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"bytes": total, "files": written, "layers": layers, "largest_tensor": largest}


def _embedding() -> tuple[int, int]:
    return WIDTHS["vocab_size"], WIDTHS["hidden_size"]


def _layer(layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = WIDTHS["hidden_size"], WIDTHS["intermediate_size"]
    keys = hidden // WIDTHS["num_attention_heads"] * WIDTHS["num_key_value_heads"]
    yield f"model.layers.{layer}.input_layernorm.weight", (hidden,)
    for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("o", hidden)):
        yield f"model.layers.{layer}.self_attn.{name}_proj.weight", (rows, hidden)
    yield f"model.layers.{layer}.post_attention_layernorm.weight", (hidden,)
    for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        yield f"model.layers.{layer}.mlp.{name}_proj.weight", shape


def _tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", _embedding()
    for layer in range(layers):
        yield from _layer(layer)
    yield "model.norm.weight", (WIDTHS["hidden_size"],)
    yield "lm_head.weight", _embedding()


class Random:
    """Makes different tensors with realistic values. Each repeats a random block from another start."""

    def __init__(self) -> None:
        self.block = (0.02 * torch.randn(2**23 + 7, generator=torch.Generator().manual_seed(0))).bfloat16()
        self.start = 0

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """Return a bfloat16 tensor of this shape."""
        size = torch.Size(shape).numel()
        self.start = (self.start + 1009) % len(self.block)
        turned = self.block.roll(-self.start)
        return turned.repeat(-(-size // len(turned)))[:size].reshape(shape).clone()


def convert(source: Path, output: Path, dtype: str, check: str) -> tuple[int, int]:
    """Convert in another process. Return its private memory in bytes after the imports, and the peak since then."""
    command = [sys.executable, "-c", CHILD, str(source), str(output), dtype, check]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        if child.stdin is None or child.stdout is None or child.stdout.readline() != "ready\n":
            raise SystemExit("the converter can't be imported")
        imports = peak = private(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            peak = max(peak, private(child.pid))
            time.sleep(INTERVAL)
    if child.returncode:
        raise SystemExit(f"converting ended with status {child.returncode}")
    shutil.rmtree(output)
    return imports, peak


def private(process: int) -> int:
    """Return the bytes of a process's private memory, or 0 if it has ended."""
    with open(f"/proc/{process}/status") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:")), 0)


if __name__ == "__main__":
    sys.exit(main())
