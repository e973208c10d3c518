"""The command ``sign``: sign a bundle with a private key."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Final

from splitbundle.cli.console import Command, Console
from splitbundle.opening import open_bundle

PASSWORD: Final = "SPLITBUNDLE_KEY_PASSWORD"  # noqa: S105  # the name of a variable
"""The environment variable with the passphrase of an encrypted key. An argument would show in the list of processes."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory, whole or partial")
    parser.add_argument(
        "--key", metavar="FILE", required=True, help="a private key in PEM: Ed25519, or ECDSA on P-256, P-384 or P-521"
    )
    parser.add_argument(
        "--output", "-o", metavar="FILE", help="the file of the signature; by default in the bundle's directory"
    )
    parser.add_argument(
        "--name", metavar="NAME", help="the name of the signature there; by default 16 digits of the key's digest"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing signature")


def _run(args: argparse.Namespace, console: Console) -> int:
    if "://" in args.bundle and args.output is None:
        args.parser.error("argument --output/-o: it is needed for a bundle on another machine, which sign can't change")

    def password() -> str | None:
        given = os.environ.get(PASSWORD)
        if given or sys.stdin is None or not sys.stdin.isatty():
            return given
        from getpass import getpass

        console.end_progress()
        try:
            return getpass(f"Passphrase of {args.key}: ", stream=console.err)
        except EOFError:
            return None

    if args.output is not None and args.name is not None:
        args.parser.error("argument --name: --output names the file already")
    bundle = open_bundle(args.bundle)
    made = bundle.sign(
        args.key, output=args.output, name=args.name, password=password, force=args.force, progress=console.progress
    )
    console.end_progress()
    place = made.path if args.output else os.path.join(args.bundle, made.path)
    console.text(f"{place}: the signature of {made.files} files")
    console.text(f"  bundle id   {bundle.id}")
    console.text(f"  public key  {made.key}")
    console.json({"ok": True, "path": place, "bundle_id": bundle.id, "key": made.key, "files": made.files})
    return 0


COMMAND: Final = Command(name="sign", help="sign a bundle with a private key", configure=_add_arguments, run=_run)
