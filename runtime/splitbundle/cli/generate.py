"""The command ``generate``: continue a prompt through all shards."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from splitbundle.backends.registry import BACKENDS, installed_backend
from splitbundle.bundle import Bundle
from splitbundle.cli.arguments import (
    add_compute_arguments,
    add_strict_argument,
    integers,
    positive,
    probability,
    temperature,
    verify_when,
)
from splitbundle.cli.console import Command, Console
from splitbundle.errors import BundleError, MissingExtra, Problem
from splitbundle.opening import open_bundle

DEFAULT_TOKENS: Final = 64

if TYPE_CHECKING:
    from splitbundle.text.huggingface import TextTokenizer


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory")
    parser.add_argument(
        "prompt",
        nargs="?",
        help="the text to continue, after -- if it begins with -; without it, or for -, standard input is read",
    )
    parser.add_argument(
        "--ids", metavar="1,2,3", type=integers, help="the prompt as token ids; the output is token ids, too"
    )
    parser.add_argument(
        "--max-new-tokens",
        "-n",
        type=positive,
        metavar="N",
        help="the largest number of new tokens; by default 64. The text ends earlier at the model's context length",
    )
    parser.add_argument(
        "--beyond-context",
        action="store_true",
        help="go on where the text reaches the model's context length; a model wasn't trained for that",
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        help="the divisor of the logits; 0, the default, takes the likeliest token",
    )
    parser.add_argument("--top-k", type=positive, metavar="K", help="draw among the K likeliest tokens")
    parser.add_argument(
        "--top-p", type=probability, metavar="P", help="draw among the likeliest tokens that reach probability P"
    )
    parser.add_argument("--seed", type=int, help="the seed of the draws; by default a different one each time")
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
    room = _room(bundle, len(ids), beyond=args.beyond_context)
    wanted = args.max_new_tokens or DEFAULT_TOKENS
    tokens: list[int] = []
    pieces: list[str] = []
    times: list[float] = []
    reason = "length"
    for token in _tokens(bundle, ids, args, wanted if room is None else min(wanted, room)):
        times.append(time.perf_counter())
        if token in bundle.manifest.text.stop_ids:
            reason = "stop"
            break
        tokens.append(token)
        pieces.append(f"{',' * (len(tokens) > 1)}{token}" if text is None else text.piece(token))
        console.stream(pieces[-1])
    pieces.append("" if text is None else text.rest())
    console.stream(pieces[-1] + "\n")
    if reason == "length" and room is not None and room < wanted:
        reason = "context"
        console.note(f"The text ends here: it has reached the model's context of {_context(bundle)} tokens.")
    speed = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 and times[-1] > times[0] else None
    if speed is not None:
        console.note(f"{len(tokens)} tokens, {speed:.1f} tokens/s after the first")
    result: dict[str, object] = {"ok": True, "prompt_ids": ids, "ids": tokens, "ended_by": reason}
    result |= {} if speed is None else {"tokens_per_second": round(speed, 2)}
    console.json(result | ({} if text is None else {"text": "".join(pieces)}))
    return 0


def _context(bundle: Bundle) -> int | None:
    """Return the model's context length in tokens, or None if nothing states it."""
    known = (bundle.architecture.position_limit, bundle.manifest.model.context_length)
    return min((length for length in known if length is not None), default=None)


def _room(bundle: Bundle, prompt: int, *, beyond: bool) -> int | None:
    """Return the number of tokens that may follow a prompt, or None if there is no limit.

    The last token is drawn and not computed with, so it needs no position.

    Raises:
        BundleError: ``usage.prompt`` for a prompt that is longer than the model's context.
    """
    context, limit = _context(bundle), bundle.architecture.position_limit
    if beyond:
        if limit is not None:
            expected, got = "a model whose positions have no limit", f"one of {limit} positions"
            raise BundleError(Problem(code="usage.arguments", argument="--beyond-context", expected=expected, got=got))
        return None
    if context is None:
        return None
    if prompt > context:
        hint = "Shorten it" if limit is not None else "Shorten it, or go on at your own risk: --beyond-context"
        raise _usage(f"at most {context} tokens, the model's context", f"{prompt}", hint)
    return context - prompt + 1


def _usage(expected: str, got: str, hint: str | None = None) -> BundleError:
    return BundleError(Problem(code="usage.prompt", argument="PROMPT", expected=expected, got=got, hint=hint))


def _prompt(text: str | None) -> str:
    """Return the prompt, from the argument or from standard input, as UTF-8 in every locale."""
    try:
        if text is not None and text != "-":
            return os.fsencode(text).decode("utf-8")
        if sys.stdin is None:  # it was closed before the start
            raise _usage("text, as an argument or on standard input", "none")
        read = sys.stdin.buffer.read().decode("utf-8")
        # echo and editors end a text with a line end. It is no part of the prompt; a second one would be.
        return read.removesuffix("\n").removesuffix("\r") if read.endswith("\n") else read
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


def _tokens(bundle: Bundle, ids: list[int], args: argparse.Namespace, most: int) -> Iterator[int]:
    pipeline = bundle.pipeline(
        backend=args.backend or installed_backend(),
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        kernels=args.kernels,
    )
    for drawn in pipeline.generate(
        pipeline.token_ids([ids]),
        max_new_tokens=most,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    ):
        yield int(drawn[0])


COMMAND: Final = Command(
    name="generate", help="continue a prompt, through all shards", configure=_add_arguments, run=_run
)
