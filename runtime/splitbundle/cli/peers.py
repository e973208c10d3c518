"""The command ``peers``: what stage servers are, what a hop costs, and whether they compute the right numbers."""

from __future__ import annotations

import argparse
from typing import Any, Final

from splitbundle import remote_stages
from splitbundle.cli.arguments import number_in, number_of
from splitbundle.cli.console import Command, Console
from splitbundle.cli.exit_status import NETWORK, NOT_VERIFIED, OK, exit_status
from splitbundle.cli.words import in_command
from splitbundle.errors import BundleError, MissingExtra, Problem
from splitbundle.opening import open_bundle
from splitbundle.records import replace

_REPEATS: Final = 20
_HINTS: Final = {
    "peer.unreachable": "Look whether splitbundle serve-stage runs there, at the port, and at the firewall between; "
    "--timeout waits longer",
    "peer.identity": "Give --tls a directory with the server's ca.pem and the certificate of this machine, or "
    "SPLITBUNDLE_STAGE_TOKEN a token that the server knows",
    "peer.protocol": "Install the same version of splitbundle on both sides",
    "peer.fingerprint": "Give --bundle the bundle from which the server was started",
    "peer.layers": "Give --shard the shard that the server computes",
    "server.full": "Ask again later, or start the server with more --slots and --sessions",
    "server.quota": "End sessions of this client, or start the server with a larger --max-sessions-per-client",
    "server.draining": "The server is ending: ask again when it has started anew",
    "server.failed": "Read the server's stderr: serve-stage --log names each refusal",
    "parity": "Don't compute with this server. Run splitbundle verify --run on its machine, with its bundle",
}
"""A code -> what to do next."""


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
        help="how long to wait for each answer of a server; by default 10",
    )
    parser.add_argument(
        "--insecure", action="store_true", help="allow grpc:// to another machine: anybody on the way can read it"
    )


def _run(args: argparse.Namespace, console: Console) -> int:
    if (args.shard is None) != (args.bundle is None):
        args.parser.error("--bundle and --shard go together")
    for address in args.addresses:
        _check_address(address, insecure=args.insecure)
    options = {
        "tls": args.tls,
        "timeout": args.timeout,
        "step_timeout": args.timeout,
        "insecure": args.insecure or None,
    }
    remote_stages.check_options(options)
    bundle = None if args.bundle is None else open_bundle(args.bundle, progress=console.transfer)
    if bundle is not None:
        remote_stages.check_ends(bundle.select(args.shard), "--shard")
    failed: list[BundleError] = []
    documents: list[dict[str, Any]] = []
    for address in args.addresses:
        document: dict[str, Any] = {"address": address, "ok": True}
        try:
            measured = remote_stages.measure(address, options, args.repeats)
            document |= _show(console, address, measured)
            if bundle is not None:
                document["golden"] = _golden(console, remote_stages.check(bundle, args.shard, address, options))
        except MissingExtra:
            raise
        except BundleError as error:
            found = BundleError(_with_hint(problem) for problem in error.problems)
            for problem in found.problems:
                console.error(f"{address}: {problem}")
            document |= {"ok": False, "problems": [each.as_json() for each in found.problems]}
            failed.append(error)
        documents.append(document)
    problems = [each for document in documents for each in document.get("problems", ())]
    console.json({"ok": not failed, **({"problems": problems} if failed else {}), "peers": documents})
    return _status([exit_status(error) for error in failed])


def _check_address(address: str, *, insecure: bool) -> None:
    """Refuse a wrong address before anything is asked, as the others would be measured for nothing."""
    from splitbundle.remote.address import parse_address

    try:
        parse_address(address, insecure=insecure)
    except BundleError as error:
        raise BundleError(
            replace(each, code="usage.arguments", argument="ADDRESS") for each in error.problems
        ) from None


def _with_hint(problem: Problem) -> Problem:
    """Return a problem with what to do next, in the words of the command."""
    hint = _HINTS.get(problem.code)
    return in_command(problem) if hint is None else replace(problem, hint=hint)


def _status(found: list[int]) -> int:
    """Return the status of the command: wrong numbers weigh more than a server that isn't reached."""
    return next((each for each in (NOT_VERIFIED, NETWORK) if each in found), found[0] if found else OK)


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
