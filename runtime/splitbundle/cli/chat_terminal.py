"""How a chat reads questions and shows answers, on a terminal and through a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from splitbundle.cli.console import Console
from splitbundle.stages.text_generation import TextGeneration

END_KEY: Final = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D"
"""What ends the input on a terminal."""
_QUOTES: Final = '"""'


class View:
    """Show an answer piece by piece, and what the model thinks apart from it."""

    def __init__(self, console: Console, *, hidden: bool) -> None:
        self._console, self._hidden = console, hidden
        self._thinks: bool | None = None
        self._colors = console.colors
        self._thought = False  # and nothing of an answer has come after it

    def show(self, thinks: bool, text: str) -> None:
        """Show a piece."""
        self._console.json({"thinking" if thinks else "text": text})
        if thinks:
            self._thought = True
        elif self._thought:
            text = text.lstrip("\n")  # what stands between the thinking and the answer
            self._thought = not text
        if not text or (thinks and self._hidden):
            return
        if thinks != self._thinks:
            if thinks:
                self._console.stream("\033[2m" if self._colors else "[thinking]\n")
            elif self._thinks:
                self._console.stream("\033[0m\n" if self._colors else "\n[answer]\n")
            self._thinks = thinks
        self._console.stream(text)

    def end(self) -> None:
        """End the answer with a line end."""
        self._console.stream("\033[0m\n" if self._thinks and self._colors else "\n")


@contextmanager
def interruptible(generation: TextGeneration) -> Iterator[None]:
    """Let the first Ctrl-C end the generation before its next token. A second one raises KeyboardInterrupt."""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True
        generation.cancel()

    with handling(stop):
        yield


@contextmanager
def handling(handler: Any) -> Iterator[None]:
    """Handle Ctrl-C in another way during the block."""
    try:
        before = signal.signal(signal.SIGINT, handler)
    except ValueError:  # not in the main thread: the calling program handles its signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def questions(console: Console) -> Iterator[str]:
    """Yield what the user writes: a line, or several lines, until the end of the input. It also ends a text."""
    terminal = on_terminal(console)
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then has a history, and keys that edit
    while True:
        try:
            line = _line("> ", terminal)
            if line is None:
                return
            if line.strip() == _QUOTES:
                lines = []
                while (more := _line("… ", terminal)) is not None and more.strip() != _QUOTES:
                    lines.append(more)
                line = "\n".join(lines)
            while line.endswith("\\"):
                line = line[:-1] + "\n" + (_line("… ", terminal) or "")
        except UnicodeDecodeError:
            console.note("This line isn't UTF-8. It was left out.")
            continue
        except KeyboardInterrupt as error:
            if not terminal or type(error) is not KeyboardInterrupt:  # SIGTERM raises a subclass
                raise
            console.note(f"To end, write /exit, or press {END_KEY}.")
            continue
        yield line


def on_terminal(console: Console) -> bool:
    """Return whether the user writes on a terminal."""
    return sys.stdin is not None and sys.stdin.isatty() and not console.as_json


def _line(prompt: str, terminal: bool) -> str | None:
    """Return a line without its end, or None at the end of the input."""
    if terminal:
        try:
            # Python keeps bytes that aren't UTF-8 as surrogates where the locale is C.
            return input(prompt).encode("utf-8", "surrogateescape").decode("utf-8")
        except EOFError:
            return None
    line = sys.stdin.buffer.readline() if sys.stdin is not None else b""
    return line.decode("utf-8", "replace").rstrip("\r\n") if line else None
