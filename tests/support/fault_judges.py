"""The conditions that must hold after a fault: the old directory or the new one stands, and the next run succeeds."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.support.fault_points import Point
from tests.support.syscalls import Call, Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A command, and the files that it finds."""

    name: str
    arguments: tuple[str, ...]
    target: str
    """The name of the bundle that it makes or replaces."""
    prepare: Callable[[Path], None]
    same: Callable[[Sequence[Call]], Sequence[Call]] = lambda calls: ()
    """Calls that another scenario makes too, in the same state."""
    always: Callable[[Call], Fault | None] = lambda call: None
    """The properties of the file system, whatever the fault."""
    judge: Callable[..., Judge] = lambda *given: Judge(*given)


TEMPORARY: Final = re.compile(r"\.(tmp|removed)-[0-9a-f]{16}")


def state(root: Path) -> dict[str, str]:
    """Return the contents of a directory: the mode of each path, and the digest of each file.

    Random names are made equal.
    """
    found = {}
    for place, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = Path(place, name)
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if name in files else "directory"
            known = TEMPORARY.sub(r".\1-0", path.relative_to(root).as_posix())
            found[known] = f"{path.lstat().st_mode:o} {digest}"
    return found


@dataclass(slots=True)
class Judge:
    """Checks the conditions that must hold after a fault."""

    scenario: Scenario
    root: Path
    template: Path
    run: Callable[[Sequence[str]], int]
    new: str = ""
    """The id of the bundle that the command makes."""
    _next: dict[str, tuple[str, list[str]]] = field(default_factory=dict)

    def old(self) -> str | None:
        """The id of the bundle that was there before."""
        place = self.template / self.scenario.target
        mended = self.template / f".{self.scenario.target}.old"
        there = next((path for path in (place, mended) if path.is_dir()), None)
        return None if there is None else identity(there)

    def problems(self, point: Point, answer: Mapping[str, Any] | None) -> tuple[str, list[str]]:
        """Return which bundle is there now (old, new, none), and a list of what is wrong."""
        wrong = []
        key = json.dumps(state(self.root), sort_keys=True)
        if key not in self._next:
            self._next[key] = self._then()
        now, later = self._next[key]
        wrong += later
        if answer is not None:
            wrong += self._check_answer(now, point, answer)
        return now, wrong

    def _then(self) -> tuple[str, list[str]]:
        """Check the result of opening, and the files that the next run leaves."""
        import splitbundle
        from splitbundle import BundleError

        wrong, now = [], "something else"
        target = self.root / self.scenario.target
        old = self.old()
        try:
            bundle = splitbundle.open(target)
            bundle.verify(exact=True)
            now = {self.new: "new", old: "old"}.get(bundle.id, now)
        except BundleError as error:
            if old is None and error.codes == ("file.missing",) and not target.exists():
                now = "none"
            else:
                wrong.append(f"opening it: {error}")
        if now == "something else":
            wrong.append("neither the old bundle nor the new one stands there, whole")
        said = io.StringIO()
        again = [*self.scenario.arguments, *(["--force"] if now == "new" and old is None else [])]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = self.run(again)
        if status != 0:
            wrong.append(f"the next run: status {status}, {said.getvalue()}")
        else:
            try:
                bundle = splitbundle.open(target)
                bundle.verify(exact=True)
                if bundle.id != self.new:
                    wrong.append("the next run made another bundle")
            except BundleError as error:
                wrong.append(f"the next run: {error}")
        expected = {self.scenario.target} | {path.name for path in self.template.iterdir() if path.name[0] != "."}
        litter = sorted({path.name for path in self.root.iterdir()} ^ expected)
        if litter:
            wrong.append(f"the next run left or took {', '.join(litter)}")
        return now, wrong

    def _check_answer(self, now: str, point: Point, answer: Mapping[str, Any]) -> list[str]:
        status, said = answer["status"], answer["said"]
        interrupted = point.fault.signal in (signal.SIGINT, signal.SIGTERM)
        if status == 0:
            return [] if now == "new" else [f"status 0, and {now} stands there"]
        wrong = []
        codes = re.findall(r"^splitbundle: \[([a-z.-]+)\]", said, re.M)
        if not codes or "Traceback" in said or "internal" in codes:
            wrong.append(f"status {status} and no typed error: {said[-2000:]}")
        if interrupted and (status != 130 or codes != ["interrupted"]):
            wrong.append(f"an interruption ends with status {status}: {said[-500:]}")
        if not interrupted and status != 1:
            wrong.append(f"status {status}: {said[-500:]}")
        if not interrupted and now == "new" and "The bundle is in place" not in said:
            wrong.append(f"status {status} where the new bundle stands, which nothing says: {said[-500:]}")
        return wrong


class CheckpointJudge(Judge):
    """Checks that no checkpoint that was saved before is lost, and that each one that is there can be loaded.

    Checkpoints 1 and 2 are there, the command saves 3, and 2 are kept.
    """

    def old(self) -> str | None:
        return "1, 2"

    def _then(self) -> tuple[str, list[str]]:
        from splitbundle import BundleError
        from splitbundle.training import Checkpoints

        wrong = []
        checkpoints = Checkpoints(self.root / self.scenario.target)
        steps = checkpoints.steps()
        if steps not in ([1, 2], [1, 2, 3], [2, 3]):
            wrong.append(f"the checkpoints are {steps}")
        for step in steps:
            stage = checkpointed_stage(self.scenario.arguments[1])
            try:
                checkpoints.load(stage, step=step)
            except BundleError as error:
                wrong.append(f"checkpoint {step}: {error}")
            if float(next(stage.parameters()).flatten()[0]) != step:
                wrong.append(f"checkpoint {step} has other weights")
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = self.run([*self.scenario.arguments[:-1], "--step=4"])
        kept = [3, 4] if 3 in steps else [2, 4]
        names = sorted(path.name for path in checkpoints.directory.iterdir())
        if status != 0 or names != [f"step-{step:010d}" for step in kept]:
            wrong.append(f"the next run: status {status}, {', '.join(names)}; {said.getvalue()}")
        return "new" if 3 in steps else "old", wrong


def identity(path: Path) -> str:
    if not (path / "manifest.json").exists():
        return ""
    return "sha256:" + hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()


def checkpointed_stage(bundle: str | Path) -> Any:
    import splitbundle

    return splitbundle.open(bundle).stage(layers=(0, 1), embeds=False, head=False, trainable=True)
