"""The commands ``push``, ``pull``, ``tag``, ``untag`` and ``list``: bundles on other machines."""

from __future__ import annotations

import argparse
import os
from typing import Any, Final

from splitbundle.bundle import Bundle
from splitbundle.cli.arguments import bundle_id, number_in, number_of
from splitbundle.cli.console import Command, Console
from splitbundle.cli.parts import in_place
from splitbundle.errors import wrong_argument
from splitbundle.opening import open_bundle
from splitbundle.records import replace

REFERENCE: Final = "oci://HOST/NAME:TAG, hf://ORG/NAME@REVISION, https://HOST/PATH, s3://, sftp://, ftp://, or a path"


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that goes to another machine."""
    parser.add_argument("--jobs", type=number_of(1, 64), metavar="N", help="how many files move at once; default 4")
    parser.add_argument(
        "--timeout",
        type=number_in(0.05, 3600),
        metavar="SECONDS",
        help="give up a connection without progress; default 30",
    )
    parser.add_argument(
        "--retries", type=number_of(0, 100), metavar="N", help="tries after one without any progress; default 5"
    )
    parser.add_argument("--plain-http", action="store_true", help="ask this host without TLS; loopback needs no option")


def _patience(args: argparse.Namespace, console: Console) -> Any:
    from splitbundle.sharing.network import patience

    return replace(patience(args.timeout, args.retries), tell=None if args.quiet else console.note)


def _reference(args: argparse.Namespace, text: str) -> Any:
    """Parse a reference, and allow plain HTTP to its host alone if that is asked for."""
    from splitbundle.sharing.reference import PLAIN_HTTP, parse_reference

    found = parse_reference(text)
    if args.plain_http and found.host:
        os.environ[PLAIN_HTTP] = ",".join(filter(None, (os.environ.get(PLAIN_HTTP), found.host)))
    return found


def _pull_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", help=REFERENCE)
    parser.add_argument(
        "--shard", metavar="NAME", action="append", help="a shard to pull; may be given several times; by default all"
    )
    parser.add_argument("--output", "-o", metavar="NAME.splitbundle", help="the directory; by default the cache")
    parser.add_argument("--text", action="store_true", help="with --shard: also the tokenizer")
    parser.add_argument(
        "--no-vectors",
        dest="vectors",
        action="store_false",
        help="with --shard: leave out the golden vectors, which verify --run needs",
    )
    parser.add_argument("--id", metavar="sha256:…", type=bundle_id, help="the only bundle id to accept")
    parser.add_argument("--force", action="store_true", help="replace another bundle at --output")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be pulled")
    parser.add_argument("--offline", action="store_true", help="take it from the cache alone")
    add_network_arguments(parser)


def _pull(args: argparse.Namespace, console: Console) -> int:
    from splitbundle.sharing.pulling import PullHow, Wanted, pull
    from splitbundle.sharing.reference import wrong_reference

    if args.shard is None and (args.text or not args.vectors):
        args.parser.error("arguments --text and --no-vectors: they need --shard; without it, every file is pulled")
    reference = _reference(args, args.reference)
    if not reference.scheme and _is_absent(reference.path):
        expected = "a bundle of this machine, or a reference that begins with oci://, hf://, https:// …"
        raise wrong_reference(args.reference, expected, "neither")
    if not reference.scheme and args.output is None:
        raise wrong_argument("output", "--output, to copy a bundle of this machine", "none")
    if args.id is not None:
        reference = replace(reference, pin=args.id)
    shards = None if args.shard is None else tuple(args.shard)
    how = PullHow(
        patience=_patience(args, console),
        force=args.force,
        dry_run=args.dry_run,
        signatures=not args.dry_run,
        progress=console.transfer,
    )
    how = how if args.jobs is None else replace(how, jobs=args.jobs)
    wanted = Wanted(shards=shards, vectors=args.vectors, text=args.text)
    done = pull(reference, wanted, how, output=args.output, offline=args.offline)
    console.end_progress()
    if done.note is not None:
        console.note(f"note: {done.note}")
    found = done.documents
    if args.dry_run:
        for path in done.fetched:
            console.text(f"{found.manifest.files[path].size:>16,}  {path}")
        console.text(f"{done.moved:,} of {done.bytes:,} bytes would be pulled")
    else:
        here = f"{len(done.paths)} of {len(found.manifest.files)} files, {done.bytes:,} bytes"
        console.text(f"{args.output or done.path}: {here}; {done.moved:,} bytes came over the network")
    console.text(f"  bundle id   {found.id}")
    if done.revision is not None:
        console.text(f"  revision    {done.revision}")
    with in_place():
        whole = [] if args.dry_run else list(Bundle(done.path, *found).whole_shards())
    if whole:
        console.text(f"  shards      {', '.join(whole)}")
    console.json(
        {
            "ok": True,
            "path": None if args.dry_run else str(args.output or done.path),
            "bundle_id": found.id,
            "revision": done.revision,
            "files": list(done.paths),
            "pulled": list(done.fetched),
            "bytes": done.bytes,
            "moved": done.moved,
            "whole_shards": whole,
            "dry_run": args.dry_run,
        }
    )
    return 0


def _is_absent(path: str) -> bool:
    """Return whether nothing is at a path. Where the system can't tell, reading it says why."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _push_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory")
    parser.add_argument("reference", help="oci://HOST/NAME:TAG, hf://ORG/NAME@REVISION, s3://, sftp:// or ftp://")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace another bundle where no revisions are kept; on the Hub, write beside other files",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be pushed")
    parser.add_argument("--no-check", dest="check", action="store_false", help="don't check the digests first")
    add_network_arguments(parser)


def _push(args: argparse.Namespace, console: Console) -> int:
    from splitbundle.sharing.pushing import PushHow, push

    reference = _reference(args, args.reference)
    bundle = open_bundle(args.bundle, progress=console.transfer)
    how = PushHow(
        patience=_patience(args, console),
        force=args.force,
        dry_run=args.dry_run,
        check=args.check,
        progress=console.transfer,
    )
    how = how if args.jobs is None else replace(how, jobs=args.jobs)
    done = push(bundle, reference, how)
    console.end_progress()
    verb = "would be sent" if args.dry_run else "were sent"
    console.text(f"{reference}: {len(done.sent)} files, {done.moved:,} of {done.bytes:,} bytes {verb}")
    console.text(f"  bundle id   {done.bundle_id}")
    if done.revision is not None:
        console.text(f"  revision    {done.revision}")
    console.json(
        {
            "ok": True,
            "reference": done.reference,
            "bundle_id": done.bundle_id,
            "revision": done.revision,
            "pushed": list(done.sent),
            "bytes": done.bytes,
            "moved": done.moved,
            "dry_run": args.dry_run,
        }
    )
    return 0


def _tag_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", help="a bundle in a registry, or a revision of a repository of the Hub")
    parser.add_argument("tag", help="the new tag")
    add_network_arguments(parser)


def _tag(args: argparse.Namespace, console: Console) -> int:
    from splitbundle.sharing.tags import add_tag

    revision = add_tag(_reference(args, args.reference), args.tag, _patience(args, console))
    console.text(f"{args.tag}: {revision}")
    console.json({"ok": True, "tag": args.tag, "revision": revision})
    return 0


def _untag_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", help="a reference with the tag to remove")
    add_network_arguments(parser)


def _untag(args: argparse.Namespace, console: Console) -> int:
    from splitbundle.sharing.tags import remove_tag

    reference = _reference(args, args.reference)
    remove_tag(reference, _patience(args, console))
    console.text(f"{reference} is removed")
    console.json({"ok": True, "reference": str(reference)})
    return 0


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", help="a repository of a registry or of the Hub")
    add_network_arguments(parser)


def _list(args: argparse.Namespace, console: Console) -> int:
    from splitbundle.sharing.tags import list_tags

    found = list_tags(_reference(args, args.reference), _patience(args, console))
    rows = [(each.tag, each.bundle_id or "-", each.revision) for each in found]
    console.table(("tag", "bundle id", "revision"), rows)
    console.json(
        {
            "ok": True,
            "tags": [{"tag": each.tag, "bundle_id": each.bundle_id, "revision": each.revision} for each in found],
        }
    )
    return 0


PULL: Final = Command(
    name="pull",
    help="fetch a bundle, or some of its shards, from another machine",
    configure=_pull_arguments,
    run=_pull,
)
PUSH: Final = Command(
    name="push",
    help="send a bundle to a registry, the Hub or an object store",
    configure=_push_arguments,
    run=_push,
)
TAG: Final = Command(name="tag", help="give a pushed bundle a further tag", configure=_tag_arguments, run=_tag)
UNTAG: Final = Command(
    name="untag", help="remove a tag of a bundle on another machine", configure=_untag_arguments, run=_untag
)
LIST: Final = Command(
    name="list", help="list the tags of a repository on another machine", configure=_list_arguments, run=_list
)
