"""The command ``kernels``: show, and export, which kernels multiply a few rows by weights on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Final

from splitbundle.backends import registry
from splitbundle.cli.arguments import add_compute_arguments
from splitbundle.cli.console import Command, Console


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_compute_arguments(parser)


def _run(args: argparse.Namespace, console: Console) -> int:
    choice = registry.module("torch", "kernel_choice")
    kernels = registry.module("torch", "kernels")
    threads = registry.module("torch", "threads")
    given = threads.checked(args.threads)
    with threads.using(given):
        number = threads.for_call(given)
        pinned, by = _pinned(choice, args.kernels)
        chosen = pinned or {key: kernels.measured.kernel(key) for key in choice.KERNELS}
        rates = {key: {} if by else kernels.measured.rates.get((key, number), {}) for key in chosen}
    for key, kernel in chosen.items():
        said = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in rates[key].items())
        how = f"pinned by {by}" if by else f"measured, in GB of weights a second: {said}" if said else "by a rule"
        console.note(f"{key:22} {kernel:8} {how}")
    console.text(f"export {choice.VARIABLE}={choice.as_text(chosen)}")
    console.json(
        {
            "ok": True,
            "threads": number,
            "kernels": choice.as_text(chosen),
            "pinned_by": by,
            "bytes_per_second": rates,
        }
    )
    return 0


def _pinned(choice: Any, given: str | None) -> tuple[Mapping[str, str] | None, str | None]:
    """Return the kernels that the option or the variable pins, and its name; None for those that are measured."""
    if given is not None:
        named = choice.parse(given)
        return named, None if named is None else "--kernels"
    named = choice.from_environment()
    return named, None if named is None else choice.VARIABLE


COMMAND: Final = Command(
    name="kernels",
    help="show which of torch's kernels multiply fastest here, or which are pinned, as a variable that pins them",
    configure=_add_arguments,
    run=_run,
)
