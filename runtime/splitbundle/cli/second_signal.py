"""Signals that end the process at once: the second one while a command drains, and the first one in an import."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from types import FrameType
from typing import Any

from splitbundle.cli.console import Console
from splitbundle.cli.exit_status import INTERRUPTED
from splitbundle.errors import Problem

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class _Signals:
    """Within ``with``, ``_handle`` is called for Ctrl-C and SIGTERM, if this is the main thread."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError

    def __enter__(self) -> None:
        for number in _NUMBERS:
            with contextlib.suppress(ValueError):
                self._before[number] = signal.getsignal(number)
                signal.signal(number, self._handle)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)


class SecondSignalEnds(_Signals):
    """The first signal interrupts the command as usual, so that it drains. The second one ends the process.

    Threads that compute would otherwise keep the process until their work is done.
    """

    def __init__(self) -> None:
        super().__init__()
        self._came = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._came:
            _end("a second interruption")
        self._came = True
        before = self._before[number]
        if not callable(before):
            raise KeyboardInterrupt
        before(number, frame)


class FirstSignalEnds(_Signals):
    """A signal ends the process, for imports of large libraries: an exception in the middle of torch's aborts it.

    Nothing may be half-written meanwhile.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._as_json = console.as_json

    def _handle(self, number: int, frame: FrameType | None) -> None:
        _end("an interruption", as_json=self._as_json)


def _end(got: str, *, as_json: bool = False) -> None:
    problem = Problem(code="interrupted", expected="to finish", got=got)
    with contextlib.suppress(OSError):  # sys.stdout and sys.stderr may be in use at this moment
        if as_json:
            os.write(1, json.dumps({"ok": False, "problems": [problem.as_json()]}).encode() + b"\n")
        os.write(2, f"splitbundle: {problem}\n".encode())
    os._exit(INTERRUPTED)
