"""splitbundle beside what people would use instead, and beside the machine's limit, in one interleaved run.

    python -m benchmarks decode
    python -m benchmarks prefill --model gpt2,qwen2-0.5b --rounds 7 --directory models --results measured

Each contender runs in fresh processes, on the same tokens, in turn (A B B A …): one round of all, then the next. Ratios
are taken round by round; tables have their medians, and their least and greatest. What a contender computes is first
held against transformers' logits; one that differs isn't timed. Files are read once before, so they are in the page
cache for everybody. Contenders that aren't installed are left out with a line on stderr. What is measured goes to
``benchmarks/results/`` or ``--results``: JSON, a table and a plot for each set, and whether the goals were reached.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import cases, file_sets, report, sets
from benchmarks.contenders import CONTENDERS
from benchmarks.files import Workshop
from benchmarks.processes import ROOT, Failed, say
from benchmarks.shapes import SHAPES

ALL = ("import", "size", "verify", "convert", "cold", "load", "prefill", "decode", "long", "batch", "shards", "memory")


def main() -> int:
    """Runs a set, writes what came, and prints the table, or JSON."""
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=lines[0], epilog="\n".join(lines[5:]))
    parser.add_argument("set", choices=(*ALL, "all"), metavar="SET", help=", ".join((*ALL, "all")))
    parser.add_argument("--model", metavar="NAME,NAME", help=f"of {', '.join(SHAPES)} (default: those of the set)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="this one alone")
    parser.add_argument("--only", metavar="NAME,NAME", help="of the contenders")
    parser.add_argument("--rounds", type=int, help="runs of each contender (default: that of the set)")
    parser.add_argument("--threads", type=int, default=2, help="that compute (default: %(default)s)")
    parser.add_argument("--directory", help="where the models are, or are made (default: a temporary one)")
    parser.add_argument("--results", help="where to write (default: benchmarks/results, if all of a set is run)")
    parser.add_argument("--lock", metavar="FILE", help="hold this file's lock during each round: others measure, too")
    parser.add_argument("--json", action="store_true", help="print what was measured as JSON")
    args = parser.parse_args()
    models = None if args.model is None else tuple(args.model.split(","))
    if models and not set(models) <= SHAPES.keys():
        parser.error(f"--model: one of {', '.join(SHAPES)}")
    only = None if args.only is None else tuple(args.only.split(","))
    if only and not set(only) <= CONTENDERS.keys():
        parser.error(f"--only: of {', '.join(CONTENDERS)}")
    part = args.model or args.dtype or args.only or args.rounds or args.threads != 2
    if args.results is None and part:
        parser.error(
            "--results: what is published in benchmarks/results is of whole sets; say where this part is to go"
        )
    results = Path(args.results or ROOT / "benchmarks" / "results")
    with tempfile.TemporaryDirectory(prefix="splitbundle-benchmark-") as temporary:
        measuring = cases.Measuring(
            workshop=Workshop(Path(args.directory or temporary)),
            threads=args.threads,
            rounds=args.rounds,
            only=only,
            lock=args.lock,
        )
        documents = []
        for name in ALL if args.set == "all" else (args.set,):
            for document in _measured(name, models, args.dtype, measuring):
                report.write(document, results)
                documents.append(document)
                if not args.json:
                    print(report.markdown([document]), flush=True)
    report.write_pages(results)
    if args.json:
        print(json.dumps(documents))
    return 0 if documents else 1


def _measured(name: str, models: tuple[str, ...] | None, dtype: str | None, measuring: cases.Measuring) -> Any:
    """The documents of a set, one after the other; a line for each that can't be."""
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
