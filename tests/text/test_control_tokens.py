"""Only a template makes control tokens: what a user, a tool or the model wrote is encoded as text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

import splitbundle_converter
from splitbundle import BundleError
from splitbundle.text.huggingface import TextTokenizer
from tests.support.paths import ROOT
from tests.support.small_tokenizer import tokenizer_with_room

EXAMPLE = ROOT / "examples" / "license-gpt2"
pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ("<unk>", "<s>", "</s>", "▁", "a", "b", "c", "s", "<", "/", ">", "|", "t", "h", "i", "n", "k", "e", "d")


def byte_level() -> Tokenizer:
    made = tokenizer_with_room()
    made.add_tokens([AddedToken("<think>", special=False, normalized=False), AddedToken("zzz", normalized=False)])
    made.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    return made


def sentencepiece(prefix: str) -> Tokenizer:
    """A unigram tokenizer: it finds ``</s>`` in any text, as this is in its vocabulary."""
    made = Tokenizer(models.Unigram([(word, 0.0 if "s>" in word else -3.0) for word in WORDS], 0, False))
    if prefix == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    made.decoder = decoders.Metaspace()
    made.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<|end|>", special=True)])
    made.add_tokens([AddedToken(each, special=False, normalized=False) for each in ("<think>", "zzz")])
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "prepended": lambda: sentencepiece("normalizer"),
    "first": lambda: sentencepiece("first"),
    "always": lambda: sentencepiece("always"),
    "never": lambda: sentencepiece("never"),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, Tokenizer]:
    """A bundle's tokenizer, whose template spells ``<think>``, and the library's own."""
    library, tmp_path = KINDS[request.param](), tmp_path_factory.mktemp("made")
    source = Path(shutil.copytree(EXAMPLE, tmp_path / "source"))
    library.save(str(source / "tokenizer.json"))
    config = {"chat_template": "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}<think>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    bundle = splitbundle_converter.convert(source, tmp_path / "b", check=False)
    return bundle.tokenizer(), library


def marked(*parts: tuple[str, int]) -> tuple[str, bytes]:
    """Return a text, and the mark of each character."""
    return "".join(text for text, _ in parts), b"".join(bytes([mark]) * len(text) for text, mark in parts)


def control_ids(library: Tokenizer, *names: str) -> set[int]:
    return {library.token_to_id(name) for name in names}


def test_without_a_forged_token_the_ids_are_those_of_the_whole(made: tuple[TextTokenizer, Tokenizer]) -> None:
    tokenizer, library = made
    for parts in (
        [("a b", 2), ("<|end|>", 0), (" c", 1), ("<|end|>", 0)],
        [("<think>", 0), ("a zzz b", 2), ("<|end|>", 0)],
        [("a", 1), ("<think>", 1), ("b", 1), ("<|end|>", 0)],  # the model wrote a token that isn't special
    ):
        text, marks = marked(*parts)
        assert tokenizer.encode_marked(text, marks) == library.encode(text, add_special_tokens=False).ids


def test_what_others_wrote_becomes_no_control_token(made: tuple[TextTokenizer, Tokenizer]) -> None:
    tokenizer, library = made
    control = control_ids(library, "<|end|>", "<think>")
    for mark, spelled in ((2, "<|end|>"), (2, "<think>"), (1, "<|end|>")):
        text, marks = marked(("a ", 2), (spelled, mark), (" b", 2), ("<|end|>", 0), (" c", 0), ("<think>", 0))
        ids = tokenizer.encode_marked(text, marks)
        assert [each for each in ids if each in control] == [
            library.token_to_id("<|end|>"),
            library.token_to_id("<think>"),
        ]
        # What follows the template's own token is encoded as it is in the whole text.
        whole = library.encode(text, add_special_tokens=False).ids
        last = len(whole) - 1 - whole[::-1].index(library.token_to_id("<|end|>"))
        assert ids[-(len(whole) - last) :] == whole[last:]


def test_a_token_that_is_half_written_by_others_is_text(made: tuple[TextTokenizer, Tokenizer]) -> None:
    tokenizer, library = made
    for parts in ([("<|", 0), ("end", 2), ("|>", 0)], [("<|end|", 2), (">", 0)], [("<", 0), ("|end|>", 1)]):
        text, marks = marked(("a", 0), *parts, ("<|end|>", 0))
        ids = tokenizer.encode_marked(text, marks)
        assert ids.count(library.token_to_id("<|end|>")) == 1
        assert ids[-1] == library.token_to_id("<|end|>")


def test_a_unigram_vocabulary_gives_no_control_token(tmp_path: Path) -> None:
    """The library finds ``</s>`` in the text even if it is told to take control tokens as text."""
    library = sentencepiece("first")
    end = library.token_to_id("</s>")
    library.encode_special_tokens = True
    assert end in library.encode("a</s>b", add_special_tokens=False).ids
    source = Path(shutil.copytree(EXAMPLE, tmp_path / "source"))
    library.save(str(source / "tokenizer.json"))
    tokenizer = splitbundle_converter.convert(source, tmp_path / "b", check=False).tokenizer()
    text, marks = marked(("a</s>b", 2), ("</s>", 0))
    ids = tokenizer.encode_marked(text, marks)
    assert (ids.count(end), ids[-1]) == (1, end)
    assert tokenizer.decode(ids) == "a</s>b"


def test_a_chat_ends_where_its_template_says(made: tuple[TextTokenizer, Tokenizer]) -> None:
    tokenizer, library = made
    end, think = library.token_to_id("<|end|>"), library.token_to_id("<think>")
    told = "b <|end|> a <think> c"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": told}])
    assert (ids.count(end), ids.count(think), ids[-2:]) == (1, 1, [end, think])
    model = tokenizer.apply_chat_template([{"role": "assistant", "content": "a <think> b"}])
    assert (model.count(end), model.count(think)) == (1, 2)


def test_a_text_that_spells_a_control_token_on_purpose(made: tuple[TextTokenizer, Tokenizer]) -> None:
    tokenizer, library = made
    library.encode_special_tokens = False
    assert tokenizer.encode("a <|end|> b", control_tokens=True) == library.encode("a <|end|> b").ids
    assert library.token_to_id("<|end|>") not in tokenizer.encode("a <|end|> b")
    ids = tokenizer.encode("a <|end|>", control_tokens=True)
    assert "<|end|>" in tokenizer.decode(ids, control_tokens=True)
    assert "<|end|>" not in tokenizer.decode(ids)


def test_a_prompt_makes_no_control_token_of_any_kind(made: tuple[TextTokenizer, Tokenizer]) -> None:
    """Those that only a template spells aren't special in the file."""
    tokenizer, library = made
    control = control_ids(library, "<|end|>", "<think>")
    assert not control & set(tokenizer.encode("a <think> b <|end|> c"))
    assert library.token_to_id("<think>") in tokenizer.encode("a <think> b", control_tokens=True)
    assert tokenizer.encode("a b") == library.encode("a b").ids


def test_what_a_template_of_the_caller_spells_is_a_control_token(made: tuple[TextTokenizer, Tokenizer]) -> None:
    tokenizer, library = made
    number = library.token_to_id("zzz")
    template = "{{ messages[0].content }}zzz"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a zzz b"}], chat_template=template)
    assert (ids.count(number), ids[-1]) == (1, number)


def test_a_bundle_without_a_template_says_so(tmp_path: Path) -> None:
    tokenizer = splitbundle_converter.convert(EXAMPLE, tmp_path / "b", check=False).tokenizer()
    messages: list[dict[str, Any]] = [{"role": "user", "content": "a"}]
    with pytest.raises(BundleError, match=r"\[text.template\] chat_template: expected a bundle with a chat template"):
        tokenizer.apply_chat_template(messages)
    own = tokenizer.apply_chat_template(messages, chat_template="{{ messages[0].content }}<|endoftext|>")
    assert own == [*tokenizer.encode("a"), 0]


def test_named_templates(tmp_path: Path) -> None:
    source = Path(shutil.copytree(EXAMPLE, tmp_path / "source"))
    templates = {"default": "d", "tool_use": "t", "rag": "r{{ documents[0].text }}"}
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    tokenizer = splitbundle_converter.convert(source, tmp_path / "b", check=False).tokenizer()
    messages = [{"role": "user", "content": "a"}]
    assert tokenizer.render_chat(messages) == "d"
    assert tokenizer.render_chat(messages, tools=[{"name": "f"}]) == "t"
    assert tokenizer.render_chat(messages, chat_template="rag", documents=[{"text": "x"}]) == "rx"
    with pytest.raises(BundleError, match=r"expected one of the chat templates default, tool_use, rag, got 'other'"):
        tokenizer.render_chat(messages, chat_template="other")
