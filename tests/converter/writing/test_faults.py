"""Whichever system call of a command that writes fails or is the last: no half bundle, no lost one, no litter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest

GROUPS: Final = (  # which take about as long
    (
        "convert",
        "convert --force, in two steps",
        "convert --allow-pickle",
        "resplit",
        "save_as",
        "a training checkpoint",
        *("extract", "merge --force, over a part", "pack", "unpack --force", "sign"),
        *("pull", "pull, into the cache"),
        *("export", "export --force, in two steps"),
    ),
    (
        *("convert --force", "add-onnx", "save_as over itself", "resplit --force"),
        *("resplit --force, after an interruption", "resplit --force, after two killed writers"),
        *("extract --force", "merge", "cast", "cast over itself", "pack --force", "unpack"),
        *("pull --force", "pull, of which a part is there", "push", "export --force"),
    ),
)


def run(scenarios: Sequence[str], *options: str) -> list[dict[str, Any]]:
    """Run scenarios, and return what became of each. None of the faults may do any harm."""
    command = [sys.executable, "-m", "tests.support.faults", *options, *scenarios]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    if "unavailable" in found:
        pytest.skip(found["unavailable"])
    assert sorted(scenario["scenario"] for scenario in found["scenarios"]) == sorted(scenarios)
    for scenario in found["scenarios"]:
        assert scenario["wrong"] == [], f"{scenario['scenario']}: {len(scenario['wrong'])} of {scenario['points']}"
    return list(found["scenarios"])


@pytest.mark.rule("SB-D-009")
def test_one_fault_in_97_of_every_scenario() -> None:
    found = run([scenario for group in GROUPS for scenario in group], "--every", "97", "--cpu", "0")
    assert min(scenario["points"] for scenario in found) >= 2
    ends = {what.partition(", ")[0] for scenario in found for what in scenario["outcomes"]}
    assert ends == {"0", "1", "130", "killed"}


@pytest.mark.long
@pytest.mark.rule("SB-D-009")
@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_every_system_call_may_fail_or_be_the_last(group: int, tally: Callable[[str, int], None]) -> None:
    for scenario in run(GROUPS[group], "--cpu", str(group)):
        # Every call has an error, an interruption, and, if it changes anything, the process's end.
        assert scenario["points"] > 2 * scenario["calls"] > 80
        ends = {what.partition(", ")[0] for what in scenario["outcomes"]}
        # A push changes nothing on this machine, so a kill is like its last interruption.
        assert ends == {"0", "1", "130", "killed"} - ({"killed"} if scenario["scenario"] == "push" else set())
        tally("system calls of commands that write", scenario["calls"])
        tally("faults in place of them", scenario["points"])


def test_a_scenario_that_is_not_there() -> None:
    """A run without a fault must not count as good."""
    command = [sys.executable, "-m", "tests.support.faults", "convert", "nosuch"]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=600)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no scenario 'nosuch'; there are: convert; " in done.stderr
