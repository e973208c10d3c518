"""Weight files that are missing, or that differ from the manifest's list."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

import splitbundle
import splitbundle_converter
from splitbundle import Bundle
from tests.support.models import checkpoint, token_rows
from tests.support.stages import refusal


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bottom [0, 1), trunk [1, 3), top [3, 4); the head is its own matrix."""
    output = tmp_path_factory.mktemp("stages") / "llama.splitbundle"
    return splitbundle_converter.convert(checkpoint("llama"), output, split=(1, 3), check=False)


@pytest.fixture
def copy(whole: Bundle, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(whole.path, tmp_path / "copy.splitbundle"))


def test_a_partial_bundle_runs_the_part_that_is_there(whole: Bundle, copy: Path) -> None:
    for unit in ("layer-001", "layer-002", "layer-003", "head"):
        (copy / f"{unit}.safetensors").unlink()
    partial = splitbundle.open(copy)
    ids = torch.tensor(token_rows(5))
    assert torch.equal(partial.stage("bottom")(ids), whole.stage("bottom")(ids))
    missing = (
        "expected a file that the manifest lists, got none. Copy it from the same bundle elsewhere, or merge the two"
    )
    assert refusal(partial.stage, "trunk") == f"[file.missing] layer-001.safetensors: {missing}"
    assert refusal(partial.stage, layers=(0, 2)) == f"[file.missing] layer-001.safetensors: {missing}"
    assert refusal(partial.stage, layers=(4, 4)) == f"[file.missing] head.safetensors: {missing}"
    assert refusal(partial.pipeline) == f"[file.missing] layer-001.safetensors: {missing}"
    assert partial.absent() == tuple(f"{unit}.safetensors" for unit in ("head", "layer-001", "layer-002", "layer-003"))
    partial.verify("bottom")


def test_a_truncated_file(copy: Path) -> None:
    """The fault is found before anything is mapped: a mapping beyond the end of a file kills the process."""
    path = copy / "layer-001.safetensors"
    data = path.read_bytes()
    opened = splitbundle.open(copy)
    for size in (len(data) - 1, 4096, 10, 0):
        path.write_bytes(data[:size])
        assert refusal(opened.stage, "trunk") == (
            f"[file.size] layer-001.safetensors: expected {len(data)} bytes, got {size} bytes. "
            "The file isn't the one that the manifest lists: fetch or convert it again"
        )
        opened.stage("bottom")


def test_a_file_with_another_header(copy: Path) -> None:
    """Another model's file of the same size: the next layer, under this layer's name."""
    other = (copy / "layer-002.safetensors").read_bytes()
    listed = json.loads((copy / "manifest.json").read_text())["files"]["layer-001.safetensors"]
    (copy / "layer-001.safetensors").write_bytes(other)
    assert len(other) == listed["size"]
    length = 8 + int.from_bytes(other[:8], "little")
    assert refusal(splitbundle.open(copy).stage, "trunk") == (
        f"[file.header-digest] layer-001.safetensors: expected a header with sha256 {listed['header_sha256']}, "
        f"got {hashlib.sha256(other[:length]).hexdigest()}. The file isn't the one that the manifest lists"
    )


def test_a_header_that_does_not_say_its_length(copy: Path) -> None:
    path = copy / "layer-001.safetensors"
    data = path.read_bytes()
    for length, text in (
        (2**63, f"expected a header of at most {len(data) - 8} bytes, got a length of {2**63}"),
        (len(data), f"expected a header of at most {len(data) - 8} bytes, got a length of {len(data)}"),
        (100, "expected data that begins at a multiple of 4096, got data at 108"),
    ):
        path.write_bytes(length.to_bytes(8, "little") + data[8:])
        assert refusal(splitbundle.open(copy).stage, "trunk") == (
            f"[weights.header] layer-001.safetensors byte 0: {text}"
        )


def test_other_values_under_the_right_header(copy: Path) -> None:
    """Opening doesn't read the weights; verifying does."""
    path = copy / "layer-001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    damaged = splitbundle.open(copy)
    damaged.stage("trunk")
    digest = damaged.manifest.files["layer-001.safetensors"].sha256
    assert refusal(damaged.verify, "trunk") == (
        f"[file.digest] layer-001.safetensors: expected sha256 {digest}, got {hashlib.sha256(data).hexdigest()}. "
        "The file isn't the one that the manifest lists: fetch or convert it again"
    )
    damaged.verify("bottom")


def test_a_link_in_a_file_s_place(copy: Path, whole: Bundle) -> None:
    path = copy / "layer-001.safetensors"
    path.unlink()
    path.symlink_to(whole.path / "layer-001.safetensors")
    assert refusal(splitbundle.open(copy).stage, "trunk") == (
        "[file.kind] layer-001.safetensors: expected a regular file in real directories, "
        "got layer-001.safetensors is a symbolic link. "
        "Put the file itself there: cp -rL copies the files that links point to"
    )


def test_no_bundle_at_all(tmp_path: Path) -> None:
    hint = 'splitbundle_converter.convert(SOURCE, "NAME.splitbundle") makes one'
    expected = "expected a bundle, a directory with a manifest.json"
    there = tmp_path / "file"
    there.write_bytes(b"")
    for path, got in (
        (tmp_path / "none", "nothing there"),
        (tmp_path, "a directory without it"),
        (there, "a file"),
    ):
        assert refusal(splitbundle.open, path) == f"[file.missing] {path}: {expected}, got {got}. {hint}"
