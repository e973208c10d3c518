"""Converting streams: what it takes doesn't grow with the model, and the bundle is no larger than the weights."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

import splitbundle
import splitbundle_converter
from tests.support.expert_models import write_experts
from tests.support.paths import ROOT

MEBI = 2**20
PROBE = """
import json, sys, threading
import jsonschema, transformers
import splitbundle_converter.conversion as conversion

def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

transformers.AutoConfig
before, peaks = private(), []
for source, output in zip(sys.argv[1::2], sys.argv[2::2]):
    peak, done = 0, threading.Event()

    def watch():
        global peak
        while not done.wait(0.002):
            peak = max(peak, private())

    thread = threading.Thread(target=watch)
    thread.start()
    conversion.convert(source, output, split=[2, 10], check=False)
    done.set()
    thread.join()
    peaks.append(peak - before)
print(json.dumps(peaks))
"""

LOADING = """
import sys
import numpy, onnxruntime
import splitbundle
import splitbundle.backends.onnxruntime.pipeline

def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

before = private()
pipeline = splitbundle.open(sys.argv[1]).pipeline(backend="onnxruntime")
print(private() - before)
"""


def write_gpt2(directory: Path, layers: int, **fields: int) -> tuple[int, int]:
    """A random GPT-2, by default of 124 M for 12 layers. Gives the bytes of its parameters, and of the largest."""
    config = GPT2Config(n_layer=layers, **fields)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    # The tied head isn't a parameter of its own; random weights a tensor at a time, as no two may be equal.
    tensors = {name: torch.rand(p.shape, generator=generator) - 0.5 for name, p in model.named_parameters()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    config.save_pretrained(directory)
    sizes = [tensor.nbytes for tensor in tensors.values()]
    return sum(sizes), max(sizes)


def over(*paths: Path) -> list[int]:
    """Return the peaks of private memory of conversions, beyond that of the converter's imports.

    Args:
        paths: A source and an output for each conversion. All of them run in one process.
    """
    done = subprocess.run([sys.executable, "-c", PROBE, *map(str, paths)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout)
    return found


def loaded(graphs: splitbundle.Bundle) -> int:
    """Return the private memory that the weights take under onnxruntime."""
    command = [sys.executable, "-c", LOADING, str(graphs.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_a_layer_of_many_experts(tmp_path: Path) -> None:
    """The experts of a layer are written one by one: 128 MiB of them take no more memory than 16."""
    taken = {}
    for count in (16, 128):
        write_experts(tmp_path / f"source-{count}", count, 4, layers=12)
        (taken[count],) = over(tmp_path / f"source-{count}", tmp_path / f"{count}.splitbundle")
    print({count: f"{size / MEBI:.1f} MiB" for count, size in taken.items()})
    assert taken[128] <= taken[16] + 24 * MEBI


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_twice_the_layers_take_no_more(tmp_path: Path) -> None:
    """The larger model has 74 MiB more. Nothing is stored twice, graphs included, and onnxruntime maps the weights."""
    widths = {"n_embd": 384, "n_head": 6, "vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0}
    write_gpt2(tmp_path / "small", 11, **widths)
    total, _ = write_gpt2(tmp_path / "deep", 22, **widths)
    small, deep = over(*(tmp_path / name for name in ("small", "small.splitbundle", "deep", "deep.splitbundle")))
    assert deep <= small + 16 * MEBI
    bundle = splitbundle.open(tmp_path / "deep.splitbundle")
    stored = sum((bundle.path / path).stat().st_size for path in bundle.manifest.weight_files())
    assert stored <= 1.001 * total, f"{stored / total:.6f} of the source's parameters"
    graphs = splitbundle_converter.add_onnx(bundle, tmp_path / "graphs.splitbundle")
    plain_size, size = (sum(file.size for file in each.manifest.files.values()) for each in (bundle, graphs))
    assert size <= 1.01 * plain_size, f"{size / plain_size:.6f}"
    assert loaded(graphs) <= 0.1 * total


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_a_full_size_gpt2(tmp_path: Path) -> None:
    total, largest = write_gpt2(tmp_path / "gpt2", 12)
    (taken,) = over(tmp_path / "gpt2", tmp_path / "gpt2.splitbundle")
    assert taken <= 250 * MEBI + largest
    bundle = splitbundle.open(tmp_path / "gpt2.splitbundle")
    stored = sum((bundle.path / path).stat().st_size for path in bundle.manifest.weight_files())
    assert stored <= 1.001 * total, f"{stored / total:.6f} of the source's parameters"
    assert [(shard.name, shard.layers) for shard in bundle.shards] == [
        ("bottom", (0, 2)),
        ("trunk", (2, 10)),
        ("top", (10, 12)),
    ]

    # Cut again in memory and on disk: other shards of the same model.
    again = splitbundle_converter.resplit(bundle, tmp_path / "again.splitbundle", split=[4, 8])
    assert again.manifest.cuts == (4, 8)
    assert again.fingerprint == bundle.fingerprint
    assert again.id != bundle.id
    ids = torch.tensor([[464, 3290]])
    whole = bundle.pipeline()(ids)
    middle = bundle.stage(layers=(0, 4))(ids)
    cut = bundle.stage(layers=(8, 12))(bundle.stage(layers=(4, 8))(middle))
    scale = whole.abs().max()
    assert (cut - whole).abs().max() <= 1e-5 * scale
    assert (again.pipeline()(ids) - whole).abs().max() <= 1e-5 * scale
    sums = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=again.path, capture_output=True, text=True)
    assert sums.returncode == 0, sums.stdout

    # Graphs store nothing again, and onnxruntime maps what torch maps.
    graphs = splitbundle_converter.add_onnx(bundle, tmp_path / "graphs.splitbundle")
    plain_size, size = (sum(file.size for file in each.manifest.files.values()) for each in (bundle, graphs))
    assert size <= 1.01 * plain_size, f"{size / plain_size:.6f}"
    assert loaded(graphs) <= 0.1 * total

    # Four times the layers of the same widths take no more, but for the header and the digests of their files.
    write_gpt2(tmp_path / "deep", 48)
    (deep,) = over(tmp_path / "deep", tmp_path / "deep.splitbundle")
    assert deep <= taken + 16 * MEBI


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_sharded_checkpoints_of_two_sizes(tmp_path: Path) -> None:
    """A model of twice the size takes no more memory, and no tensor is copied: the largest has 125 MiB."""
    command = [sys.executable, "-m", "benchmarks.conversion_memory", "--gigabytes", "0.35,0.75", "--files", "4"]
    done = subprocess.run(
        [*command, "--directory", str(tmp_path), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    small, large = json.loads(done.stdout)
    assert small["files"] >= 3
    assert large["files"] >= 3
    assert large["bytes"] > 2 * small["bytes"]
    assert small["largest_tensor"] > 120 * MEBI
    assert small["over"] <= 32 * MEBI
    assert abs(large["over"] - small["over"]) <= 16 * MEBI
    assert not list(tmp_path.iterdir())


def test_the_sums_are_those_of_the_files(tmp_path: Path) -> None:
    source = ROOT / "examples" / "license-gpt2"
    bundle = splitbundle_converter.convert(source, tmp_path / "license.splitbundle", split=[3], check=False)
    lines = (bundle.path / "SHA256SUMS").read_text().splitlines()
    assert lines == sorted(lines, key=lambda line: line.partition("  ")[2])
    listed = dict(reversed(line.split("  ")) for line in lines)
    present = {p.relative_to(bundle.path).as_posix(): p for p in bundle.path.rglob("*") if p.is_file()}
    assert listed.keys() == present.keys() - {"SHA256SUMS"}
    for path, digest in listed.items():
        assert hashlib.sha256(present[path].read_bytes()).hexdigest() == digest


def test_other_readers_open_the_weight_files(tmp_path: Path) -> None:
    source = ROOT / "examples" / "license-gpt2"
    bundle = splitbundle_converter.convert(source, tmp_path / "license.splitbundle", check=False)
    with safe_open(bundle.path / "layer-004.safetensors", framework="pt") as opened:
        names = set(opened.keys())
        query = opened.get_tensor("layers.4.attention.query.weight")
        assert len(opened.metadata()["sha256"]) == 64
    assert names == set(bundle.architecture.layer_tensors(4))
    assert torch.equal(query, bundle.stage(layers=(4, 5)).state_dict()["layers.4.attention.query.weight"])
