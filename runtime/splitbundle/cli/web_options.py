"""The options of commands that answer over HTTP: where they listen, and who may ask."""

from __future__ import annotations

import argparse
import re
from typing import Any, Final

from splitbundle.cli.arguments import listen_address, number_in
from splitbundle.errors import BundleError, Problem
from splitbundle.remote.address import is_loopback

_ORIGIN: Final = re.compile(r"https?://[A-Za-z0-9.\-\[\]:]+")
_LOCAL: Final = ("localhost", "127.0.0.1", "::1")


def add_access_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the options of who can connect, and return their group."""
    group = parser.add_argument_group("who can connect")
    group.add_argument(
        "--listen",
        type=listen_address,
        metavar="HOST:PORT",
        default=("127.0.0.1", 8000),
        help="the address; by default 127.0.0.1:8000, this machine alone; 0.0.0.0 is all; port 0 is any free one",
    )
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="clients show one of these keys; each line has a name, a space, a key, and limits such as concurrent=4 "
        "requests-per-minute=60 tokens-per-minute=20000",
    )
    group.add_argument("--certificate", metavar="FILE", help="the server's certificate in PEM, for https")
    group.add_argument("--private-key", metavar="FILE", help="the key of the certificate, in PEM")
    group.add_argument(
        "--plain-http", action="store_true", help="allow other machines without https, such as a proxy that has it"
    )
    return group


def add_end_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--log`` and ``--grace``."""
    parser.add_argument(
        "--log", action="store_true", help="write a line to stderr for each request: time, client, path, no content"
    )
    parser.add_argument(
        "--grace",
        type=number_in(0, 3600),
        metavar="SECONDS",
        default=10.0,
        help="how long answers may take to end after SIGTERM or Ctrl-C; by default 10",
    )


def check_access(args: argparse.Namespace) -> None:
    """Check that other machines come with keys and https alone.

    Raises:
        BundleError: ``server.address``.
    """
    host = args.listen[0]
    if (args.certificate is None) != (args.private_key is None):
        args.parser.error("give both --certificate and --private-key, or none of them")
    if is_loopback(host):
        return
    if args.api_key_file is None:
        expected = "--api-key-file, as other machines reach this address; or a loopback address, such as 127.0.0.1"
        raise BundleError(Problem(code="server.address", argument=host, expected=expected, got="no keys"))
    if args.certificate is None and not args.plain_http:
        expected = "--certificate and --private-key, as keys and texts can be read on the way; or --plain-http"
        raise BundleError(Problem(code="server.address", argument=host, expected=expected, got="no https"))


def listening(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of a web server that these options ask for."""
    host, port = args.listen
    return {
        "host": host,
        "port": port,
        "hosts": None if args.api_key_file is not None else tuple(dict.fromkeys((*_LOCAL, host))),
        "certificate": args.certificate,
        "key": args.private_key,
    }


def origin(text: str) -> str:
    """Parse an origin for argparse, such as ``https://page.example``."""
    if not _ORIGIN.fullmatch(text):
        raise argparse.ArgumentTypeError(f"expected an origin, such as https://page.example, got {text!r}")
    return text


def origin_or_any(text: str) -> str:
    """Parse an origin, or ``*`` for all of them."""
    return text if text == "*" else origin(text)
