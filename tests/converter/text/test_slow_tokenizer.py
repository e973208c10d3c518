"""Tokenizers without a tokenizer.json: they become one with the same ids, or the bundle has no text."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import ByteLevelBPETokenizer, Tokenizer

import splitbundle
import splitbundle_converter
from splitbundle.text.huggingface import TextTokenizer
from splitbundle_converter.text import slow_tokenizer
from tests.support.models import make_model
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

LICENSE = (ROOT / "LICENSE").read_text("utf-8")
TEXTS = (*slow_tokenizer.PROBES, *LICENSE.splitlines()[:80], "  ▁ \t<0x41>", "🙂 é")
MADE = "tokenizer.json was made from the checkpoint's older tokenizer files."


def sentencepiece(**options: Any) -> bytes:
    """Return a model of 400 pieces that was trained on the license."""
    model = io.BytesIO()
    settings: dict[str, Any] = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    lines = iter(LICENSE.splitlines())
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **(settings | options))
    return model.getvalue()


def convert(tmp_path: Path, **files: bytes | str) -> tuple[splitbundle.Bundle, list[str]]:
    """Convert a small model with these tokenizer files (``_`` for ``.`` in the names)."""
    source = tmp_path / "source"
    make_model("llama", vocab_size=400).save_pretrained(source)
    for name, data in files.items():
        (source / name.replace("__", ".")).write_bytes(data.encode() if isinstance(data, str) else data)
    notes: list[str] = []
    made = splitbundle_converter.convert(source, tmp_path / "x.splitbundle", notes=notes.append)
    return made, notes


@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}])
def test_a_sentencepiece_model(tmp_path: Path, options: dict[str, Any]) -> None:
    data = sentencepiece(**options)
    made, notes = convert(tmp_path, tokenizer__model=data)
    assert notes == [MADE]
    library = SentencePieceProcessor(model_proto=data)
    tokenizer = TextTokenizer(made)
    for text in TEXTS:
        assert tokenizer.encode(text) == [library.bos_id(), *library.encode(text)], ascii(text)
    # SentencePiece drops the space that it added, and no other.
    assert tokenizer.decode(tokenizer.encode(" naïve 🙂")) == " naïve 🙂"


def test_a_beginning_that_the_configuration_turns_off(tmp_path: Path) -> None:
    data = sentencepiece()
    made, _ = convert(tmp_path, tokenizer__model=data, tokenizer_config__json='{"add_bos_token": false}')
    library = SentencePieceProcessor(model_proto=data)
    assert TextTokenizer(made).encode("a text") == library.encode("a text")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"normalization_rule_name": "nmt_nfkc"},
            "tokenizer.model changes texts by the rules 'nmt_nfkc', which have no equal here",
        ),
        (
            {"remove_extra_whitespaces": True},
            "tokenizer.model changes texts by the rules 'identity', which have no equal here",
        ),
        (
            {"user_defined_symbols": ["▁▁"]},
            r"tokenizer.model has a symbol with a space, '\u2581\u2581', which has no equal here",
        ),
    ],
)
def test_a_sentencepiece_model_that_has_no_equal(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    made, notes = convert(tmp_path, tokenizer__model=sentencepiece(**options))
    assert notes == [f"The bundle will have no text: {reason}."]
    assert made.manifest.text.tokenizer is None
    assert (made.path / "tokenizer" / "tokenizer.model").is_file()


def test_symbols_that_users_defined(tmp_path: Path) -> None:
    """As in the models of Mistral from version 3 on. The space at the beginning of a text is no part of a symbol."""
    data = sentencepiece(user_defined_symbols=["[INST]", "[REF]"])
    made, notes = convert(tmp_path, tokenizer__model=data)
    assert notes == [MADE]
    library, tokenizer = SentencePieceProcessor(model_proto=data), TextTokenizer(made)
    for text in (*TEXTS, "[INST]", "a[INST] b", " [REF][INST]  a", "[REF"):
        assert tokenizer.encode(text) == [library.bos_id(), *library.encode(text)], ascii(text)


def test_a_result_that_differs_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = transformers.PreTrainedTokenizerFast.from_pretrained

    def other(*arguments: Any, **named: Any) -> Any:
        loaded = load(*arguments, **named)
        document = json.loads(loaded.backend_tokenizer.to_str())
        document["model"]["merges"].reverse()
        loaded._tokenizer = Tokenizer.from_str(json.dumps(document))
        return loaded

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", other)
    made, notes = convert(tmp_path, tokenizer__model=sentencepiece())
    assert notes == [
        "The bundle will have no text: ' leading and trailin' gets other ids from tokenizer.model than from its "
        "tokenizer.json."
    ]
    assert made.manifest.text.tokenizer is None


def test_a_model_that_is_damaged(tmp_path: Path) -> None:
    _, notes = convert(tmp_path, tokenizer__model=sentencepiece()[:1000])
    assert notes[0].startswith("The bundle will have no text: tokenizer.model can't be read (")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sentencepiece()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    _, notes = convert(tmp_path, tokenizer__model=data)
    assert notes == [
        "The bundle will have no text: tokenizer.model needs the library sentencepiece. Install it and convert again: "
        "pip install sentencepiece protobuf."
    ]


def test_a_vocabulary_with_merges(tmp_path: Path) -> None:
    """As in old repositories of GPT-2 and Qwen."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(LICENSE.splitlines(), vocab_size=380)
    trained.save_model(str(tmp_path))
    made, notes = convert(
        tmp_path,
        vocab__json=(tmp_path / "vocab.json").read_bytes(),
        merges__txt=(tmp_path / "merges.txt").read_bytes(),
        tokenizer_config__json='{"tokenizer_class": "GPT2Tokenizer", "auto_map": {"AutoTokenizer": ["x.Y", null]}}',
    )
    assert notes == [MADE]
    tokenizer = TextTokenizer(made)
    for text in TEXTS:
        assert tokenizer.encode(text) == trained.encode(text).ids, ascii(text)


def test_a_vocabulary_of_a_class_that_is_not_known(tmp_path: Path) -> None:
    _, notes = convert(tmp_path, vocab__json='{"a": 0}', merges__txt="#version: 0.2\n")
    assert notes == [
        "The bundle will have no text: vocab.json and merges.txt can be read for GPT2Tokenizer, Qwen2Tokenizer, "
        "CodeGenTokenizer, and no class is named."
    ]


def test_a_configuration_chooses_no_other_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would call the class of any name that it has."""
    asked: list[object] = []

    def from_pretrained(*arguments: object, **named: object) -> object:
        asked.append(arguments)
        raise OSError("this class was chosen by a file")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    source = Path(shutil.copytree(ROOT / "examples" / "license-gpt2", tmp_path / "source"))
    (source / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "AutoModelForCausalLM", "tokenizer_file": "/etc/passwd", "auto_map": {"AutoTokenizer": 3}}'
    )
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    assert slow_tokenizer.load_class(files, "gpt2").is_fast
    assert not asked


def test_a_vocabulary_alone(tmp_path: Path) -> None:
    _, notes = convert(tmp_path, vocab__json='{"a": 0}')
    assert notes == ["The bundle will have no text: vocab.json has no merges.txt beside it."]


def test_other_chat_templates_are_copied(tmp_path: Path) -> None:
    source = Path(shutil.copytree(ROOT / "examples" / "license-gpt2", tmp_path / "source"))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates" / "no template").write_text("")
    made = splitbundle_converter.convert(source, tmp_path / "x.splitbundle")
    kept = "tokenizer/additional_chat_templates/tools.jinja"
    assert [path for path in made.manifest.files if "templates" in path] == [kept]
    assert (made.path / kept).read_text() == "{{ messages }}"
    splitbundle.open(made.path).verify(exact=True)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    _, notes = convert(tmp_path)
    assert notes == ["The bundle will have no text, because the checkpoint has no tokenizer.json."]


def test_a_class_that_gives_other_ids_than_the_file(tmp_path: Path) -> None:
    """The file wins. transformers makes Llama's classes anew from the vocabulary, with other rules for spaces."""
    source = Path(shutil.copytree(ROOT / "examples" / "license-gpt2", tmp_path / "source"))
    document = json.loads((source / "tokenizer.json").read_text("utf-8"))
    document["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (source / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": false}')
    notes: list[str] = []
    made = splitbundle_converter.convert(source, tmp_path / "x.splitbundle", notes=notes.append)
    assert notes == [
        "transformers' class gives the text 'The quick brown fox jumps ove… (46 characters) other ids than "
        "tokenizer.json does. The bundle keeps the ids of tokenizer.json."
    ]
    text = "Licensed under"
    own = Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids
    assert TextTokenizer(made).encode(text) == own


def test_a_class_that_can_not_load_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> object:
        raise KeyError("no such part")

    monkeypatch.setattr(slow_tokenizer, "load_class", fail)
    notes: list[str] = []
    splitbundle_converter.convert(
        ROOT / "examples" / "license-gpt2", tmp_path / "x.splitbundle", notes=notes.append, check=True
    )
    assert notes == [
        "transformers can't load the tokenizer, so its ids were not compared. The bundle has the ids of "
        "tokenizer.json. The reason: KeyError: 'no such part'"
    ]
