"""Measure splitbundle beside its alternatives, and beside the machine's limit, in one interleaved run.

    python -m benchmarks decode
    python -m benchmarks prefill --model gpt2,qwen2-0.5b --rounds 7 --directory models --results measured

Each contender runs in fresh processes, on the same tokens. The contenders run in turn (A B B A …), round by round. Each
round gives its own ratios; tables have the median, the least and the greatest ratio. Before the rounds, each
contender's logits are compared with those of transformers; a contender with different logits is not timed. All files
are read once before, so they are in the page cache for all contenders. A contender that is not installed is left out
with a line on stderr. The results go to ``benchmarks/results/`` or ``--results``: JSON, a table and a picture for
each set, and whether the goals were reached. Exit status: 0 done, 1 nothing could be measured, 2 called wrongly, 4 a
library is missing, 130 interrupted. After an interruption, the complete rounds of the current case are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import cases, file_sets, report, sets
from benchmarks.contenders import CONTENDERS
from benchmarks.files import Workshop
from benchmarks.processes import ROOT, Failed, Missing, require, say
from benchmarks.shapes import SHAPES

ALL = (
    "import",
    "size",
    "verify",
    "resplit",
    "convert",
    "cold",
    "load",
    "prefill",
    "decode",
    "long",
    "batch",
    "shards",
    "memory",
    "contention",
    "experts",
    "quantized",
)


class _Parser(argparse.ArgumentParser):
    """A parser that prints an error on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main() -> int:
    """Run a set, write the results, and print a table or JSON. Return the exit status."""
    args = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="splitbundle-benchmark-") as temporary:
            return _run(args, Path(args.directory or temporary))
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Missing as error:
        say(str(error))
        return 4
    except (Failed, OSError) as error:
        say(f"failed: {error}")
        return 1


def _arguments() -> argparse.Namespace:
    lines = __doc__.splitlines()
    parser = _Parser(prog="python -m benchmarks", description=lines[0], epilog="\n".join(lines[5:]))
    parser.add_argument("set", choices=(*ALL, "all"), metavar="SET", help=", ".join((*ALL, "all")))
    names = _names(SHAPES)
    parser.add_argument("--model", type=names, metavar="NAME,NAME", help=f"of {', '.join(SHAPES)} (default: the set's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="measure only this dtype")
    parser.add_argument("--only", type=_names(CONTENDERS), metavar="NAME,NAME", help="measure only these contenders")
    parser.add_argument("--rounds", type=_count, help="runs of each contender (default: that of the set)")
    parser.add_argument("--threads", type=_count, default=2, help="computing threads (default: %(default)s)")
    path = os.path.abspath  # the measured processes run in another directory
    parser.add_argument("--directory", type=path, help="directory of the models (default: a temporary one)")
    parser.add_argument("--results", type=path, help="where to write (default: benchmarks/results, for whole sets)")
    parser.add_argument(
        "--lock", type=path, metavar="FILE", help="lock this file during each round, if other runs measure too"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    args = parser.parse_args()
    if args.set in file_sets.NAMES and (args.dtype == "bfloat16" or args.only):
        parser.error(f"{args.set} is measured in float32 and of everybody: it takes no --dtype bfloat16 and no --only")
    part = args.model or args.dtype or args.only or args.rounds or args.threads != 2
    if args.results is None and part:
        parser.error("--results: benchmarks/results is for whole sets unless it is named; say where this part is to go")
    return args


def _names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)!r} isn't one of {', '.join(known)}")
        return found

    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of 1 or more")
    return int(text)


def _run(args: argparse.Namespace, directory: Path) -> int:
    chosen = [name for name in (ALL if args.set == "all" else (args.set,)) if args.set != "all" or _takes(name, args)]
    require("splitbundle")
    if {*chosen} - {"import", "size", "verify", "resplit"}:  # the last three need them only to make a bundle
        require("torch", "transformers", "safetensors")
    results = Path(args.results or ROOT / "benchmarks" / "results")
    _writable("--directory", directory)
    _writable("--results", results)
    if args.lock:
        _writable("--lock", Path(args.lock))
    measuring = cases.Measuring(
        workshop=Workshop(directory),
        threads=args.threads,
        rounds=args.rounds,
        only=args.only,
        lock=args.lock,
    )
    documents = []
    try:
        for name in chosen:
            for document in _measured(name, args.model, args.dtype, measuring):
                report.write(document, results)
                documents.append(document)
                if not args.json:
                    print(report.markdown([document]), flush=True)
                if document["interrupted"]:
                    raise KeyboardInterrupt
    finally:
        if documents:
            report.write_pages(results)
            if args.json:
                print(json.dumps(documents))
    if not documents:
        raise Failed("nothing was measured")
    return 0


def _takes(name: str, args: argparse.Namespace) -> bool:
    """Return whether a set supports the options. If it does not, print a line on stderr."""
    if name in file_sets.NAMES and (args.dtype == "bfloat16" or args.only):
        say(f"left out: {name}: it is measured in float32 and of everybody")
        return False
    return True


def _writable(option: str, path: Path) -> None:
    """Check before the measurements that a directory, or a lock file, can be written.

    Raises:
        Failed: It can't be written.
    """
    try:
        if option == "--lock":
            with open(path, "a"):
                pass
        else:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
    except OSError as error:
        raise Failed(f"{option}: {path} can't be written: {error.strerror}") from None


def _measured(name: str, models: tuple[str, ...] | None, dtype: str | None, measuring: cases.Measuring) -> Any:
    """Yield the documents of a set. Print a line on stderr for each case that can't be measured."""
    if name in file_sets.NAMES:
        for model in file_sets.cases(name, models):
            try:
                yield measuring.of_files(name, model)
            except Failed as error:
                say(f"left out: {name} {model}: {error}")
        return
    for case in sets.chosen(name, models, dtype):
        try:
            yield measuring.of_models(case)
        except Failed as error:
            say(f"left out: {name} {case.model} {case.dtype}: {error}")


if __name__ == "__main__":
    sys.exit(main())
