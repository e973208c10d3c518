"""Every kind of tokenizer that can be trained here: a bundle encodes and decodes as the library does on the file."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import splitbundle_converter
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "license-gpt2"
SIZE = 640
"""The number of token ids of the example."""
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]
RANGES = ((32, 127), (160, 0x250), (0x300, 0x370), (0x370, 0x600), (0x900, 0xA00), (0x2000, 0x2100), (0x3040, 0x3100))
MORE = ((0x4E00, 0x5200), (0xAC00, 0xB000), (0x1F300, 0x1F700), (0xE000, 0xE010), (0x10000, 0x10100), (9, 14))


def trained(made: Tokenizer, trainer: Any) -> Tokenizer:
    """Train a tokenizer on the license and on some words of other scripts."""
    text = (ROOT / "LICENSE").read_text("utf-8").splitlines()
    made.train_from_iterator([*text, *["naïve", "Straße", "привет", "你好", "こんにちは", "🙂"]], trainer)
    return made


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(made, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIAL))


def metaspace_bpe() -> Tokenizer:
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    made = trained(made, trainers.BpeTrainer(vocab_size=SIZE - 10, special_tokens=[*SPECIAL, *fallback]))
    document = json.loads(made.to_str())
    document["added_tokens"] = [each for each in document["added_tokens"] if each["content"] not in fallback]
    return Tokenizer.from_str(json.dumps(document))


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC()])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made = trained(made, trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>"))
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made = trained(made, trainers.WordPieceTrainer(vocab_size=500, special_tokens=SPECIAL))
    made.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return made


def word_level() -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return trained(made, trainers.WordLevelTrainer(vocab_size=500, special_tokens=SPECIAL))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "fallback": metaspace_bpe,
    "unigram": unigram,
    "pieces": word_piece,
    "words": word_level,
}


def texts(number: int) -> list[str]:
    """Return random texts: characters of many scripts, words of the license, spaces, and spelled control tokens."""
    generator = random.Random(18)
    words = [*(ROOT / "LICENSE").read_text("utf-8").split()[:200], *SPECIAL, " ", "  ", "\n", "\r\n", "\t", "zzz"]
    made = ["", " ", "a", " a ", "<|end|>", "a<|end|> b"]
    while len(made) < number:
        if generator.random() < 0.6:
            pick = [generator.choice((*RANGES, *MORE)) for _ in range(generator.randrange(1, 40))]
            made.append("".join(chr(generator.randrange(*each)) for each in pick))
        else:
            made.append("".join(generator.choice(words) for _ in range(generator.randrange(1, 20))))
    return made


@pytest.mark.parametrize("number", [500, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_the_library(kind: str, number: int, tmp_path: Path) -> None:
    library = KINDS[kind]()
    library.add_tokens([AddedToken("zzz", special=False)])
    source = Path(shutil.copytree(EXAMPLE, tmp_path / "source"))
    library.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").unlink()
    tokenizer = splitbundle_converter.convert(source, tmp_path / "b", check=False).tokenizer()
    for text in texts(number):
        library.encode_special_tokens = True
        ids = library.encode(text).ids
        assert tokenizer.encode(text) == ids, text
        library.encode_special_tokens = False
        control = library.encode(text).ids
        assert tokenizer.encode(text, control_tokens=True) == control, text
        for each in (ids, control):
            assert tokenizer.decode(each) == library.decode(each), text
            assert tokenizer.decode(each, control_tokens=True) == library.decode(each, skip_special_tokens=False)
        stream = tokenizer.stream([])
        pieces = [stream.piece(token) for token in control] + [stream.rest()]
        assert "".join(pieces) == tokenizer.decode(control), text
        assert not any(piece.endswith("\ufffd") for piece in pieces[:-1] if "\ufffd" not in text)
