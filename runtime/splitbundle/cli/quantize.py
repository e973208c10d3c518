"""The command ``quantize``: store the matrices of a bundle in 8 or 4 bits, and report what that changed."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any, Final

from splitbundle.backends import registry
from splitbundle.cli.arguments import add_threads_argument
from splitbundle.cli.console import Command, Console
from splitbundle.errors import BundleError, Problem
from splitbundle.opening import open_bundle

KINDS: Final = ("int4", "int8")
GROUPS: Final = (32, 64, 128)
METHODS: Final = ("search", "rtn", "gptq")
ROW: Final = 512
"""The tokens of one row of a text that calibrates."""
ROWS: Final = 32
"""The most rows that calibrate. More of them change the result little, and take time."""
BAR: Final = 32
"""The length of the longest bar of the plot, in characters."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory with all weights, none of them quantized")
    parser.add_argument("--output", "-o", metavar="NAME.splitbundle", required=True, help="the new bundle")
    parser.add_argument("--to", choices=KINDS, default="int4", help="the bits of a number (default: %(default)s)")
    parser.add_argument(
        "--group",
        type=int,
        choices=GROUPS,
        help=f"for int4: how many numbers share a scale (default: {GROUPS[0]})",
    )
    parser.add_argument(
        "--keep",
        type=lambda text: [part for part in text.split(",") if part],
        metavar="PART,…",
        default=[],
        help="parts that stay as they are, such as head, layers.0, mlp.down or down_proj",
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="search",
        help="how 4 bits are chosen: the scale with the least error, the nearest number, or by the inputs of each layer"
        " (default: %(default)s)",
    )
    parser.add_argument("--calibration", metavar="FILE", help="for gptq: a text; by default the golden prompts")
    parser.add_argument("--text", metavar="FILE", help="report how well the model predicts this text before and after")
    parser.add_argument("--no-report", dest="report", action="store_false", help="measure nothing")
    parser.add_argument("--no-vectors", dest="vectors", action="store_false", help="compute no golden vectors")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle at --output")
    add_threads_argument(parser)


def _run(args: argparse.Namespace, console: Console) -> int:
    bundle = open_bundle(args.bundle, progress=console.transfer)
    if args.calibration is not None and (args.method, args.to) != ("gptq", "int4"):
        raise _usage("--calibration", "--to int4 --method gptq, which calibrates", f"{args.to}, {args.method}")
    if args.group is not None and args.to != "int4":
        raise _usage("--group", "--to int4, whose numbers share scales in groups", args.to)
    if args.text is not None and not args.report:
        raise _usage("--text", "a report", "--no-report")
    calibration = None if args.calibration is None else _rows(bundle, args.calibration, "--calibration")
    text = None if args.text is None else _ids(bundle, args.text, "--text")
    noted: list[str] = []
    threads = registry.module("torch", "threads")
    with threads.using(threads.checked(args.threads)):
        made = bundle.quantize(
            args.output,
            args.to,
            group=args.group or GROUPS[0],
            keep=args.keep,
            method=args.method,
            calibration=calibration,
            vectors=args.vectors,
            force=args.force,
            notes=console.collect(noted),
            progress=console.progress,
        )
        reports = registry.module("torch", "quantization_report")
        report = reports.measure(bundle, made, text, console.progress) if args.report else None
    console.end_progress()
    size = sum(made.manifest.files[path].size for path in made.manifest.weight_files())
    used = Counter(made.manifest.storage.encodings.values())
    counts = ", ".join(f"{count} in {name}" for name, count in sorted(used.items()))
    console.text(f"{args.output}: {size:,} bytes of weights; matrices: {counts}")
    if report is not None:
        _show(report, console)
    console.text(f"  fingerprint {made.fingerprint}")
    console.text(f"  bundle id   {made.id}")
    console.json(
        {
            "ok": True,
            "path": str(args.output),
            "bundle_id": made.id,
            "fingerprint": made.fingerprint,
            "parent": made.manifest.model.parent,
            "bytes": size,
            "encodings": made.manifest.storage.encodings,
            "report": None if report is None else report.as_json(),
            "notes": noted,
        }
    )
    return 0


def _show(report: Any, console: Console) -> None:
    share = report.bytes_after / report.bytes_before
    console.text(f"  {report.bits_per_weight:.3f} bits a number; {share:.1%} of {report.bytes_before:,} bytes")
    console.text(f"  {report.quantized:,} of {report.parameters:,} numbers are quantized")
    largest = max((part.hidden or part.weight for part in report.parts), default=0.0)
    console.text(f"  {'part':14} {'weights':>8} {'results':>8}   the relative error of the weights, and of the results")
    for part in report.parts:
        shown = part.weight if part.hidden is None else part.hidden
        bar = "#" * round(BAR * shown / largest) if largest else ""
        hidden = "" if part.hidden is None else f"{part.hidden:.4f}"
        console.text(f"  {part.part:14} {part.weight:8.4f} {hidden:>8}   {bar}".rstrip())
    text = report.text
    if text is not None:
        change = text.perplexity_after / text.perplexity_before - 1
        before, after = text.perplexity_before, text.perplexity_after
        console.text(f"  {text.tokens:,} tokens: perplexity {before:.4f} before, {after:.4f} after ({change:+.2%})")
        console.text(
            f"  divergence {text.divergence:.5f} a token; the likeliest token is the same for {text.same_first:.1%}"
        )


def _ids(bundle: Any, path: str, option: str) -> list[int]:
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise _usage(option, "a file that can be read", f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise _usage(option, "a text in UTF-8", "other bytes") from None
    ids: list[int] = bundle.tokenizer().encode(text)
    if len(ids) < 2:
        raise _usage(option, "a text of at least two tokens", f"{len(ids)}")
    return ids


def _rows(bundle: Any, path: str, option: str) -> list[list[int]]:
    row = min(ROW, bundle.architecture.position_limit or ROW, bundle.manifest.model.context_length or ROW)
    ids = _ids(bundle, path, option)[: row * ROWS]
    return [ids[start : start + row] for start in range(0, len(ids), row)]


def _usage(argument: str, expected: str, got: str) -> BundleError:
    return BundleError(Problem(code="usage.arguments", argument=argument, expected=expected, got=got))


COMMAND: Final = Command(
    name="quantize",
    help="store the matrices of a bundle in 8 or 4 bits, and report what that changed",
    configure=_add_arguments,
    run=_run,
)
