"""Shards that are taken out of a bundle: which files, the same id, verification of a part, and merging parts again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import splitbundle
import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.cli.main import main
from tests.support.checkpoints import digests
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "license-gpt2"
DOCUMENTS = ["manifest.json", "SHA256SUMS", "README.md", "architecture.json"]
SOURCE = ["source/config.json", "source/generation_config.json"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The trained example with graphs and the files of onnxruntime-genai."""
    output = tmp_path_factory.mktemp("made") / "b.splitbundle"
    return splitbundle_converter.convert(EXAMPLE, output, split=[2, 4], genai=True)


def test_the_files_of_a_shard(bundle: Bundle) -> None:
    trunk = ["layer-002.safetensors", "layer-003.safetensors", "trunk.onnx"]
    assert sorted(bundle.paths("trunk")) == sorted(DOCUMENTS + SOURCE + trunk)
    assert sorted(bundle.paths("trunk", vectors=True)) == sorted([*DOCUMENTS, *SOURCE, *trunk, "vectors.safetensors"])
    more = set(bundle.paths("trunk", text=True)) - set(bundle.paths("trunk"))
    assert more == {path for path in bundle.manifest.files if path.startswith(("tokenizer/", "genai", "text.json"))}
    everything = bundle.paths("bottom", "trunk", "top", vectors=True, text=True)
    assert sorted(everything) == sorted([*bundle.manifest.files, "manifest.json", "SHA256SUMS"])
    # The head is tied: the top needs the token table, and both ends name it once.
    assert bundle.paths("bottom", "top").count("embedding.safetensors") == 1
    assert "embedding.safetensors" in bundle.paths("top")


def test_a_part_has_unchanged_files_and_the_same_id(bundle: Bundle, tmp_path: Path) -> None:
    part = bundle.extract(tmp_path / "trunk", "trunk")
    assert (part.id, part.fingerprint, part.whole_shards()) == (bundle.id, bundle.fingerprint, ("trunk",))
    found, whole = digests(part.path), digests(bundle.path)
    assert sorted(found) == sorted(bundle.paths("trunk", vectors=True))
    assert all(whole[path] == digest for path, digest in found.items())
    verification = part.verify(exact=True)
    assert sorted((*verification.files, "manifest.json", "SHA256SUMS")) == sorted(found)
    assert set(verification.absent) == set(part.absent()) == set(whole) - set(found)
    for backend in ("torch", "onnxruntime"):
        assert part.run_vectors("trunk", backend=backend) == part.run_vectors(backend=backend)
    done = subprocess.run(
        ["sha256sum", "--ignore-missing", "--quiet", "-c", "SHA256SUMS"], cwd=part.path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")
    with pytest.raises(BundleError, match=r"\[file\.missing\] bottom\.onnx"):
        part.verify(whole=True)


def test_copies_by_hand_are_such_a_part(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed paths are what tar and rsync take."""
    assert main(["files", str(bundle.path), "--shard", "top", "--verify"]) == 0
    (tmp_path / "list").write_text(capsys.readouterr().out)
    (tmp_path / "there").mkdir()
    packed = subprocess.run(
        ["tar", "-C", str(bundle.path), "-cT", str(tmp_path / "list")], capture_output=True, check=True
    )
    subprocess.run(["tar", "-C", str(tmp_path / "there"), "-x"], input=packed.stdout, check=True)
    part = bundle.extract(tmp_path / "top", "top")
    assert digests(tmp_path / "there") == digests(part.path)


@pytest.mark.rule("SB-D-013")
def test_a_shard_that_lost_a_file_is_no_part(bundle: Bundle, tmp_path: Path) -> None:
    """Any file of a whole shard may get lost. What is left of the shard gives it away."""
    part = bundle.extract(tmp_path / "part", "bottom", "trunk")
    part.verify()
    for name in ("bottom", "trunk"):
        for path in bundle.files_of(bundle.shard(name)):
            place = part.path / path
            data = place.read_bytes()
            place.unlink()
            with pytest.raises(BundleError) as caught:
                part.verify()
            assert ("file.missing", path) in [(problem.code, problem.file) for problem in caught.value.problems]
            place.write_bytes(data)


def test_parts_of_parts_and_back(bundle: Bundle, tmp_path: Path) -> None:
    two = bundle.extract(tmp_path / "two", "trunk", "top")
    one = two.extract(tmp_path / "one", "top", vectors=False)
    assert one.whole_shards() == ("top",)
    with pytest.raises(BundleError, match=r"\[file\.missing\] embedding\.safetensors"):
        bundle.extract(tmp_path / "trunk", "trunk").extract(tmp_path / "none", "bottom")
    rest = bundle.extract(tmp_path / "rest", "bottom", text=True)
    merged = splitbundle.merge([one.path, two, rest.path], tmp_path / "merged")
    assert digests(merged.path) == digests(bundle.path)
    merged.verify(exact=True, whole=True)
    # Over one of its parts, and with a part that has nothing more.
    again = splitbundle.merge([two, rest, one], two.path, force=True)
    assert (again.id, digests(two.path)) == (bundle.id, digests(bundle.path))


def test_no_file_is_lost_by_force(bundle: Bundle, tmp_path: Path) -> None:
    """A part doesn't replace the bundle that it is taken from, and a merge never has less than its target."""
    whole = Path(shutil.copytree(bundle.path, tmp_path / "whole"))
    with pytest.raises(BundleError, match=r"\[output\.failed\].*This would remove its other shards"):
        splitbundle.open(whole).extract(whole, "trunk", force=True)
    splitbundle.merge([bundle.extract(tmp_path / "part", "trunk")], whole, force=True)
    assert digests(whole) == digests(bundle.path)


def test_no_file_is_lost_by_force_after_an_interruption(bundle: Bundle, tmp_path: Path) -> None:
    """A writer was killed between its two renames: the target is at the path of the old bundle."""
    top, trunk = bundle.extract(tmp_path / "top", "top"), bundle.extract(tmp_path / "trunk", "trunk")
    top.path.rename(tmp_path / ".top.old")
    assert splitbundle.merge([trunk], top.path, force=True).whole_shards() == ("trunk", "top")


def test_parts_of_other_bundles_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    other = splitbundle_converter.resplit(bundle, tmp_path / "other", split=[3], onnx=False)
    stage = bundle.stage("trunk", trainable=True)
    next(stage.parameters()).data.add_(1)
    trained = bundle.save_as(tmp_path / "trained", stage)
    trunk = bundle.extract(tmp_path / "trunk", "trunk")
    for wrong, why in ((other, "They are of one model with other cuts"), (trained, "They are of two models")):
        with pytest.raises(BundleError) as caught:
            splitbundle.merge([trunk, wrong], tmp_path / "merged")
        assert str(caught.value).startswith(f"[input.value] bundles: expected parts of one bundle, {bundle.id}")
        assert why in str(caught.value)
    with pytest.raises(BundleError, match=r"\[input\.value\] bundles: expected a list of at least one bundle"):
        splitbundle.merge([], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def _of_another(bundle: Bundle, part: Bundle, tmp_path: Path) -> None:
    """The unit of another model: the same names and shapes, and other numbers."""
    stage = bundle.stage("trunk", trainable=True)
    next(stage.parameters()).data.add_(1)
    trained = bundle.save_as(tmp_path / "trained", stage, vectors=False)
    shutil.copy(trained.path / "layer-002.safetensors", part.path / "layer-002.safetensors")


def _longer(bundle: Bundle, part: Bundle, tmp_path: Path) -> None:
    with (part.path / "layer-002.safetensors").open("ab") as file:
        file.write(b"\0")


def _link(bundle: Bundle, part: Bundle, tmp_path: Path) -> None:
    (part.path / "layer-002.safetensors").unlink()
    (part.path / "layer-002.safetensors").symlink_to(bundle.path / "layer-002.safetensors")


def _pipe(bundle: Bundle, part: Bundle, tmp_path: Path) -> None:
    (part.path / "layer-002.safetensors").unlink()
    os.mkfifo(part.path / "layer-002.safetensors")


def _one_bit(bundle: Bundle, part: Bundle, tmp_path: Path) -> None:
    data = bytearray((part.path / "trunk.onnx").read_bytes())
    data[-1] ^= 1
    (part.path / "trunk.onnx").write_bytes(data)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_of_another, "file.digest"),
        (_longer, "file.size"),
        (_link, "file.kind"),
        (_pipe, "file.kind"),
        (_one_bit, "file.digest"),
    ],
)
def test_hostile_parts_are_refused(
    bundle: Bundle, tmp_path: Path, change: Callable[[Bundle, Bundle, Path], None], code: str
) -> None:
    """A manifest of one bundle with a unit of another never becomes a bundle."""
    part = bundle.extract(tmp_path / "part", "trunk")
    rest = bundle.extract(tmp_path / "rest", "bottom", "top", text=True)
    change(bundle, part, tmp_path)
    with pytest.raises(BundleError) as caught:
        part.verify()
    assert code in caught.value.codes
    for write in (
        lambda: splitbundle.merge([rest, part], tmp_path / "merged"),
        lambda: part.extract(tmp_path / "merged", "trunk"),
    ):
        with pytest.raises(BundleError) as caught:
            write()
        assert caught.value.codes == (code,)
        assert not (tmp_path / "merged").exists()
    with pytest.raises(BundleError) as caught:
        splitbundle.merge([rest, part], tmp_path / "merged")
    assert str(part.path) in str(caught.value)  # it says in which of the parts


def test_another_manifest_is_another_bundle(bundle: Bundle, tmp_path: Path) -> None:
    """The id is the digest of the manifest, so a part can't bring other digests with it."""
    part = bundle.extract(tmp_path / "part", "trunk")
    rest = bundle.extract(tmp_path / "rest", "bottom", "top")
    text = (part.path / "manifest.json").read_text()
    (part.path / "manifest.json").write_text(text.replace('"name": "license-gpt2"', '"name": "license-gpt3"'))
    with pytest.raises(BundleError, match=r"\[input\.value\] bundles"):
        splitbundle.merge([rest.path, part.path], tmp_path / "merged")
    with pytest.raises(BundleError, match=r"\[file\.changed\]"):
        splitbundle.merge([rest, part], tmp_path / "merged")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["files", "B", "--shard", "middle"], 2, "[stage.name]"),
        (["extract", "B", "-o", "X"], 2, "--shard"),
        (["extract", "B", "--shard", "trunk"], 2, "--output"),
        (["extract", "B", "--shard", "middle", "-o", "X"], 2, "[stage.name]"),
        (["merge", "-o", "X"], 2, "bundle"),
        (["extract", "B", "--shard", "trunk", "-o", ""], 2, "expected a path, got an empty text"),
        (["merge", "B", "B", "-o", "B"], 1, "[output.exists]"),
        (["merge", "B", "nowhere", "-o", "X"], 1, "[file.missing]"),
        (["extract", "B", "--shard", "trunk", "-o", "B/inside"], 1, "[output.failed]"),
    ],
)
def test_wrong_calls(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    status: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundle.path, "B")
    try:
        got: object = main(arguments)
    except SystemExit as end:
        got = end.code
    assert got == status
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["B"]


def test_what_the_commands_say(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = tmp_path / "part"
    assert main(["extract", str(bundle.path), "--shard", "trunk", "-o", str(part), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["bundle_id"], told["whole_shards"]) == (bundle.id, ["trunk"])
    assert main(["verify", str(part), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["partial"], told["whole_shards"]) == (True, ["trunk"])
    assert sorted([*told["files"], *told["absent"]]) == sorted(bundle.manifest.files)
    assert main(["verify", str(part)]) == 0
    shown = capsys.readouterr()
    assert f": {len(told['files'])} of {len(bundle.manifest.files)} files, " in shown.out
    assert "The bundle is partial. These shards have all their files: trunk." in shown.err
    assert main(["verify", str(part), "--whole"]) == 3
    assert "[file.missing]" in capsys.readouterr().err
    assert main(["files", str(bundle.path), "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)["files"]) == sorted(
        [*bundle.manifest.files, "manifest.json", "SHA256SUMS"]
    )


def test_a_file_that_the_system_cannot_look_at_is_not_absent(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge onto its own part would remove it otherwise."""
    part, rest = bundle.extract(tmp_path / "part", "trunk"), bundle.extract(tmp_path / "rest", "bottom", "top")
    before, look = digests(part.path), os.stat

    def stat(path: object, *more: object, **named: object) -> os.stat_result:
        if str(path).endswith("part/layer-002.safetensors"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return look(path, *more, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", stat)
        patched.setattr(Path, "exists", lambda path: os.path.exists(path))  # as in Python 3.14
        for call in (part.absent, lambda: splitbundle.merge([part, rest], part.path, force=True)):
            with pytest.raises(BundleError, match=r"\[file.unreadable\] layer-002.safetensors: "):
                call()
    assert digests(part.path) == before
