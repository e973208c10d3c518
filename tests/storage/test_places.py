"""Links that only Windows has, and directories that have several names where the system ignores case."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import splitbundle
from splitbundle import BundleError
from splitbundle.storage import files
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
JUNCTION = 0xA0000003


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "model.splitbundle"))


def make_junctions(monkeypatch: pytest.MonkeyPatch, *places: Path) -> None:
    """Let ``lstat`` say of directories what it says of junctions on Windows."""
    lstat = os.lstat

    def told(path: Any, **named: Any) -> Any:
        status = lstat(path, **named)
        if Path(path) not in places:
            return status
        known = {name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
        return SimpleNamespace(**known, st_reparse_tag=JUNCTION)

    monkeypatch.setattr(os, "lstat", told)


def test_a_junction_on_the_way_to_a_file_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle / "vectors").mkdir()
    (bundle / "vectors" / "more.bin").write_bytes(b"x")
    files.open_file(bundle, "vectors/more.bin").close()
    make_junctions(monkeypatch, bundle / "vectors")
    with pytest.raises(BundleError, match=r"\[file.kind\] vectors/more.bin: .*got vectors is a junction"):
        files.open_file(bundle, "vectors/more.bin")


def test_a_junction_is_listed_and_not_followed(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle / "elsewhere" / "deep").mkdir(parents=True)
    (bundle / "elsewhere" / "deep" / "secret").write_bytes(b"x")
    listed = set(splitbundle.open(bundle).manifest.files) | {"manifest.json", "SHA256SUMS"}
    assert files.unlisted(bundle, listed) == ["elsewhere/deep/secret"]
    make_junctions(monkeypatch, bundle / "elsewhere")
    assert files.unlisted(bundle, listed) == ["elsewhere"]


def test_a_bundle_has_two_names_where_case_is_ignored(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that replaces its own source would remove the other shards. The names alone don't tell it on macOS."""
    other = tmp_path / "MODEL.splitbundle"
    other.symlink_to(bundle, target_is_directory=True)  # stands in for the second name
    assert files.is_same(bundle, other)
    monkeypatch.setattr(os.path, "realpath", os.path.abspath)  # as if it were no link
    assert files.is_same(bundle, other)
    assert not files.is_same(bundle, tmp_path / "nothing")
    opened = splitbundle.open(bundle)
    with pytest.raises(BundleError, match=r"\[output.failed\] .*expected another place than the bundle that is read"):
        opened.extract(other, "bottom", force=True)
    with pytest.raises(BundleError, match=r"\[output.failed\] .*expected a place outside of the bundle"):
        opened.pack(other / "a.tar")
    assert splitbundle.open(bundle).absent() == ()
