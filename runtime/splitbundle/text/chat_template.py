"""Chat templates: Jinja templates that turn messages into the text of a prompt, as Hugging Face's tokenizers do.

A template comes from a stranger, and so do most messages. So the template reaches nothing but the messages, its work is
limited, and each character of the result says who wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Final

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError, UndefinedError

from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.text.marked import MODEL, USER, Marked, greatest, is_unicode
from splitbundle.text.template_environment import ChatEnvironment, Refused
from splitbundle.text.template_guard import guarded
from splitbundle.text.template_limits import DEPTH, ITEM, OBJECT, LimitReached, budget

__all__ = ["ChatTemplate"]

_LONGEST: Final = 2**20
"""The characters that a template may have."""
_LONG_NUMBER: Final = re.compile(r"[0-9][0-9_]{199}")
"""Jinja reads numbers of any length, in a time that grows with the square of it."""
_TOKENS: Final = 30_000
"""The tokens that a template may have, spaces included. Those in ``tests/text/templates`` have up to 1,400."""
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_BITS: Final = 1024
_FAULTS: Final = (
    *(TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError),
    *(LimitReached, RecursionError, RuntimeError, MemoryError, SyntaxError),
)
"""What parsing, compiling or rendering a template may raise."""
_ANOTHER: Final = "Use another template, or report this one to whoever published the model"
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled chat template. Threads may share it.

    ``source`` is the template's text. ``file`` is its path, for messages. ``variables`` are strings that the template
    may write as its own, such as ``bos_token``: text that spells a control token in them is one. A function of
    templates, such as ``raise_exception``, wins over a variable of its name. ``clock`` returns the time that
    ``strftime_now`` writes.

    Raises:
        BundleError: ``text.template`` if it isn't a template, or needs what chat templates don't have.
    """

    def __init__(
        self,
        source: str,
        *,
        file: str,
        variables: Mapping[str, str],
        clock: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._file, self._variables = file, dict(variables)
        problem = None
        try:
            if len(source) > _LONGEST:
                raise LimitReached(f"a template of more than {_LONGEST} characters")
            if _LONG_NUMBER.search(source):
                raise LimitReached("a number of more than 200 digits")
            environment = ChatEnvironment(clock)
            for name in self._variables.keys() & environment.globals.keys():
                del self._variables[
                    name
                ]  # a text in the place of raise_exception would fail where the template calls it
            if any(number >= _TOKENS for number, _ in enumerate(environment.lex(source, filename=file))):
                raise LimitReached(f"a template of more than {_TOKENS} tokens")
            tree = guarded(environment.parse(source, filename=file))
            code = environment.compile(tree, filename=file)
            self._template = Template.from_code(environment, code, environment.make_globals(None))
        except _FAULTS as error:
            problem = _problem(error, file, _line_of_source(error))
        if problem is not None:  # raised here, so that the error holds no frames and no text of the template
            raise BundleError(problem)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> Marked:
        """Return the text of these messages, with marks.

        The arguments are those of ``apply_chat_template`` in transformers. As there, fields of a message that are None
        count as absent, and the names ``reasoning_content``, ``thinking`` and ``reasoning`` mean the same. Strings of
        assistant messages have the mark ``MODEL``. Other strings that are given here have the mark ``USER``.

        Args:
            messages: the messages, each with ``role`` and ``content``, and what else the template knows.
            tools: the tools that the model may call, as JSON schemas.
            documents: the documents that the model may cite.
            add_generation_prompt: whether to end with the beginning of the model's answer.
            variables: further variables of the template.

        Raises:
            BundleError: ``input.value`` if an argument isn't plain data; ``text.template`` if the template refuses the
                messages, needs something that isn't given, fails, or takes more work than it may.
        """
        given = _Given()
        values: dict[str, Any] = {name: given.taken(value, name, USER) for name, value in variables.items()}
        values |= {
            "messages": given.messages(messages),
            "tools": None if tools is None else given.parts(tools, "tools", USER),
            "documents": given.taken(documents, "documents", USER),
            "add_generation_prompt": add_generation_prompt,
        }
        problem = None
        try:
            with budget(given.size):
                context = self._template.new_context(self._variables | values)
                return self._template.environment.concat(self._template.root_render_func(context))  # type: ignore
        except _FAULTS as error:
            problem = _problem(error, self._file, self._line(error.__traceback__))
        raise BundleError(problem)  # here, so that the error holds no frames and no text of the messages

    def _line(self, trace: TracebackType | None) -> int | None:
        """Return the line of the template where an error was raised."""
        line = None
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == self._template.filename:
                line = self._template.get_corresponding_lineno(trace.tb_lineno)
            trace = trace.tb_next
        return line


class _Given:
    """Copies of the caller's values as plain data with marks, and their size in units of work."""

    def __init__(self) -> None:
        self.size = 0

    def messages(self, messages: Any) -> list[Any]:
        """Return the messages. Those of the assistant have the mark ``MODEL``."""
        if not isinstance(messages, list | tuple):
            raise wrong_argument("messages", "a list of messages", quoted(messages))
        taken = []
        for number, message in enumerate(messages):
            place = f"messages[{number}]"
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise wrong_argument(place, "a dict with a role", quoted(message))
            fields = {name: value for name, value in message.items() if value is not None}
            reasoning = next((fields[name] for name in _REASONING if name in fields), None)
            if reasoning is not None:
                fields = {"thinking": reasoning} | fields | {"reasoning_content": reasoning}
            mark = MODEL if fields["role"] == "assistant" else USER
            taken.append(
                {
                    self.text(name, f"{place} key", USER): self._field(name, value, f"{place}[{name!r}]", mark)
                    for name, value in fields.items()
                }
            )
        return taken

    def _field(self, name: str, value: Any, place: str, mark: int) -> Any:
        if name == "role":
            return _name(value, place)
        return self.parts(value, place, mark) if isinstance(value, list | tuple) else self.taken(value, place, mark)

    def parts(self, values: Sequence[Any], place: str, mark: int) -> list[Any]:
        """Return parts of content, calls of tools, or tools. Their ``type`` is the caller's and gets no mark."""
        if not isinstance(values, list | tuple):
            raise wrong_argument(place, "a list", quoted(values))
        taken = []
        for number, value in enumerate(values):
            made = self.taken(value, f"{place}[{number}]", mark)
            if isinstance(made, dict) and isinstance(made.get("type"), str):
                made["type"] = _name(made["type"], f"{place}[{number}]['type']")
            taken.append(made)
        return taken

    def taken(self, value: Any, place: str, mark: int, depth: int = 0) -> Any:
        """Return a value as plain data whose strings and keys have the mark.

        Raises:
            BundleError: ``input.value`` if it isn't plain data, or nested deeper than 64 levels.
        """
        if depth >= DEPTH:
            raise wrong_argument(place, f"values that are nested at most {DEPTH} levels deep", "deeper ones")
        if isinstance(value, str):
            return self.text(value, place, mark)
        self.size += ITEM
        if value is None or type(value) in (bool, float):
            return value
        if type(value) is int and value.bit_length() <= _BITS:
            return value
        if isinstance(value, list | tuple):
            return [self.taken(each, f"{place}[{number}]", mark, depth + 1) for number, each in enumerate(value)]
        if isinstance(value, dict):
            return {
                self.text(key, f"{place} key", mark): self.taken(each, f"{place}[{key!r}]", mark, depth + 1)
                for key, each in value.items()
            }
        kind = "a larger integer" if type(value) is int else f"a {type(value).__name__}"
        expected = f"plain data: dict, list, str, int of at most {_BITS} bits, float, bool or None"
        raise wrong_argument(place, expected, kind, "Convert it, or leave it out")

    def text(self, value: Any, place: str, mark: int) -> Marked:
        """Return a string with the mark, or with its own if that is greater."""
        if not isinstance(value, str):
            raise wrong_argument(place, "a string", f"a {type(value).__name__}")
        if not is_unicode(value):
            raise wrong_argument(place, "a text without lone surrogates", quoted(str.__str__(value)))
        self.size += len(value) + OBJECT
        return Marked(str.__str__(value), max(mark, greatest(value)))


def _name(value: Any, place: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise wrong_argument(place, "1 to 64 letters, digits, hyphens and underscores", quoted(value))
    return str.__str__(value)


def _line_of_source(error: BaseException) -> int | None:
    return error.lineno if isinstance(error, TemplateSyntaxError) else None


def _problem(error: BaseException, file: str, line: int | None) -> Problem:
    """Return the problem of an error that parsing, compiling or rendering raised."""
    message = " ".join(str(error).split())[:300].replace(Marked.__name__, "str") or type(error).__name__
    if isinstance(error, Refused):
        expected, hint = "messages that this template accepts", "Change the messages: the template itself refuses them"
    elif isinstance(error, RecursionError | MemoryError):
        expected, hint = "a template within the limits of chat templates", _ANOTHER
        message = "syntax or values that are nested too deep"
    elif isinstance(error, SyntaxError):  # Python's, about the code that Jinja made: it isn't deeply nested
        expected, hint = "a template that Python can compile", _ANOTHER
        message = error.msg
    elif isinstance(error, TemplateSyntaxError):
        expected, hint = "a Jinja template", "Fetch the file again from where the model was published"
    elif isinstance(error, LimitReached):
        expected, hint = "a template within the limits of chat templates", _ANOTHER
    elif isinstance(error, SecurityError):
        expected, hint = "a template that does no more than format messages", _ANOTHER
    elif isinstance(error, UndefinedError):
        expected = "messages and variables with everything that the template reads"
        hint = "Give what is missing, as the model's page describes it"
    else:
        expected = "messages that this template can format"
        message = f"{type(error).__name__}: {message}"
        hint = "Give the fields that the template reads, as the model's page describes them"
    got = message if line is None else f"line {line}: {message}"
    return Problem(code="text.template", file=file, expected=expected, got=got, hint=hint)
