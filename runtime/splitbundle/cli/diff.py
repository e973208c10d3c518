"""The command ``diff``: compare two bundles. ``cli/comparison.py`` writes the result for people."""

from __future__ import annotations

import argparse
from typing import Final

from splitbundle.bundle import Bundle
from splitbundle.cli.comparison import write
from splitbundle.cli.console import Command, Console
from splitbundle.comparison.records import ASPECTS, NO_TORCH, Comparison
from splitbundle.errors import BundleError, VerificationError, within
from splitbundle.format.names import SUMS
from splitbundle.opening import open_bundle

DIFFERENT: Final = 3


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a .splitbundle directory")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument(
        "--only",
        metavar="ASPECTS",
        type=lambda text: text.split(","),
        help=f"compare only these, with commas between them: {', '.join(ASPECTS)}",
    )
    parser.add_argument("--tensors", action="store_true", help="show a line for each tensor, not only for each layer")
    parser.add_argument(
        "--verify", action="store_true", help="first check the digests of both bundles' files that are here"
    )


def _run(args: argparse.Namespace, console: Console) -> int:
    a, b = (open_bundle(place, progress=console.transfer) for place in (args.a, args.b))
    if args.verify:
        for bundle in (a, b):
            _verify(bundle, console)
    comparison = a.diff(b, only=args.only, progress=console.progress)
    console.end_progress()
    if _lacks_torch(comparison):
        console.note('torch compares the values of weights, and it isn\'t installed: pip install "splitbundle[torch]"')
    write(comparison, (a, b), (args.a, args.b), console, tensors=args.tensors)
    console.json({"ok": True, **comparison.as_json()})
    return DIFFERENT if comparison.differs else 0


def _verify(bundle: Bundle, console: Console) -> None:
    """Check every file that is here. A partial bundle lacks some, and perhaps SHA256SUMS.

    Raises:
        VerificationError: a file isn't the one that the manifest lists.
    """
    try:
        bundle.verify(progress=console.progress)
    except BundleError as error:
        absent = set(bundle.absent())
        lacking = absent | {SUMS} if absent else absent
        problems = [each for each in error.problems if each.code != "file.missing" or each.file not in lacking]
        if problems:
            raise VerificationError(within(BundleError(problems), bundle.path)) from error


def _lacks_torch(comparison: Comparison) -> bool:
    return comparison.weights is not None and any(unit.not_compared == NO_TORCH for unit in comparison.weights.units)


COMMAND: Final = Command(
    name="diff",
    help="compare two bundles; the exit status is 3 if something differs",
    configure=_add_arguments,
    run=_run,
)
