"""Pickled checkpoints: refused, or read in a child process where that is allowed. Nothing is unpickled here."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import splitbundle_converter
from splitbundle import BundleError, ParityError
from splitbundle_converter import pickles, unpickle
from splitbundle_converter.families import FAMILIES
from tests.support.models import CONFIGURATIONS, ONE_PER_FAMILY, bundle, checkpoint, make_model
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

SAFE: Final = "model.safetensors"
BIN: Final = "pytorch_model.bin"
INDEX: Final = "pytorch_model.bin.index.json"
SHARDS: Final = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
STATE_DICT: Final = pickles.STATE_DICT
WHOLE: Final = pickles.WHOLE

LOAD: Final = torch.load

Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _no_unpickling_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process would unpickle, transformers' own loading among it, is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this process has unpickled something")

    for module, name in ((torch, "load"), (torch.serialization, "load"), (pickle, "load")):
        monkeypatch.setattr(module, name, refuse)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where nothing else is, so that a test sees whatever is left there."""
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "b.splitbundle"


@pytest.fixture
def pickled(tmp_path: Path) -> Callable[..., Path]:
    """Copies a named checkpoint with its weights in one pickle, of which ``change`` may make something else."""

    def copy(name: str, change: Callable[[Tensors], Any] = lambda tensors: tensors, **named: Any) -> Path:
        path = Path(shutil.copytree(checkpoint(name), tmp_path / "source"))
        tensors = load_file(path / SAFE)
        (path / SAFE).unlink()
        torch.save(change(tensors), path / BIN, **named)
        return path

    return copy


def convert(path: Path, output: Path, **named: Any) -> Any:
    """Converts, and leaves nothing but the bundle."""
    made = splitbundle_converter.convert(path, output, allow_pickle=True, **named)
    assert [entry.name for entry in output.parent.iterdir()] == [output.name]
    return made


def refused(path: Path, output: Path, *, allow_pickle: bool = True, **named: Any) -> BundleError:
    """The error that a conversion ends with. It leaves nothing."""
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(path, output, allow_pickle=allow_pickle, **({"check": False} | named))
    assert not list(output.parent.iterdir())
    return caught.value


class Call:
    """What an attacker pickles: reading it calls a function."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


# What converts.


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_one_pickle(pickled: Callable[..., Path], output: Path, name: str) -> None:
    """It is held against the original class, in a process that can't unpickle."""
    made = convert(pickled(name), output, split=[2])
    assert made.manifest.vectors is not None
    assert made.fingerprint == bundle(name).fingerprint
    assert [shard.layers for shard in made.shards] == [(0, 2), (2, 4)]


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_the_original_class_takes_the_tensors_of_every_family(name: str) -> None:
    """As ``vectors`` loads it where there are pickles: with nothing but a configuration and tensors."""
    from splitbundle_converter.place import Place
    from splitbundle_converter.source import Source
    from splitbundle_converter.vectors import load_original

    source = Source(checkpoint(name), name=name)
    again = pickles.PickledSource(Place(directory=source.directory, name=name), source.tensors)
    family = FAMILIES[CONFIGURATIONS[name][0]]
    one, other = (load_original(each, family)[0].state_dict() for each in (source, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_check_still_fails_where_the_weights_are_another_models(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitbundle_converter import vectors

    load = vectors._load_tensors

    def other(source: Any) -> Any:
        model, info = load(source)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.01)
        return model, info

    monkeypatch.setattr(vectors, "_load_tensors", other)
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
    """A tied head, as transformers' own state dict has it; views of one flat storage; turned axes."""

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
    """Parameters in place of tensors, ``_metadata`` beside them, and masks of old GPT-2 checkpoints."""
    path = Path(shutil.copytree(checkpoint("gpt2"), tmp_path / "source"))
    (path / SAFE).unlink()
    state = make_model("gpt2").state_dict(keep_vars=True)
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 48, 48, dtype=torch.bool).tril()
    state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4, dtype=torch.float64)
    torch.save(state, path / BIN)
    assert convert(path, output).fingerprint == bundle("gpt2").fingerprint


def test_the_format_of_before_2020(pickled: Callable[..., Path], output: Path) -> None:
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
        "describes it, got an extra tensor I32 [3]. Check the configuration's number of layers and its features; "
        "remove the tensor if it is no part of the model"
    )


# Several files.


def in_pieces(path: Path, change: Callable[[dict[str, str], Tensors, Tensors], Any] = lambda *_: None) -> None:
    """A checkpoint of two pickles and an index; ``change`` may edit the map and what the files hold."""
    tensors = load_file(checkpoint("llama") / SAFE)
    (path / BIN).unlink()
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[i::2]} for i in range(2)]
    weight_map = {name: SHARDS[i] for i, part in enumerate(parts) for name in part}
    change(weight_map, *parts)
    for file, part in zip(SHARDS, parts, strict=True):
        torch.save(part, path / file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_two_pickles_and_an_index(pickled: Callable[..., Path], output: Path) -> None:
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
            f"[source.tensor] {INDEX}: expected 'lm_head.weight' in {SHARDS[0]}, got none",
        ),
    ],
)
def test_indexes_that_lie(pickled: Callable[..., Path], output: Path, change: Callable[..., Any], text: str) -> None:
    path = pickled("llama")
    in_pieces(path, change)
    assert str(refused(path, output)) == text


def test_the_second_of_two_pickles_ends_the_child(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
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


# What is refused.


def test_without_the_flag(pickled: Callable[..., Path], output: Path) -> None:
    text = str(refused(pickled("llama"), output, allow_pickle=False))
    assert text == (
        f"[source.pickle] {BIN}: expected weights in {SAFE} or {SAFE}.index.json, got a pickle, which can run code. "
        "Save the model as safetensors where you trust it: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True). "
        "Or --allow-pickle: it reads names and tensors alone, and refuses what asks for more, in a process of its own"
    )


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_code_does_not_run(pickled: Callable[..., Path], output: Path, allow_pickle: bool, zipped: bool) -> None:
    mark = output.parent.parent / "ran"
    path = pickled(
        "llama",
        lambda tensors: tensors | {"x": Call(os.system, f"touch {mark}")},
        _use_new_zipfile_serialization=zipped,
    )
    error = refused(path, output, allow_pickle=allow_pickle)
    assert error.codes == ("source.pickle",)
    if allow_pickle:
        assert str(error) == (
            f"[source.pickle] {BIN}: expected names and tensors alone, got a pickle that asks for "
            f"{os.system.__module__}.system. {STATE_DICT}"
        )
    assert not mark.exists()


def test_a_whole_module(pickled: Callable[..., Path], output: Path) -> None:
    path = pickled("llama", lambda tensors: make_model("llama"))
    assert str(refused(path, output)) == (
        f"[source.pickle] {BIN}: expected names and tensors alone, got a pickle that asks for "
        f"transformers.models.llama.modeling_llama.LlamaForCausalLM. {STATE_DICT}"
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_program(pickled: Callable[..., Path], output: Path) -> None:
    path = pickled("llama")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path / BIN))
    text = str(refused(path, output))
    assert text.startswith(
        f"[source.pickle] {BIN}: expected names and tensors alone, got a TorchScript archive, which is a program. "
    )


READ: Final = "a state dict, as torch.save writes it"


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (lambda data: data[: len(data) // 2], "BadZipFile: File is not a zip file"),
        (lambda data: b"", "EOFError"),
        (lambda data: b"hello world" * 9, "KeyError: 101"),
        (lambda data: pickle.dumps({"a": 1}, protocol=4), "UnpicklingError: Unsupported operand 149"),
    ],
)
def test_files_that_torch_cannot_read(
    pickled: Callable[..., Path], output: Path, damage: Callable[[bytes], bytes], got: str
) -> None:
    path = pickled("llama")
    (path / BIN).write_bytes(damage((path / BIN).read_bytes()))
    assert str(refused(path, output)).startswith(f"[source.state-dict] {BIN}: expected {READ}, got {got}")


def test_the_way_round_the_protection_is_not_passed_on(pickled: Callable[..., Path], output: Path) -> None:
    """torch's own messages say how to read a file without it."""
    path = pickled("llama")
    for data in (pickle.dumps({"a": 1}, protocol=4), pickle.dumps({"a": Call(os.getpid)})):
        (path / BIN).write_bytes(data)
        assert "weights_only" not in str(refused(path, output))


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:60]])
def test_an_old_file_that_ends_early(
    pickled: Callable[..., Path], output: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = pickled("llama", _use_new_zipfile_serialization=False)
    (path / BIN).write_bytes(damage((path / BIN).read_bytes()))
    assert str(refused(path, output)).startswith(f"[source.state-dict] {BIN}: expected {READ}, got ")


def test_compressed_records(pickled: Callable[..., Path], output: Path) -> None:
    """A small one could be of any size."""
    path = pickled("llama")
    with zipfile.ZipFile(path / BIN) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path / BIN, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    assert re.fullmatch(
        rf"\[source.state-dict\] {BIN}: expected records without compression, as torch.save writes them, "
        rf"got '[\w/.]+'\. {re.escape(WHOLE)}",
        str(refused(path, output)),
    )


OBJECT: Final = "a state dict: an object of names and tensors"
WRAPPED: Final = f"{OBJECT}, perhaps as one of state_dict, model_state_dict, model"


@pytest.mark.parametrize(
    ("saved", "where", "expected", "got"),
    [
        ([1, 2], "", OBJECT, "a list"),
        (torch.zeros(3), "", OBJECT, "a Tensor"),
        ({}, "", WRAPPED, "an object of nothing"),
        ({"epoch": 3, "lr": 0.1}, "", WRAPPED, "an object of 'epoch', 'lr'"),
        (
            {"model": {"a": torch.zeros(1)}, "state_dict": {"a": torch.zeros(1)}},
            "",
            WRAPPED,
            "an object of 'model', 'state_dict'",
        ),
        ({"a": torch.zeros(1), "epoch": 3}, "epoch", "a tensor", "a int"),
        ({"a": torch.zeros(1), "b": None}, "b", "a tensor", "a NoneType"),
        ({"a": torch.zeros(1), 7: torch.zeros(1)}, "", "names that are strings", "a int"),
        ({"a" * 2000: torch.zeros(1)}, "", "names of 1 to 1024 characters", f"'{'a' * 79}"),
        ({"\ud800": torch.zeros(1)}, "", "names of 1 to 1024 characters", r"'\ud800'"),
        ({"__metadata__": torch.zeros(1)}, "", "names of 1 to 1024 characters", "'__metadata__'"),
        (
            {"a": torch.zeros(1).expand(10**12)},
            "a",
            "a tensor whose elements are all stored",
            "shape [1000000000000] of fewer",
        ),
        (
            {"a": torch.zeros(3).to_sparse()},
            "a",
            "a dense tensor",
            "one that is torch.sparse_coo, cpu, torch.float32",
        ),
        (
            {"a": torch.zeros(3, device="meta")},
            "a",
            "a dense tensor",
            "one that is torch.strided, meta, torch.float32",
        ),
        (
            {"a": torch.zeros(3, dtype=torch.complex64)},
            "a",
            f"a dtype of {', '.join(unpickle.CODES.values())}",
            "torch.complex64",
        ),
    ],
)
def test_what_is_no_state_dict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Any, where: str, expected: str, got: str
) -> None:
    """What the child says; that it arrives is tested above."""
    monkeypatch.setattr(torch, "load", LOAD)
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(unpickle.Refused) as caught:
        unpickle.rewrite(str(tmp_path / "x.pt"), str(tmp_path / "x.safetensors"), lambda done: None)
    assert (caught.value.name or "", caught.value.expected, caught.value.got) == (where, expected, got)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_tensor_that_is_none_is_named(pickled: Callable[..., Path], output: Path) -> None:
    path = pickled("llama", lambda tensors: tensors | {"epoch": 3})
    assert str(refused(path, output)) == f"[source.state-dict] {BIN} /epoch: expected a tensor, got a int. {WHOLE}"


def test_tensors_that_would_fill_the_disk(pickled: Callable[..., Path], output: Path) -> None:
    """One storage under many names."""
    shared = torch.zeros(2**18)
    path = pickled("llama", lambda tensors: {f"x{i}": shared for i in range(1000)})
    text = str(refused(path, output))
    assert re.search(
        r"expected tensors of at most 4 times the file's bytes \(\d+\), got 1048576000 bytes of them", text
    )


def test_no_pickle_either(pickled: Callable[..., Path], output: Path) -> None:
    path = pickled("llama")
    (path / BIN).unlink()
    expected = f"expected {SAFE}, {BIN}, an index of either, or one file .pt or .pth"
    assert str(refused(path, output)) == f"[source.missing] source: {expected}, got none"
    for name in ("a.pt", "b.pt"):
        (path / name).write_bytes(b"")
    assert str(refused(path, output)) == (
        f"[source.missing] source: {expected}, got a.pt, b.pt. "
        "Parts of a model need a file like bottom_metadata.json beside each bottom.pt"
    )


def test_a_directory_is_no_pickle(pickled: Callable[..., Path], output: Path) -> None:
    path = pickled("llama")
    (path / BIN).unlink()
    (path / "x.pt").mkdir()
    text = f"[source.missing] source: expected {SAFE}, {BIN}, an index of either, or one file .pt or .pth, got none"
    assert str(refused(path, output)) == text


def test_a_single_pickle_comes_before_an_index(pickled: Callable[..., Path], output: Path) -> None:
    """As in transformers."""
    path = pickled("llama")
    (path / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "elsewhere.bin"}}))
    assert convert(path, output, check=False).fingerprint == bundle("llama").fingerprint


def test_a_git_lfs_pointer(pickled: Callable[..., Path], output: Path) -> None:
    path = pickled("llama")
    (path / BIN).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 42\n")
    text = f"[source.lfs-pointer] {BIN}: expected weights, got a Git LFS pointer. Fetch the weights: git lfs pull"
    assert str(refused(path, output)) == text


def test_what_stands_there_is_refused_before_the_work(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickles, "BOOT", "raise SystemExit('started')")
    output.mkdir()
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(pickled("llama"), output, allow_pickle=True)
    assert caught.value.codes == ("output.exists",)
    assert [entry.name for entry in output.parent.iterdir()] == [output.name]


def test_no_room(pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert str(refused(pickled("llama"), output)) == (
        f"[output.failed] {output.parent}: expected 0.0 GiB of room for the tensors of the pickles, until the bundle "
        "is written, got 0.0 GiB. Choose another place with --output, or make room there"
    )


# The child: what it may do, and what becomes of it.


def bypassed(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A child in which something gets past ``weights_only``: ``body`` runs in place of ``torch.load``."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    boot = pickles.BOOT.replace("import main; main(", "import main\nSTART\nmain(")
    patch = f"import torch\ndef load(path, **named):\n    import os, signal, sys, time\n{lines}\ntorch.load = load"
    assert boot != pickles.BOOT
    monkeypatch.setattr(pickles, "BOOT", boot.replace("START", patch))


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "the process that read it ended by SIGKILL"),
        ("os.abort()", "the process that read it ended by SIGABRT"),
        ("os._exit(3)", "the process that read it ended with status 3"),
        ("os._exit(0)", "the process that read it ended with status 0"),
        ("sys.exit('farewell')", "the process that read it ended with status 1 (farewell)"),
        ("import ctypes; ctypes.string_at(8)", "the process that read it ended by SIGSEGV"),
        ("torch.empty(2**40)", "RuntimeError: "),
        ("[bytearray(2**28) for _ in range(64)]", "one that takes much more memory than its own size"),
    ],
)
def test_a_child_that_dies(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch, body: str, got: str
) -> None:
    path = pickled("llama")
    bypassed(monkeypatch, body)
    text = str(refused(path, output))
    assert text.startswith(f"[source.state-dict] {BIN}: expected a state dict")
    assert f", got {got}" in text


@pytest.mark.parametrize(
    ("body", "got"),
    [
        ("os.write(1, b'noise'); os.write(2, b'noise'); raise ValueError('x')", "ValueError: x"),
        # The channel is the first descriptor above those that everybody has.
        ("os.write(3, b'hello\\n'); time.sleep(60)", "a process that says what it shouldn't"),
        ("os.write(3, b'x' * 10**6); time.sleep(60)", "a process that says what it shouldn't"),
        ("os.write(3, b'{\"bytes\": -1}\\n'); time.sleep(60)", "a process that says what it shouldn't"),
        ("os.write(3, b'{\"bytes\": 1e9}\\n'); time.sleep(60)", "a process that says what it shouldn't"),
        ("os.write(3, b'{\"done\": 1}\\n'); time.sleep(60)", "nothing that the process made of it"),
        (
            "os.symlink('/etc/hostname', '00000.safetensors'); os.write(3, b'{\"done\": 1}\\n'); time.sleep(60)",
            "nothing that the process made of it",
        ),
        (
            "os.mkfifo('00000.safetensors'); os.write(3, b'{\"done\": 1}\\n'); time.sleep(60)",
            "nothing that the process made of it",
        ),
        (
            "open('00000.safetensors', 'wb').write(b'x' * 99); os.write(3, b'{\"done\": 1}\\n'); time.sleep(60)",
            "SafetensorError",
        ),
        ('os.write(3, b\'{"refused": 99, "got": "\\\\u001b[31m\\\\n"}\\n\'); time.sleep(60)', r"\x1b[31m\n"),
    ],
)
def test_a_child_that_lies(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch, body: str, got: str
) -> None:
    path = pickled("llama")
    bypassed(monkeypatch, body)
    start = time.monotonic()
    text = str(refused(path, output))
    assert BIN in text
    assert f"got {got}" in text
    assert "\x1b" not in text
    assert time.monotonic() - start < 50


def test_what_the_child_gets(pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No secret, no input, no descriptor of ours, a home of its own, and limits."""
    seen = output.parent.parent / "seen.json"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "1")
    path = pickled("llama")
    body = (
        "import json, resource\n"
        "limits = {name: resource.getrlimit(getattr(resource, name)) for name in "
        "('RLIMIT_CORE', 'RLIMIT_FSIZE', 'RLIMIT_AS', 'RLIMIT_CPU')}\n"
        "seen = {'environment': dict(os.environ), 'input': sys.stdin.read(), 'limits': limits, 'place': os.getcwd(),\n"
        "        'isolated': sys.flags.isolated, 'mode': os.stat('.').st_mode,\n"
        "        'named': sorted(map(repr, named.items()))}\n"
        f"json.dump(seen, open({str(seen)!r}, 'w'))\n"
        "raise ValueError"
    )
    bypassed(monkeypatch, body)
    refused(path, output)
    found = json.loads(seen.read_text())
    assert not {
        name for name in found["environment"] if "TOKEN" in name or "SECRET" in name or name.startswith("TORCH")
    }
    assert found["environment"].keys() <= {
        *pickles.KEPT, "HOME", "TMPDIR", "TEMP", "TMP", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES",
        "LC_CTYPE",
    }  # fmt: skip
    assert found["environment"]["HOME"] == found["place"]
    assert (found["input"], found["isolated"], found["mode"] & 0o777) == ("", 1, 0o700)
    assert re.fullmatch(rf"\.{output.name}\.tmp-[0-9a-f]{{16}}", Path(found["place"]).name)
    assert found["named"] == ["('map_location', 'cpu')", "('mmap', True)", "('weights_only', True)"]
    size = (path / BIN).stat().st_size
    assert found["limits"]["RLIMIT_CORE"] == [0, 0]
    assert found["limits"]["RLIMIT_FSIZE"] == [4 * size + 2**30] * 2
    soft, hard = found["limits"]["RLIMIT_CPU"]
    assert 60 < soft < 180
    assert hard == soft + 5
    if sys.platform == "linux":
        assert 2**30 < found["limits"]["RLIMIT_AS"][1] < 2**36


def hashed_for_ever(path: Path) -> None:
    """A dict whose key is a tuple of twice a tuple of twice ..., 64 deep: hashing it looks at 2**64 of them."""
    data = b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 64 + b"K\x01s."
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = {record: archive.read(record) for record in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for record, content in records.items():
            archive.writestr(record, data if record.endswith("/data.pkl") else content)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is the system's")
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="tuples remember their hash")
def test_a_pickle_that_takes_for_ever(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pickled("llama")
    hashed_for_ever(path / BIN)
    short = "import main; from splitbundle_converter import unpickle as u; u.limit.__defaults__ = (0.5,); main("
    monkeypatch.setattr(pickles, "BOOT", pickles.BOOT.replace("import main; main(", short))
    assert str(refused(path, output)) == (
        f"[source.state-dict] {BIN}: expected a state dict that can be read, got the process that read it ended by "
        f"SIGXCPU. {WHOLE}"
    )


def test_a_child_that_says_nothing_is_ended(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it started: computing isn't all that takes time."""
    path, held = pickled("llama"), output.parent.parent / "held"
    monkeypatch.setattr(pickles, "PATIENCE", 8.0)
    bypassed(
        monkeypatch,
        f"import fcntl\nfile = open({str(held)!r}, 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\nos.fork()\ntime.sleep(600)",
    )
    assert str(refused(path, output)) == (
        f"[source.state-dict] {BIN}: expected a state dict that can be read, "
        f"got no word for 8 s from the process that reads it. {WHOLE}"
    )
    with held.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # hangs for as long as a grandchild lives


def test_a_name_of_any_length_is_refused_as_code(pickled: Callable[..., Path], output: Path) -> None:
    """A message of the child has a longest length, and what a file names hasn't."""
    path = pickled("llama")
    with zipfile.ZipFile(path / BIN) as archive:
        records = {record: archive.read(record) for record in archive.namelist()}
    with zipfile.ZipFile(path / BIN, "w") as archive:
        for record, content in records.items():
            code = b"\x80\x02cos\n" + b"x" * 20_000 + b"\n."
            archive.writestr(record, code if record.endswith("/data.pkl") else content)
    text = str(refused(path, output))
    assert text.startswith(
        f"[source.pickle] {BIN}: expected names and tensors alone, got a pickle that asks for os.xxx"
    )
    assert len(text) < 1000


def test_what_the_system_refuses_here(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    path = pickled("llama")
    monkeypatch.setattr(Path, "write_text", full)
    text = str(refused(path, output))
    assert text.startswith(f"[output.failed] {output.parent}/.{output.name}.tmp-")
    assert text.endswith(
        "/request.json: expected a place that can be written, got OSError: [Errno 28] No space left on device: "
        f"'{text.partition(' ')[2].partition(':')[0]}'. Choose another place with --output, or make room there"
    )


def test_what_the_child_starts_ends_with_it(
    pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what holds its output open; also if the child itself is dead."""
    held = output.parent.parent / "held"
    path = pickled("llama")
    bypassed(
        monkeypatch,
        f"import fcntl\nfile = open({str(held)!r}, 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "if os.fork() == 0:\n    os.close(3); os.close(1); time.sleep(600)\nos._exit(0)",
    )
    assert "ended with status 0" in str(refused(path, output))
    with held.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # hangs for as long as a grandchild lives


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_child_and_leaves_nothing(
    pickled: Callable[..., Path], output: Path, number: signal.Signals
) -> None:
    path = pickled("llama")
    mark = output.parent.parent / "reading"
    boot = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        "import sys\nfrom splitbundle_converter import pickles\nfrom splitbundle.cli import main\n"
        f"pickles.BOOT = {boot!r}\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "convert", str(path), "--allow-pickle", "-o", str(output)],
        stderr=subprocess.PIPE,
        text=True,
    )
    began = time.monotonic()
    while not (mark.exists() and mark.read_text()) and time.monotonic() - began < 60:
        time.sleep(0.01)
    assert list(output.parent.glob(f".{output.name}.tmp-*"))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not list(output.parent.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_what_a_killed_conversion_left_is_removed_by_the_next(pickled: Callable[..., Path], output: Path) -> None:
    left = output.with_name(f".{output.name}.tmp-{'0' * 16}")
    left.mkdir(mode=0o700)
    (left / "00000.safetensors").write_bytes(b"x")
    left.with_name(left.name + ".lock").touch()
    convert(pickled("llama"), output, check=False)


def test_the_flag_of_the_command(pickled: Callable[..., Path], output: Path) -> None:
    words = [sys.executable, "-m", "splitbundle", "convert", str(pickled("llama")), "-o", str(output), "--split", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "Or --allow-pickle" in done.stderr
    done = subprocess.run([*words, "--allow-pickle"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "checked against the original model" in done.stdout


def test_only_the_child_unpickles() -> None:
    """Nothing else in the project so much as names the functions that do."""
    for package in ("runtime", "converter", "schemas"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text("utf-8")
            reads = re.search(r"^\s*(import pickle|from pickle import)|torch\.load\(", text, re.MULTILINE)
            assert bool(reads) == (path.name == "unpickle.py"), path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_reading_streams(tmp_path: Path) -> None:
    """The child holds no copy of the file: one of 512 MiB takes no more than a small one, and some."""
    probe = """
import os, sys
from splitbundle_converter import unpickle
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
    torch.save({f"x{i}": torch.full((2**22,), float(i)) for i in range(32)}, tmp_path / "x.pt")
    done = subprocess.run(
        [sys.executable, "-c", probe, str(tmp_path / "x.pt"), str(tmp_path / "x.safetensors")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64
    assert all(bool((tensor == i).all()) for i, tensor in enumerate(load_file(tmp_path / "x.safetensors").values()))


def test_every_family_names_its_layers_where_it_says() -> None:
    """What parts of models are recognised by."""
    for family in FAMILIES.values():
        assert family.layers.startswith(family.prefix)
        for name in (*family.dropped, *family.constants):
            assert "{layer}" not in name or name.startswith(f"{family.layers}.{{layer}}."), name
