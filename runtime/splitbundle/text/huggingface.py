"""Text to token ids and back, with the library ``tokenizers`` and the bundle's tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from splitbundle.errors import BundleError, Problem
from splitbundle.verification import tokenizer_rules

if TYPE_CHECKING:
    from splitbundle.storage.reader import BundleReader


@contextmanager
def library(path: str) -> Iterator[None]:
    """What the library refuses, or panics of, as an error of the file.

    It raises Exception itself, and where Rust panics what derives from BaseException alone.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__module__ != "pyo3_runtime":
            raise
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        expected = "a tokenizer that the library can use"
        raise BundleError(Problem(code="text.tokenizer", file=path, expected=expected, got=got)) from error


class TextTokenizer:
    """A bundle's tokenizer. Text stays text: a control token that is spelled in a prompt isn't one.

    Raises:
        BundleError: ``file.*`` where the file isn't the listed one; ``json.*`` and ``text.tokenizer`` where it isn't
            one of this model, or the library refuses it.
    """

    def __init__(self, bundle: BundleReader) -> None:
        path = bundle.manifest.text.tokenizer
        if path is None:
            raise BundleError(
                Problem(code="text.none", file=str(bundle.path), expected="a tokenizer", got="a bundle without one")
            )
        data = tokenizer_rules.read(bundle, path)
        self._path = path
        with library(path):
            self._tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        self._tokenizer.encode_special_tokens = True
        # A file may ask for every text to be cut or filled up: that is of the batches that a model was trained with.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        """Token ids, with what the tokenizer puts before and after a text."""
        with library(self._path):
            return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without control tokens."""
        with library(self._path):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """Turns tokens into text as they come, after a prompt."""
        return TextStream(self, self._tokenizer, prompt)


class TextStream:
    """The text that follows a prompt. What a token means depends on those before it: a space, half of a character."""

    def __init__(self, tokenizer: TextTokenizer, library: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer, self._library = tokenizer, library
        self._ids = list(prompt)
        self._given = tokenizer.decode(prompt)
        self._stream = DecodeStream(ids=self._ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """The text that this token completes; often none, where a character takes several."""
        self._ids.append(token)
        with library(self._tokenizer._path):
            piece = self._stream.step(self._library, token) or ""
        self._given += piece
        return piece

    def rest(self) -> str:
        """What the tokens so far have left incomplete, as far as it is text."""
        whole = self._tokenizer.decode(self._ids)
        return whole[len(self._given) :] if whole.startswith(self._given) else ""
