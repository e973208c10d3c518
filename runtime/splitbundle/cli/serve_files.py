"""The command ``serve-files``: a file server for bundles in a local network."""

from __future__ import annotations

import argparse
from typing import Final

from splitbundle.cli.arguments import number_of
from splitbundle.cli.console import Command, Console


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "directory", help="a bundle, or a directory with bundles (*.splitbundle) and archives (*.tar) directly in it"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at; by default this machine alone; 0.0.0.0 is all"
    )
    parser.add_argument(
        "--port", type=number_of(0, 65535), default=8000, help="the port; by default 8000; 0 is any free one"
    )


def _run(args: argparse.Namespace, console: Console) -> int:
    from splitbundle.sharing.file_requests import pull_command
    from splitbundle.sharing.file_server import FileServer
    from splitbundle.sharing.served_files import ServedFiles

    served = ServedFiles(args.directory)
    bundles, archives = served.bundles(), served.archives()
    for name, problem in served.left_out():
        console.note(f"note: {name} isn't served: {problem}")
    server = FileServer(served, args.host, args.port, log=console.note)
    try:
        console.text(f"{server.url} has {len(bundles)} bundles and {len(archives)} archives; Ctrl-C ends it")
        for bundle in bundles:
            console.text(f"  {bundle.id}  {pull_command(server.url, bundle.name, bundle.shards)}")
        for name in archives:
            console.text(f"  {server.url}{name}")
        console.json(
            {
                "ok": True,
                "url": server.url,
                "bundles": [{"name": each.name, "bundle_id": each.id} for each in bundles],
                "archives": archives,
            }
        )
        if not server.loopback:
            console.note(
                f"note: everybody who reaches {server.own_host} can read these files, and nothing is encrypted. "
                "Give the bundle ids on another way, so that a pull can check them"
            )
        server.serve_forever()
    finally:
        server.stop()
    return 0


COMMAND: Final = Command(
    name="serve-files",
    help="serve bundles to other machines of a local network",
    configure=_add_arguments,
    run=_run,
)
