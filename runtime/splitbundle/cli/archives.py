"""The commands ``pack`` and ``unpack``: a bundle as one tar archive."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from splitbundle.cli.arguments import bundle_id
from splitbundle.cli.console import Command, Console
from splitbundle.cli.parts import report
from splitbundle.opening import open_bundle, unpack_archive


def _pack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory, whole or partial")
    parser.add_argument("--output", "-o", metavar="FILE.tar", required=True, help="the new archive")
    parser.add_argument("--force", action="store_true", help="replace an existing archive at --output")


def _pack(args: argparse.Namespace, console: Console) -> int:
    if args.output == "-":
        args.parser.error("argument --output/-o: an archive isn't written to stdout; name a file, such as ./model.tar")
    bundle = open_bundle(args.bundle)
    made = bundle.pack(args.output, force=args.force, progress=console.progress)
    console.end_progress()
    console.text(f"{args.output}: {len(made.files)} files, {made.bytes:,} bytes")
    console.text(f"  bundle id   {bundle.id}")
    console.json(
        {
            "ok": True,
            "path": str(Path(args.output)),
            "bundle_id": bundle.id,
            "bytes": made.bytes,
            "files": list(made.files),
        }
    )
    return 0


def _unpack_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", help="a tar archive of a bundle, without compression")
    parser.add_argument("--output", "-o", metavar="NAME.splitbundle", required=True, help="the new bundle")
    parser.add_argument("--id", metavar="sha256:…", type=bundle_id, help="the expected bundle id, as inspect shows it")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle at --output")


def _unpack(args: argparse.Namespace, console: Console) -> int:
    made = unpack_archive(args.archive, args.output, id=args.id, force=args.force, progress=console.progress)
    return report(made, args.output, console)


PACK: Final = Command(name="pack", help="write a bundle into one tar archive", configure=_pack_arguments, run=_pack)
UNPACK: Final = Command(
    name="unpack", help="check a tar archive of a bundle, and unpack it", configure=_unpack_arguments, run=_unpack
)
