"""A bundle as one tar archive: the same bytes each time, plain archives of other tools, and archives from strangers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

import splitbundle
from splitbundle import Bundle, BundleError
from splitbundle.format import names
from splitbundle.sharing import archive as archives
from splitbundle.sharing import tar_members
from tests.support.checkpoints import digests
from tests.support.command_line import run
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
TOP = "golden-gpt2.splitbundle"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle with graphs, a tokenizer and two files that pass for signatures."""
    root = Path(shutil.copytree(GOLDEN, tmp_path / "b.splitbundle"))
    (root / "signatures").mkdir()
    for name in ("b", "a"):
        (root / names.signature_path(name)).write_text(f"not opened {name}")
    return splitbundle.open(root)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The archive of a golden bundle."""
    place = tmp_path_factory.mktemp("packed") / "x.tar"
    splitbundle.open(GOLDEN).pack(place)
    return place.read_bytes()


# Packing.


@pytest.mark.rule("SB-D-020", "SB-D-016")
def test_an_archive_is_the_same_each_time(bundle: Bundle, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    made = bundle.pack(tmp_path / "x.tar", progress=lambda *told: seen.append(told))
    data = made.path.read_bytes()
    assert (made.path, made.bytes, made.bytes % 10240) == (tmp_path / "x.tar", len(data), 0)
    assert seen[-1] == ("packing", *[sum(file.size for file in bundle.manifest.files.values())] * 2)
    other = Path(shutil.copytree(bundle.path, tmp_path / "other"))
    for path in other.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    (other / "notes.txt").write_text("not listed")
    (other / "SHA256SUMS").unlink()  # it follows from the manifest
    assert splitbundle.open(other).pack(tmp_path / "y.tar").path.read_bytes() == data
    order = ["manifest.json", "SHA256SUMS", *bundle.manifest.files]
    order += ["signatures/a.sigstore.json", "signatures/b.sigstore.json"]
    assert list(made.files) == order
    with tarfile.open(made.path) as read:  # by another reader
        assert read.getnames() == [f"{TOP}/{path}" for path in order]
        for member in read.getmembers():
            assert (member.type, member.mode, member.mtime) == (tarfile.REGTYPE, 0o644, 0)
            assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
            path = bundle.path / member.name.removeprefix(f"{TOP}/")
            inside = read.extractfile(member)
            assert inside is not None
            assert inside.read() == path.read_bytes()
    assert data[len(data) - 1024 :] == bytes(1024)


@pytest.mark.parametrize(
    ("model", "directory"),
    [
        ("gpt2", "gpt2.splitbundle"),
        ("meta-llama/Llama 3.2 (1B)", "meta-llama-llama-3.2-1b.splitbundle"),
        ("Ä../ö", "model.splitbundle"),
        ("", "model.splitbundle"),
        ("con", "model-con.splitbundle"),
        ("LPT1.x", "model-lpt1.x.splitbundle"),
        ("a" * 1024, "a" * 80 + ".splitbundle"),
        ("\x1b[2J", "2j.splitbundle"),
    ],
)
@pytest.mark.rule("SB-D-020")
def test_the_directory_is_named_after_the_model(model: str, directory: str) -> None:
    assert names.directory_name(model) == directory
    assert names.is_part(directory)


def test_partial_bundles_travel_too(bundle: Bundle, tmp_path: Path) -> None:
    part = bundle.extract(tmp_path / "part", "trunk")
    back = splitbundle.unpack(part.pack(tmp_path / "x.tar").path, tmp_path / "back", id=bundle.id)
    assert (back.id, back.whole_shards()) == (bundle.id, ("trunk",))
    assert digests(back.path) == digests(part.path)
    back.verify(exact=True)


def test_what_is_not_packed(bundle: Bundle, tmp_path: Path) -> None:
    """A damaged file, a place inside the bundle, and a file that isn't ours."""
    with pytest.raises(BundleError, match=r"\[output\.failed\].*inside of"):
        bundle.pack(bundle.path / "x.tar")
    (tmp_path / "model.bin").write_bytes(b"x" * 1000)
    for force in (False, True):
        with pytest.raises(BundleError, match=r"\[output\.exists\]"):
            bundle.pack(tmp_path / "model.bin", force=force)
    (tmp_path / "link.tar").symlink_to("x.tar")
    with pytest.raises(BundleError, match=r"\[output\.exists\]"):
        bundle.pack(tmp_path / "link.tar", force=True)
    first = bundle.pack(tmp_path / "x.tar").path.read_bytes()
    with pytest.raises(BundleError, match=r"\[output\.exists\].*force=True replaces it"):
        bundle.pack(tmp_path / "x.tar")
    bundle.pack(tmp_path / "x.tar", force=True)
    place = bundle.path / "layer-001.safetensors"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    with pytest.raises(BundleError, match=r"\[file\.digest\] layer-001\.safetensors"):
        bundle.pack(tmp_path / "x.tar", force=True)
    place.unlink()
    place.symlink_to(GOLDEN / "layer-001.safetensors")
    with pytest.raises(BundleError, match=r"\[file\.kind\] layer-001\.safetensors"):
        bundle.pack(tmp_path / "x.tar", force=True)
    assert (tmp_path / "x.tar").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.splitbundle", "link.tar", "model.bin", "x.tar"]


def test_the_unfinished_archive_of_a_killed_writer_is_removed(bundle: Bundle, tmp_path: Path) -> None:
    left = tmp_path / ".x.tar.tmp-0123456789abcdef"
    left.write_bytes(b"half")
    kept = tmp_path / ".x.tar.tmp-mine"
    kept.write_bytes(b"another program's")
    bundle.pack(tmp_path / "x.tar")
    assert (left.exists(), kept.exists()) == (False, True)


# Unpacking what other tools packed.


def _python(form: int) -> Callable[[Path, Path], object]:
    def make(root: Path, place: Path) -> None:
        with tarfile.open(place, "w", format=form) as out:
            out.add(root, arcname="My Bundle (1)")

    return make


def _long(form: int) -> Callable[[Path, Path], object]:
    def make(root: Path, place: Path) -> None:
        with tarfile.open(place, "w", format=form) as out:
            out.add(root, arcname="n" * 200)

    return make


def _tar(*arguments: str) -> Callable[[Path, Path], object]:
    def make(root: Path, place: Path) -> None:
        subprocess.run(["tar", "cf", str(place), *arguments], cwd=root.parent, check=True)

    return make


PLAIN: dict[str, Callable[[Path, Path], object]] = {
    "tar": _tar("b.splitbundle"),
    "tar -C": _tar("-C", "b.splitbundle", "."),
    "tar ./": _tar("./b.splitbundle"),
    "tar, sorted backwards": lambda root, place: _tar(
        "-C", "b.splitbundle", *sorted((str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()), reverse=True)
    )(root, place),
    "tar --format=posix": _tar("--format=posix", "b.splitbundle"),
    "tar --format=ustar": _tar("--format=ustar", "b.splitbundle"),
    "tar -b 64": _tar("-b", "64", "b.splitbundle"),
    "python, pax": _python(tarfile.PAX_FORMAT),
    "python, gnu": _python(tarfile.GNU_FORMAT),
    "python, ustar": _python(tarfile.USTAR_FORMAT),
    "long names, gnu": _long(tarfile.GNU_FORMAT),
    "long names, pax": _long(tarfile.PAX_FORMAT),
}


@pytest.mark.rule("SB-D-021")
@pytest.mark.parametrize("tool", PLAIN)
def test_plain_archives_are_read(tool: str, bundle: Bundle, tmp_path: Path) -> None:
    if (
        tool.startswith("tar")
        and "GNU" not in subprocess.run(["tar", "--version"], capture_output=True, text=True).stdout
    ):
        pytest.skip("tar isn't GNU's")
    PLAIN[tool](bundle.path, tmp_path / "x.tar")
    back = splitbundle.unpack(tmp_path / "x.tar", tmp_path / "back")
    assert digests(back.path) == digests(bundle.path)


@pytest.mark.rule("SB-D-021")
def test_an_archive_without_sums(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / "SHA256SUMS").unlink()
    _tar("b.splitbundle")(bundle.path, tmp_path / "x.tar")
    splitbundle.unpack(tmp_path / "x.tar", tmp_path / "back").verify(exact=True, whole=True)


def test_sizes_above_8_gib_are_written_and_read() -> None:
    for size in (2**33 - 1, 2**33, 2**62):
        block = archives._header("x/y", size)
        assert tar_members._parse(block, 0, "x.tar")[1] == size
        assert tarfile.TarInfo.frombuf(block, "utf-8", "strict").size == size
    assert tarfile.TarInfo.frombuf(archives._header("d/" + "n" * 403, 1)[-512:], "utf-8", "strict").size == 1


# The commands.


def test_every_command_says_how_a_tar_is_unpacked(
    packed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my model.tar").write_bytes(packed)
    for command in (
        ["inspect"],
        ["verify"],
        ["plan"],
        ["files"],
        ["pack", "-o", "y.tar"],
        ["sign", "--key", "nowhere.pem"],
        ["extract", "--shard", "trunk", "-o", "y"],
        ["merge", "-o", "y"],
        ["cast", "--dtype", "bfloat16", "-o", "y"],
        ["generate", "x"],
        ["chat"],
        ["perplexity", "x"],
        ["resplit", "--split", "1", "-o", "y"],
        ["add-onnx", "-o", "y"],
        ["export", "-o", "y"],
        ["diff", str(GOLDEN)],
    ):
        status, out, err = run(capsys, command[0], "my model.tar", *command[1:])
        assert status == 1, (command, out, err)
        assert "got a tar archive. Unpack it: splitbundle unpack 'my model.tar' -o 'my model.splitbundle'" in err
    Path("m.tar.gz").write_bytes(b"\x1f\x8b\x08" + bytes(100))
    with pytest.raises(BundleError, match=r"gunzip m\.tar\.gz, and then: splitbundle unpack m\.tar -o m\.splitbundle"):
        splitbundle.open("m.tar.gz")
    with pytest.raises(BundleError, match=r"got a file\. splitbundle_converter\.convert"):
        Path("m").write_text("x")
        splitbundle.open("m")


def test_what_the_commands_say(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "pack", bundle.path, "-o", tmp_path / "x.tar")
    assert (status, err) == (0, "")
    assert out == f"{tmp_path}/x.tar: 17 files, 348,160 bytes\n  bundle id   {bundle.id}\n"
    status, out, err = run(capsys, "unpack", tmp_path / "x.tar", "-o", tmp_path / "y", "--id", bundle.id)
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == f"{tmp_path}/y: all 13 files, 313,995 bytes, with the shards bottom, trunk, top"
    status, out, err = run(capsys, "unpack", tmp_path / "x.tar", "-o", tmp_path / "y", "--json")
    assert status == 1
    assert re.search(r'"code": "output\.exists".*--force replaces it', out)
    status, out, err = run(capsys, "unpack", tmp_path / "x.tar", "-o", tmp_path / "y", "--force", "--json")
    told = json.loads(out)
    assert (status, told["ok"], told["bundle_id"], told["absent"]) == (0, True, bundle.id, [])
    status, out, err = run(capsys, "pack", bundle.path, "-o", tmp_path / "x.tar", "--force", "--json")
    told = json.loads(out)
    assert (status, told["bytes"], len(told["files"])) == (0, (tmp_path / "x.tar").stat().st_size, 17)
    assert run(capsys, "unpack", tmp_path / "x.tar")[0] == 2
    assert run(capsys, "unpack", tmp_path / "x.tar", "-o", tmp_path / "z", "--id", "1")[0] == 2
    assert run(capsys, "unpack", tmp_path / "x.tar", "-o", tmp_path / "z", "--id", f"sha256:{64 * '0'}")[0] == 3
    assert run(capsys, "pack", bundle.path, "-o", "-")[0] == 2
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data += b"x"
    (tmp_path / "x.tar").write_bytes(data)
    status, out, err = run(capsys, "unpack", tmp_path / "x.tar", "-o", tmp_path / "z")
    assert (status, out) == (1, "")
    assert "[archive.trailing]" in err
