"""Every byte of a small bundle changed, every length that a file can be cut to: verification names the file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import splitbundle
from splitbundle import BundleError
from tests.support.paths import TESTS

TINY = TESTS / "conformance" / "bundles" / "tiny.splitbundle"
FILES = sorted(path.relative_to(TINY).as_posix() for path in TINY.rglob("*") if path.is_file())
HALVES = (FILES[::2], FILES[1::2])
"""So that two workers share them."""


@pytest.fixture
def tiny(tmp_path: Path) -> splitbundle.Bundle:
    """A copy, to be spoilt. It has a file of every kind: documents, weights, vectors, graphs, a tokenizer, a card."""
    assert sum((TINY / path).stat().st_size for path in FILES) <= 64 * 1024
    return splitbundle.open(shutil.copytree(TINY, tmp_path / "tiny.splitbundle"))


def named(bundle: splitbundle.Bundle, reopen: bool) -> set[str | None]:
    """The files that opening and verifying find wrong."""
    try:
        (splitbundle.open(bundle.path) if reopen else bundle).verify()
    except BundleError as error:
        return {problem.file for problem in error.problems}
    return set()


@pytest.mark.rule("SB-D-007", "SB-D-010")
@pytest.mark.parametrize("paths", HALVES, ids=["even", "odd"])
def test_every_byte_that_is_flipped_is_found(
    tiny: splitbundle.Bundle, paths: list[str], tally: Callable[[str, int], None]
) -> None:
    count = 0
    for path in paths:
        place = tiny.path / path
        data = place.read_bytes()
        # What an open bundle has read already is read again, in a new one.
        reopen = path in {"manifest.json", "architecture.json"}
        with place.open("r+b", buffering=0) as file:
            for i, byte in enumerate(data):
                file.seek(i)
                file.write(bytes([byte ^ (1 << i % 8)]))
                found = named(tiny, reopen)
                if path == "manifest.json":  # what it lists wrongly is named too
                    assert path in found, i
                else:
                    assert found == {path}, (path, i)
                file.seek(i)
                file.write(bytes([byte]))
                count += 1
    assert named(tiny, True) == set()
    tally("flipped bytes found, each by the name of its file", count)


@pytest.mark.rule("SB-D-007", "SB-D-010")
def test_every_length_that_a_file_is_cut_to_is_refused(
    tiny: splitbundle.Bundle, tally: Callable[[str, int], None]
) -> None:
    """All listed files are cut to one length at a time, each as far as it is longer: verification names every one."""
    count = 0
    for path in ("manifest.json", "architecture.json", "SHA256SUMS"):
        place = tiny.path / path
        data = place.read_bytes()
        for length in range(len(data)):
            place.write_bytes(data[:length])
            assert named(tiny, path != "SHA256SUMS") == {path}, (path, length)
            count += 1
        place.write_bytes(data)
    sizes = {path: file.size for path, file in tiny.manifest.files.items() if path != "architecture.json"}
    for length in reversed(range(max(sizes.values()))):
        cut = {path for path, size in sizes.items() if size > length}
        for path in cut:
            (tiny.path / path).open("r+b").truncate(length)
        assert named(tiny, False) == cut, length
        count += len(cut)
    tally("lengths that files were cut to refused", count)
