"""Text to ids and back with the bundle's own tokenizer, after its digest was checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

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
    import json
    import shutil

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


def test_a_tokenizer_that_the_library_does_not_read(tmp_path: Path) -> None:
    import shutil

    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    (source / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {}}}')
    bundle = splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False)
    with pytest.raises(BundleError, match=r"\[text.tokenizer\] tokenizer/tokenizer.json: expected a tokenizer that"):
        TextTokenizer(bundle)


def test_a_bundle_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    import shutil

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
    import shutil

    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    library = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    plain = library.encode("Licensed under the Apache License").ids
    library.enable_truncation(2)
    library.enable_padding(length=40)
    library.save(str(source / "tokenizer.json"))
    assert len(library.encode("Licensed under the Apache License").ids) == 40
    bundle = splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False)
    assert TextTokenizer(bundle).encode("Licensed under the Apache License") == plain


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
    import json
    import shutil

    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "source"))
    document = json.loads((source / "tokenizer.json").read_text("utf-8"))
    document["model"]["vocab"]["new"] = 50_000
    (source / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(
        BundleError, match=r"\[text.tokenizer\] tokenizer.json /model/vocab/new: expected a token id from"
    ):
        splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_former_module_is_a_door_to_this_one() -> None:
    from splitbundle import text_tokenizer

    assert text_tokenizer.TextTokenizer is TextTokenizer
    assert "splitbundle.text.huggingface" in (text_tokenizer.__doc__ or "")
