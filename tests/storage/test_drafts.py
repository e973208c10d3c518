"""Bundles that drafts of the format wrote open, or are refused and said to be a draft's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import splitbundle
from splitbundle import BundleError
from splitbundle.cli.main import main
from tests.support.paths import TESTS

DRAFTS = TESTS / "golden" / "drafts"
GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"


def refused(run: Callable[[], Any]) -> tuple[str, ...]:
    with pytest.raises(BundleError) as raised:
        run()
    last = raised.value.problems[-1]
    if last.code == "format.version":
        assert (last.file, last.pointer, last.got) == ("manifest.json", "/producer/version", "'0.1.0'")
        assert last.hint == "Convert its source again"
    return raised.value.codes


def test_a_draft_that_differs_is_refused_and_named() -> None:
    codes = refused(lambda: splitbundle.open(DRAFTS / "first.splitbundle"))
    assert set(codes) == {"field.missing", "format.version"}
    bundle = splitbundle.open(DRAFTS / "rows8.splitbundle")
    for run in (lambda: bundle.verify(shard="bottom"), lambda: bundle.stage("bottom")):
        assert set(refused(run)) == {"weights.layout", "format.version"}


def test_a_draft_that_does_not_differ_opens() -> None:
    bundle = splitbundle.open(DRAFTS / "opens.splitbundle")
    bundle.verify(shard="bottom")
    assert bundle.manifest.producer["version"] == "0.1.0"


def test_a_command_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(DRAFTS / "first.splitbundle"), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert problems[-1]["code"] == "format.version"


@pytest.mark.parametrize("producer", [{}, {"name": "other", "version": "0.1.0"}, {"name": "splitbundle", "version": 1}])
def test_others_are_not_called_drafts(producer: object, tmp_path: Path) -> None:
    root = Path(shutil.copytree(DRAFTS / "first.splitbundle", tmp_path / "other.splitbundle"))
    document = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(document | {"producer": producer}))
    assert set(refused(lambda: splitbundle.open(root))) == {"field.missing"}


def test_a_damaged_bundle_is_not_called_a_draft(tmp_path: Path) -> None:
    """A damaged file, and no JSON, say nothing of the format."""
    root = Path(shutil.copytree(DRAFTS / "opens.splitbundle", tmp_path / "damaged.splitbundle"))
    bundle = splitbundle.open(root)
    (root / "layer-000.safetensors").write_bytes(b"x")
    assert refused(lambda: bundle.stage("bottom")) == ("file.size",)
    (root / "manifest.json").write_text("{")
    assert refused(lambda: splitbundle.open(root)) == ("json.syntax",)


def test_this_version_writes_no_draft() -> None:
    assert splitbundle.open(GOLDEN).manifest.producer["version"] == "1.0.0rc1"
