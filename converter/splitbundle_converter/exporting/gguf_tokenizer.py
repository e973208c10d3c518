"""The tokenizer in a GGUF file, made of ``tokenizer.json``.

llama.cpp has its own code for each way to divide a text. A tokenizer is described only if llama.cpp has the code for
it: another one would give other ids without a word.
"""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from splitbundle.format import strict_json
from splitbundle.storage.files import MAX_TEXT_BYTES
from splitbundle.verification.tokenizer_rules import MAX_MARKS
from splitbundle_converter.checkpoint.file_names import TOKENIZER
from splitbundle_converter.options import Note

_SPACE: Final = "\u2581"
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")
_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES: Final = {"type": "ByteLevel", "add_prefix_space": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_DIVISIONS: Final = (
    ("gpt-2", False, [_BYTES | {"use_regex": True}]),
    ("smollm", False, [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}]),
    ("llama-bpe", True, [_split(_WORDS % "{1,3}"), _BYTES | {"use_regex": False}]),
    ("qwen2", False, [_split(_WORDS % ""), _BYTES | {"use_regex": False}]),
)
"""llama.cpp's name of a way to divide a text, whether it looks up a whole word first, and the steps in the file."""


class _UnknownTokenizer(ValueError):
    """llama.cpp has no code for a tokenizer. The text says what is different."""


def add_tokenizer(
    writer: Any, files: Mapping[str, bytes], vocab_size: int, stop_ids: Sequence[int], note: Note
) -> None:
    """Add the metadata of the tokenizer to a ``gguf.GGUFWriter``.

    Without a tokenizer that llama.cpp knows, the file has none, and a note says so: it takes and gives token ids.

    Args:
        writer: The writer.
        files: The files of the tokenizer by their names in a checkpoint.
        vocab_size: The number of rows of the token table.
        stop_ids: The tokens that end an answer. The first one counts where the tokenizer's files name none.
        note: A function that is called with a sentence.
    """
    data = files.get(TOKENIZER)
    if data is None:
        note("The file has no tokenizer, as the bundle has none: llama.cpp takes and gives only token ids.")
        writer.add_tokenizer_model("none")
        return
    try:
        document = strict_json.parse(data, TOKENIZER, max_bytes=MAX_TEXT_BYTES, max_marks=MAX_MARKS, constant=float)
        found = _described(document, vocab_size)
        special = _special_tokens(files, vocab_size, merges="scores" not in found)
        for name in ("bos", "eos"):  # llama.cpp's defaults depend on the model
            special.add_special_token.setdefault(name, False)
        if stop_ids:
            special.special_token_ids.setdefault("eos", stop_ids[0])
        _try(found, special)
    except Exception as error:  # noqa: BLE001  # any error of a library about a file that it doesn't know
        why = error if isinstance(error, _UnknownTokenizer) else "its file can't be read"
        note(f"The file has no tokenizer: llama.cpp doesn't know the one of the bundle ({why}).")
        writer.add_tokenizer_model("none")
        return
    _add(writer, found, special)
    if found["normalizes"]:
        note("llama.cpp doesn't normalize text to NFC, as the tokenizer does: text in another form gets other ids.")


def _add(writer: Any, found: Mapping[str, Any], special: Any) -> None:
    writer.add_tokenizer_model(found["model"])
    writer.add_tokenizer_pre(found["pre"])
    writer.add_token_list(found["tokens"])
    writer.add_token_types(found["types"])
    if "scores" in found:
        writer.add_token_scores(found["scores"])
        writer.add_add_space_prefix(found["space"])
    special.add_to_gguf(writer, quiet=True)


def _try(found: Mapping[str, Any], special: Any) -> None:
    """Write the metadata to a file that is thrown away. The library checks values only when it writes them.

    Raises:
        Exception: The library can't write them.
    """
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory() as private:
        writer = GGUFWriter(Path(private, "trial"), "llama")
        try:
            _add(writer, found, special)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
        finally:
            writer.close()


def _described(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """Return the metadata of a ``tokenizer.json``.

    Raises:
        _UnknownTokenizer: llama.cpp has no code for it.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise _UnknownTokenizer(f"the model {model.get('type')}")
    ids = {number: token for token, number in model["vocab"].items()}
    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens", ())}
    ids |= {number: entry["content"] for number, entry in added.items()}
    if not all(type(number) is int and number >= 0 for number in ids):
        raise _UnknownTokenizer("ids that aren't whole numbers from 0")
    if len(set(model["vocab"].values())) < len(model["vocab"]) or len(set(ids.values())) < len(ids):
        raise _UnknownTokenizer("two tokens that share an id or a text")
    if max(ids) >= vocab_size:
        raise _UnknownTokenizer(f"the token {max(ids)}, and the table has {vocab_size} rows")
    merges = model.get("merges")
    if not isinstance(merges, list) or not merges:
        raise _UnknownTokenizer("no merges")
    own = _sentencepiece(tokenizer) if model.get("byte_fallback") else _byte_level(tokenizer)
    unknown = model.get("unk_token")
    return own | {
        "tokens": [ids.get(number, f"[PAD{number}]") for number in range(vocab_size)],
        "types": [_type(ids.get(n), added.get(n), unknown, "scores" in own) for n in range(vocab_size)],
        **({"scores": [own["scores"].get(ids.get(n), -1e4) for n in range(vocab_size)]} if "scores" in own else {}),
    }


def _type(token: str | None, added: Mapping[str, Any] | None, unknown: str | None, fallback: bool) -> int:
    from gguf import TokenType

    if token is None:
        return int(TokenType.UNUSED)
    if fallback and token == unknown:
        return int(TokenType.UNKNOWN)
    if added is not None:
        return int(TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED)
    return int(TokenType.BYTE if fallback and _BYTE.fullmatch(token) else TokenType.NORMAL)


def _byte_level(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    normalizer = tokenizer.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        raise _UnknownTokenizer(f"the normalizer {normalizer.get('type')}")
    step = tokenizer.get("pre_tokenizer") or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    plain = [{name: value for name, value in own.items() if name != "trim_offsets"} for own in steps]
    whole = bool(tokenizer["model"].get("ignore_merges"))
    for name, looks_up, known in _DIVISIONS:
        if plain == known and whole == looks_up:
            return {"model": "gpt2", "pre": name, "normalizes": normalizer == {"type": "NFC"}}
    raise _UnknownTokenizer("its way to divide a text")


def _sentencepiece(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a tokenizer that was SentencePiece's. A merge's score is its place: earlier ones first."""
    normalizer, step = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepends = {"type": "Prepend", "prepend": _SPACE}
    if step is None and normalizer == {"type": "Sequence", "normalizers": [prepends, replaces]}:
        space = True
    elif step is None and normalizer in (replaces, {"type": "Sequence", "normalizers": [replaces]}):
        space = False
    else:
        raise _UnknownTokenizer("its way to treat spaces")
    scores: dict[str, float] = {}
    for place, merge in enumerate(tokenizer["model"]["merges"]):
        one, other = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(one + other, -float(place))
    return {"model": "llama", "pre": "default", "normalizes": False, "space": space, "scores": scores}


def _special_tokens(files: Mapping[str, bytes], vocab_size: int, *, merges: bool) -> Any:
    """Return the ``gguf.SpecialVocab``: merges, special tokens, and the chat template. The library reads files."""
    from gguf import SpecialVocab

    with tempfile.TemporaryDirectory() as private, _without_log():
        for name, data in files.items():
            path = Path(private, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
        return SpecialVocab(private, load_merges=merges, n_vocab=vocab_size)


@contextmanager
def _without_log() -> Iterator[None]:
    """Leave out what the library logs about templates for two texts: no model here has two."""
    logger = logging.getLogger("gguf.vocab")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
