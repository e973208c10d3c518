"""Run an adapter once, with all processes that it starts, and measure its time and memory.

    python process.py DESCRIPTOR COMMAND …

runs the command for ``ask`` in a small process of its own. A system reports a program's peak memory as at least the
peak memory of the process that started it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEASURES = hasattr(os, "wait4") and hasattr(os, "posix_spawnp")
"""Whether this system reports a process's time and memory, and can end all processes that it started."""
LONGEST = 2**20
"""The largest verdict in bytes."""


class Trouble(Exception):
    """An adapter that gave no verdict."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A JSON document, the processor's seconds and the bytes of memory: None if the system doesn't report them."""

    document: Any
    seconds: float | None = None
    memory: int | None = None


def ask(command: Sequence[str], timeout: float) -> Answer:
    """Return one JSON document from stdout, with exit status 0. All processes that the adapter started end with it.

    Raises:
        Trouble: no such program, no such document, another exit status, no end.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if MEASURES:
            status, seconds, memory = _measured(command, timeout, out.fileno(), err.fileno())
        else:
            status, seconds, memory = _plain(command, timeout, out.fileno(), err.fileno()), None, None
        out.seek(0)
        err.seek(max(0, err.seek(0, os.SEEK_END) - 1000))
        said, complaint = out.read(LONGEST + 1), err.read()
    if status:
        last = complaint.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise Trouble(f"exit status {status}: {shown(''.join(last))}")
    try:
        if len(said) > LONGEST:
            raise ValueError
        return Answer(document=json.loads(said), seconds=seconds, memory=memory)
    except (ValueError, RecursionError):
        raise Trouble(f"no JSON document on stdout: {said[:80]!r}") from None


def shown(value: object) -> str:
    """Return at most 200 printable characters of an adapter's output."""
    try:
        text = str(value)[:200]
    except RecursionError:
        return "deep nesting"
    return "".join(c if c.isascii() and c.isprintable() else ascii(c)[1:-1] for c in text)


def _plain(command: Sequence[str], timeout: float, out: int, err: int) -> int:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=timeout).returncode
    except subprocess.TimeoutExpired:
        raise Trouble(f"no verdict after {timeout:g} s") from None
    except OSError as error:
        raise Trouble(f"{command[0]} can't be run: {error.strerror}") from None


def _measured(command: Sequence[str], timeout: float, out: int, err: int) -> tuple[int, float, int]:
    read, write = os.pipe()
    with open(read, "rb") as pipe:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(write), *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=[write],
                start_new_session=True,
            )
        finally:
            os.close(write)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Trouble(f"no verdict after {timeout:g} s") from None
        finally:
            if process.returncode is None:  # it isn't reaped, so its group is still its own
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found = json.loads(pipe.read() or b"{}")
    if "error" in found:
        raise Trouble(f"{command[0]} can't be run: {found['error']}")
    if not found:
        raise Trouble("the adapter killed the process that runs it")
    return found["status"], found["seconds"], found["memory"]


def main() -> None:
    """Run the command, write its time and memory to the descriptor, and end all processes that are left."""
    descriptor, command = int(sys.argv[1]), sys.argv[2:]
    os.set_inheritable(descriptor, False)
    try:
        child = os.posix_spawnp(command[0], command, os.environ)
    except OSError as error:
        found: dict[str, Any] = {"error": error.strerror}
    else:
        _, status, used = os.wait4(child, 0)
        found = {
            "status": os.waitstatus_to_exitcode(status),
            "seconds": used.ru_utime + used.ru_stime,
            "memory": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }
    os.write(descriptor, json.dumps(found).encode())
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
