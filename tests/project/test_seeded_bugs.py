"""The conformance kit finds bugs that are planted in a copy of a reader."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final

import pytest

from conformance import run
from conformance.cases import cases, number_cases, wire_cases
from tests.support import javascript_reader
from tests.support.paths import ROOT, TESTS
from tests.support.seeded_bugs import Bug
from tests.support.seeded_bugs_javascript import READING as READING_IN_JAVASCRIPT
from tests.support.seeded_bugs_javascript_contents import JUDGING as JUDGING_IN_JAVASCRIPT
from tests.support.seeded_bugs_javascript_numbers import COMPUTING as COMPUTING_IN_JAVASCRIPT
from tests.support.seeded_bugs_javascript_wire import EXCHANGING as EXCHANGING_IN_JAVASCRIPT
from tests.support.seeded_bugs_python import READING
from tests.support.seeded_bugs_python_numbers import COMPUTING

PYTHON: Final = (*READING, *COMPUTING)
JAVASCRIPT: Final = (
    *READING_IN_JAVASCRIPT,
    *JUDGING_IN_JAVASCRIPT,
    *COMPUTING_IN_JAVASCRIPT,
    *EXCHANGING_IN_JAVASCRIPT,
)
KIT: Final = TESTS / "conformance"
CASES: Final = {case.name: case for case in (*cases(), *wire_cases(), *number_cases())}
FAILED: Final = 3


def named(bugs: tuple[Bug, ...]) -> list[object]:
    return [pytest.param(bug, id=bug.name.replace(" ", "-")) for bug in bugs]


@pytest.mark.parametrize("bugs", [PYTHON, JAVASCRIPT], ids=["python", "javascript"])
def test_each_bug_has_one_place_and_each_of_its_cases_is_there(bugs: tuple[Bug, ...]) -> None:
    assert [name for name, times in Counter(bug.name for bug in bugs).items() if times > 1] == []
    for bug in bugs:
        assert (ROOT / bug.file).read_text("utf-8").count(bug.good) == 1, (bug.name, bug.file, bug.good)
        assert bug.good != bug.bad, bug.name
        assert bug.cases, bug.name
        for part in bug.cases:
            assert any(part in name for name in CASES), (bug.name, part)


def asked(parts: tuple[str, ...], command: list[str], paths: list[Path]) -> subprocess.CompletedProcess[str]:
    """Run the kit on some cases."""
    only = [word for part in parts for word in ("--only", part)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run(
        [sys.executable, str(KIT / "run.py"), "--jobs", "1", "--wire", "--numbers", *only, *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.long
@pytest.mark.parametrize("bug", named(PYTHON))
def test_a_bug_of_the_runtime_is_found(bug: Bug, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "runtime" / "splitbundle", tmp_path / "runtime" / "splitbundle")
    bug.plant(tmp_path)
    done = asked(bug.cases, [sys.executable, str(KIT / "adapters.py"), "torch"], [tmp_path / "runtime"])
    assert done.returncode == FAILED, done.stdout + done.stderr
    assert " is not defined" not in done.stdout  # the kit finds the bug, and not a broken copy
    assert "SyntaxError" not in done.stdout


def javascript_copy(directory: Path) -> Path:
    """Copy the JavaScript reader and its adapter, as they lie in the checkout. Return the copy of the adapter."""
    browser = Path("runtime", "browser")
    shutil.copytree(ROOT / browser, directory / browser, ignore=shutil.ignore_patterns("page"))
    adapter = directory / javascript_reader.ADAPTER.relative_to(ROOT)
    adapter.parent.mkdir(parents=True)
    return Path(shutil.copy(javascript_reader.ADAPTER, adapter))


def verdicts(adapter: Path, parts: tuple[str, ...], directory: Path) -> dict[str, str | None]:
    """Return why a copy's verdict of each case is unexpected, or None."""
    chosen = [case for name, case in CASES.items() if any(part in name for part in parts)]
    with javascript_reader.serving(adapter) as ask:
        results = [result for case in chosen for result in run.judge(case, directory, ask)]
    return {result["name"]: result["wrong"] for result in results}


NODE: Final = javascript_reader.missing()
needs_node = pytest.mark.skipif(NODE is not None, reason=NODE or "")


@needs_node
@pytest.mark.long
@pytest.mark.parametrize("bug", named(JAVASCRIPT))
def test_a_bug_of_the_javascript_reader_is_found(bug: Bug, tmp_path: Path) -> None:
    adapter = javascript_copy(tmp_path)
    bug.plant(tmp_path)
    assert any(verdicts(adapter, bug.cases, tmp_path).values())


@needs_node
@pytest.mark.parametrize(
    ("bad", "said"),
    [("if (", "SyntaxError"), ("nowhere();", "nowhere is not defined"), ('import "./nowhere.js";', "nowhere.js")],
)
def test_a_broken_copy_is_not_a_bug_that_was_found(bad: str, said: str, tmp_path: Path) -> None:
    adapter = javascript_copy(tmp_path)
    Bug(name="", file="runtime/browser/reader/json.js", good="/** SB-J-007 */", bad=bad, cases=("",)).plant(tmp_path)
    with pytest.raises(RuntimeError, match=said):
        verdicts(adapter, ("reject/manifest-json-lone-surrogate",), tmp_path)
