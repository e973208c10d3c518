"""The command ``perplexity``: how well a model predicts a text."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any, Final

from splitbundle.cli import text_options
from splitbundle.cli.arguments import positive, verify_when
from splitbundle.cli.console import Command, Console
from splitbundle.errors import BundleError, Problem
from splitbundle.opening import open_bundle
from splitbundle.stages.text_generation import context_of

WINDOW: Final = 512
"""The default number of tokens of a window, as in llama.cpp."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory")
    parser.add_argument("file", help="a text in UTF-8; - is standard input")
    parser.add_argument(
        "--window",
        type=positive,
        metavar="N",
        help=f"the number of tokens that are computed at once; by default {WINDOW}, or the model's context",
    )
    parser.add_argument(
        "--per-token", action="store_true", help="also print each scored token with the logarithm of its probability"
    )
    text_options.add_model_arguments(parser)


def _run(args: argparse.Namespace, console: Console) -> int:
    bundle = open_bundle(args.bundle, verify=verify_when(args), progress=console.transfer)
    tokenizer = bundle.tokenizer()
    ids = tokenizer.encode(_text(args.file))
    pipeline = text_options.load_pipeline(bundle, args)
    context = context_of(pipeline)
    window = args.window or min(WINDOW, context or WINDOW)
    if context is not None and window > context:
        raise _usage("--window", f"at most {context}, the model's context", f"{window}")
    if window < 4:
        raise _usage("--window", "at least 4 tokens", f"{window}")
    if len(ids) < 2:
        raise _usage("FILE", "a text of at least two tokens", f"{len(ids)}")
    begin = ids[0] if tokenizer.encode("")[:1] == ids[:1] else None  # the token that begins every text, if there is one
    scores: list[float] = []
    windows = list(divided(ids, window))
    for number, (start, stop, first) in enumerate(windows):
        console.progress("scoring", number, len(windows))
        row = ids[start:stop]
        if begin is not None:
            row[0] = begin
        (found,) = pipeline.log_probabilities(pipeline.token_ids([row]), last=len(row) - first)
        scores += found
        if args.per_token:
            _print_tokens(console, tokenizer, start + first, row[first:], found)
    console.end_progress()
    mean = -math.fsum(scores) / len(scores)
    spread = math.fsum((-score - mean) ** 2 for score in scores) / max(1, len(scores) - 1)
    value = math.exp(mean)
    error = value * math.sqrt(spread / len(scores))
    console.text(f"perplexity {value:.4f} ± {error:.4f}")
    left = len(ids) - windows[-1][1]
    console.note(
        f"{len(scores)} of {len(ids)} tokens were scored, in {len(windows)} windows of at most {window} tokens"
        + (f"; the last {left} make no whole window" if left else "")
    )
    console.json(
        {
            "ok": True,
            "perplexity": value,
            "standard_error": error,
            "mean_log_probability": -mean,
            "scored_tokens": len(scores),
            "tokens": len(ids),
            "window": window,
            "windows": len(windows),
        }
    )
    return 0


def divided(ids: list[int], window: int) -> list[tuple[int, int, int]]:
    """Return the windows of a text: where each begins and ends, and the first token in it that is scored.

    llama.cpp scores the second half of each window, so that each scored token has at least half a window before it. The
    tokens that make no whole window are left out. A text that is shorter than a window is one window, of which all
    tokens but the first are scored.
    """
    if len(ids) < window:
        return [(0, len(ids), 1)]
    first = window // 2 + 1  # the logits of the token before predict it
    return [(start, start + window, first) for start in range(0, len(ids) - window + 1, window)]


def _print_tokens(console: Console, tokenizer: Any, at: int, ids: list[int], scores: list[float]) -> None:
    for place, (token, score) in enumerate(zip(ids, scores, strict=True), at):
        text = tokenizer.decode([token], control_tokens=True)
        console.text(f"  {place:8}  {token:8}  {score:10.5f}  {text!a}")
        console.json({"position": place, "id": token, "log_probability": score, "text": text})


def _text(path: str) -> str:
    try:
        if path != "-":
            return Path(path).read_bytes().decode("utf-8")
        return sys.stdin.buffer.read().decode("utf-8") if sys.stdin is not None else ""
    except OSError as error:
        raise _usage("FILE", "a file that can be read", f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise _usage("FILE", "a text in UTF-8", "other bytes") from None


def _usage(argument: str, expected: str, got: str) -> BundleError:
    return BundleError(Problem(code="usage.arguments", argument=argument, expected=expected, got=got))


COMMAND: Final = Command(name="perplexity", help="how well a model predicts a text", configure=_add_arguments, run=_run)
