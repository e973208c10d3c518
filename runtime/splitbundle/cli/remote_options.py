"""The options of commands that compute with stages of other machines."""

from __future__ import annotations

import argparse
from typing import Any, Final

from splitbundle.cli.arguments import number_in

_NAMES: Final = ("tls", "wire", "replay", "timeout")


def add_remote_arguments(parser: argparse.ArgumentParser, *, computes: bool = True) -> None:
    """Add ``--remote`` and its companions.

    Args:
        parser: the parser of the command.
        computes: whether the command computes with the stages, so that it chooses how hidden states travel.
    """
    group = parser.add_argument_group("stages on other machines")
    group.add_argument(
        "--remote",
        action="append",
        type=_remote,
        metavar="SHARD=ADDRESS[,…]",
        help="a shard that serve-stage computes, at grpcs://HOST:PORT; further addresses are used if the first fails",
    )
    group.add_argument(
        "--tls",
        metavar="DIR",
        help="the directory with this machine's certificate; the variable SPLITBUNDLE_STAGE_TOKEN has a token",
    )
    if computes:
        group.add_argument(
            "--wire",
            choices=("float32", "float16", "bfloat16", "int8"),
            help="send hidden states in fewer bits; by default exactly",
        )
        group.add_argument(
            "--replay",
            choices=("exact", "merged"),
            help="how another server gets a lost session: by the same calls, or faster, as one prompt; by default "
            "exact",
        )
        group.add_argument(
            "--other-weights",
            action="store_true",
            help="take servers of the same layers with other weights, such as trained ones",
        )
    else:
        parser.set_defaults(wire=None, replay=None, other_weights=False)
    group.add_argument(
        "--timeout",
        type=number_in(0.1, 86400),
        metavar="SECONDS",
        help="how long to wait where no server answers; by default 30",
    )
    group.add_argument(
        "--insecure", action="store_true", help="allow grpc:// to another machine: anybody on the way can read it"
    )


def remote_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of ``Bundle.pipeline`` that the options of ``add_remote_arguments`` ask for."""
    if args.remote is None:
        for name in (*_NAMES, "insecure", "other_weights"):
            if getattr(args, name):
                args.parser.error(f"argument --{name.replace('_', '-')}: it needs --remote SHARD=ADDRESS")
        return {}
    remote: dict[str, list[str]] = {}
    for shard, addresses in args.remote:
        remote.setdefault(shard, []).extend(addresses)
    return {
        "remote": remote,
        "insecure": args.insecure or None,
        "same_weights": False if args.other_weights else None,
        **{name: getattr(args, name) for name in _NAMES},
    }


def _remote(text: str) -> tuple[str, list[str]]:
    shard, equals, addresses = text.partition("=")
    if not shard or not equals or not addresses:
        raise argparse.ArgumentTypeError(f"expected SHARD=ADDRESS, such as trunk=grpcs://HOST:7000, got {text!r}")
    return shard, addresses.split(",")
