"""The command ``kernels``: show, and export, which kernels multiply a few rows by weights on this machine."""

from __future__ import annotations

import argparse
from typing import Final

from splitbundle.backends import registry
from splitbundle.cli.arguments import add_threads_argument
from splitbundle.cli.console import Command, Console


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_threads_argument(parser)


def _run(args: argparse.Namespace, console: Console) -> int:
    choice = registry.module("torch", "kernel_choice")
    kernels = registry.module("torch", "kernels")
    threads = registry.module("torch", "threads")
    given = threads.checked(args.threads)
    with threads.using(given):
        number = threads.for_call(given)
        chosen = kernels.chosen()
        rates = {key: kernels.measured.rates.get((key, number), {}) for key in chosen}
    for key, kernel in chosen.items():
        said = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in rates[key].items())
        console.note(f"{key:18} {kernel:8} {f'GB of weights a second: {said}' if said else ''}".rstrip())
    console.text(f"export {choice.VARIABLE}={choice.as_text(chosen)}")
    console.json({"ok": True, "threads": number, "kernels": choice.as_text(chosen), "bytes_per_second": rates})
    return 0


COMMAND: Final = Command(
    name="kernels",
    help="show which of torch's kernels multiply fastest here, as a variable that pins them",
    configure=_add_arguments,
    run=_run,
)
