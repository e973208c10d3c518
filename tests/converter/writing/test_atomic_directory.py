"""A new bundle appears whole or not at all, and only bundles are ever removed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import stat
import time
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import splitbundle
import splitbundle_converter
from splitbundle import BundleError
from splitbundle.storage import files
from splitbundle.storage.recovery import backup_path, recover
from splitbundle.writing import atomic_directory as writing
from splitbundle.writing.atomic_directory import atomic_directory
from tests.support.checkpoints import accepted, digests, refused
from tests.support.models import checkpoint
from tests.support.paths import ROOT

ROUNDS = 20
KINDS = ("n1", "n2", "f1", "f2")
"""Runs with and without force, and in one step or two."""
CHECKPOINT = ROOT / "examples" / "license-gpt2"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Convert the example to one shard."""
    return splitbundle_converter.convert(CHECKPOINT, tmp_path / "x.splitbundle", check=False).path


@pytest.mark.parametrize("unit", ["embedding", "head"])
def test_a_file_that_cannot_be_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    """An error of the second pass over a weight file is raised, although the pass runs in another thread."""
    real = files.sha256

    def fails(file: BinaryIO, *more: Any) -> str:
        if file.name.endswith(f"{unit}.safetensors"):
            raise OSError(errno.EIO, "no such luck")
        return real(file, *more)

    monkeypatch.setattr(files, "sha256", fails)
    with pytest.raises(BundleError, match="no such luck"):
        splitbundle_converter.convert(CHECKPOINT, tmp_path / "x.splitbundle", check=False)
    assert names(tmp_path) == []


def names(directory: Path) -> list[str]:
    """Return the contents of a directory."""
    return sorted(path.name for path in directory.iterdir())


def test_what_others_keep_under_such_names_stays(bundle: Path, tmp_path: Path) -> None:
    """A file of another program is never taken for an old bundle or for the remains of a writer."""
    old = backup_path(bundle)
    old.mkdir()
    (old / "thesis.txt").write_text("years of work")
    splitbundle_converter.resplit(bundle, bundle, split=[2], force=True)
    assert (old / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(old)
    old.write_text("a backup")
    splitbundle_converter.resplit(bundle, bundle, split=[3], force=True)
    notes = backup_path(tmp_path / "notes")
    notes.write_text("my notes")
    with pytest.raises(BundleError, match=r"\[file.missing\]"):
        splitbundle.open(tmp_path / "notes")
    assert (old.read_text(), notes.read_text()) == ("a backup", "my notes")


@pytest.mark.skipif(os.name == "nt", reason="links, pipes and modes as POSIX has them")
def test_links_and_pipes_under_such_names_lead_nowhere(bundle: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "inner").mkdir(parents=True)
    (home / "inner").chmod(0o755)
    link = bundle.with_name(f".{bundle.name}.tmp-0123456789abcdef")
    link.symlink_to(home, target_is_directory=True)
    pipe = bundle.with_name(f".{bundle.name}.tmp-0123456789abcde0.lock")
    os.mkfifo(pipe)
    splitbundle_converter.resplit(bundle, bundle, split=[2], force=True)
    assert link.is_symlink()
    assert pipe.is_fifo()
    assert stat.S_IMODE((home / "inner").stat().st_mode) == 0o755
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    os.mkfifo(spoilt / "manifest.json")
    with pytest.raises(BundleError, match=r"\[output.exists\] .*got something else"):
        splitbundle_converter.resplit(bundle, spoilt, split=[2], force=True)


@pytest.mark.parametrize("place", ["/", "a\0b"])
def test_a_place_without_a_name(bundle: Path, place: str) -> None:
    with pytest.raises(BundleError, match=r"\[output.failed\]"):
        splitbundle_converter.resplit(bundle, place, split=[2], force=True)


@pytest.mark.rule("SB-D-009")
@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two"])
def test_the_old_bundle_stays_until_the_new_one_is_there(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(writing, "rename", lambda *arguments, **named: False)
    before = splitbundle.open(bundle).id
    with pytest.raises(RuntimeError), atomic_directory(bundle, force=True) as staging:
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
        with pytest.raises(BundleError, match=r"\[output.exists\]"), atomic_directory(target, force=force):
            target.mkdir()
            (target / "thesis.txt").write_text("years of work")
        assert (target / "thesis.txt").read_text() == "years of work"
        (target / "thesis.txt").unlink()
        target.rmdir()
    assert names(tmp_path) == []


def _hang(target: Path, complete: bool) -> None:
    with atomic_directory(target, force=True) as staging:
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
    while not list(bundle.parent.glob(".x.splitbundle.tmp-*/manifest.json")) and time.monotonic() - began < 600:
        time.sleep(0.01)
    with pytest.raises(RuntimeError), atomic_directory(bundle, force=True):
        raise RuntimeError
    assert len(names(bundle.parent)) == 3  # it lives, so what it writes is left alone: directory, lock, and the bundle
    process.kill()
    process.join()
    with pytest.raises(RuntimeError), atomic_directory(bundle, force=True):
        raise RuntimeError
    assert names(bundle.parent) == [bundle.name]


def test_an_interrupted_exchange_is_mended_by_the_next_writer(bundle: Path) -> None:
    before = splitbundle.open(bundle).id
    bundle.rename(bundle.with_name(f".{bundle.name}.old"))
    with pytest.raises(BundleError, match=r"\[output.exists\]"):
        splitbundle_converter.convert(CHECKPOINT, bundle, check=False)
    assert splitbundle.open(bundle).id == before


def test_an_interrupted_exchange_of_exports_is_mended_too(bundle: Path, tmp_path: Path) -> None:
    """An export has no manifest by which it could be recognized."""
    checkpoint, old = tmp_path / "checkpoint", tmp_path / ".checkpoint.old"
    splitbundle_converter.export(bundle, checkpoint)
    weights = (checkpoint / "model.safetensors").read_bytes()
    checkpoint.rename(old)
    with pytest.raises(BundleError, match=r"\[output.exists\]"):
        splitbundle_converter.export(bundle, checkpoint)
    assert (checkpoint / "model.safetensors").read_bytes() == weights
    shutil.copytree(checkpoint, old)  # a writer that was killed after the exchange leaves both
    splitbundle_converter.export(bundle, checkpoint, force=True, max_shard_size=1)
    assert not (checkpoint / "model.safetensors").exists()
    assert names(tmp_path) == [checkpoint.name, bundle.name]


@pytest.mark.rule("SB-D-012")
@pytest.mark.parametrize("command", ["resplit", "add_onnx"])
def test_a_bundle_that_is_replaced_while_it_is_copied_is_refused(bundle: Path, command: str) -> None:
    other = splitbundle_converter.resplit(bundle, bundle.with_name("other"), split=[2])
    target = bundle.with_name("new")

    def replace(what: str, done: int, total: int) -> None:
        if what == "copying" and 0 < done < total and other.path.exists():
            bundle.rename(bundle.with_name("away"))
            other.path.rename(bundle)

    with pytest.raises(BundleError, match=r"\[file.changed\] .*another bundle, which replaced it during the copy"):
        getattr(splitbundle_converter, command)(bundle, target, progress=replace)
    assert names(bundle.parent) == ["away", bundle.name]


@pytest.mark.parametrize("command", ["resplit", "add_onnx"])
def test_a_bundle_is_not_written_into_itself(bundle: Path, command: str) -> None:
    before = names(bundle)
    (bundle.parent / "link").symlink_to(bundle, target_is_directory=True)
    for place in (bundle / "new", bundle / "tokenizer" / "new", bundle.parent / "link" / "new"):
        with pytest.raises(
            BundleError, match=r"\[output.failed\] .*outside of the bundle that is read, got a place insi"
        ):
            getattr(splitbundle_converter, command)(bundle, place)
    assert names(bundle) == before


@pytest.mark.parametrize("command", ["resplit", "add_onnx"])
def test_damaged_files_get_no_fresh_digests(bundle: Path, command: str) -> None:
    damaged = bundle / "layer-000.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(BundleError, match=r"\[file.digest\] layer-000.safetensors: expected sha256 "):
        getattr(splitbundle_converter, command)(bundle, bundle.with_name("new"))
    assert names(bundle.parent) == [bundle.name]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
@pytest.mark.parametrize("error", ["EIO", "ENOLCK"])
def test_a_lock_that_fails(bundle: Path, monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    """Without locks on the system, writing goes on. If the system has locks and one fails, writing fails."""

    def refuse(*arguments: object) -> None:
        raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)))

    monkeypatch.setattr(writing.fcntl, "flock", refuse)
    if error == "EIO":
        with pytest.raises(BundleError, match=r"\[output.failed\]"):
            splitbundle_converter.resplit(bundle, bundle, split=[3], force=True)
    else:
        splitbundle_converter.resplit(bundle, bundle, split=[3], force=True).verify(exact=True)
    assert names(bundle.parent) == [bundle.name]


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    other = tmp_path / ".a.splitbundle.old"
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


def _race(place: Path, together: Barrier, answers: SimpleQueue[tuple[int, str]]) -> None:
    """Two writers race several times, over nothing and over an old bundle, in one step and in two."""
    exchanging = writing.rename
    for kind in KINDS:
        vars(writing)["rename"] = exchanging if kind[1] == "1" else lambda *arguments, **named: False
        together.wait(600)
        for _ in range(ROUNDS):
            try:
                with atomic_directory(place / kind, force=kind[0] == "f") as staging:
                    (staging / "manifest.json").write_text('{"format": "splitbundle"}')
                    for i in range(4):
                        (staging / f"{i}.txt").write_text(str(os.getpid()))
                answers.put((os.getpid(), "won"))
            except BundleError as error:
                answers.put((os.getpid(), error.codes[0]))


@pytest.mark.skipif(os.name == "nt", reason="nothing there keeps a writer's steps together")
@pytest.mark.rule("SB-D-009")
def test_of_writers_that_race_one_wins_and_the_others_say_so(tmp_path: Path) -> None:
    start, writers = multiprocessing.get_context("spawn"), 2
    together, answers = start.Barrier(writers + 1), start.SimpleQueue()
    racers = [start.Process(target=_race, args=(tmp_path, together, answers)) for _ in range(writers)]
    for racer in racers:
        racer.start()
    for kind in KINDS:
        if kind[0] == "f":
            (tmp_path / kind).mkdir()
            (tmp_path / kind / "manifest.json").write_text('{"format": "splitbundle"}')
        together.wait(600)
        said: list[tuple[int, str]] = []
        end = time.monotonic() + 600
        while len(said) < writers * ROUNDS:
            if time.monotonic() > end:
                pytest.fail(f"the writers hang after {said}")
            while not answers.empty():
                said.append(answers.get())
            recover(tmp_path / kind)  # as every reader does
            time.sleep(0.0005)
        won = [str(who) for who, what in said if what == "won"]
        assert names(tmp_path / kind) == ["0.txt", "1.txt", "2.txt", "3.txt", "manifest.json"]
        (winner,) = {(tmp_path / kind / f"{i}.txt").read_text() for i in range(4)}
        assert winner in won
        if kind[0] == "f":
            assert {what for _, what in said} == {"won"}  # each replaced what the one before it had made
        else:
            assert len(won) == 1
            assert {what for _, what in said} == {"won", "output.exists"}
        assert [name for name in names(tmp_path) if name.startswith(".")] == []
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0


def test_a_destination_that_exists(output: Path) -> None:
    made = accepted(checkpoint("llama"), output, check=False)
    before = digests(output)
    hint = "force=True replaces it once the new one is complete"
    expected = f"[output.exists] {output}: expected nothing there, got an existing file or directory. {hint}"
    assert str(refused(checkpoint("gpt2"), output)) == expected
    assert digests(output) == before
    other = accepted(checkpoint("gpt2"), output, check=False, force=True)
    assert other.fingerprint != made.fingerprint
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("a file"),
        lambda path: (path / "mine").mkdir(parents=True),
        # Other things have a manifest.json too: a browser's extension, say.
        lambda path: (path.mkdir(), (path / "manifest.json").write_text('{"manifest_version": 3}')),
    ],
)
def test_what_is_no_bundle_is_not_replaced(output: Path, make: Callable[[Path], Any]) -> None:
    make(output)
    assert str(refused(checkpoint("llama"), output, force=True)) == (
        f"[output.exists] {output}: expected a bundle, to be replaced, got something else. "
        "Remove it yourself, or choose another output: force=True won't replace it"
    )
