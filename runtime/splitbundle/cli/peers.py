"""The command ``peers``: what stage servers are, what a hop costs, and whether they compute the right numbers."""

from __future__ import annotations

import argparse
from typing import Any, Final

from splitbundle import remote_stages
from splitbundle.cli.arguments import number_in, number_of
from splitbundle.cli.console import Command, Console
from splitbundle.cli.exit_status import exit_status
from splitbundle.errors import BundleError
from splitbundle.opening import open_bundle

_REPEATS: Final = 20


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("addresses", nargs="+", metavar="ADDRESS", help="grpcs://HOST:PORT, or grpc:// without TLS")
    parser.add_argument(
        "--tls",
        metavar="DIR",
        help="the directory with this machine's certificate; the variable SPLITBUNDLE_STAGE_TOKEN has a token",
    )
    parser.add_argument(
        "--bundle", metavar="BUNDLE", help="run the golden vectors of this bundle through each server, and compare"
    )
    parser.add_argument("--shard", metavar="NAME", help="with --bundle: the shard that the servers must hold")
    parser.add_argument(
        "--repeats",
        type=number_of(1, 10000),
        default=_REPEATS,
        metavar="N",
        help=f"how often to measure a message; by default {_REPEATS}",
    )
    parser.add_argument(
        "--timeout",
        type=number_in(0.1, 3600),
        default=10.0,
        metavar="SECONDS",
        help="how long to wait for a server; by default 10",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="allow grpc:// to another machine: anybody on the way can read it"
    )


def _run(args: argparse.Namespace, console: Console) -> int:
    if (args.shard is None) != (args.bundle is None):
        args.parser.error("--bundle and --shard go together")
    bundle = None if args.bundle is None else open_bundle(args.bundle, progress=console.transfer)
    options = {"tls": args.tls, "timeout": args.timeout, "insecure": args.insecure or None}
    status, failed = 0, None
    documents: list[dict[str, Any]] = []
    for address in args.addresses:
        try:
            measured = remote_stages.measure(address, options, args.repeats)
            document = _show(console, address, measured)
            if bundle is not None:
                document["golden"] = _golden(console, remote_stages.check(bundle, args.shard, address, options))
        except BundleError as error:
            console.text(f"{address}: {error.problems[0]}")
            document = {"address": address, "ok": False, "problems": [each.as_json() for each in error.problems]}
            failed = failed or error
        documents.append(document)
    if failed is not None:
        status = exit_status(failed)
    console.json({"ok": failed is None, "peers": documents})
    return status


def _show(console: Console, address: str, measured: Any) -> dict[str, Any]:
    welcome = measured.welcome
    start, stop = welcome.layers
    console.text(f"{address}: layers {start} to {stop - 1}, {welcome.backend} in {welcome.dtype}")
    console.text(f"  model {welcome.fingerprint}, version {welcome.version}")
    console.text(f"  a message takes {measured.hello / 1000:.2f} ms")
    rows = [
        (
            hop.tokens,
            hop.bytes,
            f"{hop.total / 1000:.2f}",
            f"{hop.wire / 1000:.2f}",
            f"{hop.queued / 1000:.2f}",
            f"{hop.computed / 1000:.2f}",
        )
        for hop in measured.hops
    ]
    console.table(("tokens", "bytes", "ms", "wire", "queue", "compute"), rows)
    return {
        "address": address,
        "ok": True,
        "layers": [start, stop],
        "fingerprint": welcome.fingerprint,
        "backend": welcome.backend,
        "dtype": welcome.dtype,
        "version": welcome.version,
        "trainable": welcome.trainable,
        "hello_us": round(measured.hello),
        "steps": [
            {
                "tokens": hop.tokens,
                "bytes": hop.bytes,
                "total_us": round(hop.total),
                "wire_us": round(hop.wire),
                "queued_us": round(hop.queued),
                "computed_us": round(hop.computed),
            }
            for hop in measured.hops
        ],
    }


def _golden(console: Console, differences: Any) -> list[dict[str, Any]]:
    for each in differences:
        console.text(
            f"  golden vectors at {each.where}: {each.relative:.1e} of the scale, at most {each.tolerance:.0e}"
        )
    return [{"where": each.where, "relative": each.relative, "tolerance": each.tolerance} for each in differences]


COMMAND: Final = Command(
    name="peers",
    help="measure stage servers, and check that they compute the right numbers",
    configure=_add_arguments,
    run=_run,
)
