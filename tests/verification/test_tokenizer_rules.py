"""What the rules of a tokenizer accept, the library loads, with the same ids; and the messages of what they refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from splitbundle import BundleError
from splitbundle.verification import tokenizer_rules

FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
WORDS = {"a": 0, "b": 1, "ab": 2}
BPE = {"vocab": WORDS, "merges": ["a b"]}
Model = dict[str, Any]


def added(*tokens: tuple[int, str], special: bool = False) -> list[dict[str, Any]]:
    return [{"id": number, "content": token, **FLAGS, "special": special} for number, token in tokens]


def document(model: Model | None = None, **fields: Any) -> bytes:
    return json.dumps(
        {"version": "1.0", "added_tokens": [], "model": model or {"type": "BPE", **BPE}} | fields
    ).encode()


def refusal(data: bytes, vocab_size: int = 8) -> str:
    with pytest.raises(BundleError) as caught:
        tokenizer_rules.check(data, "tokenizer.json", vocab_size)
    return str(caught.value).removesuffix(f". {tokenizer_rules.WHOLE}")


LOADED: dict[str, tuple[bytes, list[int]]] = {
    "merges as strings": (document(), [2, 2]),
    "merges as pairs": (document({"type": "BPE", **BPE, "merges": [["a", "b"]]}), [2, 2]),
    "no type, merges as strings": (document(BPE), [2, 2]),
    "no type, merges as pairs": (document({**BPE, "merges": [["a", "b"]]}), [2, 2]),
    "merges that are ignored": (document({"type": "BPE", **BPE, "ignore_merges": True, "merges": []}), [0, 1, 0, 1]),
    "byte_fallback": (
        document({"type": "BPE", "vocab": WORDS | {"<0x78>": 3}, "merges": ["a b"], "byte_fallback": True}),
        [2, 2],
    ),
    "no type, words": (document({"vocab": {"abab": 5}, "unk_token": "?"}), [5]),
    "no type, pieces of words": (
        document(
            {
                "vocab": {"?": 0, "ab": 1, "##ab": 2},
                "unk_token": "?",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 99,
            }
        ),
        [1, 2],
    ),
    "no type, a list": (document({"vocab": [["?", 0.0], ["ab", -1.0]], "unk_id": 0}), [1, 1]),
    "a piece twice": (
        document({"type": "Unigram", "vocab": [["?", 0.0], ["ab", -1.0], ["ab", -1.0]], "unk_id": 0}),
        [2, 2],
    ),
    "ids with holes": (document({"type": "BPE", "vocab": {"a": 0, "b": 5, "ab": 7}, "merges": ["a b"]}), [7, 7]),
    "no added tokens": (json.dumps({"version": "1.0", "model": BPE}).encode(), [2, 2]),
    "an added token of the vocabulary": (document(added_tokens=added((2, "ab"))), [2, 2]),
    "an added token of the vocabulary, with another id": (document(added_tokens=added((6, "ab"))), [2, 2]),
    "an added token twice": (document(added_tokens=added((3, "aba"), (3, "aba"))), [3, 1]),
    "added tokens with holes": (document(added_tokens=added((5, "ba"), (7, "aba"))), [4, 1]),
    "an added token with an id that is taken": (document(added_tokens=added((0, "aba"))), [3, 1]),
    "an empty added token": (document(added_tokens=added((3, ""), (4, "aba"))), [3, 1]),
    "kinds of added tokens in turn": (
        document(added_tokens=[*added((9, "x"), special=True), *added((8, "ba")), *added((7, "aba"), special=True)]),
        [2, 2],
    ),
    "a padding that the model lacks": (
        document(
            padding={
                "strategy": "BatchLongest",
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 99,
                "pad_type_id": 0,
                "pad_token": "x",
            }
        ),
        [2, 2],
    ),
    "an id that only pairs of texts have": (
        document(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "a", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}],
                "special_tokens": {
                    "a": {"id": "a", "ids": [0], "tokens": ["a"]},
                    "x": {"id": "x", "ids": [99], "tokens": ["x"]},
                },
            }
        ),
        [0, 2, 2],
    ),
}


@pytest.mark.rule("SB-T-004", "SB-T-005", "SB-T-006")
@pytest.mark.parametrize(("data", "ids"), LOADED.values(), ids=LOADED)
def test_what_the_library_loads_is_accepted(data: bytes, ids: list[int]) -> None:
    found = tokenizer_rules.check(data, "tokenizer.json", 8)
    library = Tokenizer.from_str(data.decode())
    library.encode_special_tokens = True
    assert library.encode("abab").ids == ids
    assert found.beyond == {}
    for token, (given, number) in found.renumbered.items():
        assert library.token_to_id(token) == number != given


@pytest.mark.rule("SB-T-004")
def test_added_tokens_have_the_ids_of_the_library() -> None:
    data = document(added_tokens=added((9, "x"), (1, "y"), (1, "b"), (4, "b"), (6, "z"), (9, "x")))
    found = tokenizer_rules.check(data, "tokenizer.json", 5)
    assert found.renumbered == {"x": (9, 3), "y": (1, 4), "b": (4, 1), "z": (6, 5)}
    assert found.beyond == {"z": 5}
    assert Tokenizer.from_str(data.decode()).get_vocab() == WORDS | {"x": 3, "y": 4, "z": 5}


def words(count: int) -> dict[str, int]:
    return {f"w{i}": i for i in range(count)}


@pytest.mark.rule("SB-T-008")
def test_one_token_in_a_hundred_may_be_beyond() -> None:
    model = {"type": "WordLevel", "vocab": words(200), "unk_token": "w0"}
    data = document(model, added_tokens=added(*((i, f"x{i}") for i in range(200, 300))))
    found = tokenizer_rules.check(data, "tokenizer.json", 198)
    assert list(found.beyond) == ["w198", "w199", *(f"x{i}" for i in range(200, 300))]
    assert refusal(data, 197) == (
        "[text.tokenizer] tokenizer.json /model/vocab: expected ids below 197, as the model has 197, for all but one "
        "token in 100, got 3 of 200, the first 'w197' with 197. The model has no such token: the tokenizer belongs to "
        "another model, or was changed after training"
    )


REFUSED = {
    "two tokens of one id": (
        document({"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}),
        "/model/vocab/b: expected an id that no other token has, got 0, that of 'a'",
    ),
    "an unknown type": (
        document({"type": "X", **BPE}),
        "/model/type: expected one of BPE, Unigram, WordLevel, WordPiece, or none, got 'X'",
    ),
    "no type": (
        document({"type": None, **BPE}),
        "/model/type: expected one of BPE, Unigram, WordLevel, WordPiece, or none, got None",
    ),
    "a negative id": (
        document(added_tokens=added((-1, "x"))),
        "/added_tokens/0/id: expected a token id from 0 to 2147483647, got -1",
    ),
    "an added token that could have a taken id": (
        document({"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 3}, "merges": []}, added_tokens=added((4, "x"))),
        "/model/vocab: expected ids from 0 to 2 for the 3 tokens of the vocabulary, as tokens are added to it, got "
        "greater ones, and the added token 'x'",
    ),
    "an id before every text": (
        document(post_processor={"type": "BertProcessing", "sep": ["a", 0], "cls": ["x", 8]}),
        "/post_processor/cls/1: expected a token id from 0 to 7, as the model has 8, got 8. The model has no such "
        "token: the tokenizer belongs to another model, or was changed after training",
    ),
    "replacements of replacements": (
        document(normalizer=[{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}] * 4),
        "/normalizer/3: expected steps that make a text at most 1024 times as long, got more",
    ),
    "steps": (
        document(normalizer=[{"type": "NFC"}] * 1025),
        "/normalizer/1024: expected at most 1024 objects in /normalizer, got more",
    ),
    "templates": (
        document(post_processor={"type": "TemplateProcessing", "single": [1] * 1025}),
        "/post_processor: expected templates of at most 1024 items and ids, got more",
    ),
}


@pytest.mark.rule("SB-T-004", "SB-T-005", "SB-T-006", "SB-T-007")
@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED)
def test_the_message_of_a_refusal(data: bytes, message: str) -> None:
    assert refusal(data) == f"[text.tokenizer] tokenizer.json {message}"


@pytest.mark.rule("SB-T-007")
def test_the_growth_of_each_step_is_that_of_the_library() -> None:
    """No step makes a text longer than its factor says."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "ab"}, "content": "xyz"},
        {"type": "Replace", "pattern": {"Regex": "x?"}, "content": "yy"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "yy"},
        {"type": "Prepend", "prepend": "xy"},
        {"type": "ByteLevel"},
    ]
    for step in steps:
        normalizer = Tokenizer.from_str(document(normalizer=step).decode()).normalizer
        for text in ("ababab", "a", "🙂", "é" * 9):
            once = normalizer.normalize_str(text)
            assert len(once) <= tokenizer_rules._growth(step) * len(text) + len(step.get("content", "")), (step, text)
