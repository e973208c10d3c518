"""A command that serves, in a process of its own, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Final, TypeVar

START: Final = 120.0
"""The seconds in which a server starts, on a busy machine."""
END: Final = 60.0
"""The seconds in which it ends."""
Own = TypeVar("Own", bound="ServerProcess")


class ServerProcess:
    """A command that serves until it is told to end. With ``--json``, it says in one line where it listens."""

    command: ClassVar[str]

    def __init__(self, *arguments: object, port: int = 0, cwd: Path | None = None) -> None:
        command = [sys.executable, "-m", "splitbundle", self.command, *map(str, arguments), "--json"]
        command += ["--listen", f"127.0.0.1:{port}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)
        line: list[str] = []
        reader = threading.Thread(target=lambda: line.append(self.process.stdout.readline()))  # type: ignore[union-attr]
        reader.start()
        reader.join(START)
        if not line or not line[0].strip():
            self.process.kill()
            raise RuntimeError(f"the server didn't start: {self.process.communicate()[1]}")
        self.facts: dict[str, Any] = json.loads(line[0])
        if not self.facts["ok"]:
            self.process.communicate()
            raise RuntimeError(f"the server didn't start: {self.facts}")
        self.url: str = self.facts["url"]
        self.port = int(self.url.rpartition(":")[2])

    @property
    def held(self) -> dict[str, int]:
        """Return what the process holds: file descriptors, threads, and memory in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("utf-8")
        values = dict(line.split(":", 1) for line in status.splitlines())
        descriptors = len(os.listdir(f"/proc/{self.process.pid}/fd"))
        return {
            "descriptors": descriptors,
            "threads": int(values["Threads"]),
            "memory": int(values["VmRSS"].split()[0]),
        }

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the process as ``kill -9`` does."""
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """End the process as a system does, and return its exit status."""
        if self.process.poll() is None:
            if hasattr(signal, "SIGCONT"):  # a test may have stopped it
                self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        if self.process.stdout is not None and not self.process.stdout.closed:
            try:
                self.process.communicate(timeout=END)
            finally:
                self.process.kill()
        return self.process.wait(END)

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
