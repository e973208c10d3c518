"""Text documents with one fault each: the manifest lists them as they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conformance.case import Case, Draft, dump

TEXT = "text.json"
DOCUMENT: dict[str, Any] = {
    "version": 1,
    "variables": {"eos_token": "<|end|>"},
    "templates": [
        {"name": "default", "template": "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"},
        {"name": "tool_use", "template": ""},
    ],
    "defaults": {
        "sample": True,
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0,
        "typical_p": None,
        "repetition_penalty": 1.1,
    },
    "cases": [{"text": "the cat", "ids": [1, 3], "control_ids": [1, 3], "decoded": "the cat"}],
    "chats": [{"messages": [{"role": "user", "content": "a dog"}], "add_generation_prompt": False, "ids": [2, 4, 0]}],
}
"""The text document of the small bundle, whose model has 24 token ids."""


_MESSAGE = "/chats/0/messages/0"
_ROLE = f"{_MESSAGE}/role"


def text_cases() -> Iterator[Case]:
    """Cases that the rules SB-T-010 to SB-T-015 refuse and accept."""

    def put(pointer: str, value: object) -> Callable[[dict[str, Any]], object]:
        *tokens, last = pointer.split("/")[1:]

        def change(document: Any) -> None:
            for token in tokens:
                document = document[int(token)] if isinstance(document, list) else document[token]
            if isinstance(document, list):
                document[int(last)] = value
            else:
                document[last] = value

        return change

    def drop(name: str) -> Callable[[dict[str, Any]], object]:
        return lambda document: document.pop(name)

    value, kind = "field.value", "field.type"
    rows: list[tuple[str, str, Callable[[dict[str, Any]], object], str | None, str | None]] = [
        ("whole", "all fields", lambda document: None, None, None),
        (
            "empty",
            "nothing but empty fields",
            lambda d: d.update(variables={}, templates=[], cases=[], chats=[]),
            None,
            None,
        ),
        ("nulls", "no defaults", lambda d: d["defaults"].update(dict.fromkeys(d["defaults"])), None, None),
        ("greedy", "a temperature of 0", put("/defaults/temperature", 0), None, None),
        ("version", "a later version", put("/version", 2), "text.version", "/version"),
        ("version-0", "version 0", put("/version", 0), value, "/version"),
        ("version-text", "a version that is text", put("/version", "1"), kind, "/version"),
        ("missing", "no variables", drop("variables"), "field.missing", ""),
        ("unknown", "an unknown field", put("/more", 1), "field.unknown", "/more"),
        ("variable-name", "a variable with a capital", put("/variables/Eos", "x"), value, "/variables/Eos"),
        ("variable-type", "a variable that is a number", put("/variables/eos_token", 1), kind, "/variables/eos_token"),
        ("variable-long", "a long variable", put("/variables/eos_token", "x" * 4097), value, "/variables/eos_token"),
        (
            "template-name",
            "a template's name with a slash",
            put("/templates/1/name", "a/b"),
            value,
            "/templates/1/name",
        ),
        (
            "template-twice",
            "two templates of one name",
            put("/templates/1/name", "default"),
            value,
            "/templates/1/name",
        ),
        (
            "template-long",
            "a long template",
            put("/templates/1/template", " " * (2**20 + 1)),
            value,
            "/templates/1/template",
        ),
        (
            "templates-many",
            "17 templates",
            lambda d: d.update(templates=[{"name": f"t{i}", "template": ""} for i in range(17)]),
            value,
            "/templates",
        ),
        ("top-p", "a probability above 1", put("/defaults/top_p", 1.5), value, "/defaults/top_p"),
        ("top-p-zero", "a probability of 0", put("/defaults/top_p", 0), value, "/defaults/top_p"),
        ("top-k-zero", "among none", put("/defaults/top_k", 0), value, "/defaults/top_k"),
        ("min-p-tiny", "a share below 1e-37", put("/defaults/min_p", 1e-38), value, "/defaults/min_p"),
        (
            "temperature-tiny",
            "a temperature below 1e-37",
            put("/defaults/temperature", 1e-38),
            value,
            "/defaults/temperature",
        ),
        ("min-p", "a share above 1", put("/defaults/min_p", 2), value, "/defaults/min_p"),
        ("penalty", "a penalty of 0", put("/defaults/repetition_penalty", 0), value, "/defaults/repetition_penalty"),
        ("temperature", "a negative temperature", put("/defaults/temperature", -1), value, "/defaults/temperature"),
        ("sample", "1 for true", put("/defaults/sample", 1), kind, "/defaults/sample"),
        ("id-beyond", "an id that the model lacks", put("/cases/0/ids/1", 24), value, "/cases/0/ids/1"),
        ("control-id", "a negative id", put("/cases/0/control_ids/0", -1), value, "/cases/0/control_ids/0"),
        ("chat-id", "an id of a chat that the model lacks", put("/chats/0/ids/2", 24), value, "/chats/0/ids/2"),
        ("chat-empty", "a chat without messages", put("/chats/0/messages", []), value, "/chats/0/messages"),
        ("chats-many", "65 chats", lambda d: d.update(chats=d["chats"] * 65), value, "/chats"),
        ("cases-many", "257 golden texts", lambda d: d.update(cases=d["cases"] * 257), value, "/cases"),
        ("decoded-long", "8,193 characters", put("/cases/0/decoded", "x" * 8193), value, "/cases/0/decoded"),
        ("text-long", "4,097 characters", put("/cases/0/text", "x" * 4097), value, "/cases/0/text"),
        ("role-long", "a role of 65 characters", put("/chats/0/messages/0/role", "r" * 65), value, _ROLE),
        (
            "message-more",
            "a member more in a message",
            put("/chats/0/messages/0/name", "x"),
            "field.unknown",
            _MESSAGE + "/name",
        ),
        ("role", "a role with a space", put("/chats/0/messages/0/role", "a b"), value, "/chats/0/messages/0/role"),
    ]
    for name, about, edit, code, pointer in rows:

        def make(root: Path, edit: Callable[[dict[str, Any]], object] = edit) -> None:
            document = copy.deepcopy(DOCUMENT)
            edit(document)
            _write(root, dump(document))

        yield _case(name, about, make, code, pointer)
    yield _case("nested", "100,000-fold nesting", lambda root: _write(root, b"[" * 100_000), "json.depth", None)
    yield _case(
        "utf16", "UTF-16", lambda root: _write(root, json.dumps(DOCUMENT).encode("utf-16")), "json.encoding", None
    )


def _write(root: Path, data: bytes) -> None:
    draft = Draft()
    draft.files[TEXT] = data
    draft.manifest["model"]["text_file"] = TEXT
    draft.seal().write(root)


def _case(name: str, about: str, make: Callable[[Path], None], code: str | None, pointer: str | None) -> Case:
    return Case(
        name=f"text/{name}",
        about=about,
        rules=_rules(code, pointer),
        steps=("verify",),
        make=make,
        code=code,
        file=TEXT if code else None,
        pointer=pointer,
        points=code is not None and not code.startswith("json."),
        limited=name == "nested",
    )


def _rules(code: str | None, pointer: str | None) -> tuple[str, ...]:
    """Return the rules that a case holds, by the place of the fault."""
    places = {"variables": "011", "templates": "012", "defaults": "013", "cases": "014", "chats": "015"}
    at = (pointer or "").strip("/").split("/")[0]
    return (f"SB-T-{places[at]}",) if at in places else ("SB-T-010", "SB-M-063")
