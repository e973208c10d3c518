"""The command ``keys``: a certificate authority for the machines of one group."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Final

from splitbundle.cli.arguments import number_of
from splitbundle.cli.console import Command, Console
from splitbundle.errors import MissingExtra

if TYPE_CHECKING:
    import datetime
    from pathlib import Path

    from splitbundle.serving.key_directories import Certificate

MAX_DAYS: Final = 3650
_NAMES: Final = {"init": "", "server": "HOST", "client": "NAME", "rotate": "NAME", "revoke": "NAME", "list": ""}
"""Each action, and what it takes after the directory."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=tuple(_NAMES),
        help="init makes an authority; server and client make a certificate; rotate makes a new one for the same name; "
        "revoke takes all certificates of a client away; list shows them",
    )
    parser.add_argument("directory", help="the directory of the authority, which stays on one machine")
    parser.add_argument(
        "name",
        nargs="*",
        help="server: the names and IP addresses by which clients call it; client, rotate, revoke: one name",
    )
    parser.add_argument(
        "--days",
        type=number_of(1, MAX_DAYS),
        metavar="N",
        help="server, client, rotate: how long the certificate is valid; by default 397 days",
    )


def _run(args: argparse.Namespace, console: Console) -> int:
    wanted = _NAMES[args.action]
    if bool(args.name) != bool(wanted) or (len(args.name) > 1 and args.action != "server"):
        usage = f"keys {args.action} DIR {wanted}".rstrip()
        args.parser.error(f"{usage}{' [HOST …]' if args.action == 'server' else ''}: got {len(args.name)} names")
    days = {} if args.days is None else {"days": args.days}
    if days and args.action in ("init", "revoke", "list"):
        args.parser.error(f"argument --days: keys {args.action} makes no certificate for a machine")
    keys = _keys()
    if args.action == "init":
        made = keys.init(args.directory)
        console.text(f"{made.path}: a new authority, until {_day(made.expires)}")
        console.text(f"  {made.path / 'ca.key'} signs certificates: it never leaves this directory")
        console.json({"ok": True, "path": str(made.path), "expires": _time(made.expires)})
    elif args.action == "revoke":
        _revoke(keys, args.directory, args.name[0], console)
    elif args.action == "list":
        _list(keys, args.directory, console)
    else:
        _say_made(getattr(keys, args.action)(args.directory, *args.name, **days), console)
    return 0


def _say_made(made: Certificate, console: Console) -> None:
    whom = "the server " + ", ".join(made.hosts) if made.kind == "server" else f"the client {made.name}"
    console.text(f"{made.path}: a certificate for {whom}, until {_day(made.expires)}")
    console.text(f"  Copy this directory to that machine, for example: scp -rp {made.path} HOST:")
    console.json({"ok": True, **_as_json(made)})


def _revoke(keys: ModuleType, directory: str, name: str, console: Console) -> None:
    done = keys.revoke(directory, name)
    count = len(done.certificates)
    console.text(f"{name}: {count} certificate{'s are' if count > 1 else ' is'} revoked")
    if lists := done.lists[1:]:
        console.text("  Copy each server's list beside its certificate; a running server reads it again:")
        _say_lists(lists, console)
    revoked = [each.fingerprint for each in done.certificates]
    console.json({"ok": True, "name": name, "revoked": revoked, "lists": [str(place) for place in done.lists]})


def _say_lists(lists: Sequence[Path], console: Console) -> None:
    for place in lists:
        console.text(f"  {place}")


def _list(keys: ModuleType, directory: str, console: Console) -> None:
    found: tuple[Certificate, ...] = keys.listing(directory)
    for each in found:
        words = [f"until {_day(each.expires)}"]
        if each.revoked:
            words.append("revoked")
        if keys.has_ended(each):
            words.append("ended")
        if each.path is None:
            words.append("replaced or moved away")
        console.text(f"{each.kind} {', '.join(each.hosts) or each.name}: {', '.join(words)}")
        console.text(f"  {each.fingerprint}")
    console.text(f"{directory}: {len(found)} certificates")
    console.json({"ok": True, "path": directory, "certificates": [_as_json(each) for each in found]})


def _as_json(each: Certificate) -> dict[str, object]:
    return {
        "name": each.name,
        "kind": each.kind,
        "hosts": list(each.hosts),
        "fingerprint": each.fingerprint,
        "expires": _time(each.expires),
        "revoked": each.revoked,
        "path": None if each.path is None else str(each.path),
    }


def _day(time: datetime.datetime) -> str:
    return f"{time:%Y-%m-%d}"


def _time(time: datetime.datetime) -> str:
    return f"{time:%Y-%m-%dT%H:%M:%SZ}"


def _keys() -> ModuleType:
    """Return the module that makes certificates.

    Raises:
        MissingExtra: ``cryptography`` isn't installed.
    """
    try:
        from splitbundle.serving import keys
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cryptography":
            raise
        raise MissingExtra.of("cryptography", "network", "make keys and certificates") from None
    return keys


COMMAND: Final = Command(
    name="keys",
    help="make keys and certificates for machines that compute together",
    configure=_add_arguments,
    run=_run,
)
