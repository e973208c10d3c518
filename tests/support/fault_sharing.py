"""The scenarios of ``pull`` and ``push`` for ``faults``: one job at a time, as a tracee has one thread."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fake_registry import FakeRegistry
from tests.support.fault_judges import Judge, Scenario, state
from tests.support.fault_points import Point
from tests.support.static_server import static_server

REPOSITORY = "models/faults"
TARGET = "x.splitbundle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """The servers that the commands ask. They run in the process that traces."""

    files: str
    """The URL of the bundle that is pulled."""
    registry: FakeRegistry
    bundle_id: str


@contextlib.contextmanager
def servers(bundles: Path) -> Iterator[Servers]:
    """Run a static server for bundles, and an empty registry."""
    import splitbundle

    with static_server(bundles) as files, FakeRegistry() as registry:
        yield Servers(files=f"{files.url}/parts", registry=registry, bundle_id=splitbundle.open(bundles / "parts").id)


def scenarios(made: Path, root: Path, there: Servers | None) -> list[Scenario]:
    """Return the scenarios. Without servers, their names alone are right."""
    place, source = str(root / TARGET), str(root / "parts")
    pull = ("pull", source, "-o", place, "--jobs", "1", "--quiet")
    files = "" if there is None else there.files
    cached = f"cache/bundles/{'' if there is None else there.bundle_id.removeprefix('sha256:')}"
    registry = FakeRegistry() if there is None else there.registry

    def with_source(*names: str) -> Callable[[Path], object]:
        """The bundle that is read lies beside the target, so that reading meets faults too."""

        def both(template: Path) -> None:
            shutil.copytree(made / "parts", template / "parts")
            for name in names:
                shutil.copytree(made / name, template / TARGET)

        return both

    return [
        Scenario(name="pull", arguments=pull, target=TARGET, prepare=with_source(), judge=PullJudge),
        Scenario(
            name="pull --force",
            arguments=(*pull, "--force"),
            target=TARGET,
            prepare=with_source("old"),
            judge=PullJudge,
        ),
        Scenario(
            name="pull, of which a part is there",
            arguments=pull,
            target=TARGET,
            prepare=with_source("trunk"),
            judge=GrownJudge,
        ),
        Scenario(
            name="pull, into the cache",
            arguments=("pull", files, "--jobs", "1", "--quiet"),
            target=cached,
            prepare=lambda template: None,
            judge=CacheJudge,
        ),
        Scenario(
            name="push",
            arguments=("push", source, f"oci://{registry.host}/{REPOSITORY}:v1", "--jobs", "1", "--quiet"),
            target="parts",
            prepare=with_source(),
            judge=lambda *given: PushJudge(*given, registry=registry),
        ),
    ]


class PullJudge(Judge):
    """Checks a pulled directory as any other. The next pull needs no ``--force`` for the bundle that is there."""

    def rerun(self, arguments: Any) -> tuple[int, str]:
        given = self.scenario.arguments
        return super().rerun(given)


class GrownJudge(PullJudge):
    """Checks a part to which files are added: each that is there is whole, and the next pull adds the rest."""

    in_place = ""  # a pull that fails may have added all of them

    def _then(self) -> tuple[str, list[str]]:
        import splitbundle
        from splitbundle import BundleError

        wrong, target = [], self.root / self.scenario.target
        try:
            before = splitbundle.open(target).verify(exact=True)
        except BundleError as error:
            return "something else", [f"opening it: {error}"]
        status, said = self.rerun(self.scenario.arguments)
        if status != 0 or self.there() != self.new:
            wrong.append(f"the next run: status {status}, {said}")
        litter = {path.name for path in self.root.iterdir()} - {self.scenario.target, "parts", "parts.tar", "cache"}
        if litter:
            wrong.append(f"the next run left {', '.join(sorted(litter))}")
        return "part" if before.absent else "new", wrong


class CacheJudge(Judge):
    """Checks that the cache has only whole files, and that the next pull and ``cache prune`` leave nothing else."""

    in_place = ""  # a pull that fails may have filled the cache

    def old(self) -> str | None:
        return None

    def identity(self, path: Path) -> str:
        self.rerun(["cache", "prune"])  # every pull needs the lock of the cache, which is no finding
        return json.dumps(state(self.root), sort_keys=True)

    def _then(self) -> tuple[str, list[str]]:
        from splitbundle import BundleError
        from splitbundle.storage.documents import read_documents

        wrong, place, now = [], self.root / self.scenario.target, "none"
        if place.exists():
            try:
                listed = read_documents(place).manifest.files
            except BundleError as error:
                # The manifest appears with its directory, and then the files one by one.
                listed = {}
                if error.codes != ("file.missing",):
                    wrong.append(f"the documents: {error}")
            whole = [path for path, file in listed.items() if _is_whole(place / path, file.sha256, file.size)]
            wrong += [f"half a file: {path}" for path in listed if path not in whole and (place / path).exists()]
            now = "new" if listed and len(whole) == len(listed) else "part"
        steps: list[tuple[str, ...]] = [("cache", "verify"), self.scenario.arguments, ("cache", "verify")]
        for arguments in steps:
            status, said = self.rerun(arguments)
            if status != 0:
                wrong.append(f"{' '.join(arguments[:2])}: status {status}, {said}")
        if self.identity(place) != self.new:
            wrong.append("the next run and a prune leave another cache")
        return now, wrong


def _is_whole(path: Path, sha256: str, size: int) -> bool:
    if not path.exists():
        return False
    data = path.read_bytes()
    return len(data) == size and hashlib.sha256(data).hexdigest() == sha256


class PushJudge(Judge):
    """Checks that a tag means the whole bundle or nothing, and that the next push succeeds."""

    in_place = ""  # the answer to the last request may be lost

    def __init__(self, *given: Any, registry: FakeRegistry) -> None:
        super().__init__(*given)
        self._registry = registry

    def identity(self, path: Path) -> str:
        tag = self._registry.tags[REPOSITORY].get("v1", "")
        if tag:
            described = json.loads(self._registry.manifests[REPOSITORY][tag].data)
            absent = [each for each in described["layers"] if each["digest"] not in self._registry.holds[REPOSITORY]]
            if absent:
                return "layers are missing"
        self._registry.tags.clear()
        self._registry.manifests.clear()
        self._registry.holds.clear()
        self._registry.blobs.clear()
        return tag

    def problems(self, point: Point, answer: Mapping[str, Any] | None) -> tuple[str, list[str]]:
        found = self.identity(self.root)
        now = {self.new: "new", "": "none"}.get(found, found)
        wrong = [] if now in ("new", "none") else [now]
        if answer is not None:
            wrong += self._check_answer(now, point, answer)
        status, said = self.rerun(self.scenario.arguments)
        if status != 0 or self.identity(self.root) != self.new:
            wrong.append(f"the next run: status {status}, {said}")
        return now, wrong
