"""Convert text to token ids and back, with the library ``tokenizers`` and the bundle's tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.verification import tokenizer_rules

if TYPE_CHECKING:
    from splitbundle.storage.reader import BundleReader


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
    """A bundle's tokenizer. If a text spells a control token, the tokenizer encodes it as ordinary text.

    Raises:
        BundleError: ``file.*`` if the file isn't the listed one; ``json.*`` and ``text.tokenizer`` if it doesn't fit
            this model, or if the library refuses it.
    """

    def __init__(self, bundle: BundleReader) -> None:
        path = bundle.manifest.text.tokenizer
        if path is None:
            raise BundleError(
                Problem(code="text.none", file=str(bundle.path), expected="a tokenizer", got="a bundle without one")
            )
        data = tokenizer_rules.read(bundle, path)
        self._path, self._vocab_size = path, bundle.architecture.vocab_size
        with library(path):
            self._tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        self._tokenizer.encode_special_tokens = True
        # The file may ask the library to truncate or pad every text. That was for training batches, so turn it off.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if getattr(self._tokenizer.model, "dropout", None):
            self._tokenizer.model.dropout = None  # for training too: it leaves out merges at random

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the tokens that the tokenizer adds before and after it.

        Raises:
            BundleError: ``text.token`` if the text spells an added token that the model does not have;
                ``text.tokenizer`` if the library fails.
        """
        with library(self._path):
            encoding = self._tokenizer.encode(text)
        for number, token in zip(encoding.ids, encoding.tokens, strict=True):
            if number >= self._vocab_size:
                expected = f"a text of tokens that the model has, with ids below {self._vocab_size}"
                got = f"{quoted(token)}, whose id is {number}"
                hint = "Leave this token out of the text"
                raise BundleError(Problem(code="text.token", argument="text", expected=expected, got=got, hint=hint))
        return list(encoding.ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without control tokens."""
        with library(self._path):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """Return a stream that turns the tokens after a prompt into text, one token at a time."""
        return TextStream(self, self._tokenizer, prompt)


class TextStream:
    """The text that follows a prompt.

    The text of a token depends on the tokens before it: it may start with a space, or be half of a character.
    """

    def __init__(self, tokenizer: TextTokenizer, library: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer, self._library = tokenizer, library
        self._ids = list(prompt)
        self._given = tokenizer.decode(prompt)
        self._stream = DecodeStream(ids=self._ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """Return the text that this token completes. It is often empty, because a character may take several tokens."""
        self._ids.append(token)
        with library(self._tokenizer._path):
            piece = self._stream.step(self._library, token) or ""
        self._given += piece
        return piece

    def rest(self) -> str:
        """Return the text of the tokens that ``piece`` has not returned yet, or "" if there is none."""
        whole = self._tokenizer.decode(self._ids)
        return whole[len(self._given) :] if whole.startswith(self._given) else ""
