"""Whole bundles: verification of all files, of one shard, and of unlisted files."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

import splitbundle
from splitbundle.errors import BundleError
from splitbundle.writing.atomic_directory import atomic_directory
from tests.support.bundles import write_llama3


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_llama3(tmp_path / "llama3.splitbundle")


def codes(path: Path, *, exact: bool = False, shard: str | None = None) -> list[tuple[str, str | None]]:
    """Return the problems that opening and verifying a bundle find."""
    try:
        splitbundle.open(path).verify(shard, exact=exact)
    except BundleError as error:
        return [(problem.code, problem.file) for problem in error.problems]
    return []


@pytest.mark.rule(
    "SB-I-001",
    "SB-I-002",
    "SB-I-003",
    "SB-W-001",
    "SB-W-007",
    "SB-W-008",
    "SB-W-009",
    "SB-W-010",
    "SB-W-012",
    "SB-W-013",
)
def test_a_bundle_made_by_the_rules_is_whole(bundle: Path) -> None:
    assert codes(bundle, exact=True) == []
    opened = splitbundle.open(bundle)
    assert opened.id == f"sha256:{hashlib.sha256((bundle / 'manifest.json').read_bytes()).hexdigest()}"
    assert opened.architecture_id == f"sha256:{hashlib.sha256((bundle / 'architecture.json').read_bytes()).hexdigest()}"
    lines = (bundle / "SHA256SUMS").read_text("ascii").splitlines(keepends=True)
    model = "".join(line for line in lines if not line.endswith("  manifest.json\n"))
    assert opened.fingerprint == f"sha256:{hashlib.sha256(model.encode('ascii')).hexdigest()}"


@pytest.mark.rule("SB-D-001")
@pytest.mark.parametrize("name", ["manifest.json", "architecture.json", "SHA256SUMS"])
def test_a_bundle_has_its_three_documents(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert {code for code, _ in codes(bundle)} == {"file.missing"}


@pytest.mark.rule("SB-D-005", "SB-D-006")
def test_unlisted_files_are_reported_and_never_opened(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine")
    (bundle / "more").mkdir()
    (bundle / "more" / "evil.json").symlink_to(bundle / "nowhere")  # opening it would fail
    if hasattr(os, "mkfifo"):
        os.mkfifo(bundle / "pipe")  # opening it would wait forever
    unlisted = ["more/evil.json", "notes.txt", *(["pipe"] if hasattr(os, "mkfifo") else [])]
    assert list(splitbundle.open(bundle).verify().unlisted) == unlisted
    assert codes(bundle, exact=True) == [("file.unlisted", path) for path in unlisted]


@pytest.mark.rule("SB-D-008")
def test_a_partial_bundle_opens_and_its_shards_verify(bundle: Path) -> None:
    (bundle / "layer-003-part-002.safetensors").unlink()
    (bundle / "head.safetensors").unlink()
    absent = ["head.safetensors", "layer-003-part-002.safetensors"]
    assert list(splitbundle.open(bundle).absent()) == absent
    assert codes(bundle, shard="bottom") == []
    assert codes(bundle, shard="trunk") == [("file.missing", "layer-003-part-002.safetensors")]
    assert codes(bundle, shard="top") == [("file.missing", "head.safetensors")]
    assert codes(bundle) == [("file.missing", path) for path in absent]


@pytest.mark.rule("SB-D-009")
def test_a_bundle_appears_whole_or_not_at_all(bundle: Path) -> None:
    before = sorted(path.name for path in bundle.parent.iterdir())
    new = bundle.parent / "new.splitbundle"
    for target, force in ((new, False), (bundle, True)):
        with pytest.raises(RuntimeError, match="half-way"):
            _fail_half_way(target, force, bundle, new)
    assert sorted(path.name for path in bundle.parent.iterdir()) == before
    with atomic_directory(new, force=False) as staging:
        shutil.copytree(bundle, staging, dirs_exist_ok=True)
    assert codes(new, exact=True) == []


def _fail_half_way(target: Path, force: bool, old: Path, new: Path) -> None:
    with atomic_directory(target, force=force) as staging:
        (staging / "manifest.json").write_text("{}")
        assert not new.exists()
        assert codes(old) == []
        raise RuntimeError("half-way")


@pytest.mark.rule("SB-E-001")
def test_problems_name_the_file_inside_the_bundle(bundle: Path) -> None:
    (bundle / "manifest.json").write_text('{"format": "zip", "format_version": "1.0", "requires": []}')
    with pytest.raises(BundleError) as raised:
        splitbundle.open(bundle)
    assert str(raised.value) == "[format.name] manifest.json /format: expected \"splitbundle\", got 'zip'"
