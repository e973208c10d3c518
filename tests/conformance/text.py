"""Tokenizers with one fault each: the manifest lists them as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conformance.case import TOKENIZER, Case, Draft


def tokenizer_cases() -> Iterator[Case]:
    """Cases that the rules SB-T-003 to SB-T-007 refuse and accept. The small model has 24 token ids."""

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

    bert = {"type": "BertProcessing", "sep": ["the", 24], "cls": ["a", 2]}
    template = {"type": "TemplateProcessing", "special_tokens": {"x/y": {"id": "x/y", "ids": [0, 99], "tokens": []}}}
    rows: list[tuple[str, str, Callable[[bytes], bytes], str | None, str | None]] = [
        ("whole", "a token of the last id", vocab(last=23), None, None),
        ("unigram", "a list of as many pieces as the model has ids", unigram(24), None, None),
        ("added-again", "an added token that the vocabulary has", added({"id": 3, "content": "cat"}), None, None),
        ("truncated", "truncated JSON", lambda data: data[:-2], "json.syntax", None),
        ("utf16", "UTF-16", lambda data: data.decode("ascii").encode("utf-16"), "json.encoding", None),
        ("duplicate-token", "a token twice", lambda d: d.replace(b'"cat":', b'"dog":'), "json.duplicate-key", None),
        ("nested", "100,000-fold nesting", lambda data: b"[" * 100_000, "json.depth", None),
        ("array", "an array", lambda data: b"[]", "text.tokenizer", "/model"),
        (
            "type",
            "a model of an unknown type",
            edited(lambda v: v["model"].update(type="X")),
            "text.tokenizer",
            "/model/type",
        ),
        (
            "id-deep",
            "an id out of range in a sequence of sequences",
            set_("post_processor", {"type": "Sequence", "processors": [{"type": "Sequence", "processors": [bert]}]}),
            "text.tokenizer",
            "/post_processor/processors/0/processors/0/sep/1",
        ),
        (
            "inserted-many",
            "2,000 ids beside every text",
            set_(
                "post_processor",
                {"type": "TemplateProcessing", "special_tokens": {"x": {"id": "x", "ids": [1] * 2000, "tokens": []}}},
            ),
            "text.tokenizer",
            "/post_processor/special_tokens/x/ids/1024",
        ),
        (
            "growth",
            "replacements that make gigabytes of a word",
            set_(
                "normalizer",
                {
                    "type": "Sequence",
                    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 6,
                },
            ),
            "text.tokenizer",
            "/normalizer/normalizers/1/content",
        ),
        ("id-beyond", "a token id out of range", vocab(new=24), "text.tokenizer", "/model/vocab/new"),
        ("id-2-32", "a token id of 2^32", vocab(new=2**32), "text.tokenizer", "/model/vocab/new"),
        ("id-negative", "a negative token id", vocab(new=-1), "text.tokenizer", "/model/vocab/new"),
        ("id-float", "1.0 as a token id", vocab(the=1.0), "text.tokenizer", "/model/vocab/the"),
        ("id-true", "true as a token id", vocab(the=True), "text.tokenizer", "/model/vocab/the"),
        ("id-twice", "two tokens of one id", vocab(new=3), "text.tokenizer", "/model/vocab/new"),
        ("pointer", "a pointer is escaped", vocab(**{"a/~b": 99}), "text.tokenizer", "/model/vocab/a~1~0b"),
        (
            "larger",
            "more tokens than the embedding has rows",
            vocab(**{f"n{i}": i for i in range(11, 40)}),
            "text.tokenizer",
            "/model/vocab/n24",
        ),
        ("unigram-larger", "more pieces than the embedding has rows", unigram(25), "text.tokenizer", "/model/vocab/24"),
        ("added-beyond", "an added token beyond the embedding", added({"id": 24, "content": "new"}), None, None),
        (
            "added-2-32",
            "an added token of id 2^32",
            added({"id": 2**32, "content": "new"}),
            "text.tokenizer",
            "/added_tokens/1/id",
        ),
        ("no-type", "a file of before tokenizers 0.9", edited(lambda v: v["model"].pop("type")), None, None),
        (
            "no-type-larger",
            "more pieces than the embedding has rows, without a type",
            edited(lambda v: v.update(model={"unk_id": 0, "vocab": [[f"p{i}", -1.5] for i in range(25)]})),
            "text.tokenizer",
            "/model/vocab/24",
        ),
        (
            "added-twice",
            "an added token of another's id",
            added({"id": 3, "content": "new"}),
            "text.tokenizer",
            "/added_tokens/1/id",
        ),
        (
            "added-other",
            "an added token of another id than in the vocabulary",
            added({"id": 12, "content": "cat"}),
            "text.tokenizer",
            "/added_tokens/1/id",
        ),
        (
            "added-no-id",
            "an added token without an id",
            added({"content": "new"}),
            "text.tokenizer",
            "/added_tokens/1/id",
        ),
        (
            "added-null",
            "null for an added token",
            edited(lambda v: v["added_tokens"].append(None)),
            "text.tokenizer",
            "/added_tokens/1",
        ),
        (
            "bert",
            "an id beside every text, out of range",
            set_("post_processor", bert),
            "text.tokenizer",
            "/post_processor/sep/1",
        ),
        (
            "template",
            "the same in a template of a sequence",
            set_("post_processor", {"type": "Sequence", "processors": [template]}),
            "text.tokenizer",
            "/post_processor/processors/0/special_tokens/x~1y/ids/1",
        ),
        ("padding", "a padding id, which no text gets", set_("padding", {"pad_id": 24}), None, None),
    ]
    for name, about, edit, code, pointer in rows:

        def make(root: Path, edit: Callable[[bytes], bytes] = edit) -> None:
            draft = Draft()
            draft.files[TOKENIZER] = edit(draft.files[TOKENIZER])
            draft.seal().write(root)

        yield Case(
            name=f"tokenizer/{name}",
            about=about,
            steps=("verify",),
            make=make,
            code=code,
            file=TOKENIZER if code else None,
            pointer=pointer,
            points=code == "text.tokenizer",
            limited=name == "nested",
        )
