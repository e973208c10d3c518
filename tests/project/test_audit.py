"""No code from a bundle runs, and nothing outside the bundle is read, as Python's audit hooks see it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import TESTS

TINY = TESTS / "conformance" / "bundles" / "tiny.splitbundle"

CHILD = """
import json, sys
import splitbundle
backend, warm, path = sys.argv[1:]
work = json.loads(sys.stdin.read())
events = []
listening = False

def hook(event, arguments):
    if listening and not (event == "open" and type(arguments[0]) is int):  # a descriptor that was opened before
        events.append((event, [str(each) for each in arguments[:2]]))

def everything(path):
    bundle = splitbundle.open(path)
    if "verify" in work:
        bundle.verify(exact=True)
    if "run" in work:
        bundle.run_vectors(backend=backend)
    if "text" in work:
        from splitbundle.text.huggingface import TextTokenizer
        text = TextTokenizer(bundle)
        assert text.decode(text.encode("the cat sat")) == "the cat sat"
    if "generate" in work:
        stages = [bundle.stage(shard.name, backend=backend) for shard in bundle.shards]
        pipeline = bundle.pipeline(backend=backend)
        assert len(list(pipeline.generate(pipeline.token_ids([[1, 2, 3]]), max_new_tokens=4))) == 4
        if backend == "torch":
            bundle.stage("top", trainable=True)

sys.addaudithook(hook)
everything(warm)  # imports what it imports
listening = True
everything(path)
listening = False
print(json.dumps(events))
"""
HARMLESS = {
    "open",  # the path is checked below
    "os.listdir",  # the path is checked below
    "os.scandir",
    "os.walk",
    "mmap.__new__",  # weights
    "builtins.id",
    "object.__getattr__",  # reading an attribute of a function or a type
    "sys._getframe",
    "object.__setattr__",
    "_thread.start_new_thread",  # files are hashed on all cores
    "glob.glob",  # an interrupted replacement is looked for beside the bundle, by its own name
    "pathlib.Path.glob",
    "time.sleep",
}
"""The audit events of CPython that neither run code nor reach outside the process."""


def events(backend: str, work: list[str], tmp_path: Path) -> tuple[Path, list[tuple[str, list[str]]]]:
    """Record what a child process does with a bundle, once it has done the same with another."""
    warm, path = (Path(shutil.copytree(TINY, tmp_path / name / "x.splitbundle")) for name in ("warm", "cold"))
    done = subprocess.run(
        [sys.executable, "-c", CHILD, backend, warm, path],
        input=json.dumps(work),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return path, [(event, arguments) for event, arguments in json.loads(done.stdout)]


@pytest.mark.rule("SB-D-005")
@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_nothing_runs_and_nothing_outside_is_read(backend: str, tmp_path: Path) -> None:
    path, seen = events(backend, ["verify", "run", "generate", "text"], tmp_path)
    assert {event for event, _ in seen} - HARMLESS == set()
    opened = {arguments[0] for event, arguments in seen if event == "open"}
    inside = {str(place) for place in path.rglob("*") if place.is_file()}
    # The container's quota of processors is in files of the system.
    assert {place for place in opened if not place.startswith(("/sys/fs/cgroup/", "/proc/self/cgroup"))} <= inside
    assert opened & inside  # the hook works
    assert {arguments[0] for event, arguments in seen if event in {"os.listdir", "os.scandir"}} <= {
        str(path),
        str(path / "tokenizer"),
    }


def test_opening_reads_the_manifest_and_the_architecture_alone(tmp_path: Path) -> None:
    path, seen = events("torch", [], tmp_path)
    assert [arguments[0] for event, arguments in seen if event == "open"] == [
        str(path / "manifest.json"),
        str(path / "architecture.json"),
    ]
    assert {event for event, _ in seen} - {"object.__getattr__"} == {"open"}
