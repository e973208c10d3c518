"""Opening a bundle reads two files, verifying reads all of them, and messages name the fault."""

from __future__ import annotations

import copy as copying
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

import splitbundle
from splitbundle import BundleError
from tests.runtime.conftest import ALL, GOLDEN


def test_opening_reads_no_weights(copy: Path) -> None:
    for path in copy.glob("*.safetensors"):
        path.unlink()
    bundle = splitbundle.open(copy)
    assert [shard.name for shard in bundle.shards] == ["bottom", "trunk", "top"]
    assert "layer-000.safetensors" in bundle.absent()


@pytest.mark.parametrize("name", ALL)
def test_every_golden_bundle_verifies(name: str) -> None:
    golden = splitbundle.open(GOLDEN / name)
    found = golden.verify(exact=True)
    assert set(found.files) == set(golden.manifest.files)
    assert found.bytes == sum(file.stat().st_size for file in golden.path.rglob("*") if file.is_file()) - sum(
        (golden.path / name).stat().st_size for name in ("manifest.json", "SHA256SUMS")
    )


@pytest.mark.rule("SB-I-001", "SB-I-002", "SB-I-003")
def test_ids_are_what_coreutils_compute(golden: splitbundle.Bundle) -> None:
    def sha256(data: bytes) -> str:
        return "sha256:" + hashlib.sha256(data).hexdigest()

    lines = (golden.path / "SHA256SUMS").read_text().splitlines(keepends=True)
    model = [
        line
        for line in lines
        if line.endswith(("  architecture.json\n", ".safetensors\n")) and not line.endswith("  vectors.safetensors\n")
    ]
    assert golden.id == sha256((golden.path / "manifest.json").read_bytes())
    assert golden.architecture_id == sha256((golden.path / "architecture.json").read_bytes())
    assert golden.fingerprint == sha256("".join(model).encode())


def test_a_partial_bundle_verifies_shard_by_shard(copy: Path) -> None:
    for name in ("head.safetensors", "layer-001.safetensors", "layer-002.safetensors", "vectors.safetensors"):
        (copy / name).unlink()
    bundle = splitbundle.open(copy)
    bundle.verify("bottom")
    with pytest.raises(BundleError) as caught:
        bundle.verify("trunk")
    assert str(caught.value) == (
        "[file.missing] layer-001.safetensors: expected a file that the manifest lists, got none. "
        "Copy it from the same bundle elsewhere, or merge the two"
    )
    with pytest.raises(BundleError) as caught:
        bundle.verify()
    assert {problem.file for problem in caught.value.problems} == {
        "head.safetensors",
        "layer-001.safetensors",
        "layer-002.safetensors",
        "vectors.safetensors",
    }


def test_a_changed_byte_is_named_by_its_file(copy: Path) -> None:
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        data = path.read_bytes()
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        name = path.relative_to(copy).as_posix()
        with pytest.raises(BundleError) as caught:
            splitbundle.open(copy).verify()
        assert name in {problem.file for problem in caught.value.problems}, name
        path.write_bytes(data)
    splitbundle.open(copy).verify()


def test_a_truncated_file_is_refused(copy: Path) -> None:
    for path in sorted(path for path in copy.rglob("*") if path.is_file()):
        data = path.read_bytes()
        for length in (0, 1, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            with pytest.raises(BundleError):
                splitbundle.open(copy).verify()
        path.write_bytes(data)


def test_a_changed_manifest_that_still_opens_is_named_by_the_sums(copy: Path) -> None:
    manifest = copy / "manifest.json"
    document = json.loads(manifest.read_text())
    document["model"]["name"] = "another"
    manifest.write_text(json.dumps(document))
    with pytest.raises(BundleError) as caught:
        splitbundle.open(copy).verify()
    assert [(problem.code, problem.file) for problem in caught.value.problems] == [("sums.mismatch", "manifest.json")]


@pytest.mark.rule("SB-D-001")
def test_unlisted_files_are_reported_and_with_exact_refused(copy: Path) -> None:
    (copy / "source" / "extra.txt").write_text("hello")
    bundle = splitbundle.open(copy)
    assert bundle.verify().unlisted == ("source/extra.txt",)
    with pytest.raises(BundleError, match=r"\[file.unlisted\] source/extra.txt"):
        bundle.verify(exact=True)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows, and there are no pipes")
@pytest.mark.rule("SB-D-002")
def test_links_and_pipes_are_refused(copy: Path, tmp_path: Path) -> None:
    unit = copy / "layer-001.safetensors"
    elsewhere = Path(shutil.move(unit, tmp_path / "elsewhere"))
    unit.symlink_to(elsewhere)
    with pytest.raises(BundleError) as caught:
        splitbundle.open(copy).stage("trunk")
    assert str(caught.value) == (
        "[file.kind] layer-001.safetensors: expected a regular file in real directories, "
        "got layer-001.safetensors is a symbolic link. "
        "Put the file itself there: cp -rL copies the files that links point to"
    )
    unit.unlink()
    os.mkfifo(unit)
    with pytest.raises(BundleError, match="is a pipe"):
        splitbundle.open(copy).verify()
    unit.unlink()
    unit.mkdir()
    with pytest.raises(BundleError, match="is a directory"):
        splitbundle.open(copy).verify()
    text = copy / "source"
    moved = Path(shutil.move(text, tmp_path / "text"))
    text.symlink_to(moved)
    with pytest.raises(BundleError, match="source is a symbolic link"):
        splitbundle.open(copy).verify()


def test_what_is_no_bundle_is_said(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        splitbundle.open(tmp_path / "nothing.splitbundle")
    assert str(caught.value) == (
        f"[file.missing] {tmp_path / 'nothing.splitbundle'}: expected a bundle, a directory with a manifest.json, "
        'got nothing there. splitbundle_converter.convert(SOURCE, "NAME.splitbundle") makes one'
    )


def test_an_interrupted_replacement_is_mended(copy: Path) -> None:
    copy.rename(copy.with_name(f".{copy.name}.old"))
    assert splitbundle.open(copy).verify()


def test_a_bundle_and_its_errors_travel_between_processes(gpt2: splitbundle.Bundle) -> None:
    assert pickle.loads(pickle.dumps(gpt2)).id == gpt2.id
    with pytest.raises(BundleError) as caught:
        gpt2.stage("middle")
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


def test_a_bundle_pickles_as_its_path_its_id_and_its_strictness(copy: Path) -> None:
    strict = splitbundle.open(copy, verify="always")
    data = pickle.dumps(strict)
    assert strict.__reduce__()[1] == (copy, strict.id, True)
    assert len(data) < 1000 + len(str(copy))
    found = pickle.loads(data)
    assert (found.path, found.id, found.strict, found.manifest) == (copy, strict.id, True, strict.manifest)
    manifest = copy / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")  # by now it is another bundle
    with pytest.raises(BundleError, match=r"\[file.digest\] manifest.json"):
        pickle.loads(data)


def test_a_pickled_bundle_is_opened_as_any_other(copy: Path) -> None:
    bundle = splitbundle.open(copy)
    data = pickle.dumps(bundle)
    copy.rename(copy.with_name(f".{copy.name}.old"))  # its replacement is interrupted
    assert pickle.loads(data).id == bundle.id
    assert copy.is_dir()
    shutil.rmtree(copy)
    with pytest.raises(BundleError, match=r"\[file.missing\] .*: expected a bundle, a directory with a manifest.json"):
        pickle.loads(data)
    assert copying.copy(bundle) is copying.deepcopy(bundle) is bundle
