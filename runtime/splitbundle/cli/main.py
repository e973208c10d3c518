"""The command ``splitbundle``: it takes arguments and returns an exit status."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, Final, NoReturn

from splitbundle.cli.commands import COMMANDS
from splitbundle.cli.console import Command, Console, discard_output, output_problem
from splitbundle.cli.exit_status import FAILURE, INTERRUPTED, OK, USAGE, exit_status
from splitbundle.cli.words import as_usage, in_command
from splitbundle.errors import BundleError, Problem, broken_library
from splitbundle.version import FORMAT_VERSION, __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status (docs/contributing/command-line.md has the list)."""
    arguments = _command_first(sys.argv[1:] if argv is None else list(argv))
    try:
        return _flushed(_run(arguments))
    except SystemExit as left:  # argparse ends so, also after --help
        raise SystemExit(_flushed(left.code if isinstance(left.code, int) else OK)) from None


def _run(arguments: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        # A character that a terminal or pipe can't show mustn't end the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            if sys.platform == "win32" and not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
                stream.reconfigure(encoding="utf-8")  # the code page lacks most characters that a model writes
    _Parser.as_json = "--json" in arguments
    args: argparse.Namespace | None = None
    console = Console(as_json=_Parser.as_json, quiet=False)
    caught: BaseException
    with _Interruption(as_json=_Parser.as_json) as interruption:
        try:
            args = _parse(arguments)
            if args is None:
                return USAGE
            console = Console(as_json=args.json, quiet=args.quiet)
            status: int = args.command.run(args, console)
            console.end_progress()
            return status
        except BundleError as error:
            if args is not None:
                error = as_usage(error, args.parser)
            caught, problems, status = error, error.problems, exit_status(error)
        except BrokenPipeError:
            discard_output()  # its reader has closed it
            return FAILURE
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # users get one line, and the rest with --debug
            caught, (problems, status) = error, _unforeseen(error)
        # Some libraries turn an interruption into an error of their own.
        if interruption.came or isinstance(caught, KeyboardInterrupt):
            problems, status = (_INTERRUPTED,), INTERRUPTED
        interruption.reported = True
        console.end_progress()
        problems = tuple(in_command(problem) for problem in problems)
        with contextlib.suppress(OSError, BundleError):  # where stdout is what failed, stderr says so
            console.json(_document(*problems))
        for problem in problems:
            console.error(str(problem))
        if args is not None and args.debug:
            import traceback

            traceback.print_exception(caught)
        return status


def _unforeseen(error: BaseException) -> tuple[tuple[Problem, ...], int]:
    """Return the problems and the exit status for an error that no part of the command raised."""
    broken = broken_library(error, LIBRARIES) if isinstance(error, ImportError | OSError) else None
    if broken is not None:
        return broken.problems, exit_status(broken)
    if isinstance(error, OSError | MemoryError):
        got = f"{type(error).__name__}: {error}"
        return (Problem(code="system", expected="no error from the system", got=got),), FAILURE
    got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    hint = "This shouldn't happen: --debug shows where it did"
    return (Problem(code="internal", expected="no error here", got=got, hint=hint),), FAILURE


LIBRARIES: Final = (
    *("torch", "onnxruntime", "numpy", "tokenizers", "jinja2", "transformers", "safetensors", "onnx", "gguf"),
    *("grpc", "ray", "cryptography", "starlette", "uvicorn", "prometheus_client", "fsspec", "huggingface_hub"),
)
"""The optional libraries, one of which may be installed and broken."""
_INTERRUPTED: Final = Problem(code="interrupted", expected="to finish", got="an interruption")
_COMMON: Final = ("--json", "--quiet", "-q", "--debug")
"""The options that every command has. They may also stand before its name."""


def _document(*problems: Problem) -> dict[str, object]:
    """Return what ``--json`` writes for a command that failed."""
    return {"ok": False, "problems": [problem.as_json() for problem in problems]}


def _command_first(arguments: list[str]) -> list[str]:
    """Return the arguments with the options that every command has behind the command's name."""
    count = next((i for i, argument in enumerate(arguments) if argument not in _COMMON), 0)
    return [*arguments[count : count + 1], *arguments[:count], *arguments[count + 1 :]]


def _flushed(status: int) -> int:
    """Write what stdout still holds, and return the exit status. At Python's own end, an error would be a traceback."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        return status or FAILURE
    except (OSError, ValueError) as error:  # the latter where the calling program has closed it
        discard_output()
        if status == OK:
            Console(as_json=False, quiet=False).error(str(output_problem(error)))
            return FAILURE
    return status


def _every_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    return build_parsers(all_commands())


class Terminated(KeyboardInterrupt):
    """SIGTERM came, or SIGBREAK of Windows. A command that goes on after Ctrl-C ends all the same."""


class _Interruption:
    """Raise KeyboardInterrupt on Ctrl-C, SIGTERM and SIGBREAK, so that half-written files are removed. Remember it.

    A second signal ends the process at once: who sends it doesn't want to wait until these files are removed.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.came = False
        self.reported = False
        """Whether the command has begun to say how it ended."""
        self._as_json = as_json
        self._before: dict[signal.Signals, Any] = {}

    def _interrupt(self, number: int, _: object) -> None:
        if self.came or self.reported:
            self._end()
        self.came = True
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    def _end(self) -> NoReturn:
        """End the process. A stream may be in the middle of a line, so this writes past its buffer."""
        said = [(sys.stderr, f"splitbundle: {_INTERRUPTED}\n")]
        if self._as_json:
            said.insert(0, (sys.stdout, json.dumps(_document(_INTERRUPTED)) + "\n"))
        for stream, text in () if self.reported else said:
            self.reported = True  # a third signal doesn't wait for a reader
            with contextlib.suppress(OSError, AttributeError):  # a stream without a file, or none
                os.write(stream.fileno(), text.encode())
        os._exit(INTERRUPTED)

    def __enter__(self) -> _Interruption:
        # Ctrl-Break, and a console that is closed: on Windows no other process can send SIGTERM.
        more = [signal.Signals(signal.SIGBREAK)] if hasattr(signal, "SIGBREAK") else []
        for number in (signal.SIGINT, signal.SIGTERM, *more):
            with contextlib.suppress(ValueError):  # not in the main thread: the calling program handles its signals
                self._before[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Parser(argparse.ArgumentParser):
    """An argument parser that reports errors as JSON too, with ``--json``."""

    as_json = False
    plain: ClassVar[dict[str, str]] = {}
    """The stand-ins of arguments after ``--``, which a message must not show."""

    def error(self, message: str) -> NoReturn:
        for name, argument in self.plain.items():
            message = message.replace(name, argument).replace(ascii(name)[1:-1], argument)
        if self.as_json:
            problem = Problem(code="usage.arguments", expected=" ".join(self.format_usage().split()), got=message)
            with contextlib.suppress(OSError, BundleError):  # stderr says the same
                Console(as_json=True, quiet=False).json(_document(problem))
        super().error(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is not None and file is sys.stdout:  # argparse would hide that it can't be written
            Console(as_json=False, quiet=False).stream(message)
        else:
            super()._print_message(message, file)


def _parse(arguments: Sequence[str]) -> argparse.Namespace | None:
    """Return the parsed arguments, with the ``command`` and its ``parser``. Print help if there is no command."""
    parser, parsers = build_parsers(_commands(arguments))
    if not arguments:
        parser.print_help(sys.stderr)
        return None
    own = parsers.get(arguments[0])
    if own is None:
        name = next((argument for argument in arguments if argument in parsers), None)
        if name is not None and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version"):
            at = arguments.index(name)
            right = shlex.join(["splitbundle", name, *arguments[:at], *arguments[at + 1 :]])
            parser.error(f"the command's name comes before its options: {right}")
        parser.parse_args(arguments)  # --help, --version, or an error
        parser.error(f"a command comes first, got {arguments[0]!r}")
    return _parse_in_any_order(own, arguments[1:])


def _parse_in_any_order(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse options that may stand before, between and after the other arguments.

    After ``--`` there are no options. ``parse_intermixed_args`` parses twice and forgets that, so it sees stand-ins for
    what comes after ``--``. No argument of a process has the character NUL.
    """
    at = arguments.index("--") if "--" in arguments else len(arguments)
    after = arguments[at + 1 :]
    plain = {f"\0{i}": argument for i, argument in enumerate(after) if argument.startswith("-")}
    names = {argument: name for name, argument in plain.items()}
    _Parser.plain = plain
    given = [*arguments[:at], *(names.get(argument, argument) for argument in after)]
    args = parser.parse_intermixed_args(given, argparse.Namespace(parser=parser, every_parser=_every_parser))
    if getattr(args, "output", None) == "":  # it would mean the current directory
        parser.error("argument --output/-o: expected a path, got an empty text")
    if "://" in (getattr(args, "output", None) or ""):
        parser.error("argument --output/-o: expected a path of this machine; splitbundle push sends a bundle away")
    for name, value in vars(args).items():
        if isinstance(value, str) and value in plain:
            setattr(args, name, plain[value])
    return args


def build_parsers(commands: Sequence[Command]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser that lists the commands, and the parser of each command by its name."""
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="write JSON to stdout")
    common.add_argument("--quiet", "-q", action="store_true", help="no progress and no notes on stderr")
    common.add_argument("--debug", action="store_true", help="show a traceback where something fails")
    parser = _Parser(
        prog="splitbundle", description="Run or train a part of a transformer: convert, inspect, verify, generate."
    )
    newest = ".".join(map(str, FORMAT_VERSION))
    parser.add_argument("--version", action="version", version=f"splitbundle {__version__}, bundle format {newest}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    own: dict[str, argparse.ArgumentParser] = {}
    for command in commands:
        own[command.name] = subparsers.add_parser(
            command.name, help=command.help, description=command.help, parents=[common]
        )
        command.configure(own[command.name])
        own[command.name].set_defaults(command=command)
    return parser, own


def _commands(arguments: Sequence[str]) -> list[Command]:
    """Return the runtime's own commands and, if they may be needed, those of other packages."""
    if any(argument == command.name for argument in arguments[:1] for command in COMMANDS):
        return list(COMMANDS)  # a search for entry points reads the metadata of every installed package
    return all_commands()


def all_commands() -> list[Command]:
    """Return the commands of other packages, and the runtime's own."""
    from importlib.metadata import entry_points

    found = {entry.name: entry for entry in entry_points(group="splitbundle.commands")}
    return [*(found[name].load() for name in sorted(found)), *COMMANDS]
