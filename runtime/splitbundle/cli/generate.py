"""The command ``generate``: continue a prompt through all shards."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

from splitbundle.bundle import Bundle
from splitbundle.cli import text_options
from splitbundle.cli.arguments import integers, number_of, verify_when
from splitbundle.cli.console import Command, Console
from splitbundle.errors import BundleError, MissingExtra, Problem
from splitbundle.opening import open_bundle
from splitbundle.records import replace
from splitbundle.stages.text_generation import CONTEXT, context_of, shorter_context
from splitbundle.verification import text_rules

DEFAULT_TOKENS: Final = 64


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
        "--messages",
        metavar="FILE",
        help="the messages of a chat in a JSON file, or - for standard input; the model answers the last one",
    )
    parser.add_argument("--chat-template", metavar="NAME", help="with --messages: another chat template of the bundle")
    parser.add_argument(
        "--beyond-context",
        action="store_true",
        help="go on where the text reaches the model's context length; a model wasn't trained for that",
    )
    parser.add_argument(
        "--logprobs",
        type=number_of(0, 100),
        metavar="N",
        help="with --json: the logarithm of the probability of each new token, and of the N likeliest tokens there",
    )
    text_options.add_sampling_arguments(parser, default=f"by default {DEFAULT_TOKENS}")
    text_options.add_model_arguments(parser)


class _Ids:
    """The tokenizer of a prompt that is token ids: the new text is ids with commas between them."""

    def __init__(self, bundle: Bundle) -> None:
        self.document = text_rules.read(bundle)
        self.stop_ids = bundle.manifest.text.stop_ids
        self._count = 0

    def stream(self, prompt: Sequence[int]) -> _Ids:
        """Return this object, which is also the stream."""
        return self

    def piece(self, token: int) -> str:
        """Return the text of a token."""
        self._count += 1
        return f"{',' * (self._count > 1)}{token}"

    def rest(self) -> str:
        """Return nothing: each token has its own text."""
        return ""


def _run(args: argparse.Namespace, console: Console) -> int:
    bundle = open_bundle(args.bundle, verify=verify_when(args), progress=console.transfer)
    tokenizer, prompt, tools = _prompt(bundle, args)
    pipeline = text_options.load_pipeline(bundle, args)
    began: list[float] = []
    with pipeline.stream_text(
        prompt,
        max_new_tokens=args.max_new_tokens or DEFAULT_TOKENS,
        stop=args.stop,
        prompt_lookup=args.prompt_lookup,
        logprobs=args.logprobs,
        defaults=False,  # those of the options have them
        beyond_context=args.beyond_context,
        tools=tools,
        chat_template=args.chat_template,
        tokenizer=tokenizer,
        **text_options.sampling(args, tokenizer.document, console),
    ) as generation:
        for piece in generation:
            began.append(time.perf_counter())
            console.stream(piece)
            console.json({"piece": piece})
        made = generation.completion()
    console.stream("\n")
    if made.finish_reason == CONTEXT:
        context = context_of(pipeline)
        console.note(f"The text ends here: it has reached the model's context of {context} tokens.")
    speed = generation.tokens_per_second
    if speed is not None:
        console.note(f"{len(made.ids)} tokens, {speed:.1f} tokens/s after the first")
    result: dict[str, object] = {
        "ok": True,
        "prompt_ids": made.prompt_ids,
        "ids": made.ids,
        "ended_by": made.finish_reason,
        "stopped_by": made.stopped_by,
    }
    if speed is not None:
        result["tokens_per_second"] = round(speed, 2)
    if made.logprobs is not None and made.top is not None:
        result["logprobs"] = [
            {"id": token, "logprob": logprob, "top": [{"id": each, "logprob": value} for each, value in top]}
            for token, logprob, top in zip(made.ids, made.logprobs, made.top, strict=True)
        ]
    console.json(result if args.ids is not None else result | {"text": made.text})
    return 0


def _prompt(bundle: Bundle, args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return the tokenizer, the prompt, and the tools of a chat."""
    if sum(given is not None for given in (args.prompt, args.ids, args.messages)) > 1:
        raise _usage("text, --ids or --messages", "several of them")
    if args.chat_template is not None and args.messages is None:
        raise _unused("--chat-template", "a chat (--messages FILE)")
    if args.logprobs is not None and not args.json:
        raise _unused("--logprobs", "--json, whose last line has them")
    if args.ids is not None and args.stop:
        raise _unused("--stop", "text, as a prompt or in --messages")
    if args.messages is not None:
        messages, tools = text_options.read_messages(args.messages)
        return bundle.tokenizer(), messages, tools
    if args.ids is None:
        tokenizer = _tokenizer(bundle)
        prompt = tokenizer.encode(_text(args.prompt))
    else:
        tokenizer, prompt = _Ids(bundle), list(args.ids)
        last = bundle.architecture.vocab_size - 1
        if wrong := [token for token in prompt if not 0 <= token <= last]:
            raise _usage(f"token ids from 0 to {last}", str(wrong[0]))
    if not prompt:
        raise _usage("a prompt of at least one token", "none")
    _check_room(bundle, len(prompt), beyond=args.beyond_context)
    return tokenizer, prompt, None


def _check_room(bundle: Bundle, prompt: int, *, beyond: bool) -> None:
    """Check before the weights are loaded that the model's context has room for a prompt.

    Raises:
        BundleError: ``usage.prompt`` for a prompt that is longer than the model's context.
    """
    limit = bundle.architecture.position_limit
    context = shorter_context(bundle.architecture, bundle.manifest.model.context_length)
    if beyond:
        if limit is not None:
            expected, got = "a model whose positions have no limit", f"one of {limit} positions"
            raise BundleError(Problem(code="usage.arguments", argument="--beyond-context", expected=expected, got=got))
    elif context is not None and prompt > context:
        hint = "Shorten it" if limit is not None else "Shorten it, or go on at your own risk: --beyond-context"
        raise _usage(f"at most {context} tokens, the model's context", f"{prompt}", hint)


def _usage(expected: str, got: str, hint: str | None = None) -> BundleError:
    return BundleError(Problem(code="usage.prompt", argument="PROMPT", expected=expected, got=got, hint=hint))


def _unused(option: str, needed: str) -> BundleError:
    return BundleError(Problem(code="usage.arguments", argument=option, expected=needed, got=f"{option} without it"))


def _text(text: str | None) -> str:
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


def _tokenizer(bundle: Bundle) -> Any:
    hint = "Give the prompt as token ids: --ids 1,2,3"
    try:
        return bundle.tokenizer()
    except MissingExtra as error:
        (problem,) = error.problems
        raise MissingExtra(replace(problem, expected=f"{problem.expected} (or give --ids)")) from None
    except BundleError as error:
        if error.codes != ("text.none",):
            raise
        (problem,) = error.problems
        raise BundleError(replace(problem, hint=hint)) from None


COMMAND: Final = Command(
    name="generate", help="continue a prompt, through all shards", configure=_add_arguments, run=_run
)
