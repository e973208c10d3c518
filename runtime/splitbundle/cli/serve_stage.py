"""The command ``serve-stage``: compute a part of a model for other machines."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any, Final

from splitbundle.backends import registry
from splitbundle.cli.arguments import (
    add_compute_arguments,
    add_strict_argument,
    listen_address,
    number_in,
    number_of,
    positive,
    size,
    verify_when,
)
from splitbundle.cli.console import Command, Console, timed_notes
from splitbundle.cli.exit_status import OK
from splitbundle.cli.second_signal import FirstSignalEnds, SecondSignalEnds
from splitbundle.errors import BundleError, Problem
from splitbundle.opening import open_bundle
from splitbundle.serving.stage_server import Budget, StageServer, Trainer, check_ends
from splitbundle.storage import files

_MAX_TOKEN_BYTES: Final = 2**20
_DEFAULTS: Final = Budget()
_OF_TRAINING: Final = ("optimizer", "learning_rate", "weight_decay", "lora", "lora_alpha", "checkpoints")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory, whole or with the files of this shard alone")
    parser.add_argument("shard", nargs="?", help="the shard to serve; it neither embeds nor has the head")
    parser.add_argument(
        "--layers", type=_layers, metavar="START:STOP", help="serve these layers in place of a shard (torch)"
    )
    group = parser.add_argument_group("who can connect")
    group.add_argument(
        "--listen",
        type=listen_address,
        metavar="HOST:PORT",
        default=("127.0.0.1", 7000),
        help="the address; by default 127.0.0.1:7000, this machine alone; 0.0.0.0 is all; port 0 is any free one",
    )
    group.add_argument(
        "--tls",
        metavar="DIR",
        help="the directory with the server's certificate, as splitbundle keys server makes it; clients show theirs",
    )
    group.add_argument(
        "--token-file",
        metavar="FILE",
        help="clients show one of these tokens in place of a certificate; each line has a name, a space, and a token",
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--slots",
        type=positive,
        metavar="N",
        default=_DEFAULTS.slots,
        help=f"the tokens that all sessions may hold, each row counted; by default {_DEFAULTS.slots}",
    )
    group.add_argument(
        "--sessions",
        type=positive,
        metavar="N",
        default=_DEFAULTS.sessions,
        help=f"the sessions that live at once; by default {_DEFAULTS.sessions}",
    )
    group.add_argument(
        "--rows",
        type=number_of(1, 4096),
        metavar="N",
        default=_DEFAULTS.rows,
        help=f"the rows of a session; by default {_DEFAULTS.rows}",
    )
    group.add_argument(
        "--shared-rows",
        type=number_of(0, 4096),
        metavar="N",
        default=_DEFAULTS.shared_rows,
        help=f"the rows of a cache that sessions share, so that steps of several clients are computed together; 0 for "
        f"none; by default {_DEFAULTS.shared_rows}",
    )
    group.add_argument("--memory", type=size, metavar="SIZE", help="the memory of all caches, such as 2GiB")
    group.add_argument(
        "--max-sessions-per-client",
        type=positive,
        metavar="N",
        help="the sessions that one client may have at once; by default as many as there are",
    )
    group.add_argument(
        "--max-memory-per-client",
        type=size,
        metavar="SIZE",
        help="the memory of the caches of one client; by default as much as there is",
    )
    group.add_argument(
        "--lease",
        type=number_in(0.1, 86400),
        metavar="SECONDS",
        default=_DEFAULTS.lease,
        help=f"how long a session lives without a message; by default {_DEFAULTS.lease:g}",
    )
    group = parser.add_argument_group("computing")
    group.add_argument("--backend", choices=registry.BACKENDS, help="by default torch if it is installed")
    group.add_argument("--device", metavar="DEVICE", help="torch's name of a device, such as cuda")
    group.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="the dtype to compute in; by default the stored one"
    )
    add_compute_arguments(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--trainable", action="store_true", help="let one client at a time train the stage")
    group.add_argument("--optimizer", choices=("adamw", "sgd"), help="by default adamw")
    group.add_argument(
        "--learning-rate", type=number_in(1e-12, 1e3), metavar="X", help="by default 1e-4; a client may give another"
    )
    group.add_argument("--weight-decay", type=number_in(0, 1), metavar="X", help="by default 0")
    group.add_argument("--lora", type=positive, metavar="RANK", help="train a LoRA, and no weight of the bundle")
    group.add_argument("--lora-alpha", type=number_in(1e-6, 1e6), metavar="X", help="by default twice the rank")
    group.add_argument(
        "--checkpoints", metavar="DIR", help="write a checkpoint of each step there, and go on from the last one"
    )
    parser.add_argument(
        "--status",
        type=listen_address,
        metavar="HOST:PORT",
        help="answer /healthz and /metrics (Prometheus) over HTTP there; by default nowhere",
    )
    parser.add_argument(
        "--log",
        action="store_true",
        help="write a line to stderr for each session, training step and refusal: the time, the client and no content",
    )
    parser.add_argument(
        "--grace",
        type=number_in(0, 3600),
        metavar="SECONDS",
        default=10.0,
        help="how long a step may take to end after SIGTERM or Ctrl-C; by default 10",
    )
    add_strict_argument(parser)


def _run(args: argparse.Namespace, console: Console) -> int:
    if (args.shard is None) == (args.layers is None):
        args.parser.error("give a shard, or --layers START:STOP")
    if not args.trainable:
        for name in _OF_TRAINING:
            if getattr(args, name) is not None:
                args.parser.error(f"argument --{name.replace('_', '-')}: it needs --trainable")
    bundle = open_bundle(args.bundle, verify=verify_when(args), progress=console.transfer)
    given = {"device": args.device, "dtype": args.dtype, "threads": args.threads, "kernels": args.kernels}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    check_ends(bundle, args.shard, args.layers)
    with FirstSignalEnds(console):
        registry.module(args.backend or registry.installed_backend(), "served")
    server = StageServer(
        bundle,
        args.shard,
        layers=args.layers,
        backend=args.backend,
        host=args.listen[0],
        port=args.listen[1],
        tls=args.tls,
        tokens=None if args.token_file is None else read_tokens(args.token_file),
        budget=Budget(
            slots=args.slots,
            sessions=args.sessions,
            rows=args.rows,
            shared_rows=args.shared_rows,
            max_bytes=args.memory,
            sessions_per_client=args.max_sessions_per_client,
            bytes_per_client=args.max_memory_per_client,
            lease=args.lease,
        ),
        trainer=_trainer(args) if args.trainable else None,
        status=args.status,
        log=timed_notes(console) if args.log else None,
        **options,
    )
    stage = server.stage
    with SecondSignalEnds():
        try:
            server.start()
            start, stop = stage.layer_range
            console.text(
                f"{server.url} computes {stage.name}, layers {start} to {stop - 1}, with {stage.backend} in "
                f"{server.service.served.dtype}; Ctrl-C ends it"
            )
            if args.listen[0] in ("0.0.0.0", "::"):  # noqa: S104  # compared, and not listened at
                console.note("clients use a name or an address of this machine that its certificate has")
            if server.status_url is not None:
                console.text(f"{server.status_url}/healthz and /metrics say how it is")
            console.json(
                {
                    "ok": True,
                    "url": server.url,
                    "status_url": server.status_url,
                    "shard": stage.name,
                    "layers": list(stage.layer_range),
                    "fingerprint": stage.fingerprint,
                    "dtype": server.service.served.dtype,
                    "backend": stage.backend,
                }
            )
            if server.service.training is not None:
                console.note(f"the stage is trained; its last step is {server.service.training.number}")
            server.wait()
        except KeyboardInterrupt:  # Ctrl-C and SIGTERM are how this command ends
            console.note("ending: new sessions are refused, and the step that is computed ends")
        finally:
            ended = server.stop(args.grace)
        if not ended:
            console.note(f"the step that is computed takes longer than --grace {args.grace:g}: it is given up")
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            os._exit(
                OK
            )  # Python would wait for the thread that computes. No file is half-written: each is replaced whole
    return OK


def _trainer(args: argparse.Namespace) -> Trainer:
    own = {
        "optimizer": args.optimizer,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "lora_rank": args.lora,
        "lora_alpha": args.lora_alpha,
        "checkpoints": args.checkpoints,
    }
    return Trainer(**{name: value for name, value in own.items() if value is not None})


def read_tokens(path: str) -> dict[str, str]:
    """Read a file of tokens: on each line a name, a space, and a token.

    Raises:
        BundleError: ``keys.file`` for a file that can't be read, a line of another form, or a name twice.
    """
    tokens: dict[str, str] = {}
    place = Path(os.path.abspath(path))
    try:
        text = files.read_file(place.parent, place.name, _MAX_TOKEN_BYTES).decode("utf-8", "replace")
    except BundleError as error:
        expected, got = f"a file of tokens, up to {_MAX_TOKEN_BYTES} bytes", error.problems[0].got
        raise BundleError(Problem(code="keys.file", file=path, expected=expected, got=got)) from None
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) != 2 or parts[0] in tokens or parts[1] in tokens.values():
            expected, got = "a new name, a space, and a new token", "one twice" if len(parts) == 2 else "another form"
            raise BundleError(Problem(code="keys.file", file=f"{path}, line {number}", expected=expected, got=got))
        tokens[parts[0]] = parts[1]
    return tokens


def _layers(text: str) -> tuple[int, int]:
    start, colon, stop = text.partition(":")
    if not colon or not all(part.isascii() and part.isdigit() and len(part) < 7 for part in (start, stop)):
        raise argparse.ArgumentTypeError(f"expected START:STOP, such as 4:8, got {text!r}")
    return int(start), int(stop)


COMMAND: Final = Command(
    name="serve-stage",
    help="compute a part of a model for other machines",
    configure=_add_arguments,
    run=_run,
)
