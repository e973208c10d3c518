"""Processes that are measured: each run in a fresh one, contenders in turn, round by round."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
_CHILD: Final = (
    "from benchmarks.{module} import measure; import json, sys; print(json.dumps(measure(json.loads(sys.argv[1]))))"
)


class Failed(Exception):
    """A contender ended with an error; the last line of what it said."""


class Missing(Exception):
    """Libraries that aren't installed, without which nothing of what was asked for can be measured."""


def require(*libraries: str) -> None:
    """Whether libraries can be imported.

    Raises:
        Missing: some can't.
    """
    if absent := [name for name in libraries if importlib.util.find_spec(name) is None]:
        raise Missing(f'{", ".join(absent)} not installed: pip install -e ".[bench]"')


def measured(module: str, task: dict[str, Any]) -> dict[str, Any]:
    """What ``measure`` of a module of this package gives, called in a fresh process."""
    command = [sys.executable, "-c", _CHILD.format(module=module), json.dumps(task | {"started": time.time()})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or f"ended with status {done.returncode}").splitlines()
        raise Failed(next((line for line in reversed(said) if "Error" in line or "error" in line), said[-1])[:300])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def seconds(command: list[str], *, where: Path = ROOT) -> float:
    """Of a command, from its start to its end."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=where, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode:
        raise Failed(
            (done.stderr.strip() or f"{command[0]} ended with status {done.returncode}").splitlines()[-1][:300]
        )
    return taken


def interleaved(
    contenders: Mapping[str, Callable[[], dict[str, Any]]], rounds: int, lock: str | None
) -> tuple[list[dict[str, dict[str, Any]]], dict[str, str]]:
    """A B B A …: each round's figures by contender; and which contenders failed, with the reason, and are left out.

    An interruption ends it with the rounds that are whole; with none it goes on to who called.
    """
    failed: dict[str, str] = {}
    runs: list[dict[str, dict[str, Any]]] = []
    try:
        for i in range(rounds):
            run: dict[str, dict[str, Any]] = {}
            with holding(lock):
                turn = list(contenders.items())
                for name, measure in turn if i % 2 == 0 else reversed(turn):
                    if name in failed:
                        continue
                    say(f"round {i + 1} of {rounds}: {name}")
                    try:
                        run[name] = measure()
                    except Failed as error:
                        failed[name] = str(error)
                        say(f"left out: {name}: {error}")
            runs.append(run)
    except KeyboardInterrupt:
        if not runs:
            raise
    return [{name: own for name, own in run.items() if name not in failed} for run in runs], failed


@contextlib.contextmanager
def holding(lock: str | None) -> Iterator[None]:
    """Waits for a file's lock, for machines that several measure on."""
    if lock is None:
        yield
        return
    import fcntl

    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def warm(*paths: Path) -> None:
    """Reads files, or all files of directories, so that they are in the page cache whoever comes first."""
    for path in paths:
        for file in (path,) if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file()):
            with open(file, "rb", buffering=0) as opened:
                while opened.read(2**24):
                    pass


def say(text: str) -> None:
    """Progress, or an error, on one line."""
    print(" ".join(text.split()), file=sys.stderr, flush=True)
