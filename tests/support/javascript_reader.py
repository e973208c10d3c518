"""The JavaScript reader as a program that answers the conformance kit, for tests that have Node."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from conformance import run
from tests.support.paths import TESTS

OLDEST: Final = 18
ADAPTER: Final = TESTS / "conformance" / "javascript.mjs"
SECONDS: Final = 300
BROKEN: Final = ("SyntaxError", "ReferenceError", "ERR_MODULE_NOT_FOUND")
"""What stands in the errors of a program that can't run, whatever it is asked."""


def missing() -> str | None:
    """Why the reader can't run here; None if it can."""
    node = shutil.which("node")
    if node is None:
        return "there is no node"
    said = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    return None if int(said.removeprefix("v").partition(".")[0]) >= OLDEST else f"node {said.strip()} is too old"


@contextmanager
def serving(adapter: Path = ADAPTER, seconds: float = SECONDS) -> Iterator[run.Ask]:
    """Start one process that answers every question. It is killed after some seconds.

    Raises:
        RuntimeError: the adapter's own code is broken, or the process has ended.
    """
    with subprocess.Popen(
        ["node", str(adapter), "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as process:
        given, said, errors = process.stdin, process.stdout, process.stderr
        if given is None or said is None or errors is None:
            raise RuntimeError("a process without pipes")

        def answer(step: str, directory: Path, limited: bool) -> Any:
            try:
                given.write(f"{step} {directory}\n")
                given.flush()
                line = said.readline()
            except BrokenPipeError:
                line = ""
            if not line:
                process.kill()
                raise RuntimeError(f"the adapter has ended: {errors.read()[:2000]}")
            if '{"error":' in line and any(word in line for word in BROKEN):
                raise RuntimeError(f"the adapter is broken: {line[:2000]}")
            return json.loads(line)

        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            yield answer
        finally:
            timer.cancel()
            process.kill()
