"""The output of commands (data on stdout, progress and errors on stderr), and the type of a command."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final, TextIO

from splitbundle.cli.words import in_words
from splitbundle.errors import BundleError, Problem, printable
from splitbundle.records import record

QUIET_SECONDS: Final = 1.0
"""Work that ends sooner needs no progress."""


class Console:
    """The streams that a command writes to. Only ``chat`` uses a style."""

    def __init__(self, *, as_json: bool, quiet: bool, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.as_json = as_json
        # A process may run without stdout or stderr.
        self.out = out or sys.stdout or io.StringIO()
        self.err = err or sys.stderr or io.StringIO()
        self._quiet = quiet
        self._began = time.monotonic()
        self._terminal = self.err.isatty()
        self._what = ""
        self._shown = 0.0
        self._width = 0
        self._moving, self._moved, self._since = "", 0, 0.0

    def text(self, text: str) -> None:
        """Write a line of data for people. ``--json`` leaves it out."""
        self.stream(printable(text) + "\n")

    def stream(self, text: str) -> None:
        """Write the text of a model unchanged. ``--json`` leaves it out."""
        if not self.as_json:
            self._write(text)

    def json(self, value: object) -> None:
        """Write data for programs, one document a line, only with ``--json``."""
        if self.as_json:
            self._write(json.dumps(value) + "\n")

    def _write(self, text: str) -> None:
        try:
            self.out.write(text)
            self.out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            discard_output()  # the rest, and what Python writes at its end
            raise BundleError(output_problem(error)) from error

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Write aligned columns: text to the left, numbers (with separated thousands) to the right."""
        texts = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
        numeric = [bool(rows) and all(isinstance(row[i], int) for row in rows) for i in range(len(head))]
        widths = [max(len(head[i]), *(len(row[i]) for row in texts), 0) for i in range(len(head))]
        for row in ([*head], *texts):
            cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
            self.text("  " + "  ".join(cells).rstrip())

    def progress(self, what: str, done: int, total: int, detail: str = "") -> None:
        """Show progress: a changing line on a terminal; elsewhere a line for each step, then one every ten seconds."""
        now = time.monotonic()
        if self._quiet or (what == self._what and now - self._shown < (0.1 if self._terminal else 10.0)):
            return
        if not self._terminal and now - self._began < QUIET_SECONDS:
            return
        line = what if what != self._what or not total else f"{what} {100 * done // total:3d} %  {detail}".rstrip()
        self._what, self._shown = what, now
        if self._terminal:
            self.err.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self.err.write(line + "\n")
        self.err.flush()

    def transfer(self, what: str, done: int, total: int) -> None:
        """Show the progress of a transfer, as ``progress`` does: its bytes, its rate, and the time that is left."""
        now = time.monotonic()
        if what != self._moving:
            self._moving, self._moved, self._since = what, done, now
        rate = (done - self._moved) / max(now - self._since, 1e-3)
        detail = f"{in_bytes(done)} of {in_bytes(total)}"
        if now - self._since >= QUIET_SECONDS and rate > 0:
            detail += f", {in_bytes(round(rate))}/s, {max(total - done, 0) / rate:.0f} s left"
        self.progress(what, done, total, detail)

    def end_progress(self) -> None:
        """Remove the changing line."""
        if self._width:
            self.err.write("\r" + " " * self._width + "\r")
            self._width = 0
            self.err.flush()

    def note(self, text: str) -> None:
        """Write a note for people to stderr."""
        self.end_progress()
        if not self._quiet:
            self.err.write(printable(text) + "\n")

    def note_lines(self, text: str) -> None:
        """Write a text of several lines for people to stderr."""
        for line in text.splitlines():
            self.note(line)

    @property
    def colors(self) -> bool:
        """Return whether stdout is a terminal that shows styles, and the user wants them."""
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
        return self.out.isatty() and not plain and not self.as_json

    def collect(self, notes: list[str]) -> Callable[[str], None]:
        """Return a function that adds a sentence to ``notes``, in the words of the command, and writes it as a note."""

        def note(text: str) -> None:
            notes.append(in_words(text))
            self.note(f"note: {notes[-1]}")

        return note

    def error(self, text: str) -> None:
        """Write an error to stderr."""
        self.end_progress()
        self.err.write(f"splitbundle: {text}\n")


def output_problem(error: Exception) -> Problem:
    """Return the problem of a stdout that can't be written."""
    got = f"{type(error).__name__}: {error}"
    return Problem(code="system", argument="stdout", expected="to write the output", got=got)


def discard_output() -> None:
    """Send what is still written to stdout nowhere. Python flushes stdout at its end, and would show a traceback."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it has no file, or is closed, or isn't there
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def in_bytes(number: int) -> str:
    """Return a number of bytes for people, in powers of 1000."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} bytes"


@record(frozen=True, slots=True, kw_only=True)
class Command:
    """A subcommand. Entry points of the group ``splitbundle.commands`` have this type."""

    name: str
    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Console], int]


def timed_notes(console: Console) -> Callable[[str], None]:
    """Return a function that notes a line with the time before it."""

    def log(line: str) -> None:
        console.note(f"{datetime.datetime.now().astimezone().isoformat(timespec='seconds')} {line}")

    return log
