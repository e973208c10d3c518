"""The command ``chat``: talk with a model on a terminal, or through a pipe."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from splitbundle.bundle import Bundle
from splitbundle.cli import text_options
from splitbundle.cli.arguments import verify_when
from splitbundle.cli.chat_terminal import END_KEY, View, handling, interruptible, on_terminal, questions
from splitbundle.cli.console import Command, Console
from splitbundle.cli.words import in_command
from splitbundle.errors import BundleError, Problem, printable, quoted
from splitbundle.opening import open_bundle
from splitbundle.stages.channels import Channels, divided
from splitbundle.stages.text_generation import CANCELLED, CONTEXT, LENGTH, TextGeneration, context_of

HELP: Final = f"""\
/help          this list
/reset         begin a new chat; the system message stays
/system TEXT   set the system message, and begin a new chat
/undo          take back the last question and its answer
/save FILE     write the chat to a JSON file, which --messages reads
/exit          end; so does the end of the input ({END_KEY})
Ctrl-C stops an answer. A line that ends with \\ goes on in the next line. Three quotation marks (\"\"\") on a line
of their own begin and end a text of several lines."""
RESERVE: Final = 64
"""The number of tokens of the context that a chat leaves for an answer before old turns are left out."""
_COMMAND: Final = re.compile(r"/[a-z]+(\s|$)")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="a .splitbundle directory")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--messages", metavar="FILE", help="go on with the chat of a JSON file")
    parser.add_argument(
        "--thinking",
        choices=("show", "hide"),
        default="show",
        help="show what the model thinks before it answers, apart from the answer, or hide it; by default show",
    )
    parser.add_argument("--chat-template", metavar="NAME", help="another chat template of the bundle")
    text_options.add_sampling_arguments(parser, default="by default as many as the context has room for")
    text_options.add_model_arguments(parser)


class Chat:
    """The messages of a chat, the pipeline that answers, and the session that remembers what it computed."""

    def __init__(self, pipeline: Any, args: argparse.Namespace, console: Console) -> None:
        self.pipeline, self.args, self.console = pipeline, args, console
        self.tokenizer = pipeline.tokenizer()
        self.sampling = text_options.sampling(args, self.tokenizer.document, console)
        self.messages: list[dict[str, Any]] = []
        self.tools: list[dict[str, Any]] | None = None
        self.session = pipeline.session(1)
        if args.messages == "-":
            expected, got = "a file, as questions come on standard input", "-"
            raise BundleError(Problem(code="usage.messages", argument="--messages", expected=expected, got=got))
        if args.messages is not None:
            self.messages, self.tools = text_options.read_messages(args.messages)
        if args.system is not None:
            self.set_system(args.system)

    def set_system(self, text: str) -> None:
        """Replace the system message."""
        self.messages = [{"role": "system", "content": text}, *self.turns]

    @property
    def system(self) -> list[dict[str, Any]]:
        """Return the system message, in a list, if there is one."""
        return self.messages[: len(self.messages) - len(self.turns)]

    @property
    def turns(self) -> list[dict[str, Any]]:
        """Return the messages after the system message."""
        begins = bool(self.messages) and self.messages[0].get("role") in ("system", "developer")
        return self.messages[1:] if begins else self.messages

    def ask(self, question: str) -> None:
        """Write the model's answer to a question, and remember both.

        Raises:
            BundleError: for a question that can't be answered. Then the chat is as it was.
        """
        before = self.messages
        self.messages = [*before, {"role": "user", "content": question}]
        try:
            prompt = self._fitting_prompt()
            answer = self._answer(prompt)
        except BaseException:
            self.messages = before
            raise
        self.messages.append({"role": "assistant", **answer})

    def undo(self) -> None:
        """Take back the last question and what follows it."""
        turns = self.turns
        last = max((i for i, each in enumerate(turns) if each.get("role") == "user"), default=0)
        self.messages = [*self.system, *turns[:last]]

    def forget(self) -> None:
        """Begin another session: after an interruption, a token of this one may be half computed."""
        self.session = self.pipeline.session(1)

    def _fitting_prompt(self) -> list[int]:
        """Return the ids of the chat. The oldest whole turns are left out if it is too long for the context."""
        context, dropped = context_of(self.pipeline), 0
        while True:
            ids: list[int] = self.tokenizer.apply_chat_template(
                self.messages,
                tools=self.tools,
                add_generation_prompt=True,
                chat_template=self.args.chat_template,
            )
            following = [i for i, each in enumerate(self.turns) if each.get("role") == "user" and i > 0]
            reserve = min(RESERVE, context // 4) if context is not None else 0
            if context is None or len(ids) + reserve <= context or not following:
                break
            self.messages = [*self.system, *self.turns[following[0] :]]
            dropped += 1
        if dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            self.console.note(
                f"The oldest {turns} left out: the chat is longer than the model's context of {context} tokens."
            )
        return ids

    def _answer(self, prompt: list[int]) -> dict[str, str]:
        thinking = divided(self.tokenizer.decode(prompt[-32:], control_tokens=True))
        view = View(self.console, hidden=self.args.thinking == "hide")
        texts = {True: "", False: ""}  # what it thinks, and what it says

        def show(parts: Iterator[tuple[bool, str]]) -> None:
            for thinks, text in parts:
                texts[thinks] += text
                view.show(thinks, text)

        began = first = time.perf_counter()
        with self.pipeline.stream_text(
            prompt,
            max_new_tokens=self.args.max_new_tokens,
            stop=self.args.stop,
            prompt_lookup=self.args.prompt_lookup,
            session=self.session,
            defaults=False,  # self.sampling has them
            **self.sampling,
        ) as generation:
            try:
                with interruptible(generation):
                    for piece in generation:
                        first = first if generation.text != piece else time.perf_counter()
                        show(thinking.feed(piece))
                show(thinking.rest())
            except KeyboardInterrupt:
                generation.close()
                self.forget()
        view.end()
        answer = {"content": generation.text}
        if isinstance(thinking, Channels):  # harmony's templates want each channel in a field of its own
            answer = {"content": texts[False]} | ({"thinking": texts[True]} if texts[True] else {})
        self._report(generation, answer, began, first)
        return answer

    def _report(self, generation: TextGeneration, answer: dict[str, str], began: float, first: float) -> None:
        now, count = time.perf_counter(), len(generation.ids)
        speed = f", {(count - 1) / (now - first):.1f} tokens/s" if count > 1 and now > first else ""
        computed = len(generation.prompt_ids) - generation.reused
        self.console.note(
            f"[{count} tokens{speed}; the first after {first - began:.2f} s, for {computed} new tokens of a prompt of "
            f"{len(generation.prompt_ids)}]"
        )
        ends = {
            CANCELLED: "The answer was stopped.",
            CONTEXT: "The answer ends here, as the model's context is full.",
            LENGTH: f"The answer ends after {count} tokens, as --max-new-tokens says.",
        }
        if generation.finish_reason in ends:
            self.console.note(ends[generation.finish_reason])
        self.console.json(
            {
                "role": "assistant",
                **answer,
                "finish_reason": generation.finish_reason,
                "prompt_tokens": len(generation.prompt_ids),
                "reused_tokens": generation.reused,
                "new_tokens": count,
            }
        )


def _run(args: argparse.Namespace, console: Console) -> int:
    bundle = open_bundle(args.bundle, verify=verify_when(args), progress=console.transfer)
    if not on_terminal(console):
        return _talk(bundle, args, console)
    # Ctrl-C at the prompt, or in an answer, doesn't end the command, so it mustn't count as the reason of a later end.
    with handling(signal.default_int_handler):
        return _talk(bundle, args, console)


def _talk(bundle: Bundle, args: argparse.Namespace, console: Console) -> int:
    chat = Chat(text_options.load_pipeline(bundle, args), args, console)
    if on_terminal(console):
        console.note(f"{printable(bundle.manifest.model.name)}: write a message, or /help.")
    for line in questions(console):
        text = line.strip()
        if not text:
            continue
        if line.rstrip() in ("/exit", "/quit"):
            break
        try:
            if _COMMAND.match(line):
                _command(chat, text)
            else:
                chat.ask(line)
        except KeyboardInterrupt as error:
            if not on_terminal(console) or type(error) is not KeyboardInterrupt:
                raise
            chat.forget()
            console.note("The answer was stopped.")
        except Exception as error:  # whatever fails in one turn, the user keeps the chat
            if not on_terminal(console) or isinstance(error, OSError) or args.debug:
                raise
            if isinstance(error, BundleError):
                console.error(str(in_command(error.problems[0])))
                continue
            chat.forget()  # it may have been interrupted within a token
            console.error(f"{type(error).__name__}: {error}")
    return 0


def _command(chat: Chat, text: str) -> None:
    """Do what a line such as ``/reset`` asks for."""
    name, _, rest = text.partition(" ")
    if name == "/help":
        chat.console.note_lines(HELP)
    elif name == "/reset":
        chat.messages = chat.system
        chat.console.note("A new chat begins.")
    elif name == "/undo":
        chat.undo()
        chat.console.note(f"The chat has {len(chat.messages)} messages now.")
    elif name == "/system":
        chat.messages = []
        if rest.strip():
            chat.set_system(rest.strip())
        chat.console.note(f"A new chat begins, with{'' if chat.messages else 'out'} a system message.")
    elif name == "/save":
        _save(chat, _unquoted(rest.strip()))
    else:
        chat.console.note(
            f"There is no command {quoted(name)}: /help lists them. A space before it makes it a message."
        )


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'" else text


def _save(chat: Chat, path: str) -> None:
    """Write the chat to a new file, which appears complete or not at all."""
    if not path:
        chat.console.note("Give the name of a file: /save FILE")
        return
    data = json.dumps({"messages": chat.messages} | ({"tools": chat.tools} if chat.tools else {}), indent=2) + "\n"
    target = Path(path).expanduser()
    try:
        staging = target.with_name(f".{target.name}.{os.getpid()}")
        staging.write_text(data, encoding="utf-8")
        try:
            _name(staging, target)
        except FileExistsError:
            chat.console.note(f"{path} exists already. Give another name.")
            return
        finally:
            staging.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # the latter for names that no file can have
        chat.console.note(f"{path} can't be written: {getattr(error, 'strerror', None) or error}")
        return
    chat.console.note(f"The chat was written to {path}.")


def _name(staging: Path, target: Path) -> None:
    """Give a file a second name, which no file has.

    Raises:
        FileExistsError: a file has it.
    """
    try:
        os.link(staging, target)  # unlike a rename, it never replaces a file
    except FileExistsError:
        raise
    except OSError:  # a file system without links, such as FAT: then the name is taken first
        os.close(os.open(target, os.O_CREAT | os.O_EXCL, 0o666))
        os.replace(staging, target)


COMMAND: Final = Command(name="chat", help="talk with a model, through all shards", configure=_add_arguments, run=_run)
