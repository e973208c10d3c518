"""The command ``serve``: answer OpenAI's interface, and show a page, over one or several bundles."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from splitbundle import ray
from splitbundle.bundle import Bundle
from splitbundle.cli import text_options
from splitbundle.cli.arguments import number_of, positive, size, verify_when
from splitbundle.cli.console import Command, Console, timed_notes
from splitbundle.cli.second_signal import SecondSignalEnds
from splitbundle.cli.web_options import add_access_arguments, add_end_arguments, check_access, listening, origin_or_any
from splitbundle.errors import BundleError, Problem
from splitbundle.opening import open_bundle
from splitbundle.serving.web.access import Access
from splitbundle.serving.web.models import Model, Models
from splitbundle.serving.web.opening import open_web_server
from splitbundle.stages.shared_pipeline import SharedPipeline

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundles",
        nargs="+",
        metavar="BUNDLE",
        help="a .splitbundle directory, or NAME=DIRECTORY; of several ones, each is loaded when it is asked for",
    )
    group = add_access_arguments(parser)
    group.add_argument(
        "--cors",
        action="append",
        type=origin_or_any,
        metavar="ORIGIN",
        help="a page of this origin may ask; by default none",
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--rows", type=number_of(1, 4096), metavar="N", default=8, help="the texts made at once; by default 8"
    )
    group.add_argument(
        "--queue", type=number_of(0, 65536), metavar="N", default=64, help="the texts that may wait; by default 64"
    )
    group.add_argument(
        "--capacity", type=positive, metavar="N", help="the most tokens of a text; by default the model's context"
    )
    group.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="the weights that may be loaded, such as 8GiB; idle ones make room",
    )
    group = parser.add_argument_group("a cluster of Ray")
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="compute in replicas on a cluster: auto for that of this machine, HOST:PORT for another one, or local to "
        "start one here",
    )
    group.add_argument(
        "--replicas",
        type=_replicas,
        metavar="LEAST[:MOST]",
        help="the replicas; with two numbers, theirs follows the load; by default 1",
    )
    group.add_argument("--spread", action="store_true", help="put the processes of a replica on different machines")
    add_end_arguments(parser)
    text_options.add_model_arguments(parser)


def _run(args: argparse.Namespace, console: Console) -> int:
    check_access(args)
    named = _named(args.bundles)
    for option in ("remote", "ray"):
        if getattr(args, option) and len(named) > 1:
            args.parser.error(f"argument --{option}: give one bundle with it")
    if args.ray and args.remote:
        args.parser.error("argument --ray: give it or --remote")
    if not args.ray and (args.replicas or args.spread):
        args.parser.error("arguments --replicas and --spread: they need --ray")
    access = Access(args.api_key_file, note=console.note)
    models = {}
    for name, path in named.items():
        bundle = open_bundle(path, verify=verify_when(args), progress=console.transfer)
        bundle.tokenizer()  # its absence, or that of its library, is said before weights are loaded
        models[name] = Model(name, bundle, _loader(bundle, args))
    served = Models(models, args.memory)
    server = open_web_server(
        served,
        access,
        origins=args.cors or (),
        log=timed_notes(console) if args.log else None,
        **listening(args),
    )
    with SecondSignalEnds():
        try:
            if len(models) == 1:
                with served.using(served.first.name):
                    pass  # loaded now, so that an error is seen now
            server.start()
            console.text(
                f"{server.url} answers for {', '.join(models)}; {server.url}/v1 is for clients; Ctrl-C ends it"
            )
            console.json({"ok": True, "url": server.url, "models": list(models)})
            server.wait()
        except KeyboardInterrupt:  # Ctrl-C and SIGTERM are how this command ends
            console.note("ending: new requests are refused, and answers end")
        finally:
            server.stop(args.grace)
    return 0


def _named(given: list[str]) -> dict[str, str]:
    """Return the name of each bundle -> its directory."""
    found: dict[str, str] = {}
    for each in given:
        name, equals, path = each.partition("=")
        if not equals or not _NAME.fullmatch(name):
            name, path = Path(each).name.removesuffix(".splitbundle") or "model", each
        if name in found:
            expected = "names that differ, as in first=DIRECTORY second=DIRECTORY"
            raise BundleError(
                Problem(code="usage.arguments", argument="BUNDLE", expected=expected, got=f"{name} twice")
            )
        found[name] = path
    return found


def _loader(bundle: Bundle, args: argparse.Namespace) -> Callable[[], Any]:
    def load() -> Any:
        if args.ray:
            own = {"backend": args.backend, "device": args.device, "dtype": args.dtype, "context": args.capacity}
            own |= {"threads": args.threads, "kernels": args.kernels, "replicas": args.replicas}
            given = {name: value for name, value in own.items() if value is not None}
            return ray.deploy(bundle, address=args.ray, rows=args.rows, queue=args.queue, spread=args.spread, **given)
        pipeline = text_options.load_pipeline(bundle, args)
        return SharedPipeline(pipeline, rows=args.rows, waiting=args.queue, capacity=args.capacity)

    return load


def _replicas(text: str) -> int | tuple[int, int]:
    least, colon, most = text.partition(":")
    if not all(part.isascii() and part.isdigit() and len(part) < 5 for part in ((least, most) if colon else (least,))):
        raise argparse.ArgumentTypeError(f"expected LEAST or LEAST:MOST, such as 1:4, got {text!r}")
    return (int(least), int(most)) if colon else int(least)


COMMAND: Final = Command(
    name="serve",
    help="answer OpenAI's interface, with a page to look at",
    configure=_add_arguments,
    run=_run,
)
"""The command needs the extra ``serve``: starlette, uvicorn and prometheus_client."""
