"""Each byte of a small bundle is changed, and each file cut to each length: verification names the file."""

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
"""Two parameters, so that two workers share the work."""


@pytest.fixture
def tiny(tmp_path: Path) -> splitbundle.Bundle:
    """A copy, to be damaged.

    It has a file of every kind: documents, weights, vectors, graphs, a tokenizer, a card.
    """
    assert sum((TINY / path).stat().st_size for path in FILES) <= 64 * 1024
    return splitbundle.open(shutil.copytree(TINY, tmp_path / "tiny.splitbundle"))


def named(bundle: splitbundle.Bundle, reopen: bool) -> set[str | None]:
    """Return the files that opening and verifying report."""
    try:
        (splitbundle.open(bundle.path) if reopen else bundle).verify()
    except BundleError as error:
        return {problem.file for problem in error.problems}
    return set()


def flip(tiny: splitbundle.Bundle, paths: list[str], step: int) -> int:
    """Flip a bit in one byte of ``step`` at a time, and return how many. Verification must name the file of each."""
    count = 0
    for path in paths:
        place = tiny.path / path
        data = place.read_bytes()
        # Files that an open bundle has read already are read again, in a new one.
        reopen = path in {"manifest.json", "architecture.json"}
        with place.open("r+b", buffering=0) as file:
            for i in range(0, len(data), step):
                byte = data[i]
                file.seek(i)
                file.write(bytes([byte ^ (1 << i % 8)]))
                found = named(tiny, reopen)
                if path == "manifest.json":  # the files that it lists wrongly are named too
                    assert path in found, i
                else:
                    assert found == {path}, (path, i)
                file.seek(i)
                file.write(bytes([byte]))
                count += 1
    assert named(tiny, True) == set()
    return count


def cut(tiny: splitbundle.Bundle, step: int) -> int:
    """Cut all listed files to one length in ``step`` at a time, each as far as it is longer, and return how many.

    Verification must name every one.
    """
    count = 0
    for path in ("manifest.json", "architecture.json", "SHA256SUMS"):
        place = tiny.path / path
        data = place.read_bytes()
        for length in range(0, len(data), step):
            place.write_bytes(data[:length])
            assert named(tiny, path != "SHA256SUMS") == {path}, (path, length)
            count += 1
        place.write_bytes(data)
    sizes = {path: file.size for path, file in tiny.manifest.files.items() if path != "architecture.json"}
    for length in reversed(range(0, max(sizes.values()), step)):
        shorter = {path for path, size in sizes.items() if size > length}
        for path in shorter:
            (tiny.path / path).open("r+b").truncate(length)
        assert named(tiny, False) == shorter, length
        count += len(shorter)
    return count


@pytest.mark.rule("SB-D-007", "SB-D-010")
def test_one_flipped_byte_in_43_is_found(tiny: splitbundle.Bundle) -> None:
    """The step is odd, so that every bit of a byte is flipped."""
    assert flip(tiny, FILES, 43) > 500


@pytest.mark.rule("SB-D-007", "SB-D-010")
def test_one_length_in_43_that_a_file_is_cut_to_is_refused(tiny: splitbundle.Bundle) -> None:
    assert cut(tiny, 43) > 500


@pytest.mark.long
@pytest.mark.rule("SB-D-007", "SB-D-010")
@pytest.mark.parametrize("paths", HALVES, ids=["even", "odd"])
def test_every_byte_that_is_flipped_is_found(
    tiny: splitbundle.Bundle, paths: list[str], tally: Callable[[str, int], None]
) -> None:
    tally("flipped bytes found, each by the name of its file", flip(tiny, paths, 1))


@pytest.mark.long
@pytest.mark.rule("SB-D-007", "SB-D-010")
def test_every_length_that_a_file_is_cut_to_is_refused(
    tiny: splitbundle.Bundle, tally: Callable[[str, int], None]
) -> None:
    tally("lengths that files were cut to refused", cut(tiny, 1))
