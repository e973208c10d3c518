"""Choose the tokenizer files of a bundle, and check that the tokenizer is one of this model."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from tokenizers import Tokenizer

from splitbundle.errors import BundleError, quoted
from splitbundle.text.huggingface import library
from splitbundle.verification import tokenizer_rules
from splitbundle_converter.checkpoint.file_names import TOKENIZER
from splitbundle_converter.checkpoint.source import Checkpoint
from splitbundle_converter.options import Note
from splitbundle_converter.text import slow_tokenizer
from splitbundle_converter.text.golden_texts import TEXTS

WITHOUT: Final = "tokenizer=False converts without a tokenizer"
_NO_TEXT: Final = "The bundle will have no text"


def text_files(
    checkpoint: Checkpoint, model_type: str, vocab_size: int, notes: Note | None, *, compare: bool
) -> dict[str, bytes]:
    """Return the tokenizer files for the bundle by name.

    Args:
        checkpoint: The checkpoint.
        model_type: The type of the model.
        vocab_size: The number of token ids that the model has.
        notes: A function that is called with a sentence for each thing that was made, or could not be made.
        compare: Whether to compare tokenizer.json with the class that transformers makes of it.

    Raises:
        BundleError: ``source.unreadable``, ``source.missing``, ``source.changed``; ``json.*`` and ``text.tokenizer``
            for a tokenizer that isn't one of this model, or that the library can't load.
    """
    try:
        files = {name: checkpoint.read(name) for name in checkpoint.text_files()}
    except BundleError as error:
        raise _offering(error) from error
    say = notes or (lambda text: None)
    if slow_tokenizer.has_slow_files(files):
        try:
            files[TOKENIZER] = slow_tokenizer.make_fast(files, model_type)
            say("tokenizer.json was made from the checkpoint's older tokenizer files.")
        except slow_tokenizer.NoTokenizerError as error:
            say(f"{_NO_TEXT}: {error}.")
    elif TOKENIZER not in files:
        say(f"{_NO_TEXT}, because the checkpoint has no tokenizer.json.")
    if TOKENIZER not in files:
        return files
    try:
        ids = tokenizer_rules.check(files[TOKENIZER], TOKENIZER, vocab_size)
        with library(TOKENIZER):
            Tokenizer.from_str(files[TOKENIZER].decode("utf-8"))
    except BundleError as error:
        raise _offering(error) from error
    for token, (given, own) in list(ids.renumbered.items())[:1]:
        say(
            f"tokenizer.json gives {quoted(token, 30)} the id {given}, and the library tokenizers gives it {own}. The "
            "bundle has the library's ids."
        )
    if compare and notes is not None and (different := slow_tokenizer.other_ids(files, model_type, TEXTS)) is not None:
        notes(different)
    return files


def _offering(error: BundleError) -> BundleError:
    """Return the error with the offer to convert without a tokenizer, where the error is about one."""
    return BundleError(
        replace(problem, hint=f"{problem.hint}. {WITHOUT}" if problem.hint else WITHOUT) for problem in error.problems
    )
