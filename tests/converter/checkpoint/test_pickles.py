"""Pickled checkpoints that convert, in one file or several. Nothing is unpickled in the process of the test."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file

import splitbundle_converter
from splitbundle import ParityError
from splitbundle_converter.checkpoint import pickles
from splitbundle_converter.families.table import FAMILIES
from tests.converter.checkpoint.test_unpickle import bypassed
from tests.support.checkpoints import MISSING, said
from tests.support.command_line import run
from tests.support.models import CONFIGURATIONS, ONE_PER_FAMILY, bundle, checkpoint, make_model
from tests.support.pickled import BIN, INDEX, SAFE, WHOLE, Tensors, convert, refused
from tests.support.tiers import USUAL, thinned

pytestmark = pytest.mark.usefixtures("one_thread", "pickles_here")
SHARDS: Final = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


# What converts.


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_one_pickle(pickled: Callable[..., Path], output: Path, name: str) -> None:
    """The bundle is compared with the original class, in a process that can't unpickle."""
    made = convert(pickled(name), output, split=[2])
    assert made.manifest.vectors is not None
    assert made.fingerprint == bundle(name).fingerprint
    assert [shard.layers for shard in made.shards] == [(0, 2), (2, 4)]


@pytest.mark.parametrize("name", thinned(ONE_PER_FAMILY, USUAL))
def test_the_original_class_takes_the_tensors_of_every_family(name: str) -> None:
    """Load the class as for pickles: from a configuration and tensors only."""
    from splitbundle_converter.checkpoint.directory import CheckpointDirectory
    from splitbundle_converter.checkpoint.source import Checkpoint
    from splitbundle_converter.reference.golden_vectors import load_original

    source = Checkpoint(checkpoint(name), name=name)
    again = pickles.PickledCheckpoint(CheckpointDirectory(path=source.directory.path, name=name), source.tensors)
    family = FAMILIES[CONFIGURATIONS[name][0]]
    one, other = (load_original(each, family)[0].state_dict() for each in (source, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_check_still_fails_where_the_weights_are_another_models(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitbundle_converter.reference import golden_vectors

    load = golden_vectors._load_tensors

    def other(source: Any, config: Any) -> Any:
        model, info = load(source, config)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        return model, info

    monkeypatch.setattr(golden_vectors, "_load_tensors", other)
    with pytest.raises(ParityError):
        splitbundle_converter.convert(pickled("llama"), output, allow_pickle=True)
    assert not list(output.parent.iterdir())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(tmp_path: Path, output: Path, dtype: str) -> None:
    path = Path(shutil.copytree(checkpoint("llama", dtype), tmp_path / "source"))
    expected = splitbundle_converter.convert(path, tmp_path / "safe.splitbundle", check=False)
    tensors = load_file(path / SAFE)
    (path / SAFE).unlink()
    torch.save(tensors, path / BIN)
    made = convert(path, output)
    assert made.manifest.storage.dtype == dtype
    assert made.fingerprint == expected.fingerprint


def test_tensors_that_share_their_storage(pickled: Callable[..., Path], output: Path) -> None:
    """The tensors are a tied head, views of one flat storage, and transposed matrices."""

    def share(tensors: Tensors) -> Tensors:
        flat = torch.cat([tensors[name].reshape(-1) for name in tensors])
        views, start = {}, 0
        for name, tensor in tensors.items():
            views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
            start += tensor.numel()
        turned = "transformer.h.1.mlp.c_fc.weight"
        views[turned] = tensors[turned].T.contiguous().T
        assert not views[turned].is_contiguous()
        views["lm_head.weight"] = views["transformer.wte.weight"]
        return views

    assert convert(pickled("gpt2", share), output).fingerprint == bundle("gpt2").fingerprint


def test_a_state_dict_of_a_module_with_its_parameters(tmp_path: Path, output: Path) -> None:
    """The state dict has parameters, ``_metadata``, and masks of old GPT-2 checkpoints."""
    path = Path(shutil.copytree(checkpoint("gpt2"), tmp_path / "source"))
    (path / SAFE).unlink()
    state = make_model("gpt2").state_dict(keep_vars=True)
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 48, 48, dtype=torch.bool).tril()
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4, dtype=torch.float64)
    torch.save(state, path / BIN)
    assert convert(path, output).fingerprint == bundle("gpt2").fingerprint


def test_the_format_of_before_2020(child: None, pickled: Callable[..., Path], output: Path) -> None:
    path = pickled("llama", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path / BIN)
    assert convert(path, output).fingerprint == bundle("llama").fingerprint


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
def test_what_a_training_loop_wraps(pickled: Callable[..., Path], output: Path, wrapper: str) -> None:
    path = pickled("llama", lambda tensors: {"epoch": 3, "optimizer": {"state": {}}, wrapper: tensors})
    assert convert(path, output, check=False).fingerprint == bundle("llama").fingerprint


@pytest.mark.parametrize("file", ["model.pt", "weights.pth"])
def test_a_single_file_of_any_name(pickled: Callable[..., Path], output: Path, file: str) -> None:
    path = pickled("llama")
    (path / BIN).rename(path / file)
    assert convert(path, output, check=False).fingerprint == bundle("llama").fingerprint


def test_safetensors_come_first(tmp_path: Path, output: Path) -> None:
    path = Path(shutil.copytree(checkpoint("llama"), tmp_path / "source"))
    (path / BIN).write_bytes(b"never read")
    assert convert(path, output).fingerprint == bundle("llama").fingerprint


def test_a_tensor_of_a_pickle_is_named_with_its_file(pickled: Callable[..., Path], output: Path) -> None:
    path = pickled("llama", lambda tensors: tensors | {"module.x": torch.zeros(3, dtype=torch.int32)})
    assert str(refused(path, output)) == (
        f"[source.tensor] {BIN} /module.x: expected only the tensors of a model of 4 layers as its configuration "
        "describes it, got an extra tensor I32 [3]. Use the configuration that was published with these weights"
    )


# Several files.


def in_pieces(path: Path, change: Callable[[dict[str, str], Tensors, Tensors], Any] = lambda *_: None) -> None:
    """Return a checkpoint of two pickles and an index. ``change`` may edit the map and the files."""
    tensors = load_file(checkpoint("llama") / SAFE)
    (path / BIN).unlink()
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[i::2]} for i in range(2)]
    weight_map = {name: SHARDS[i] for i, part in enumerate(parts) for name in part}
    change(weight_map, *parts)
    for file, part in zip(SHARDS, parts, strict=True):
        torch.save(part, path / file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_two_pickles_and_an_index(child: None, pickled: Callable[..., Path], output: Path) -> None:
    path = pickled("llama")
    in_pieces(path)
    assert convert(path, output).fingerprint == bundle("llama").fingerprint


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda weight_map, first, second: weight_map.update({"lm_head.weight": "../x.bin"}),
            f"[source.index] {INDEX} /weight_map/lm_head.weight: "
            "expected the name of a .bin file beside the index, got '../x.bin'",
        ),
        (
            lambda weight_map, first, second: weight_map.update({"lm_head.weight": "pytorch_model-3.bin"}),
            f"[source.missing] pytorch_model-3.bin: expected a file that {INDEX} names, got none",
        ),
        (
            lambda weight_map, first, second: second.update({"lm_head.weight": first["lm_head.weight"]}),
            f"[source.tensor] {INDEX}: expected one entry for 'lm_head.weight', got it is in {SHARDS[1]} too",
        ),
        (
            lambda weight_map, first, second: first.pop("lm_head.weight"),
            f"[source.tensor] {INDEX}: expected 'lm_head.weight' in {SHARDS[0]}, got none. {MISSING}",
        ),
    ],
)
def test_indexes_that_lie(pickled: Callable[..., Path], output: Path, change: Callable[..., Any], text: str) -> None:
    path = pickled("llama")
    in_pieces(path, change)
    assert said(refused(path, output)) == text


def test_the_second_of_two_pickles_ends_the_child(
    child: None, pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pickled("llama")
    in_pieces(path)
    bypassed(monkeypatch, f"return {{'a': torch.zeros(1)}} if {SHARDS[0]!r} in path else os.abort()")
    assert str(refused(path, output)) == (
        f"[source.state-dict] {SHARDS[1]}: expected a state dict that can be read, "
        f"got the process that read it ended by SIGABRT. {WHOLE}"
    )


def test_the_second_of_two_pickles_is_named(pickled: Callable[..., Path], output: Path) -> None:
    path = pickled("llama")
    in_pieces(path)
    torch.save([1, 2], path / SHARDS[1])
    text = str(refused(path, output))
    assert text == (
        f"[source.state-dict] {SHARDS[1]}: expected a state dict: an object of names and tensors, got a list. {WHOLE}"
    )


def test_the_flag_of_the_command(
    child: None, pickled: Callable[..., Path], output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", pickled("llama"), "-o", output, "--split", "2"]
    status, _, errors = run(capsys, *words)
    assert status == 1
    assert "Or --allow-pickle" in errors
    status, said, errors = run(capsys, *words, "--allow-pickle")
    assert status == 0, errors
    assert "checked against the original model" in said


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_reading_streams(tmp_path: Path) -> None:
    """The child copies no file: one of 128 MiB takes about the memory of a small one."""
    probe = """
import os, sys
from splitbundle_converter.checkpoint import unpickle
def private():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("RssAnon"))
before, peak = private(), 0
def wrote(done):
    global peak
    peak = max(peak, private())
unpickle.limit(os.path.getsize(sys.argv[1]), os.path.getsize(sys.argv[1]))
unpickle.rewrite(sys.argv[1], sys.argv[2], wrote)
print(peak - before)
"""
    torch.save({f"x{i}": torch.full((2**20,), float(i)) for i in range(32)}, tmp_path / "x.pt")
    done = subprocess.run(
        [sys.executable, "-c", probe, str(tmp_path / "x.pt"), str(tmp_path / "x.safetensors")],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(load_file(tmp_path / "x.safetensors").values()))


def test_every_family_names_its_layers_where_it_says() -> None:
    """Return the metadata that identifies a part."""
    for family in FAMILIES.values():
        assert family.layers.startswith(family.prefix)
        for name in (*family.dropped, *family.constants):
            assert "{layer}" not in name or name.startswith(f"{family.layers}.{{layer}}."), name
