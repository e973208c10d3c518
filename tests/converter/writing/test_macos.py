"""The calls of macOS that make writing atomic and durable. Stand-ins take them, so this says only what is asked for."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
from pathlib import Path

import pytest

from splitbundle.writing import atomic_directory as writing
from splitbundle.writing.atomic_file import atomic_file
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
EXCLUSIVE, SWAP = 4, 2


class Library:
    """The C library of macOS, with one function."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.asked: list[int] = []

    def renamex_np(self, source: bytes, target: bytes, flags: int) -> int:
        self.asked.append(flags)
        if self.code:
            ctypes.set_errno(self.code)
            return -1
        if flags == SWAP:
            os.rename(target, target + b".aside")
        os.rename(source, target)
        if flags == SWAP:
            os.rename(target + b".aside", source)
        return 0


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of what was flushed by F_FULLFSYNC. It makes this system macOS."""
    found: list[str] = []

    def control(handle: int, command: int) -> int:
        assert command == 51
        found.append(os.readlink(f"/proc/self/fd/{handle}"))
        return 0

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    return found


def replace(target: Path) -> None:
    for name in ("one", "two"):
        with writing.atomic_directory(target, force=True) as root:
            shutil.copytree(GOLDEN, root, dirs_exist_ok=True)
            (root / name).write_text(name)


def test_a_bundle_is_written_and_exchanged(flushed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    target = tmp_path / "b.splitbundle"
    replace(target)
    assert library.asked == [EXCLUSIVE, SWAP]
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert not (target / "one").exists()
    # The disk is flushed before the bundle appears, and after it: directories come after the files in them.
    assert flushed[-1] == str(tmp_path)
    assert all(Path(path) == tmp_path or ".tmp-" in path for path in flushed)


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_exchange(
    code: int, flushed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = Library(code)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    replace(tmp_path / "b.splitbundle")
    assert [path.name for path in tmp_path.iterdir()] == ["b.splitbundle"]
    assert (tmp_path / "b.splitbundle" / "two").exists()
    assert library.asked == [EXCLUSIVE, SWAP]
    assert flushed


def test_a_file_is_written(flushed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library)
    with atomic_file(tmp_path / "a.tar", force=False, ours=lambda _: True) as file:
        file.write(b"x")
    assert library.asked == [EXCLUSIVE]
    assert [".a.tar.tmp-" in flushed[0], *flushed[1:]] == [True, str(tmp_path)]


def test_a_file_system_that_does_not_flush_the_disk(flushed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOTSUP, "not here")

    handles: list[int] = []
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", handles.append)
    writing.flush_handle(3, disk=True)
    writing.flush_handle(4, disk=False)
    assert (handles, flushed) == ([3, 4], [])
