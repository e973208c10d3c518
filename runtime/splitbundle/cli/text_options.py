"""The options that the commands for text share: how tokens are drawn, where they are computed, and stop strings."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from splitbundle.backends.registry import BACKENDS, installed_backend
from splitbundle.bundle import Bundle
from splitbundle.cli.arguments import (
    add_compute_arguments,
    add_strict_argument,
    number_in,
    number_of,
    positive,
    probability,
    temperature,
)
from splitbundle.cli.console import Console
from splitbundle.cli.remote_options import add_remote_arguments, remote_options
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.stages.sampling import with_defaults

_NUMBERS: Final = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
MAX_MESSAGES_BYTES: Final = 2**24


def add_sampling_arguments(parser: argparse.ArgumentParser, *, default: str) -> None:
    """Add the options that choose how tokens are drawn. ``default`` says how many tokens there are by default."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperature",
        type=temperature,
        metavar="T",
        help="the divisor of the logits; 0 takes the likeliest token. The default is the model's own; else 1 with one "
        "of the next four options, and 0 without",
    )
    group.add_argument("--top-k", type=positive, metavar="K", help="draw among the K likeliest tokens")
    group.add_argument(
        "--top-p", type=probability, metavar="P", help="draw among the likeliest tokens that reach probability P"
    )
    group.add_argument(
        "--min-p",
        type=number_in(0, 1),
        metavar="P",
        help="draw among the tokens of at least P times the probability of the likeliest one",
    )
    group.add_argument(
        "--typical-p", type=probability, metavar="P", help="draw among the most typical tokens that reach probability P"
    )
    group.add_argument(
        "--repetition-penalty",
        type=number_in(1e-6, 1e6),
        metavar="X",
        help="divide positive logits of tokens that are there already by X, and multiply negative ones",
    )
    group.add_argument(
        "--presence-penalty",
        type=number_in(-100, 100),
        metavar="X",
        help="subtract X from the logits of new tokens that were drawn before",
    )
    group.add_argument(
        "--frequency-penalty",
        type=number_in(-100, 100),
        metavar="X",
        help="subtract X from the logits of new tokens for each time that they were drawn",
    )
    group.add_argument(
        "--logit-bias", type=biases, metavar="ID:X,…", help="add X to the logit of the token ID, for each of a list"
    )
    group.add_argument("--seed", type=int, help="the seed of the draws; by default a different one each time")
    group.add_argument(
        "--no-defaults",
        dest="defaults",
        action="store_false",
        help="don't sample as the model's generation_config.json says",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="a text that ends the answer; may be repeated"
    )
    parser.add_argument(
        "--prompt-lookup",
        type=number_of(1, 64),
        metavar="N",
        help="guess N tokens from the text itself and check them at once; pays where a text repeats itself",
    )
    parser.add_argument(
        "--max-new-tokens",
        "-n",
        type=positive,
        metavar="N",
        help=f"the largest number of new tokens, {default}. The text ends earlier where the model's context is full",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where and how a model computes."""
    parser.add_argument(
        "--backend", choices=BACKENDS, help="the backend; by default torch, or onnxruntime if torch isn't installed"
    )
    parser.add_argument("--device", help="the device, by its name in torch")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="the dtype to compute in; by default the stored one",
    )
    add_compute_arguments(parser)
    add_strict_argument(parser)
    add_remote_arguments(parser)


def load_pipeline(bundle: Bundle, args: argparse.Namespace) -> Any:
    """Return the pipeline that the options of ``add_model_arguments`` ask for."""
    return bundle.pipeline(
        backend=args.backend or installed_backend(),
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        kernels=args.kernels,
        **remote_options(args),
    )


def sampling(args: argparse.Namespace, document: Any, console: Console) -> dict[str, Any]:
    """Return the arguments of sampling, and say which of them come from the model's makers.

    Args:
        args: the options of ``add_sampling_arguments``.
        document: the bundle's text document, or None.
        console: where to say it.
    """
    names = (*_NUMBERS, "presence_penalty", "frequency_penalty", "logit_bias", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    found = with_defaults(given, document if args.defaults else None)
    said = [f"{name.replace('_', '-')} {found[name]:g}" for name in _NUMBERS if name in found and name not in given]
    if said:
        console.note(f"Sampling as the model's makers do: {', '.join(said)} (--no-defaults: the likeliest token)")
    return found


def biases(text: str) -> dict[int, float]:
    """Parse ``50256:-100,11:1.5`` for argparse."""
    found: dict[int, float] = {}
    try:
        for part in text.split(","):
            token, bias = part.split(":")
            if int(token) in found:
                raise argparse.ArgumentTypeError(f"expected each ID once, got {text!r}")
            found[int(token)] = float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ID:X with commas between them, got {text!r}") from None
    return found


def read_messages(path: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return the messages of a JSON file, and its tools if it has any.

    The file has an array of messages, or an object with ``messages`` and perhaps ``tools``. ``-`` is standard input.

    Raises:
        BundleError: ``usage.messages``.
    """
    try:
        data = _read(path)
    except OSError as error:
        raise _wrong(path, "a file that can be read", error.strerror or str(error)) from None
    if len(data) > MAX_MESSAGES_BYTES:
        raise _wrong(path, f"at most {MAX_MESSAGES_BYTES:,} bytes", "more")
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _wrong(path, "JSON in UTF-8", str(error)) from None
    tools = value.get("tools") if isinstance(value, dict) else None
    messages = value.get("messages") if isinstance(value, dict) else value
    _check_objects(path, messages, "messages", "an array of messages, each an object with role and content")
    if not messages:
        raise _wrong(path, "at least one message", "an empty array")
    if tools is not None:
        _check_objects(path, tools, "tools", "an array of objects as tools")
    return messages, tools


def _read(path: str) -> bytes:
    if path != "-":
        with Path(path).open("rb") as file:
            return file.read(MAX_MESSAGES_BYTES + 1)
    return b"" if sys.stdin is None else sys.stdin.buffer.read(MAX_MESSAGES_BYTES + 1)


def _check_objects(path: str, value: object, name: str, expected: str) -> None:
    if not isinstance(value, list):
        raise _wrong(path, expected, quoted(value))
    for number, each in enumerate(value):
        if not isinstance(each, dict):
            raise _wrong(path, expected, f"{quoted(each)} as {name}[{number}]")


def _wrong(path: str, expected: str, got: str) -> BundleError:
    return BundleError(Problem(code="usage.messages", file=path, expected=expected, got=got))
