"""The command ``cache``: look at the cache of pulled bundles, check it, and free its space."""

from __future__ import annotations

import argparse
import time
from typing import Final

from splitbundle.cli.arguments import number_in
from splitbundle.cli.console import Command, Console, in_bytes

DAY: Final = 86400.0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "prune", "verify"), help="what to do")
    parser.add_argument("bundle", nargs="*", help="prune: bundle ids or references to remove")
    parser.add_argument(
        "--older-than", type=number_in(0, 36500), metavar="DAYS", help="prune: bundles that weren't used for so long"
    )
    parser.add_argument("--all", action="store_true", help="prune: every bundle")


def _run(args: argparse.Namespace, console: Console) -> int:
    from splitbundle.sharing import cache_care
    from splitbundle.sharing.cache import Cache

    cache = Cache()
    if args.action != "prune" and (args.bundle or args.all or args.older_than is not None):
        args.parser.error(f"cache {args.action} takes no bundles, no --all and no --older-than")
    if args.action == "verify":
        count, size = cache_care.verify(cache, console.transfer)
        console.end_progress()
        console.text(f"{cache.root}: {count} files, {size:,} bytes, every digest as its name")
        console.json({"ok": True, "path": str(cache.root), "files": count, "bytes": size})
        return 0
    if args.action == "prune":
        older = None if args.older_than is None else args.older_than * DAY
        gone, freed = cache_care.prune(cache, args.bundle, older_than=older, everything=args.all)
        for each in gone:
            console.text(f"removed {each.name or 'what was no bundle any more'}, {each.bundle_id}")
        console.text(f"{in_bytes(freed)} are free now")
        console.json({"ok": True, "removed": [each.bundle_id for each in gone], "freed": freed})
        return 0
    found = cache_care.every_bundle(cache)
    size = cache_care.total_bytes(cache)
    for each in found:
        used = time.strftime("%Y-%m-%d", time.localtime(each.used))
        shards = ", ".join(each.shards) or "no whole shard"
        console.text(f"{each.name or 'no bundle any more'}: {in_bytes(each.bytes)}, {shards}, used {used}")
        console.text(f"  {each.bundle_id}")
        for reference in each.references:
            console.text(f"  {reference}")
    console.text(f"{cache.root}: {len(found)} bundles in {in_bytes(size)}")
    console.json(
        {
            "ok": True,
            "path": str(cache.root),
            "bytes": size,
            "bundles": [
                {
                    "bundle_id": each.bundle_id,
                    "name": each.name,
                    "path": str(each.path),
                    "bytes": each.bytes,
                    "whole_shards": list(each.shards),
                    "references": list(each.references),
                    "used": each.used,
                }
                for each in found
            ],
        }
    )
    return 0


COMMAND: Final = Command(
    name="cache", help="list, check or empty the cache of pulled bundles", configure=_add_arguments, run=_run
)
