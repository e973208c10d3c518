"""Make a tokenizer.json of the files that older tokenizers have: ``tokenizer.model``, or a vocabulary with merges.

The result of a ``tokenizer.model`` is held against SentencePiece itself. If one text gets other ids, there is no
result: a bundle without text is better than one with wrong ids.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer
from tokenizers.models import BPE

from splitbundle.errors import quoted
from splitbundle_converter.errors import line
from splitbundle_converter.quiet_transformers import quiet

TOKENIZER: Final = "tokenizer.json"
CONFIG: Final = "tokenizer_config.json"
SENTENCEPIECE: Final = "tokenizer.model"
_KEPT: Final = frozenset(
    [
        *("tokenizer_class", "legacy", "add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens"),
        *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
        *("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"),
    ]
)
"""The fields of tokenizer_config.json that change ids. Others name files, or code."""
_MERGED: Final = ("vocab.json", "merges.txt")
_BYTE_LEVEL: Final = ("GPT2Tokenizer", "Qwen2Tokenizer", "CodeGenTokenizer")
"""The classes of transformers that read these two files, and whose rule for words is fixed."""
_MAX_PIECE: Final = 256
"""The largest number of characters of a piece. Each piece is cut at each place to find the merges."""
_USER_DEFINED: Final = 4
"""The kind of a piece that is matched before all others, as SentencePiece numbers it."""
_SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
"""The character that SentencePiece has in place of a space."""
_SPELLED: Final = ("a {} b", "{}", " {}a")
PROBES: Final = (
    "The quick brown fox jumps over the lazy dog.",
    " leading and trailing ",
    "two  spaces,   three,     five",
    "    def f(x):\n\treturn x ** 2\r\n\n\n",
    "naïve café, Ünïcödé — “quotes” … ½ ﬁ",
    "数字 123456789, かな, 한국어, русский, العربية, हिन्दी",
    "🙂👩‍👩‍👧 e\u0301 \u200b\ufeff",
    "<s> </s> [INST] <|endoftext|> <unk>",
    "don't I'LL we've",
    "a",
    " ",
    "\n",
    f"b {_SPACE}",
)
"""Texts whose ids are compared: spaces, line ends, scripts, control tokens that are spelled, and short texts."""


class NoTokenizerError(Exception):
    """The reason why no tokenizer.json can be made."""


def has_slow_files(files: Mapping[str, bytes]) -> bool:
    """Return whether a checkpoint without tokenizer.json has another kind of tokenizer."""
    return TOKENIZER not in files and (SENTENCEPIECE in files or "vocab.json" in files)


def make_fast(files: Mapping[str, bytes], model_type: str) -> bytes:
    """Return a tokenizer.json with the ids of the checkpoint's own tokenizer.

    Args:
        files: The tokenizer files of a checkpoint by name.
        model_type: The type of the model, which tells the tokenizer's class if ``tokenizer_config.json`` does not.

    Raises:
        NoTokenizerError: It can't be made without guessing.
    """
    if SENTENCEPIECE in files:
        return _of_sentencepiece(files, model_type)
    if any(name not in files for name in _MERGED):
        raise NoTokenizerError("vocab.json has no merges.txt beside it")
    return _of_merges(files, model_type)


def load_class(files: Mapping[str, bytes], model_type: str) -> Any:
    """Return the tokenizer that transformers makes of the files. Code of the checkpoint never runs.

    transformers gets a copy of the files, with the fields of the configuration that change ids. The class is one of its
    tokenizers: ``tokenizer_class`` could name any other of its classes.

    Raises:
        Exception: of any kind, if transformers can't load it.
    """
    from transformers import AutoTokenizer

    config = {name: value for name, value in tokenizer_config(files).items() if name in _KEPT}
    if str(config.get("tokenizer_class")).removesuffix("Fast") not in _classes():
        config.pop("tokenizer_class", None)
    with tempfile.TemporaryDirectory(prefix="splitbundle-") as directory, quiet():
        for name in (TOKENIZER, SENTENCEPIECE, *_MERGED):
            if name in files:
                (Path(directory) / name).write_bytes(files[name])
        (Path(directory) / CONFIG).write_text(json.dumps(config))
        (Path(directory) / "config.json").write_text(json.dumps({"model_type": model_type}))
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


@cache
def _classes() -> frozenset[str]:
    """Return the names of transformers' tokenizers for the types of models, without "Fast"."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    return frozenset(str(name).removesuffix("Fast") for name in TOKENIZER_MAPPING_NAMES.values() if name)


def tokenizer_config(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the parsed tokenizer_config.json, or an empty object."""
    return parsed(files.get(CONFIG, b"{}"))


def parsed(data: bytes) -> dict[str, Any]:
    """Return a JSON object, or an empty one for anything else."""
    try:
        # Its numbers may be beyond strict JSON: published files have 1e30 as the longest length.
        document = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _of_class(files: Mapping[str, bytes], model_type: str) -> Tokenizer:
    try:
        made: Tokenizer = load_class(files, model_type).backend_tokenizer
        return made
    except Exception as error:  # a class may raise any error for files that do not suit it
        raise NoTokenizerError(f"transformers can't read its files ({line(error)})") from error


def _of_merges(files: Mapping[str, bytes], model_type: str) -> bytes:
    """Return the tokenizer.json of vocab.json and merges.txt. They do not say how a text is split into words.

    The tokenizer's class says that, so it must be one whose rule is known.
    """
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    named = tokenizer_config(files).get("tokenizer_class") or TOKENIZER_MAPPING_NAMES.get(model_type) or "none"
    name = str(named[0] if isinstance(named, tuple) else named).removesuffix("Fast")
    if name not in _BYTE_LEVEL:
        known, own = ", ".join(_BYTE_LEVEL), "no class is named" if name == "none" else f"the class is {name[:40]!a}"
        raise NoTokenizerError(f"vocab.json and merges.txt can be read for {known}, and {own}")
    made = _of_class(files, model_type)
    with tempfile.TemporaryDirectory(prefix="splitbundle-") as directory:
        for file in _MERGED:
            (Path(directory) / file).write_bytes(files[file])
        try:
            vocabulary, merges = BPE.read_file(*(str(Path(directory) / file) for file in _MERGED))
        except Exception as error:  # the library raises Exception itself
            raise NoTokenizerError(f"vocab.json and merges.txt can't be read ({line(error)})") from error
    model = json.loads(made.to_str())["model"]
    if model["vocab"] != vocabulary or [tuple(pair) for pair in model["merges"]] != [tuple(pair) for pair in merges]:
        raise NoTokenizerError(f"transformers' {name} makes other tokens of vocab.json and merges.txt")
    return made.to_str().encode("utf-8")


def _of_sentencepiece(files: Mapping[str, bytes], model_type: str) -> bytes:
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise NoTokenizerError(
            f"{SENTENCEPIECE} needs the library sentencepiece. Install it and convert again: "
            "pip install sentencepiece protobuf"
        ) from error
    try:
        processor = SentencePieceProcessor(model_proto=files[SENTENCEPIECE])
    except (RuntimeError, TypeError) as error:
        raise NoTokenizerError(f"{SENTENCEPIECE} can't be read ({line(error)})") from error
    model_pb2: Any = sentencepiece_model_pb2  # the compiler of protobuf gives no types
    proto = model_pb2.ModelProto.FromString(processor.serialized_model_proto())
    spec, symbols = proto.normalizer_spec, [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    if spec.name != "identity" or spec.remove_extra_whitespaces or not spec.escape_whitespaces:
        raise NoTokenizerError(f"{SENTENCEPIECE} changes texts by the rules {spec.name!a}, which have no equal here")
    if any(len(piece.piece) > _MAX_PIECE for piece in proto.pieces):
        raise NoTokenizerError(f"{SENTENCEPIECE} has a piece of more than {_MAX_PIECE} characters")
    if spaced := [symbol for symbol in symbols if _SPACE in symbol or " " in symbol]:
        raise NoTokenizerError(f"{SENTENCEPIECE} has a symbol with a space, {spaced[0]!a}, which has no equal here")
    with tempfile.TemporaryDirectory(prefix="splitbundle-") as directory, quiet():
        (Path(directory) / SENTENCEPIECE).write_bytes(files[SENTENCEPIECE])
        (Path(directory) / "config.json").write_text(json.dumps({"model_type": model_type}))
        try:
            # This class follows the settings in the file. Those of Llama and others have their own rules for spaces.
            made = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True).backend_tokenizer
        except Exception as error:  # a converter of transformers may raise any error for a model that is unusual
            raise NoTokenizerError(f"transformers can't read {SENTENCEPIECE} ({line(error)})") from error
    # SentencePiece takes the spelling of a control token as text, and so does the reader of a bundle.
    made.encode_special_tokens = True
    # A symbol that users defined is matched before the rules for spaces apply, so each of them is spelled.
    for text in (*PROBES, *(spelled.format(symbol) for symbol in symbols for spelled in _SPELLED)):
        ids = made.encode(text, add_special_tokens=False).ids
        if ids != processor.encode(text):
            raise NoTokenizerError(f"{text[:20]!a} gets other ids from {SENTENCEPIECE} than from its tokenizer.json")
    document = json.loads(made.to_str())
    document["post_processor"] = _begin(processor, tokenizer_config(files))
    return json.dumps(document, ensure_ascii=False).encode("utf-8")


def _begin(processor: Any, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the rule that puts the token of the beginning before a text, unless the configuration turns it off."""
    if config.get("add_bos_token") is False or processor.bos_id() < 0:
        return None
    token = processor.id_to_piece(processor.bos_id())
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"SpecialToken": {"id": token, "type_id": 1}}, second],
        "special_tokens": {token: {"id": token, "ids": [processor.bos_id()], "tokens": [token]}},
    }


def library_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    """Return tokenizer.json as the library loads it, without truncation and padding."""
    own = Tokenizer.from_str(files[TOKENIZER].decode("utf-8"))
    own.no_truncation()
    own.no_padding()
    return own


def other_ids(files: Mapping[str, bytes], model_type: str, texts: Sequence[str]) -> str | None:
    """Return a sentence about a text that transformers' class gives other ids than tokenizer.json, or None.

    If transformers can't load the tokenizer, the sentence says that nothing was compared, and why.
    """
    own = library_tokenizer(files)
    try:
        loaded = load_class(files, model_type)
        text = next((text for text in texts if loaded(text).input_ids != own.encode(text).ids), None)
    except Exception as error:  # noqa: BLE001  # a class may raise any error for files that do not suit it
        return (
            "transformers can't load the tokenizer, so its ids were not compared. The bundle has the ids of "
            f"{TOKENIZER}. The reason: {line(error)}"
        )
    if text is None:
        return None
    return (
        f"transformers' class gives the text {quoted(text, 30)} other ids than {TOKENIZER} does. The bundle keeps the "
        f"ids of {TOKENIZER}."
    )
