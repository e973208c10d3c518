"""The command ``cast``: store the weights of a bundle in another dtype."""

from __future__ import annotations

import argparse
from typing import Final

from splitbundle.backends import registry
from splitbundle.cli.arguments import add_threads_argument
from splitbundle.cli.console import Command, Console
from splitbundle.format.dtypes import WEIGHTS
from splitbundle.opening import open_bundle


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory with all weights")
    parser.add_argument("--dtype", choices=WEIGHTS, required=True, help="the dtype of the stored weights")
    parser.add_argument("--output", "-o", metavar="NAME.splitbundle", required=True, help="the new bundle")
    parser.add_argument(
        "--no-vectors", dest="vectors", action="store_false", help="compute no golden vectors from rounded weights"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle at --output")
    add_threads_argument(parser)


def _run(args: argparse.Namespace, console: Console) -> int:
    bundle = open_bundle(args.bundle, progress=console.transfer)
    noted: list[str] = []
    threads = registry.module("torch", "threads")
    with threads.using(threads.checked(args.threads)):
        made = bundle.cast(
            args.output,
            args.dtype,
            vectors=args.vectors,
            force=args.force,
            notes=console.collect(noted),
            progress=console.progress,
        )
    console.end_progress()
    size = sum(made.manifest.files[path].size for path in made.manifest.weight_files())
    vectors = made.manifest.vectors
    origin = None if vectors is None else "self" if vectors.of_itself else "original"
    of = {None: "none", "self": "computed from the new bundle itself", "original": "those of the original model"}
    console.text(f"{args.output}: weights in {args.dtype}, {size:,} bytes; golden vectors: {of[origin]}")
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
            "vectors_origin": origin,
            "notes": noted,
        }
    )
    return 0


COMMAND: Final = Command(
    name="cast", help="store the weights of a bundle in another dtype", configure=_add_arguments, run=_run
)
