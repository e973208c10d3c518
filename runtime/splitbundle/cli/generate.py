"""The command ``generate``: continue a prompt through all shards."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from splitbundle.backends.registry import BACKENDS, installed_backend
from splitbundle.bundle import Bundle
from splitbundle.cli.arguments import add_strict_argument, integers, positive, verify_when
from splitbundle.cli.console import Command, Console
from splitbundle.errors import BundleError, MissingExtra, Problem
from splitbundle.opening import open_bundle

if TYPE_CHECKING:
    from splitbundle.text.huggingface import TextTokenizer


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory")
    parser.add_argument("prompt", nargs="?", help="the text to continue; by default, or for -, standard input")
    parser.add_argument(
        "--ids", metavar="1,2,3", type=integers, help="the prompt as token ids; the output is token ids, too"
    )
    parser.add_argument(
        "--max-new-tokens",
        "-n",
        type=positive,
        metavar="N",
        help="the largest number of new tokens; by default 64, or fewer if the model has fewer positions",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="the divisor of the logits; 0, the default, takes the likeliest token",
    )
    parser.add_argument("--top-k", type=positive, metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw among the likeliest tokens that reach probability P"
    )
    parser.add_argument("--seed", type=int, help="the seed of the draws; by default a different one each time")
    parser.add_argument(
        "--backend", choices=BACKENDS, help="the backend; by default torch, or onnxruntime if torch isn't installed"
    )
    parser.add_argument("--device", help="the device, by its name in torch")
    parser.add_argument(
        "--dtype", help="the dtype to compute in: float32, float16 or bfloat16; by default the stored one"
    )
    add_strict_argument(parser)


def _run(args: argparse.Namespace, console: Console) -> int:
    bundle = open_bundle(args.bundle, verify=verify_when(args))
    text = None
    if args.ids is None:
        tokenizer = _tokenizer(bundle)
        ids = tokenizer.encode(_prompt(args.prompt))
        text = tokenizer.stream(ids)
    else:
        if args.prompt is not None:
            raise _usage("text or --ids", "both")
        ids = list(args.ids)
        last = bundle.architecture.vocab_size - 1
        if wrong := [token for token in ids if not 0 <= token <= last]:
            raise _usage(f"token ids from 0 to {last}", str(wrong[0]))
    if not ids:
        raise _usage("a prompt of at least one token", "none")
    tokens: list[int] = []
    pieces: list[str] = []
    for token in _tokens(bundle, ids, args):
        tokens.append(token)
        pieces.append(f"{',' * (len(tokens) > 1)}{token}" if text is None else text.piece(token))
        console.stream(pieces[-1])
    pieces.append("" if text is None else text.rest())
    console.stream(pieces[-1] + "\n")
    result: dict[str, object] = {"ok": True, "prompt_ids": ids, "ids": tokens}
    console.json(result | ({} if text is None else {"text": "".join(pieces)}))
    return 0


def _usage(expected: str, got: str) -> BundleError:
    return BundleError(Problem(code="usage.prompt", argument="PROMPT", expected=expected, got=got))


def _prompt(text: str | None) -> str:
    """Return the prompt, from the argument or from standard input, as UTF-8 in every locale."""
    try:
        if text is not None and text != "-":
            return os.fsencode(text).decode("utf-8")
        return sys.stdin.buffer.read().decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError):
        raise _usage("text in UTF-8", "other bytes") from None


def _tokenizer(bundle: Bundle) -> TextTokenizer:
    if bundle.manifest.text.tokenizer is None:
        hint = "Give the prompt as token ids: --ids 1,2,3"
        raise BundleError(
            Problem(
                code="text.none", file=str(bundle.path), expected="a tokenizer", got="a bundle without one", hint=hint
            )
        )
    try:
        from splitbundle.text.huggingface import TextTokenizer
    except ModuleNotFoundError as error:
        if error.name != "tokenizers":
            raise
        raise MissingExtra.of("tokenizers", "text", "turn text into token ids (or give --ids)") from None
    return TextTokenizer(bundle)


def _tokens(bundle: Bundle, ids: list[int], args: argparse.Namespace) -> Iterator[int]:
    pipeline = bundle.pipeline(backend=args.backend or installed_backend(), device=args.device, dtype=args.dtype)
    given = pipeline.token_ids([ids])
    limit = bundle.architecture.position_limit
    room = 64 if limit is None else max(1, min(64, limit - len(ids) + 1))
    stop = bundle.manifest.text.stop_ids
    for drawn in pipeline.generate(
        given,
        max_new_tokens=args.max_new_tokens or room,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_ids=stop,
    ):
        token = int(drawn[0])
        if token in stop:
            return
        yield token


COMMAND: Final = Command(
    name="generate", help="continue a prompt, through all shards", configure=_add_arguments, run=_run
)
