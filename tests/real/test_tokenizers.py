"""Published tokenizers: a bundle gives the ids that the library gives, for 10,000 texts each."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from tokenizers import Tokenizer

import splitbundle_converter
from splitbundle import BundleError
from splitbundle.text.huggingface import TextTokenizer

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.usefixtures("one_thread")]

COUNT: Final = 10_000
VOCABULARIES: Final = {
    "gemma3": 262_144,  # <image_soft_token> lies beyond it
    "llama3_1": 128_256,
    "qwen3": 151_936,
    "deepseek_v3": 129_280,
    "gptoss": 201_088,
    "llama2": 32_000,
    "mistral": 32_768,
}
WORDS: Final = (
    *("the", "Hello", "don't", "WORLD", "naïve", "Straße", "ﬁne", "e\u0301", "I'LL", "x" * 60, "3.14159", "1234567890"),
    *("привет", "мир", "你好", "世界", "こんにちは", "안녕하세요", "مرحبا", "שלום", "नमस्ते", "สวัสดี", "γειά"),
    *("🙂", "👩‍👩‍👧‍👦", "🇫🇷", "\u200b", "\ufeff", "½", "∑", "“quote”", "—", "…", "▁", "Ġ", "\u00a0"),
    *(
        "def f(x):",
        "return",
        "    ",
        "\t\t",
        "{}",
        "();",
        "//",
        "<html>",
        "\\n",
        "a_b_c",
        "camelCase",
        "http://x.y/?a=b",
    ),
    *("<s>", "</s>", "<|endoftext|>", "<|im_start|>", "[INST]", "<pad>", "<unk>", "<0x0A>", "<start_of_turn>"),
)
"""Words of many scripts, pieces of code, and the spellings of control tokens."""
BETWEEN: Final = ("", " ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ")


def texts(seed: int) -> list[str]:
    """Return random texts: words, random characters, and short texts at the beginning."""
    generator = random.Random(seed)
    made = ["", " ", "  ", "\n", "a", " a", "a ", *WORDS]
    while len(made) < COUNT:
        if generator.random() < 0.25:
            ranges = ((32, 127), (160, 0x250), (0x370, 0x600), (0x3040, 0x3100), (0x4E00, 0x5200), (0x1F300, 0x1F700))
            made.append("".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(30)))
        else:
            count = generator.randrange(1, 25)
            made.append("".join(generator.choice(BETWEEN) + generator.choice(WORDS) for _ in range(count)))
    return made


def convert(source: Path, vocabulary: int, tmp_path: Path) -> tuple[TextTokenizer, list[str]]:
    """Convert a tiny model with a published tokenizer, and return the bundle's tokenizer and the notes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    path = tmp_path / "source"
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    notes: list[str] = []
    made = splitbundle_converter.convert(path, tmp_path / "x.splitbundle", notes=notes.append)
    return TextTokenizer(made), notes


@pytest.mark.parametrize("name", [name for name in VOCABULARIES if name != "mistral"])
def test_ids_of_a_published_tokenizer(
    published_tokenizer: Callable[[str], Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published_tokenizer(name)
    tokenizer, notes = convert(source, VOCABULARIES[name], tmp_path)
    with capsys.disabled():
        print(f"\n{name}: {' '.join(notes) or 'no notes'}")
    library = Tokenizer.from_file(str(source / "tokenizer.json"))
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    given = texts(1)
    for text, wanted in zip(given, library.encode_batch(given), strict=True):
        ids = tokenizer.encode(text)
        assert ids == wanted.ids, ascii(text)
        assert tokenizer.decode(ids) == library.decode(wanted.ids), ascii(text)


def test_mistrals_ids_are_those_of_sentencepiece(published_tokenizer: Callable[[str], Path], tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    source = published_tokenizer("mistral")
    tokenizer, notes = convert(source, VOCABULARIES["mistral"], tmp_path)
    assert notes[0] == "tokenizer.json was made from the checkpoint's older tokenizer files."
    library = SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    for text in texts(2):
        # The library adds nothing before an empty text, and a bundle's tokenizer adds the token of the beginning.
        assert tokenizer.encode(text) == [library.bos_id(), *library.encode(text)], ascii(text)


def test_a_token_beyond_the_embedding_is_refused_by_name(
    published_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    """Gemma 3's image token is a control token, so its spelling is plain text. Another added token isn't."""
    tokenizer, _ = convert(published_tokenizer("gemma3"), VOCABULARIES["gemma3"], tmp_path)
    assert max(tokenizer.encode("an <image_soft_token> here")) < VOCABULARIES["gemma3"]
    with pytest.raises(BundleError, match=r"\[text.token\] text: expected a text of tokens that the model has"):
        tokenizer.encode("an <image_soft_token> here", control_tokens=True)
