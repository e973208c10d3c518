"""The conformance kit finds bugs that are planted in a copy of a reader."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import seeded_bugs
from tests.support.paths import ROOT, TESTS
from tests.support.seeded_bugs import Bug

pytestmark = pytest.mark.long
KIT = TESTS / "conformance"
FAILED = 3


def planted(bug: Bug, copy: Path) -> None:
    """Change the one place of a bug in a copy of the checkout's sources."""
    place = copy / bug.file
    text = place.read_text("utf-8")
    assert text.count(bug.good) == 1, f"{bug.file} has {bug.good!r} {text.count(bug.good)} times"
    place.write_text(text.replace(bug.good, bug.bad), "utf-8")


def asked(cases: tuple[str, ...], command: list[str], paths: list[Path]) -> subprocess.CompletedProcess[str]:
    """Run the kit on some cases."""
    only = [word for case in cases for word in ("--only", case)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run(
        [sys.executable, str(KIT / "run.py"), "--jobs", "1", "--wire", "--numbers", *only, *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("bug", [pytest.param(bug, id=bug.name.replace(" ", "-")) for bug in seeded_bugs.PYTHON])
def test_a_bug_of_the_runtime_is_found(bug: Bug, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "runtime" / "splitbundle", tmp_path / "runtime" / "splitbundle")
    planted(bug, tmp_path)
    done = asked(bug.cases, [sys.executable, str(KIT / "adapters.py"), "torch"], [tmp_path / "runtime"])
    assert done.returncode == FAILED, done.stdout + done.stderr
    assert " is not defined" not in done.stdout  # the kit finds the bug, and not a broken copy
    assert "SyntaxError" not in done.stdout
