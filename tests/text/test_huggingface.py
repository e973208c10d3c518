"""Text to ids and back with the bundle's own tokenizer, after its digest was checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

import splitbundle
import splitbundle_converter
from splitbundle import BundleError
from splitbundle.cli import main
from splitbundle.text.huggingface import TextTokenizer
from splitbundle.verification import tokenizer_rules
from tests.support.graph_cases import relist
from tests.support.paths import ROOT

CHECKPOINT = ROOT / "examples" / "license-gpt2"


@pytest.fixture
def bundle(tmp_path: Path) -> splitbundle.Bundle:
    """The license model in one shard."""
    return splitbundle_converter.convert(CHECKPOINT, tmp_path / "license.splitbundle", check=False)


def test_pieces_make_the_text_that_was_encoded(bundle: splitbundle.Bundle) -> None:
    tokenizer = TextTokenizer(bundle)
    text = "Licensed under the Apache License, – naïve 🙂 bytes"
    ids = tokenizer.encode(text)
    assert ids == Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(text).ids
    stream = tokenizer.stream([])
    pieces = [stream.piece(token) for token in ids]
    assert "".join(pieces) == text
    assert "" in pieces  # a character of several tokens comes as a whole, with its last token
    stream = tokenizer.stream(ids[:3])
    assert tokenizer.decode(ids[:3]) + "".join(stream.piece(token) for token in ids[3:]) + stream.rest() == text


def test_a_space_between_prompt_and_answer_is_kept(tmp_path: Path) -> None:
    """SentencePiece tokenizers strip the first space of a text: the prompt's, but not the continuation's."""
    from tokenizers import decoders, models, normalizers

    vocabulary = {"<unk>": 0, "▁one": 1, "▁two": 2, "<0xC3>": 3}
    library = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    (source / "tokenizer.json").write_text(json.dumps(json.loads(library.to_str())))
    bundle = splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False)
    tokenizer = TextTokenizer(bundle)
    stream = tokenizer.stream([1])
    assert [stream.piece(2), stream.piece(1)] == [" two", " one"]
    assert stream.piece(3) == ""
    assert stream.rest() == "\ufffd"  # half a character at the end isn't lost silently


@pytest.mark.rule("SB-T-002")
def test_text_that_spells_a_control_token_stays_text(bundle: splitbundle.Bundle) -> None:
    tokenizer = TextTokenizer(bundle)
    ids = tokenizer.encode("a<|endoftext|>b")
    assert 0 not in ids
    stream = tokenizer.stream([])
    assert "".join(stream.piece(token) for token in ids) == "a<|endoftext|>b"


@pytest.mark.rule("SB-T-001")
def test_a_changed_tokenizer_is_refused_before_it_is_parsed(bundle: splitbundle.Bundle) -> None:
    path = bundle.path / "tokenizer" / "tokenizer.json"
    data = path.read_bytes()
    path.write_bytes(b"[" + data[1:])  # not JSON any more: a parser would report this first
    with pytest.raises(BundleError) as caught:
        TextTokenizer(bundle)
    assert caught.value.codes == ("file.digest",)


def test_a_tokenizer_that_the_library_does_not_read(tmp_path: Path, bundle: splitbundle.Bundle) -> None:
    unreadable = '{"version": "1.0", "model": {"type": "BPE", "vocab": {}}}'
    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    (source / "tokenizer.json").write_text(unreadable)
    with pytest.raises(BundleError, match=r"\[text.tokenizer\] tokenizer.json: expected a tokenizer that") as caught:
        splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False)
    assert str(caught.value).endswith("tokenizer=False converts without a tokenizer")
    path = bundle.manifest.text.tokenizer
    assert path is not None
    relist(bundle.path, path, unreadable.encode())
    with pytest.raises(BundleError, match=r"\[text.tokenizer\] tokenizer/tokenizer.json: expected a tokenizer that"):
        TextTokenizer(splitbundle.open(bundle.path))


def test_a_bundle_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    (source / "tokenizer.json").unlink()
    bundle = splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False)
    assert bundle.manifest.text.tokenizer is None
    assert bundle.manifest.text.stop_ids == (0,)
    with pytest.raises(BundleError, match=r"\[text.none\]"):
        TextTokenizer(bundle)


@pytest.mark.rule("SB-T-002")
def test_a_text_is_neither_cut_nor_filled_up(tmp_path: Path) -> None:
    """These settings of the file are for the batches of training."""
    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    library = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    plain = library.encode("Licensed under the Apache License").ids
    library.enable_truncation(2)
    library.enable_padding(length=40)
    library.save(str(source / "tokenizer.json"))
    assert len(library.encode("Licensed under the Apache License").ids) == 40
    bundle = splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False)
    assert TextTokenizer(bundle).encode("Licensed under the Apache License") == plain


@pytest.mark.rule("SB-T-002")
def test_a_text_has_the_same_ids_each_time(tmp_path: Path) -> None:
    """A file that was saved in training may ask for random merges."""
    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    document = json.loads((source / "tokenizer.json").read_text("utf-8"))
    document["model"]["dropout"] = 0.5
    (source / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    bundle = splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False)
    text = "Licensed under the Apache License, Version 2.0"
    plain = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(text).ids
    assert [TextTokenizer(bundle).encode(text) for _ in range(5)] == [plain] * 5


PANICS: dict[str, dict[str, object]] = {
    "a map that isn't one": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a piece of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "no vocabulary": {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "?"}},
}


@pytest.mark.parametrize("change", PANICS.values(), ids=PANICS)
def test_a_library_that_panics_is_an_error_of_the_file(
    bundle: splitbundle.Bundle, change: dict[str, object], capfd: pytest.CaptureFixture[str]
) -> None:
    path = bundle.manifest.text.tokenizer
    assert path is not None
    document = json.loads((bundle.path / path).read_bytes()) | change
    relist(bundle.path, path, json.dumps(document).encode())
    with pytest.raises(BundleError, match=rf"\[text.tokenizer\] {path}: expected a tokenizer that the library can use"):
        TextTokenizer(splitbundle.open(bundle.path)).encode("the text")
    assert main.main(["generate", str(bundle.path), "the text", "-n", "1"]) == 1
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.rule("SB-T-007")
def test_ordinary_replacements_are_taken() -> None:
    """The replacements of SentencePiece's models, and some more."""
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    document = {
        "model": {"type": "BPE", "vocab": {"a": 0}},
        "normalizer": {"type": "Sequence", "normalizers": steps * 8},
        "decoder": {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    }
    tokenizer_rules.check(json.dumps(document).encode(), "tokenizer.json", 2)


@pytest.mark.rule("SB-T-005")
def test_a_tokenizer_of_another_model_is_not_converted(tmp_path: Path) -> None:
    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    document = json.loads((source / "tokenizer.json").read_text("utf-8"))
    document["model"]["vocab"] |= {f"new{i}": 50_000 + i for i in range(20)}
    (source / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False)
    assert str(caught.value) == (
        "[text.tokenizer] tokenizer.json /model/vocab: expected ids below 640, as the model has 640, for all but one "
        "token in 100, got 20 of 660, the first 'new0' with 50000. The model has no such token: the tokenizer belongs "
        "to another model, or was changed after "
        "training. tokenizer=False converts without a tokenizer"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    output = tmp_path / "x.splitbundle"
    assert main.main(["convert", str(source), "-o", str(output), "--no-tokenizer", "--no-check"]) == 0
    assert splitbundle.open(output).manifest.text.tokenizer is None
    assert not (output / "tokenizer").exists()


@pytest.mark.rule("SB-T-004")
@pytest.mark.parametrize("merges", ["strings", "pairs"])
def test_a_tokenizer_without_the_type_of_its_model(tmp_path: Path, merges: str) -> None:
    """The published file of GPT-2 has none. The library takes it for BPE."""
    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    document = json.loads((source / "tokenizer.json").read_text("utf-8"))
    del document["model"]["type"]
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in document["model"]["merges"]]
    document["model"]["merges"] = pairs if merges == "pairs" else [" ".join(pair) for pair in pairs]
    (source / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    text = "Licensed under the Apache License, – naïve 🙂"
    made = splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False)
    assert TextTokenizer(made).encode(text) == Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).encode(text).ids


@pytest.mark.rule("SB-T-005", "SB-T-008")
def test_an_added_token_beyond_the_embedding(tmp_path: Path) -> None:
    """Gemma 3 has such a token. It is kept, and only a text that spells it is refused."""
    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    library = Tokenizer.from_file(str(source / "tokenizer.json"))
    library.add_tokens(["<image>"])
    library.save(str(source / "tokenizer.json"))
    made = splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False)
    beyond = library.token_to_id("<image>")
    assert beyond == made.architecture.vocab_size
    tokenizer = TextTokenizer(made)
    assert tokenizer.encode("an <imag e>") == library.encode("an <imag e>").ids
    with pytest.raises(BundleError) as caught:
        tokenizer.encode("an <image> here")
    assert str(caught.value) == (
        f"[text.token] text: expected a text of tokens that the model has, with ids below {beyond}, got '<image>', "
        f"whose id is {beyond}. Leave this token out of the text"
    )
    assert main.main(["generate", str(made.path), "an <image> here", "-n", "1"]) == 1


def test_the_former_module_is_a_door_to_this_one() -> None:
    from splitbundle import text_tokenizer

    assert text_tokenizer.TextTokenizer is TextTokenizer
    assert "splitbundle.text.huggingface" in (text_tokenizer.__doc__ or "")


def test_what_is_no_text_and_no_token(bundle: splitbundle.Bundle) -> None:
    tokenizer = TextTokenizer(bundle)
    for wrong in ("a\ud800b", None, b"a"):
        with pytest.raises(BundleError, match=r"\[input.value\] text: expected a text without lone surrogates"):
            tokenizer.encode(wrong)  # type: ignore[arg-type]
    for ids in ([-1], [10**9], b"hi", ["a"]):
        with pytest.raises(BundleError, match=r"\[input.value\] ids"):
            tokenizer.decode(ids)  # type: ignore[arg-type]
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(BundleError, match=r"messages\[0\]\['content'\]: expected a text without lone surrogates"):
        tokenizer.apply_chat_template([{"role": "user", "content": "\udfff"}], chat_template=template)
    with pytest.raises(TypeError, match=r"tokenize is an argument of transformers. .* render_chat returns the text"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template=template, tokenize=False)
    with pytest.raises(BundleError, match=r"\[text.template\] chat_template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], chat_template="")


def with_token(document: dict[str, Any], token: str) -> int:
    """Make the last token of a tokenizer an added one that isn't special. Return its id."""
    last, number = max(document["model"]["vocab"].items(), key=lambda entry: entry[1])
    del document["model"]["vocab"][last]
    document["model"]["vocab"][token] = number
    document["model"]["merges"].pop()
    flags = dict.fromkeys(("special", "single_word", "lstrip", "rstrip", "normalized"), False)
    document["added_tokens"].append({"id": number, "content": token, **flags})
    return number


def test_a_text_without_the_tokens_around_it(tmp_path: Path) -> None:
    library = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    library.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    document = json.loads(library.to_str())
    number = with_token(document, "<|tool|>")
    (source / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = TextTokenizer(splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False))
    for text in ("Licensed", "a <|tool|> b"):  # the second one is encoded in another way
        ids = tokenizer.encode(text)
        assert (ids[0], number in ids) == (0, False)
        assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]


def test_golden_texts_spell_control_tokens_that_are_not_special(tmp_path: Path) -> None:
    """A tokenizer whose library lets such a token into a text is noticed."""
    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    document = json.loads((source / "tokenizer.json").read_text())
    number = with_token(document, "<zig>")
    (source / "tokenizer.json").write_text(json.dumps(document))
    (source / "chat_template.jinja").write_text("{% for m in messages %}<zig>{{ m.content }}{% endfor %}")
    bundle = splitbundle_converter.convert(source, tmp_path / "x.splitbundle")
    tokenizer = TextTokenizer(bundle)
    assert tokenizer.document is not None
    (case,) = [each for each in tokenizer.document.cases if each.text == "a<zig>b"]
    assert number in case.control_ids
    assert number not in case.ids
    assert tuple(tokenizer.encode("a<zig>b")) == case.ids
    assert bundle.check_texts() >= len(tokenizer.document.cases)


def test_what_the_makers_ask_for_and_is_not_done_is_said(tmp_path: Path) -> None:
    source, notes = Path(shutil.copytree(CHECKPOINT, tmp_path / "source")), list[str]()
    config = {
        "eos_token_id": 0,
        "num_beams": 1,
        "no_repeat_ngram_size": 3,
        "stop_strings": ["x"],
        "suppress_tokens": None,
    }
    (source / "generation_config.json").write_text(json.dumps(config))
    splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False, notes=notes.append)
    expected = "generation_config.json also has no_repeat_ngram_size, stop_strings, by which no text is generated here."
    assert expected in notes
