"""Tokenizers with one fault each: the manifest lists them as they are."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conformance.case import TOKENIZER, Case, Draft

_LONG_MAP = base64.b64encode((7).to_bytes(4, "little") + bytes(4) + b"x" * 1026).decode("ascii")


def tokenizer_cases() -> Iterator[Case]:
    """Cases that the rules SB-T-003 to SB-T-008 refuse and accept. The small model has 24 token ids."""

    def edited(edit: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            value = json.loads(data)
            edit(value)
            return json.dumps(value).encode("ascii")

        return change

    def vocab(**tokens: object) -> Callable[[bytes], bytes]:
        return edited(lambda value: value["model"]["vocab"].update(tokens))

    def added(*entries: dict[str, object]) -> Callable[[bytes], bytes]:
        return edited(lambda value: value["added_tokens"].extend(entries))

    def unigram(count: int) -> Callable[[bytes], bytes]:
        pieces = [["<|end|>", 0.0], *([f"p{i}", -1.5] for i in range(1, count))]
        return edited(lambda value: value.update(model={"type": "Unigram", "unk_id": 0, "vocab": pieces}))

    def set_(name: str, value: object) -> Callable[[bytes], bytes]:
        return edited(lambda document: document.update({name: value}))

    def model(**fields: object) -> Callable[[bytes], bytes]:
        return edited(lambda value: value.update(model=fields))

    def both(*edits: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        return lambda data: edits[1](edits[0](data))

    def steps(place: str, *objects: dict[str, object]) -> Callable[[bytes], bytes]:
        names = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
        return set_(place, {"type": "Sequence", names[place]: list(objects)})

    def replace(content: str, **pattern: str) -> dict[str, object]:
        return {"type": "Replace", "pattern": pattern, "content": content}

    def template(*pieces: str, ids: int = 99) -> dict[str, object]:
        single = [{"SpecialToken": {"id": piece, "type_id": 0}} for piece in pieces]
        special = {name: {"id": name, "ids": [0, ids], "tokens": ["a", "b"]} for name in ("x/y", "z")}
        text = [{"Sequence": {"id": "A", "type_id": 0}}]
        return {"type": "TemplateProcessing", "single": single + text, "pair": text, "special_tokens": special}

    def charsmap(text: bytes) -> dict[str, object]:
        data = (4).to_bytes(4, "little") + bytes(4) + b"short\0" + text + b"\0"
        return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode("ascii")}

    bert = {"type": "BertProcessing", "sep": ["the", 24], "cls": ["a", 2]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    words = {"<|end|>": 0} | {f"w{i}": i for i in range(1, 24)}
    pieces = [["<|end|>", 0.0], ["a", -1.0]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    metaspace = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": False}
    bad = "text.tokenizer"
    rows: list[tuple[str, str, Callable[[bytes], bytes], str | None, str | None]] = [
        ("whole", "a token of the last id", vocab(last=23), None, None),
        ("unigram", "a list of as many pieces as the model has ids", unigram(24), None, None),
        ("added-again", "an added token that the vocabulary has", added({"id": 3, "content": "cat"}), None, None),
        (
            "no-type",
            "a model without a type",
            model(vocab=words, merges=[]),
            None,
            None,
        ),
        ("no-type-list", "a list of pieces without a type", model(vocab=pieces, unk_id=0), None, None),
        ("type-null", "null for the type of a model", model(type=None, vocab=words, merges=[]), bad, "/model/type"),
        (
            "no-type-neither",
            "a vocabulary that is neither an array nor an object",
            model(vocab="a"),
            bad,
            "/model/vocab",
        ),
        (
            "unigram-repeated",
            "a piece twice",
            model(type="Unigram", vocab=[*pieces, ["a", -2.0]], unk_id=0),
            None,
            None,
        ),
        ("no-added", "no list of added tokens", edited(lambda v: v.pop("added_tokens")), None, None),
        (
            "added-renumbered",
            "an added token has the next id, not the one of the file",
            added({"id": 24, "content": "new", **flags}),
            None,
            None,
        ),
        (
            "added-twice",
            "an added token with another's id in the file",
            added({"id": 3, "content": "new", **flags}),
            None,
            None,
        ),
        (
            "added-other",
            "an added token has the id of the vocabulary, not the one of the file",
            added({"id": 12, "content": "cat", **flags}),
            None,
            None,
        ),
        (
            "added-beyond",
            "added tokens that the model lacks",
            both(model(type="WordLevel", vocab=words, unk_token="w1"), added({"id": 24, "content": "new", **flags})),
            None,
            None,
        ),
        (
            "added-holes",
            "an added token after a vocabulary with holes",
            both(vocab(last=23), added({"id": 24, "content": "new", **flags})),
            bad,
            "/model/vocab",
        ),
        (
            "special-tokens-bare",
            "special tokens without ids, and others that aren't objects",
            set_(
                "post_processor",
                {"type": "TemplateProcessing", "single": [], "special_tokens": {"x": {"id": "x"}, "y": None}},
            ),
            None,
            None,
        ),
        (
            "special-tokens-used",
            "a special token without ids that the template uses",
            set_(
                "post_processor",
                {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "x"}}, {"SpecialToken": {"id": "y"}}],
                    "special_tokens": {"x": {"id": "x"}, "y": {"id": "y", "ids": "23"}},
                },
            ),
            None,
            None,
        ),
        (
            "special-tokens-array",
            "an array in place of the special tokens",
            set_("post_processor", {"type": "TemplateProcessing", "single": {}, "pair": 1, "special_tokens": [1]}),
            None,
            None,
        ),
        ("padding", "a padding id out of range, as nothing is padded", set_("padding", {"pad_id": 24}), None, None),
        (
            "template-unused",
            "an id out of range that the template doesn't use",
            set_("post_processor", template()),
            None,
            None,
        ),
        (
            "replacements",
            "ordinary replacements",
            steps("normalizer", *[{"type": "Prepend", "prepend": "_"}, replace("_", String=" ")] * 8),
            None,
            None,
        ),
        (
            "shorter",
            "replacements that make a text no longer",
            steps("normalizer", *[replace("ab", String="xy")] * 99),
            None,
            None,
        ),
        ("charsmap", "a map to short texts", set_("normalizer", charsmap(b"shorter")), None, None),
        (
            "charsmap-not-base64",
            "a map that isn't base64",
            set_("normalizer", {"type": "Precompiled", "precompiled_charsmap": "A A="}),
            None,
            None,
        ),
        (
            "charsmap-line-feed",
            "a map with a line feed behind it isn't base64",
            set_("normalizer", {"type": "Precompiled", "precompiled_charsmap": _LONG_MAP + "\n"}),
            None,
            None,
        ),
        (
            "charsmap-rounded",
            "a length that isn't a multiple of 4, and then 1,026 bytes",
            set_("normalizer", {"type": "Precompiled", "precompiled_charsmap": _LONG_MAP}),
            bad,
            "/normalizer",
        ),
        ("truncated", "truncated JSON", lambda data: data[:-2], "json.syntax", None),
        ("utf16", "UTF-16", lambda data: data.decode("ascii").encode("utf-16"), "json.encoding", None),
        ("duplicate-token", "a token twice", lambda d: d.replace(b'"cat":', b'"dog":'), "json.duplicate-key", None),
        ("nested", "100,000-fold nesting", lambda data: b"[" * 100_000, "json.depth", None),
        ("array", "an array", lambda data: b"[]", bad, ""),
        ("no-model", "no model", edited(lambda v: v.pop("model")), bad, ""),
        ("no-vocabulary", "no vocabulary", edited(lambda v: v["model"].pop("vocab")), bad, "/model"),
        (
            "vocabulary-null",
            "null for the vocabulary",
            edited(lambda v: v["model"].update(vocab=None)),
            bad,
            "/model/vocab",
        ),
        ("type", "a model of an unknown type", edited(lambda v: v["model"].update(type="X")), bad, "/model/type"),
        (
            "id-deep",
            "an id out of range in a sequence of sequences",
            set_("post_processor", {"type": "Sequence", "processors": [{"type": "Sequence", "processors": [bert]}]}),
            bad,
            "/post_processor/processors/0/processors/0/sep/1",
        ),
        (
            "inserted-many",
            "2,000 ids beside every text",
            set_(
                "post_processor",
                {"type": "TemplateProcessing", "special_tokens": {"x": {"id": "x", "ids": [1] * 2000, "tokens": []}}},
            ),
            bad,
            "/post_processor",
        ),
        (
            "inserted-again",
            "a text 2,000 times",
            set_("post_processor", template() | {"single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2000}),
            bad,
            "/post_processor",
        ),
        (
            "growth",
            "replacements that make gigabytes of a word",
            steps("normalizer", *[replace("a" * 100, String="a")] * 6),
            bad,
            "/normalizer/normalizers/1",
        ),
        (
            "growth-empty",
            "replacements of nothing, which insert",
            steps("decoder", *[replace("a", Regex="x?")] * 40),
            bad,
            "/decoder/decoders/10",
        ),
        (
            "growth-bytes",
            "bytes of bytes of bytes",
            steps("normalizer", *[byte_level] * 30),
            bad,
            "/normalizer/normalizers/5",
        ),
        (
            "growth-spaces",
            "11 spaces before each word",
            steps("pre_tokenizer", *[metaspace] * 11),
            bad,
            "/pre_tokenizer/pretokenizers/10",
        ),
        (
            "growth-constructor",
            "replacements after a step of a kind that JavaScript's objects have",
            steps("normalizer", {"type": "constructor"}, *[replace("a" * 100, String="a")] * 6),
            bad,
            "/normalizer/normalizers/2",
        ),
        ("growth-map", "a map to a long text", set_("normalizer", charsmap(b"a" * 2000)), bad, "/normalizer"),
        (
            "steps-many",
            "2,000 steps",
            steps("normalizer", *[{"type": "Lowercase"}] * 2000),
            bad,
            "/normalizer/normalizers/1023",
        ),
        ("id-beyond", "a token id out of range", vocab(new=24), bad, "/model/vocab"),
        ("id-2-31", "a token id of 2^31", vocab(new=2**31), bad, "/model/vocab/new"),
        ("id-2-32", "a token id of 2^32", vocab(new=2**32), bad, "/model/vocab/new"),
        ("id-negative", "a negative token id", vocab(new=-1), bad, "/model/vocab/new"),
        ("id-float", "1.0 as a token id", vocab(the=1.0), bad, "/model/vocab/the"),
        ("id-true", "true as a token id", vocab(the=True), bad, "/model/vocab/the"),
        ("id-twice", "two tokens of one id", vocab(new=3), bad, "/model/vocab/new"),
        ("proto", "a token __proto__ with another's id", vocab(__proto__=3), bad, "/model/vocab/__proto__"),
        ("pointer", "a pointer is escaped", vocab(**{"a/~b": -1}), bad, "/model/vocab/a~1~0b"),
        (
            "larger",
            "more tokens than the embedding has rows",
            vocab(**{f"n{i}": i for i in range(11, 40)}),
            bad,
            "/model/vocab",
        ),
        ("unigram-larger", "more pieces than the embedding has rows", unigram(25), bad, "/model/vocab"),
        ("added-no-content", "an added token without a text", added({"id": 24}), bad, "/added_tokens/1"),
        ("added-number", "a number for a text", added({"id": 24, "content": 1}), bad, "/added_tokens/1/content"),
        ("unigram-no-score", "null for a score", model(type="Unigram", vocab=[["a", None]]), bad, "/model/vocab/0"),
        ("added-no-id", "an added token without an id", added({"content": "new"}), bad, "/added_tokens/1"),
        (
            "added-negative",
            "a negative id of an added token",
            added({"id": -1, "content": "x"}),
            bad,
            "/added_tokens/1/id",
        ),
        (
            "added-null",
            "null for an added token",
            edited(lambda v: v["added_tokens"].append(None)),
            bad,
            "/added_tokens/1",
        ),
        ("bert", "an id beside every text, out of range", set_("post_processor", bert), bad, "/post_processor/sep/1"),
        (
            "template",
            "the same in a template of a sequence",
            set_("post_processor", {"type": "Sequence", "processors": [template("x/y")]}),
            bad,
            "/post_processor/processors/0/special_tokens/x~1y/ids/1",
        ),
    ]
    for name, about, edit, code, pointer in rows:

        def make(root: Path, edit: Callable[[bytes], bytes] = edit) -> None:
            draft = Draft()
            draft.files[TOKENIZER] = edit(draft.files[TOKENIZER])
            draft.seal().write(root)

        yield Case(
            name=f"tokenizer/{name}",
            about=about,
            rules=_rules(code, pointer),
            steps=("verify",),
            make=make,
            code=code,
            file=TOKENIZER if code else None,
            pointer=pointer,
            points=code == "text.tokenizer",
            limited=name == "nested",
        )


def _rules(code: str | None, pointer: str | None) -> tuple[str, ...]:
    """Return the rules that a case holds, by the place of the fault."""
    if code is None:
        return "SB-T-004", "SB-T-005", "SB-T-006", "SB-T-007", "SB-T-008"
    if code.startswith("json."):
        return ("SB-T-003",)
    at = pointer.split("/")[1] if pointer else "model"
    of_model = "SB-T-004", "SB-T-006", "SB-T-008"
    return {"model": of_model, "added_tokens": of_model[:2], "post_processor": ("SB-T-005",)}.get(at, ("SB-T-007",))
