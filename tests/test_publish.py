"""What is published appears whole or not at all, and nothing that isn't a bundle is ever removed."""

from __future__ import annotations

import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest

import splitbundle
import splitbundle_converter
from splitbundle import BundleError
from splitbundle_converter import publish
from splitbundle_converter.publish import publishing

CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "license-gpt2"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The licence model in one shard."""
    return splitbundle_converter.convert(CHECKPOINT, tmp_path / "x.splitbundle", check=False).path


def names(directory: Path) -> list[str]:
    """What lies in a directory."""
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.rule("SB-D-009")
@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
def test_the_old_bundle_stays_until_the_new_one_is_there(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "_rename", lambda *arguments, **named: False)
    before = splitbundle.open(bundle).id
    with pytest.raises(RuntimeError), publishing(bundle, force=True) as staging:
        (staging / "manifest.json").write_text("half")
        raise RuntimeError
    assert splitbundle.open(bundle).id == before
    after = splitbundle_converter.resplit(bundle, bundle, split=[3], force=True)
    assert after.id != before
    after.verify(exact=True)
    assert names(bundle.parent) == [bundle.name]


def test_what_came_to_stand_there_meanwhile_is_not_removed(tmp_path: Path) -> None:
    target = tmp_path / "new"
    for force in (False, True):
        with pytest.raises(BundleError, match=r"\[output.exists\]"), publishing(target, force=force):
            target.mkdir()
            (target / "thesis.txt").write_text("years of work")
        assert (target / "thesis.txt").read_text() == "years of work"
        (target / "thesis.txt").unlink()
        target.rmdir()
    assert names(tmp_path) == []


def _hang(target: Path, complete: bool) -> None:
    with publishing(target, force=True) as staging:
        (staging / "manifest.json").write_text("half")
        if complete:
            (staging / "SHA256SUMS").write_text("")
        time.sleep(60)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks: what a killed writer left stays")
@pytest.mark.parametrize("complete", [False, True])
def test_what_a_killed_writer_left_goes_with_the_next(bundle: Path, complete: bool) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_hang, args=(bundle, complete))
    process.start()
    began = time.monotonic()
    while not list(bundle.parent.glob(".x.splitbundle.tmp-*/manifest.json")) and time.monotonic() - began < 60:
        time.sleep(0.01)
    with pytest.raises(RuntimeError), publishing(bundle, force=True):
        raise RuntimeError
    assert len(names(bundle.parent)) == 3  # it lives, so what it writes is left alone: directory, lock, and the bundle
    process.kill()
    process.join()
    with pytest.raises(RuntimeError), publishing(bundle, force=True):
        raise RuntimeError
    assert names(bundle.parent) == [bundle.name]


def test_an_interrupted_exchange_is_mended_by_the_next_writer(bundle: Path) -> None:
    before = splitbundle.open(bundle).id
    bundle.rename(bundle.with_name(f".{bundle.name}.old-0123"))
    with pytest.raises(BundleError, match=r"\[output.exists\]"):
        splitbundle_converter.convert(CHECKPOINT, bundle, check=False)
    assert splitbundle.open(bundle).id == before


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    other = tmp_path / ".a.splitbundle.old-xyz"
    other.mkdir()
    for name in ("[ab].splitbundle", "*"):
        splitbundle_converter.convert(CHECKPOINT, tmp_path / name, check=False)
        splitbundle_converter.convert(CHECKPOINT, tmp_path / name, check=False, force=True)
    assert other.exists()


@pytest.mark.skipif(os.name == "nt", reason="modes are of POSIX")
def test_modes_are_those_of_any_new_file(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        os.chmod(tmp_path, 0o2775)  # a shared directory hands its group on
        path = splitbundle_converter.convert(CHECKPOINT, tmp_path / "x.splitbundle", check=False).path
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) & 0o777 == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.rglob("*") if file.is_file()} == {0o640}


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(BundleError, match=r"\[output.failed\]"):
            splitbundle_converter.convert(CHECKPOINT, tmp_path / "x.splitbundle", check=False)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(os.name == "nt", reason="resource limits are of POSIX")
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    import resource
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(BundleError, match=r"\[output.failed\] .*File too large"):
            splitbundle_converter.convert(CHECKPOINT, tmp_path / "x.splitbundle", check=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == []
