"""Pickled checkpoints that are refused: code, damage, and whatever else than a state dict they hold."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch

import splitbundle_converter
from splitbundle import BundleError
from splitbundle_converter.checkpoint import pickles, unpickle
from tests.support.checkpoints import said
from tests.support.models import bundle, make_model
from tests.support.pickled import BIN, INDEX, SAFE, WHOLE, Call, convert, refused

pytestmark = pytest.mark.usefixtures("one_thread", "pickles_here")
STATE_DICT: Final = pickles.STATE_DICT

LOAD: Final = torch.load


def test_without_the_flag(pickled: Callable[..., Path], output: Path) -> None:
    text = str(refused(pickled("llama"), output, allow_pickle=False))
    assert text == (
        f"[source.pickle] {BIN}: expected weights in {SAFE} or {SAFE}.index.json, got a pickle, which can run code. "
        "Save the model as safetensors where you trust it: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True). Or "
        "allow_pickle=True: it reads names and tensors alone, and refuses what asks for more, in a process of its own"
    )


@pytest.mark.parametrize("allow_pickle", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_code_does_not_run(
    child: None, pickled: Callable[..., Path], output: Path, allow_pickle: bool, zipped: bool
) -> None:
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
    """The message is not torch's, which explains how to switch the protection off."""
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
    """A small compressed file could hold any number of bytes."""
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
    """Return the message of the child. Its delivery is tested above."""
    monkeypatch.setattr(torch, "load", LOAD)
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(unpickle.Refused) as caught:
        unpickle.rewrite(str(tmp_path / "x.pt"), str(tmp_path / "x.safetensors"), lambda done: None)
    assert (caught.value.name or "", caught.value.expected, caught.value.got) == (where, expected, got)
    assert not (tmp_path / "x.safetensors").exists()


def test_a_tensor_that_is_none_is_named(child: None, pickled: Callable[..., Path], output: Path) -> None:
    path = pickled("llama", lambda tensors: tensors | {"epoch": 3})
    assert str(refused(path, output)) == f"[source.state-dict] {BIN} /epoch: expected a tensor, got a int. {WHOLE}"


def test_tensors_that_would_fill_the_disk(pickled: Callable[..., Path], output: Path) -> None:
    """Many names of one storage would fill the disk."""
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
    assert said(refused(path, output)) == f"[source.missing] source: {expected}, got none"
    for name in ("a.pt", "b.pt"):
        (path / name).write_bytes(b"")
    assert said(refused(path, output)) == (
        f"[source.missing] source: {expected}, got a.pt, b.pt. "
        "Parts of a model need a file like bottom_metadata.json beside each bottom.pt"
    )


def test_a_directory_is_no_pickle(pickled: Callable[..., Path], output: Path) -> None:
    path = pickled("llama")
    (path / BIN).unlink()
    (path / "x.pt").mkdir()
    text = f"[source.missing] source: expected {SAFE}, {BIN}, an index of either, or one file .pt or .pth, got none"
    assert said(refused(path, output)) == text


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
    monkeypatch.setattr(pickles, "CHILD_CODE", "raise SystemExit('started')")
    output.mkdir()
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(pickled("llama"), output, allow_pickle=True)
    assert caught.value.codes == ("output.exists",)
    assert [entry.name for entry in output.parent.iterdir()] == [output.name]


def test_no_room(pickled: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert str(refused(pickled("llama"), output)) == (
        f"[output.failed] {output.parent}: expected 0.0 GiB of room for the tensors of the pickles, until the bundle "
        "is written, got 0.0 GiB. Choose another output, or make room there"
    )
