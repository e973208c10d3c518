"""The records of ``text.json``: how text is used with the model. The parser is ``spec/v1/bundle.md`` in code."""

from __future__ import annotations

import re
from typing import Final

from splitbundle.errors import quoted
from splitbundle.format import strict_json
from splitbundle.format.fields import Field, Problems
from splitbundle.records import as_dict, record

FILE: Final = "text.json"
VERSION: Final = 1
"""The newest ``version`` of the document that this reader knows."""
MAX_BYTES: Final = 2**24
MAX_TEMPLATE: Final = 2**20
"""The largest number of characters of a chat template."""
MAX_TEMPLATES: Final = 16
MAX_TEXT: Final = 4096
"""The largest number of characters of a golden text, of a message of a golden chat, and of a variable."""
MAX_CASES: Final = 256
MAX_CHATS: Final = 64
MAX_MESSAGES: Final = 64
DEFAULT: Final = "default"
"""The name of the template that is used unless another is asked for."""
_VARIABLE: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_ROLE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FIELDS: Final = ["version", "variables", "templates", "defaults", "cases", "chats"]


@record(frozen=True, slots=True, kw_only=True)
class Defaults:
    """How the source's makers generate. None where the source says nothing."""

    sample: bool | None = None
    """Whether tokens are drawn. Otherwise the likeliest one is taken."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None


@record(frozen=True, slots=True, kw_only=True)
class GoldenText:
    """A text and its ids, from the source's own tokenizer."""

    text: str
    ids: tuple[int, ...]
    """The ids if a spelled control token is text like any other."""
    control_ids: tuple[int, ...]
    """The ids if a spelled control token is that token."""
    decoded: str
    """The text of ``control_ids`` without control tokens."""


@record(frozen=True, slots=True, kw_only=True)
class GoldenChat:
    """A chat and its ids, from the source's own tokenizer and the template ``default``."""

    messages: tuple[tuple[str, str], ...]
    """The role and the content of each message."""
    add_generation_prompt: bool
    ids: tuple[int, ...]


@record(frozen=True, slots=True, kw_only=True)
class TextDocument:
    """What ``text.json`` says."""

    variables: dict[str, str]
    """The variables that each chat template has, such as ``bos_token``."""
    templates: dict[str, str]
    """The name of each chat template -> its text."""
    defaults: Defaults
    cases: tuple[GoldenText, ...]
    chats: tuple[GoldenChat, ...]

    def to_bytes(self) -> bytes:
        """Return the document in canonical JSON."""
        return strict_json.dump(
            {
                "version": VERSION,
                "variables": dict(sorted(self.variables.items())),
                "templates": [{"name": name, "template": text} for name, text in self.templates.items()],
                "defaults": as_dict(self.defaults),
                "cases": [as_dict(case) for case in self.cases],
                "chats": [
                    {
                        "messages": [{"role": role, "content": content} for role, content in chat.messages],
                        "add_generation_prompt": chat.add_generation_prompt,
                        "ids": list(chat.ids),
                    }
                    for chat in self.chats
                ],
            }
        )


def parse_text(data: bytes, vocab_size: int) -> TextDocument:
    """Read ``text.json``.

    Args:
        data: the bytes of the file.
        vocab_size: the number of token ids that the model has.

    Raises:
        BundleError: ``json.*``, ``field.*``, ``text.version``: every problem of the file.
    """
    problems = Problems(FILE)
    document = Field(strict_json.parse(data, FILE, max_bytes=MAX_BYTES), problems)
    version = document.value.get("version") if isinstance(document.value, dict) else None
    if type(version) is int and version > VERSION:
        problems.add(
            "text.version", "/version", f"at most {VERSION}", quoted(version), "A newer splitbundle reads this bundle"
        )
        problems.raise_if_any()
    members = document.members(_FIELDS)
    members["version"].integer(1, VERSION)
    variables = {}
    for name, field in members["variables"].mapping():
        if not _VARIABLE.fullmatch(name):
            field.problems.add("field.value", field.pointer, f"a name like {_VARIABLE.pattern}", quoted(name))
        variables[name] = field.string(maximum=MAX_TEXT)
    made = TextDocument(
        variables=variables,
        templates=_templates(members["templates"]),
        defaults=_defaults(members["defaults"]),
        cases=tuple(_case(item, vocab_size) for item in members["cases"].items(maximum=MAX_CASES)),
        chats=tuple(_chat(item, vocab_size) for item in members["chats"].items(maximum=MAX_CHATS)),
    )
    problems.raise_if_any()
    return made


def _templates(field: Field) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in field.items(maximum=MAX_TEMPLATES):
        members = item.members(["name", "template"])
        name = members["name"].string(_NAME, f"a name like {_NAME.pattern}")
        if name in found:
            members["name"].refuse("a name that no other template has")
        found[name] = members["template"].string(maximum=MAX_TEMPLATE)
    return found


def _defaults(field: Field) -> Defaults:
    members = field.members(list(Defaults.__slots__))
    sample = members["sample"]
    return Defaults(
        sample=None if sample.is_null else sample.boolean(),
        temperature=_optional(members["temperature"], zero=True),
        top_k=members["top_k"].optional_integer(1),
        top_p=_optional(members["top_p"], most=1),
        min_p=_optional(members["min_p"], most=1, zero=True),
        typical_p=_optional(members["typical_p"], most=1),
        repetition_penalty=_optional(members["repetition_penalty"]),
    )


def _optional(field: Field, *, most: float | None = None, zero: bool = False) -> float | None:
    if zero and type(field.value) in (int, float) and field.value == 0:
        return 0.0
    number = field.optional_positive_number()
    if most is not None and number is not None and number > most:
        field.refuse(f"a number up to {most}")
    return number


def _case(field: Field, vocab_size: int) -> GoldenText:
    members = field.members(["text", "ids", "control_ids", "decoded"])
    return GoldenText(
        text=members["text"].string(maximum=MAX_TEXT),
        ids=_ids(members["ids"], vocab_size),
        control_ids=_ids(members["control_ids"], vocab_size),
        decoded=members["decoded"].string(maximum=2 * MAX_TEXT),
    )


def _chat(field: Field, vocab_size: int) -> GoldenChat:
    members = field.members(["messages", "add_generation_prompt", "ids"])
    messages = []
    for item in members["messages"].items(minimum=1, maximum=MAX_MESSAGES):
        one = item.members(["role", "content"])
        messages.append(
            (one["role"].string(_ROLE, f"a name like {_ROLE.pattern}"), one["content"].string(maximum=MAX_TEXT))
        )
    return GoldenChat(
        messages=tuple(messages),
        add_generation_prompt=members["add_generation_prompt"].boolean(),
        ids=_ids(members["ids"], vocab_size),
    )


def _ids(field: Field, vocab_size: int) -> tuple[int, ...]:
    return tuple(item.integer(0, vocab_size - 1) for item in field.items())
