"""The commands ``files``, ``extract`` and ``merge``: take shards to another machine, and join them again."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from splitbundle.bundle import Bundle
from splitbundle.cli.console import Command, Console
from splitbundle.errors import BundleError
from splitbundle.opening import merge_bundles, open_bundle
from splitbundle.partial.shard_files import UNLISTED
from splitbundle.records import replace
from splitbundle.storage.files import missing
from splitbundle.storage.signature_files import signature_files


def _add_shards(parser: argparse.ArgumentParser, *, required: bool) -> None:
    what = "a shard to take; may be given several times" + ("" if required else "; by default all files that are there")
    parser.add_argument("--shard", metavar="NAME", action="append", required=required, help=what)


def _files_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory")
    _add_shards(parser, required=False)
    parser.add_argument("--verify", action="store_true", help="also the golden vectors, which verify --run needs")
    parser.add_argument("--text", action="store_true", help="also the tokenizer")


def _files(args: argparse.Namespace, console: Console) -> int:
    bundle = open_bundle(args.bundle, shard=(), progress=console.transfer)
    gone = set(bundle.absent())
    if args.shard is None:
        paths = [*UNLISTED, *(path for path in bundle.manifest.files if path not in gone)]
        paths += signature_files(bundle.path)
    else:
        paths = bundle.paths(*args.shard, vectors=args.verify, text=args.text)
    if absent := [path for path in paths if path in gone]:
        raise BundleError(missing(path) for path in absent)
    for path in paths:
        console.text(path)
    size = sum(bundle.manifest.files[path].size for path in paths if path in bundle.manifest.files)
    console.json({"ok": True, "bundle_id": bundle.id, "files": paths, "bytes": size})
    return 0


def _extract_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory")
    _add_shards(parser, required=True)
    parser.add_argument("--output", "-o", metavar="NAME.splitbundle", required=True, help="the new partial bundle")
    parser.add_argument("--text", action="store_true", help="also take the tokenizer")
    parser.add_argument(
        "--no-vectors",
        dest="vectors",
        action="store_false",
        help="leave out the golden vectors, which verify --run needs",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing bundle at --output")


def _extract(args: argparse.Namespace, console: Console) -> int:
    bundle = open_bundle(args.bundle, progress=console.transfer)
    made = bundle.extract(
        args.output, *args.shard, vectors=args.vectors, text=args.text, force=args.force, progress=console.progress
    )
    return report(made, args.output, console)


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", nargs="+", metavar="bundle", help="partial bundles of one bundle id")
    parser.add_argument("--output", "-o", metavar="NAME.splitbundle", required=True, help="the new bundle")
    parser.add_argument(
        "--force", action="store_true", help="replace an existing bundle at --output, which may be one of the parts"
    )


def _merge(args: argparse.Namespace, console: Console) -> int:
    made = merge_bundles(args.bundles, args.output, force=args.force, progress=console.progress)
    return report(made, args.output, console)


@contextlib.contextmanager
def in_place() -> Iterator[None]:
    """Say that the bundle is in place where it can't be read after it was written."""
    try:
        yield
    except BundleError as error:
        hint = "The bundle is in place. Check it with splitbundle verify"
        raise BundleError(replace(problem, hint=hint) for problem in error.problems) from error


def report(made: Bundle, output: str, console: Console) -> int:
    """Say which files of a bundle were written, and return the exit status.

    Raises:
        BundleError: the system can't tell which files are there; the hint says that the bundle is in place.
    """
    console.end_progress()
    with in_place():
        absent = set(made.absent())
    whole = [shard.name for shard in made.shards if absent.isdisjoint(made.files_of(shard))]
    files = len(made.manifest.files) - len(absent)
    size = sum(file.size for path, file in made.manifest.files.items() if path not in absent)
    here = f"{files} of {len(made.manifest.files)} files" if absent else f"all {files} files"
    console.text(f"{output}: {here}, {size:,} bytes, with the shards {', '.join(whole) or 'none'}")
    console.text(f"  bundle id   {made.id}")
    console.json(
        {
            "ok": True,
            "path": str(Path(output)),
            "bundle_id": made.id,
            "fingerprint": made.fingerprint,
            "bytes": size,
            "whole_shards": whole,
            "absent": [path for path in made.manifest.files if path in absent],
        }
    )
    return 0


FILES: Final = Command(
    name="files", help="print the paths that some shards need, one a line", configure=_files_arguments, run=_files
)
EXTRACT: Final = Command(
    name="extract",
    help="take shards out of a bundle, with unchanged files and the same bundle id",
    configure=_extract_arguments,
    run=_extract,
)
MERGE: Final = Command(
    name="merge", help="merge partial bundles of one bundle id", configure=_merge_arguments, run=_merge
)
