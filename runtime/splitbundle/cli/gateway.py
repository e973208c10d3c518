"""The command ``gateway``: a page that runs the ends of a model in the browser, and a way to its remote stages."""

from __future__ import annotations

import argparse
from typing import Final

from splitbundle.cli.console import Command, Console, timed_notes
from splitbundle.cli.remote_options import add_remote_arguments, remote_options
from splitbundle.cli.second_signal import SecondSignalEnds
from splitbundle.cli.web_options import add_access_arguments, add_end_arguments, check_access, listening, origin
from splitbundle.opening import open_bundle
from splitbundle.remote_stages import token_of_environment
from splitbundle.serving.gateway.opening import open_gateway, open_relays
from splitbundle.serving.web.access import Access


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", help="a .splitbundle directory, whole or without the remote shards; browsers read its files"
    )
    add_access_arguments(parser)
    add_remote_arguments(parser, computes=False)
    parser.add_argument(
        "--onnxruntime-web",
        metavar="DIR",
        help="the npm package onnxruntime-web, which lets browsers compute faster; by default "
        "node_modules/onnxruntime-web, if it is there",
    )
    parser.add_argument(
        "--bundles-from",
        action="append",
        type=origin,
        metavar="ORIGIN",
        default=[],
        help="let the page read bundles of this server, too, such as https://files.example; by default of no other",
    )
    add_end_arguments(parser)


def _run(args: argparse.Namespace, console: Console) -> int:
    check_access(args)
    if not args.remote:
        args.parser.error("argument --remote: give the stages that servers compute, as in trunk=grpcs://HOST:PORT")
    access = Access(args.api_key_file, note=console.note)
    bundle = open_bundle(args.bundle)
    options = remote_options(args)
    given = {name: value for name, value in options.items() if name != "remote" and value is not None}
    log = timed_notes(console) if args.log else None
    relays = open_relays(bundle, options["remote"], {"token": token_of_environment(), **given}, log)
    server = open_gateway(
        bundle,
        relays,
        access,
        origins=args.bundles_from,
        onnxruntime_web=args.onnxruntime_web,
        log=log,
        **listening(args),
    )
    with SecondSignalEnds():
        try:
            server.start()
            stages = ", ".join(relays)
            console.text(f"{server.url} has the page, the bundle's files, and the way to {stages}; Ctrl-C ends it")
            console.json({"ok": True, "url": server.url, "stages": list(relays), "bundle_id": bundle.id})
            server.wait()
        except KeyboardInterrupt:  # Ctrl-C and SIGTERM are how this command ends
            console.note("ending: new frames are refused, and those that are answered end")
        finally:
            server.stop(args.grace)
    return 0


COMMAND: Final = Command(
    name="gateway",
    help="run the ends of a model in browsers, and the middle on servers",
    configure=_add_arguments,
    run=_run,
)
"""The command needs the extras ``serve`` and ``network``: starlette, uvicorn and grpcio."""
