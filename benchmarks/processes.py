"""Run measurements in fresh processes, with the contenders in turn, round by round."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
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
_BUSY: Final = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(100000):\n        pass"
"""A busy process also ends when its parent is gone, for a killed parent can't end it."""


class Failed(Exception):
    """A contender, or a case, failed. The message is the reason, such as the last line of a contender's output."""


class Missing(Exception):
    """Required libraries are not installed, so no requested set can be measured."""


def require(*libraries: str) -> None:
    """Check that libraries are installed.

    Raises:
        Missing: At least one is not installed.
    """
    if absent := [name for name in libraries if importlib.util.find_spec(name) is None]:
        raise Missing(f'{", ".join(absent)} not installed: pip install -e ".[bench]"')


def measured(module: str, task: dict[str, Any]) -> dict[str, Any]:
    """Call ``measure`` of a module of this package in a fresh process, and return its result.

    The process has this environment, changed by the task's ``environment``. There, None removes a variable.

    Raises:
        Failed: The process ended with an error.
    """
    command = [sys.executable, "-c", _CHILD.format(module=module), json.dumps(task | {"started": time.time()})]
    changed = {**os.environ, **task.get("environment", {})}
    environment = {name: value for name, value in changed.items() if value is not None}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or f"ended with status {done.returncode}").splitlines()
        raise Failed(next((line for line in reversed(said) if "Error" in line or "error" in line), said[-1])[:300])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@contextlib.contextmanager
def beside(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run the block beside some busy processes: each loops in Python. They end with the block, however it ends.

    Raises:
        Failed: A busy process ended before the block did, so the block did not run beside it.
    """
    command = [sys.executable, "-I", "-S", "-c", _BUSY, str(os.getpid())]
    nothing = subprocess.DEVNULL
    busy: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            busy.append(subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing))
        yield busy
        if any(each.poll() is not None for each in busy):
            raise Failed("a busy process beside it ended too early")
    finally:
        for each in busy:
            each.kill()
        for each in busy:
            each.wait()


def seconds(command: list[str], *, where: Path = ROOT) -> float:
    """Return the seconds from the start of a command to its end.

    Raises:
        Failed: The command ended with an error.
    """
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
    """Measure the contenders in the order A B B A …

    An interruption ends the measurement, and the complete rounds are returned.

    Returns:
        The figures of each round by contender, and the contenders that failed, with the reason. The rounds do not have
        the contenders that failed.

    Raises:
        KeyboardInterrupt: The run was interrupted before one round was complete.
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
    """Hold the lock of a file during the block, so that several runs on one machine measure in turn."""
    if lock is None:
        yield
        return
    import fcntl

    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def warm(*paths: Path) -> None:
    """Read files, or all files of directories, so that they are in the page cache for all contenders."""
    for path in paths:
        for file in (path,) if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file()):
            with open(file, "rb", buffering=0) as opened:
                while opened.read(2**24):
                    pass


def say(text: str) -> None:
    """Print progress, or an error, on one line of stderr."""
    print(" ".join(text.split()), file=sys.stderr, flush=True)
