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
from typing import Any, ClassVar, Final

from tests.support.fault_points import Point
from tests.support.syscalls import Call, Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A command, and the files that it finds."""

    name: str
    arguments: tuple[str, ...]
    target: str
    """The name of the bundle that it makes or replaces."""
    prepare: Callable[[Path], object]
    same: Callable[[Sequence[Call]], Sequence[Call]] = lambda calls: ()
    """Calls that another scenario makes too, in the same state."""
    always: Callable[[Call], Fault | None] = lambda call: None
    """The properties of the file system, which are the same for every fault."""
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
    in_place: ClassVar[str] = "The bundle is in place"
    new: str = ""
    """The identity of the bundle that the command makes."""
    _next: dict[str, tuple[str, list[str]]] = field(default_factory=dict)

    def old(self) -> str | None:
        """Return the identity of the bundle that was there before; None if there was none."""
        place = self.template / self.scenario.target
        mended = self.template / f".{self.scenario.target}.old"
        there = next((path for path in (place, mended) if path.is_dir()), None)
        return None if there is None else self.identity(there)

    def identity(self, path: Path) -> str:
        """Return the digest of a bundle's manifest, and its files: parts of one bundle have the same manifest."""
        manifest = path / "manifest.json"
        if not manifest.exists():
            return ""
        return f"{hashlib.sha256(manifest.read_bytes()).hexdigest()} {' '.join(sorted(state(path)))}"

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

    def there(self) -> str | None:
        """Return the identity of the bundle that stands there; None if nothing does.

        Raises:
            BundleError: it can't be opened, or isn't whole.
        """
        import splitbundle
        from splitbundle import BundleError

        target = self.root / self.scenario.target
        try:
            splitbundle.open(target).verify(exact=True)
        except BundleError as error:
            if error.codes == ("file.missing",) and not target.exists():
                return None
            raise
        return self.identity(target)

    def _then(self) -> tuple[str, list[str]]:
        """Check the result of opening, and the files that the next run leaves."""
        from splitbundle import BundleError

        wrong, now = [], "something else"
        old = self.old()
        try:
            now = {self.new: "new", old: "none" if old is None else "old"}.get(self.there(), now)
        except BundleError as error:
            wrong.append(f"opening it: {error}")
        if now == "something else":
            wrong.append("neither the old one nor the new one stands there, whole")
        again = [*self.scenario.arguments, *(["--force"] if now == "new" and old is None else [])]
        status, said = self.rerun(again)
        if status != 0:
            wrong.append(f"the next run: status {status}, {said}")
        else:
            try:
                if self.there() != self.new:
                    wrong.append("the next run made another one")
            except BundleError as error:
                wrong.append(f"the next run: {error}")
        expected = {self.scenario.target} | {path.name for path in self.template.iterdir() if path.name[0] != "."}
        litter = sorted({path.name for path in self.root.iterdir()} ^ expected)
        if litter:
            wrong.append(f"the next run left or took {', '.join(litter)}")
        return now, wrong

    def rerun(self, arguments: Sequence[str]) -> tuple[int, str]:
        """Run a command without a fault. Return its exit status and its output."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = self.run(arguments)
        return status, said.getvalue()

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
        if not interrupted and now == "new" and self.in_place not in said:
            wrong.append(f"status {status} where the new bundle stands, which nothing says: {said[-500:]}")
        return wrong


class CheckpointJudge(Judge):
    """Checks that no checkpoint that was saved before is lost, and that each one that is there can be loaded.

    Checkpoints 1 and 2 are there, the command saves 3, and 2 are kept.
    """

    in_place = "The new directory is in place"

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
        status, said = self.rerun([*self.scenario.arguments[:-1], "--step=4"])
        kept = [3, 4] if 3 in steps else [2, 4]
        names = sorted(path.name for path in checkpoints.directory.iterdir())
        if status != 0 or names != [f"step-{step:010d}" for step in kept]:
            wrong.append(f"the next run: status {status}, {', '.join(names)}; {said}")
        return "new" if 3 in steps else "old", wrong


class ExportJudge(Judge):
    """Checks that an exported checkpoint has every file as an export without a fault makes it."""

    in_place = "The new directory is in place"

    def identity(self, path: Path) -> str:
        return json.dumps(state(path), sort_keys=True) if path.is_dir() else ""

    def there(self) -> str | None:
        target = self.root / self.scenario.target
        if not target.exists() and self.old() is not None:
            # No reader of a checkpoint brings back the old one. The next export does, even if it replaces nothing.
            self.rerun([argument for argument in self.scenario.arguments if argument != "--force"])
        return self.identity(target) if target.exists() else None


class ArchiveJudge(Judge):
    """Checks that an archive has every byte of one that was packed without a fault."""

    in_place = "The new file is in place"

    def identity(self, path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    def old(self) -> str | None:
        return self.identity(self.template / self.scenario.target) or None

    def there(self) -> str | None:
        target = self.root / self.scenario.target
        return self.identity(target) if target.exists() else None


class SignatureJudge(Judge):
    """Checks that a bundle stays whole with or without its signature. An empty directory for signatures is none."""

    in_place = "The new file is in place"

    def identity(self, path: Path) -> str:
        return json.dumps({name: what for name, what in state(path).items() if name != "signatures"}, sort_keys=True)

    def rerun(self, arguments: Sequence[str]) -> tuple[int, str]:
        return super().rerun([*arguments, *(["--force"] if "--force" not in arguments else [])])


def checkpointed_stage(bundle: str | Path) -> Any:
    import splitbundle

    return splitbundle.open(bundle).stage(layers=(0, 1), embeds=False, head=False, trainable=True)
