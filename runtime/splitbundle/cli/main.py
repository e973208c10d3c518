"""The command ``splitbundle``: it takes arguments and returns an exit status."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

from splitbundle.cli.commands import COMMANDS
from splitbundle.cli.console import Command, Console
from splitbundle.cli.exit_status import FAILURE, INTERRUPTED, USAGE, exit_status
from splitbundle.cli.words import as_usage, in_command
from splitbundle.errors import BundleError, Problem
from splitbundle.version import FORMAT_VERSION, __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status (docs/contributing/command-line.md has the list)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
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
    with _Interruption() as interruption:
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
            # The reader of the output has closed it. Python would complain again when it flushes at its end.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILURE
        except (OSError, MemoryError) as error:
            caught, got = error, f"{type(error).__name__}: {error}"
            problems, status = (Problem(code="system", expected="no error from the system", got=got),), FAILURE
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # users get one line, and the rest with --debug
            caught, got = error, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            hint = "This shouldn't happen: --debug shows where it did"
            problems, status = (Problem(code="internal", expected="no error here", got=got, hint=hint),), FAILURE
    # Some libraries turn an interruption into an error of their own.
    if interruption.came or isinstance(caught, KeyboardInterrupt):
        problems, status = (Problem(code="interrupted", expected="to finish", got="an interruption"),), INTERRUPTED
    console.end_progress()
    problems = tuple(in_command(problem) for problem in problems)
    console.json({"ok": False, "problems": [problem.as_json() for problem in problems]})
    for problem in problems:
        console.error(str(problem))
    if args is not None and args.debug:
        import traceback

        traceback.print_exception(caught)
    return status


def _every_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    return build_parsers(all_commands())


class Terminated(KeyboardInterrupt):
    """SIGTERM came, or SIGBREAK of Windows. A command that goes on after Ctrl-C ends all the same."""


class _Interruption:
    """Raise KeyboardInterrupt on Ctrl-C, SIGTERM and SIGBREAK, so that half-written files are removed. Remember it."""

    def __init__(self) -> None:
        self.came = False
        self._before: dict[signal.Signals, Any] = {}

    def _interrupt(self, number: int, _: object) -> None:
        self.came = True
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

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
            sys.stdout.write(json.dumps({"ok": False, "problems": [problem.as_json()]}) + "\n")
        super().error(message)


def _parse(arguments: Sequence[str]) -> argparse.Namespace | None:
    """Return the parsed arguments, with the ``command`` and its ``parser``. Print help if there is no command."""
    parser, parsers = build_parsers(_commands(arguments))
    if not arguments:
        parser.print_help(sys.stderr)
        return None
    own = parsers.get(arguments[0])
    if own is None:
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
