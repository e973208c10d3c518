"""``splitbundle example`` copies a checkpoint that comes with the package, whole or not at all, with Python alone."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from splitbundle import BundleError
from splitbundle_converter import example_checkpoints
from splitbundle_converter.example_checkpoints import DEFAULT, EXAMPLES, copy_example
from tests.support.paths import ROOT


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a separate process."""
    command = [sys.executable, "-m", "splitbundle", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def contents(directory: Path) -> dict[str, bytes]:
    """Return the name and the bytes of each file."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_copy_has_the_same_bytes(tmp_path: Path, name: str) -> None:
    copied = copy_example(name, tmp_path / "made" / "copy")
    assert copied == tmp_path / "made" / "copy"
    assert contents(copied) == contents(ROOT / "examples" / name)
    assert [path.name for path in copied.parent.iterdir()] == ["copy"]


def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    plain = run("example", "-o", "first", cwd=tmp_path)
    size = sum(len(data) for data in contents(tmp_path / "first").values())
    assert (plain.returncode, plain.stdout) == (0, f"first: {DEFAULT}, {size:,} bytes\n")
    done = run("example", "--json", cwd=tmp_path)
    assert json.loads(done.stdout) == {"ok": True, "path": DEFAULT, "name": DEFAULT, "bytes": size}
    assert contents(tmp_path / DEFAULT) == contents(tmp_path / "first")
    words = run("example", "--help", cwd=tmp_path).stdout
    assert [name for name in EXAMPLES if name not in words] == []


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_an_existing_path_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    there = tmp_path / "there"
    if kind == "file":
        there.write_text("mine")
    elif kind == "directory":
        there.mkdir()
    else:
        there.symlink_to("nothing")
    before = there.lstat()
    done = run("example", "-o", "there", "--json", cwd=tmp_path)
    assert done.returncode == 1
    (problem,) = json.loads(done.stdout)["problems"]
    assert problem["code"] == "output.exists"
    assert "force" not in problem["hint"]
    assert os.path.samestat(before, there.lstat())
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_unknown_name_is_a_wrong_call(tmp_path: Path) -> None:
    done = run("example", "nothing-like-it", "-o", "there", "--json", cwd=tmp_path)
    assert done.returncode == 2
    (problem,) = json.loads(done.stdout)["problems"]
    assert (problem["code"], problem["argument"]) == ("usage.arguments", "NAME")
    assert DEFAULT in problem["expected"]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_copy_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if len(data) > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BundleError) as caught:
        copy_example(DEFAULT, tmp_path / "there")
    assert caught.value.codes == ("output.failed",)
    assert list(tmp_path.iterdir()) == []


def test_an_installation_without_the_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example_checkpoints, "_PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(example_checkpoints, "_CHECKOUT", tmp_path / "checkout")
    with pytest.raises(BundleError) as caught:
        copy_example(DEFAULT, tmp_path / "there")
    assert caught.value.codes == ("source.missing",)


def test_the_package_brings_its_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the wheel is searched first."""
    package = Path(example_checkpoints.__file__).parent
    folder = (package / "examples").relative_to(package.parent).as_posix()
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    for name in EXAMPLES:
        assert f'"examples/{name}" = "{folder}/{name}"' in text
    packaged = tmp_path / "packaged"
    (packaged / DEFAULT).mkdir(parents=True)
    (packaged / DEFAULT / "config.json").write_text("{}")
    monkeypatch.setattr(example_checkpoints, "_PACKAGED", packaged)
    assert contents(copy_example(DEFAULT, tmp_path / "there")) == {"config.json": b"{}"}


def test_it_needs_no_library(tmp_path: Path) -> None:
    """The copy needs only the standard library."""
    code = (
        "import argparse, sys\n"
        f"sys.path[:0] = [{str(ROOT / 'runtime')!r}, {str(ROOT / 'converter')!r}]\n"
        "from splitbundle_converter.example_checkpoints import copy_example\n"
        f"copy_example({DEFAULT!r}, 'there')\n"
        "import splitbundle_converter.commands\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "there") == contents(ROOT / "examples" / DEFAULT)
