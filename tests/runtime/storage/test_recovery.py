"""A reader of a bundle that is being replaced gets the old bundle or the new one, or refuses; never a mixture."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import splitbundle
from splitbundle import BundleError
from splitbundle.storage import files, recovery
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0"


@pytest.fixture
def other(copy: Path) -> Path:
    """A bundle of another model, which may replace ``copy``."""
    return Path(shutil.copytree(GOLDEN / "llama.splitbundle", copy.with_name("other")))


def test_an_old_bundle_comes_back_where_nothing_stands_and_there_alone(copy: Path, other: Path) -> None:
    before = splitbundle.open(copy).id
    old = recovery.backup_path(copy)
    other.rename(old)
    os.utime(old, (2**33, 2**33))  # whatever the clocks show
    assert splitbundle.open(copy).id == before
    assert old.is_dir()
    copy.rename(copy.with_name("away"))
    assert splitbundle.open(copy).id != before
    assert not old.exists()


@pytest.mark.skipif(os.name == "nt", reason="there the steps of writers aren't kept together")
def test_a_reader_leaves_a_living_writer_alone(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader looks between the two renames, waits, and finds the new bundle."""
    old, new = recovery.backup_path(copy), copy.with_name("new")
    shutil.copytree(copy, new)

    def go_on(seconds: float) -> None:
        if new.exists():
            new.rename(copy)
            writer.close()

    monkeypatch.setattr(recovery.time, "sleep", go_on)
    writer = _Locked(copy.parent)
    copy.rename(old)
    assert splitbundle.open(copy)
    assert old.is_dir()
    assert not new.exists()


class _Locked:
    """The lock that a writer holds between its two renames."""

    def __init__(self, directory: Path) -> None:
        self._held = recovery.directory_lock(directory)
        self._held.__enter__()

    def close(self) -> None:
        """End the process."""
        self._held.__exit__(None, None, None)


def test_a_lock_that_is_never_given_back_stops_nobody(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "LOCK_TIMEOUT", 0.05)
    copy.rename(recovery.backup_path(copy))
    held = _Locked(copy.parent)
    assert splitbundle.open(copy).verify()
    held.close()


@pytest.mark.parametrize("name", ["open", "rename", "lstat"])
def test_where_nothing_can_be_written_what_is_there_is_read(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A mount that is read-only, or whose directory can't be listed."""
    before = splitbundle.open(copy).id
    tried = []

    def refuse(path: Any, *arguments: Any, **named: Any) -> None:
        tried.append(path)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(recovery.os, name, refuse) if name != "rename" else patched.setattr(Path, name, refuse)
        recovery.recover(copy)
    assert splitbundle.open(copy).id == before
    copy.rename(recovery.backup_path(copy))
    with monkeypatch.context() as patched:
        patched.setattr(recovery.os, name, refuse) if name != "rename" else patched.setattr(Path, name, refuse)
        recovery.recover(copy)  # no message: the caller finds that there is no bundle
    assert tried
    assert not copy.exists()
    assert splitbundle.open(copy).id == before


def _replace_when(monkeypatch: pytest.MonkeyPatch, copy: Path, other: Path, path: str, times: int) -> list[str]:
    """Exchange the two bundles just before a file of one is opened, so many times."""
    done: list[str] = []
    original = files.open_file

    def opening(root: Path, name: str, *rest: Any) -> Any:
        if name == path and len(done) < times:
            done.append(name)
            third = copy.with_name("third")
            copy.rename(third)
            other.rename(copy)
            third.rename(other)
        return original(root, name, *rest)

    monkeypatch.setattr(files, "open_file", opening)
    return done


@pytest.mark.rule("SB-D-012")
@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_bundle_that_is_replaced_while_it_is_opened_is_one_of_them(
    copy: Path, other: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    ids = [splitbundle.open(other).id, splitbundle.open(copy).id]
    done = _replace_when(monkeypatch, copy, other, "architecture.json", times)
    bundle = splitbundle.open(copy)
    assert len(done) == times
    assert bundle.id == ids[(times + 1) % 2]
    bundle.verify(exact=True)


@pytest.mark.rule("SB-D-012")
def test_a_bundle_that_is_replaced_without_end_is_refused(
    copy: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = _replace_when(monkeypatch, copy, other, "architecture.json", 10**9)
    with pytest.raises(BundleError) as caught:
        splitbundle.open(copy)
    assert caught.value.codes[0] in ("file.size", "file.digest")
    assert len(done) < 100


@pytest.mark.rule("SB-D-012")
def test_a_bundle_that_is_replaced_before_its_weights_are_loaded_is_refused(copy: Path, other: Path) -> None:
    bundle = splitbundle.open(copy)
    copy.rename(copy.with_name("third"))
    other.rename(copy)
    with pytest.raises(BundleError) as caught:
        list(bundle.open_weights("embedding"))
    assert set(caught.value.codes) <= {"file.size", "file.header-digest"}
