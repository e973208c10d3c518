"""The command ``completion``: print a script with which a shell completes commands, options and paths."""

from __future__ import annotations

import argparse
import importlib.util
from typing import Final

from splitbundle.cli.console import Command, Console
from splitbundle.errors import MissingExtra

SHELLS: Final = ("bash", "zsh", "tcsh", "fish")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")


def _run(args: argparse.Namespace, console: Console) -> int:
    if importlib.util.find_spec("shtab") is None:
        raise MissingExtra.of("shtab", "completion", "write a script for a shell")
    import shtab

    if args.shell not in shtab.SUPPORTED_SHELLS:
        raise MissingExtra.of(f"shtab, in a version that knows {args.shell}", "completion", "write a script for it")
    parser, parsers = args.every_parser()
    for own in parsers.values():
        for action in own._actions:
            if action.dest in ("bundle", "source", "output"):
                action.complete = shtab.DIRECTORY
    script = shtab.complete(parser, shell=args.shell)
    console.stream(script if script.endswith("\n") else f"{script}\n")
    console.json({"ok": True, "shell": args.shell, "script": script})
    return 0


COMMAND: Final = Command(
    name="completion",
    help="print a script that completes this command in a shell",
    configure=_add_arguments,
    run=_run,
)
