"""Convert text to token ids and back, with the library ``tokenizers`` and the bundle's tokenizer.json."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from tokenizers import Encoding, Tokenizer
from tokenizers.decoders import DecodeStream

from splitbundle.errors import BundleError, MissingExtra, Problem, quoted, wrong_argument
from splitbundle.format.text_document import DEFAULT
from splitbundle.integers import as_token_ids
from splitbundle.stages.channels import CHANNEL, MARKS, MESSAGE, START
from splitbundle.text.control_tokens import ControlTokens
from splitbundle.text.marked import is_unicode
from splitbundle.verification import text_rules, tokenizer_rules

if TYPE_CHECKING:
    from splitbundle.format.text_document import TextDocument
    from splitbundle.storage.reader import BundleReader
    from splitbundle.text.chat_template import ChatTemplate
    from splitbundle.text.marked import Marked

TOOL_USE: Final = "tool_use"
"""The name of the template that is used if there are tools."""
_OF_TRANSFORMERS: Final = frozenset(
    {"tokenize", "return_tensors", "return_dict", "continue_final_message", "padding", "truncation", "max_length"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs", "conversation"}
)
"""Arguments of ``apply_chat_template`` in transformers, which no template should get as variables."""


@contextmanager
def library(path: str) -> Iterator[None]:
    """Raise the library's errors and panics as ``text.tokenizer`` errors that name the file.

    The library raises ``Exception`` itself, not a subclass. A panic in Rust raises a direct subclass of
    ``BaseException``.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__module__ != "pyo3_runtime":
            raise
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        expected = "a tokenizer that the library can use"
        hint = "Fetch the file again from where the model was published"
        raise BundleError(Problem(code="text.tokenizer", file=path, expected=expected, got=got, hint=hint)) from error


class TextTokenizer:
    """A bundle's tokenizer. ``Bundle.tokenizer`` makes one. Threads may share it.

    A control token, such as ``<|im_end|>``, steers the model. Text that spells one stays text, unless the caller asks
    for control tokens: otherwise anyone who writes a text could end a message and begin another.

    Raises:
        BundleError: ``file.*`` if a file isn't the listed one; ``json.*``, ``field.*``, ``text.*`` if a file doesn't
            fit this model, or if the library refuses it.
    """

    def __init__(self, bundle: BundleReader) -> None:
        path = bundle.manifest.text.tokenizer
        if path is None:
            raise BundleError(
                Problem(code="text.none", file=str(bundle.path), expected="a tokenizer", got="a bundle without one")
            )
        data = tokenizer_rules.read(bundle, path)
        self._bundle = bundle
        self._path, self._vocab_size = path, bundle.architecture.vocab_size
        self._document = text_rules.read(bundle)
        self._lock = threading.Lock()
        self._sources = () if self._document is None else tuple(self._document.templates.values())
        self._control: ControlTokens | None = None
        self._compiled: dict[str, ChatTemplate] = {}
        with library(path):
            self._tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        # The file may ask the library to truncate or pad every text. That was for training batches, so turn it off.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None  # for training too: it leaves out merges at random
        self.stop_ids = bundle.manifest.text.stop_ids

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[BundleReader]]:
        return type(self), (self._bundle,)  # a worker loads it again

    def __copy__(self) -> TextTokenizer:
        return self  # it doesn't change

    def __deepcopy__(self, memo: object) -> TextTokenizer:
        return self

    @functools.cached_property
    def longest_token(self) -> int:
        """Return the length of the longest token, in characters or bytes as the vocabulary spells it."""
        return max(map(len, self._tokenizer.get_vocab()))

    @property
    def document(self) -> TextDocument | None:
        """Return what the bundle's ``text.json`` says, or None for a bundle without one."""
        return self._document

    def encode(self, text: str, *, control_tokens: bool = False, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: the text.
            control_tokens: whether a control token that the text spells becomes that token. Give True only for a text
                that you wrote. By default the characters are encoded like any others.
            add_special_tokens: whether the ids also have the tokens that the tokenizer adds before and after a text.

        Raises:
            BundleError: ``input.value`` for what isn't text; ``text.token`` if the text spells an added token that the
                model does not have; ``text.tokenizer`` if the library fails.
        """
        ids = self._encode(text, control_tokens=control_tokens, around=add_special_tokens).ids
        if not control_tokens:
            with library(self._path):
                ids = self._control_tokens().as_text(text, ids, around=add_special_tokens)
        return self._checked(ids)

    def encode_marked(self, text: str, marks: bytes) -> list[int]:
        """Return the token ids of a rendered chat. Only its template makes control tokens.

        Where no message spells a control token, these are the ids of the whole text. Otherwise the characters of that
        spelling are encoded like any others, and the rest of the text as if it stood there.

        Args:
            text: the text.
            marks: for each character, 0 if the template wrote it, 1 if the model did, 2 if anyone else did. What the
                model wrote may hold tokens such as ``<think>``: they aren't special, and not written ``<|…|>``.

        Raises:
            BundleError: as for ``encode``.
        """
        encoding = self._encode(text, control_tokens=True, around=False)
        with library(self._path):
            return self._checked(self._control_tokens().encode(text, marks, encoding))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> list[int]:
        """Return the token ids of a chat, as the model's template writes it.

        Args:
            messages: the messages, each with ``role`` and ``content``, and what else the template knows.
            tools: the tools that the model may call, as JSON schemas.
            documents: the documents that the model may cite.
            add_generation_prompt: whether to end with the beginning of the model's answer.
            chat_template: the name of another template of the bundle, or the text of a template. By default
                ``tool_use`` if there are tools and such a template, otherwise ``default``.
            variables: further variables of the template.

        Raises:
            TypeError: a variable has the name of an argument that only transformers has, such as ``tokenize``.
            BundleError: ``text.template`` for a bundle without chat templates, and for a template that fails or does
                too much; as for ``encode``.
        """
        rendered = self.render_chat(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            **variables,
        )
        return self.encode_marked(str.__str__(rendered), rendered.marks)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> Marked:
        """Return the text of a chat. Its ``marks`` tell who wrote each character.

        Args:
            messages: the messages, as for ``apply_chat_template``.
            tools: the tools that the model may call, as JSON schemas.
            documents: the documents that the model may cite.
            add_generation_prompt: whether to end with the beginning of the model's answer.
            chat_template: the name of another template of the bundle, or the text of a template.
            variables: further variables of the template.

        Raises:
            TypeError: as for ``apply_chat_template``.
            BundleError: ``text.template``; ``input.value`` for an argument that isn't plain data.
        """
        if foreign := sorted(variables.keys() & _OF_TRANSFORMERS):
            raise TypeError(
                f"{foreign[0]} is an argument of transformers. Here apply_chat_template returns a list of ids, and "
                "render_chat returns the text"
            )
        return self._template(chat_template, tools=tools is not None).render(
            messages, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt, **variables
        )

    def decode(self, ids: Sequence[int], *, control_tokens: bool = False) -> str:
        """Return the text of token ids.

        Args:
            ids: the ids.
            control_tokens: whether to spell control tokens; by default they are left out.

        Raises:
            BundleError: ``input.value`` for what is no token id of the model; ``text.tokenizer`` if the library fails.
        """
        known = as_token_ids(ids, "ids", self._vocab_size)
        with library(self._path):
            return str(self._tokenizer.decode(known, skip_special_tokens=not control_tokens))

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """Return a stream that turns the tokens after a prompt into text, one token at a time.

        Control tokens are left out, except for those between the messages of harmony, the format of gpt-oss, if the
        prompt has them: without them, nothing would tell thinking from the answer.
        """
        marks = self._channel_marks
        return TextStream(self, self._tokenizer, prompt, marks if not marks.keys().isdisjoint(prompt) else {})

    @functools.cached_property
    def _channel_marks(self) -> dict[int, str]:
        """Return the control tokens of harmony by their ids, for a tokenizer that has them. See ``stages.channels``."""
        ids = {mark: self._tokenizer.token_to_id(mark) for mark in MARKS}
        if any(ids[mark] is None for mark in (START, CHANNEL, MESSAGE)):
            return {}
        return {number: mark for mark, number in ids.items() if number is not None}

    def _encode(self, text: str, *, control_tokens: bool, around: bool = True) -> Encoding:
        if not isinstance(text, str) or not is_unicode(text):
            raise wrong_argument("text", "a text without lone surrogates", quoted(text))
        with self._lock, library(self._path):  # the library has one switch for all threads
            self._tokenizer.encode_special_tokens = not control_tokens
            return self._tokenizer.encode(text, add_special_tokens=around)

    def _checked(self, ids: list[int]) -> list[int]:
        number = max(ids, default=0)
        if number >= self._vocab_size:
            expected = f"a text of tokens that the model has, with ids below {self._vocab_size}"
            got = f"{quoted(self._tokenizer.id_to_token(number))}, whose id is {number}"
            hint = "Leave this token out of the text"
            raise BundleError(Problem(code="text.token", argument="text", expected=expected, got=got, hint=hint))
        return ids

    def _control_tokens(self) -> ControlTokens:
        with self._lock:  # so that no thread keeps one from before a template came
            if self._control is None:
                self._control = ControlTokens(self._tokenizer, self._sources)
            return self._control

    def _template(self, asked: str | None, *, tools: bool) -> ChatTemplate:
        """Return a compiled template: by name, of a text, or the usual one."""
        known = {} if self._document is None else self._document.templates
        name = asked if asked is not None else (TOOL_USE if tools and TOOL_USE in known else DEFAULT)
        source = known.get(name) or (asked if asked is not None and _is_template(asked) else None)
        if source is None:
            raise _no_template(name, known)
        if source not in self._compiled:
            with self._lock:
                if source not in self._sources:
                    # What this template spells is a control token, too.
                    self._sources, self._control = (*self._sources, source), None
            try:
                from splitbundle.text.chat_template import ChatTemplate
            except ModuleNotFoundError as error:
                if error.name != "jinja2":
                    raise
                raise MissingExtra.of("jinja2", "text", "render chat templates") from None
            variables = {} if self._document is None else self._document.variables
            file = f"text.json, template {quoted(name)}" if name in known else "chat_template"
            self._compiled[source] = ChatTemplate(source, file=file, variables=variables)
        return self._compiled[source]


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def _no_template(name: str, known: Mapping[str, str]) -> BundleError:
    names = ", ".join(known)
    expected = f"one of the chat templates {names}" if known else "a bundle with a chat template"
    got = quoted(name) if known else "one without"
    hint = "Give one of these names" if known else "Convert the model again if its source has a chat template"
    return BundleError(Problem(code="text.template", argument="chat_template", expected=expected, got=got, hint=hint))


class TextStream:
    """The text that follows a prompt.

    The text of a token depends on the tokens before it: it may start with a space, or be half of a character.
    """

    def __init__(
        self, tokenizer: TextTokenizer, library: Tokenizer, prompt: Sequence[int], marks: Mapping[int, str]
    ) -> None:
        self._tokenizer, self._library, self._marks = tokenizer, library, marks
        self._ids = list(prompt)
        self._given = tokenizer.decode(prompt)
        self._stream = DecodeStream(ids=self._ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """Return the text that this token completes. It is often empty, because a character may take several tokens."""
        if token in self._marks:
            rest = self.rest()  # a character that isn't whole, and never will be
            self._given += rest
            self._ids.append(token)
            self._stream = DecodeStream(ids=[token], skip_special_tokens=True)
            return rest + self._marks[token]
        self._ids.append(token)
        with library(self._tokenizer._path):
            piece = self._stream.step(self._library, token) or ""
        self._given += piece
        return piece

    def rest(self) -> str:
        """Return the text of the tokens that ``piece`` has not returned yet, or "" if there is none."""
        whole = self._tokenizer.decode(self._ids)
        return whole[len(self._given) :] if whole.startswith(self._given) else ""
