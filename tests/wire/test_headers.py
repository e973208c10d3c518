"""The tables of wire.md, the schema, the records and the parser have the same fields."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import jsonschema
import pytest

import splitbundle_schemas
from splitbundle.errors import BundleError
from splitbundle.records import types
from splitbundle.wire import headers
from splitbundle.wire.messages import ANSWERS, KINDS, Limits
from tests.support.paths import ROOT, TESTS

TEXT = (ROOT / "spec" / "v1" / "wire.md").read_text("utf-8")
SCHEMA = splitbundle_schemas.load("wire-header")
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
ACCEPTED = [json.loads(path.read_text("utf-8")) for path in sorted((TESTS / "conformance/wire/accept").glob("*.json"))]


def table(kind: str, name: str) -> dict[str, str]:
    """Return the fields of a table, in order, with their types."""
    body = re.search(rf"^### {kind}: {name}$(.*?)(?=^#|\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert body is not None, name
    rows = body[1].partition("| field | type | meaning |\n|---|---|---|\n")[2].partition("\n\n")[0]
    return dict(re.findall(r"^\| `([a-z_]+)` \| ([^|]*) \|", rows, flags=re.MULTILINE))


def optional(fields: dict[str, str]) -> set[str]:
    return {name for name, kind in fields.items() if kind.endswith("or absent")}


def longest(op: str) -> dict[str, Any]:
    """Return the accepted header of a kind with the most members."""
    found = [vector["expect"]["header"] for vector in ACCEPTED if vector["expect"]["header"]["op"] == op]
    return copy.deepcopy(max(found, key=len))


def test_the_document_has_a_table_of_every_message() -> None:
    assert set(re.findall(r"^### Message: (.*)$", TEXT, flags=re.MULTILINE)) == KINDS.keys()
    assert re.findall(r"^### Object: (.*)$", TEXT, flags=re.MULTILINE) == ["limits"]
    asked = re.findall(r"^\| `([a-z]+)` \| `([a-z]+)` \| [a-z]", TEXT, flags=re.MULTILINE)
    assert asked == [(request.op, answer.op) for request, answer in ANSWERS.items()]


@pytest.mark.rule("SB-X-004")
@pytest.mark.parametrize("op", KINDS)
def test_the_document_the_schema_the_record_and_the_parser_agree(op: str) -> None:
    fields, kind, own = table("Message", op), KINDS[op], SCHEMA["$defs"][op]
    assert fields["op"] == "string"
    absent = optional(fields)
    assert list(fields) == ["op", *types(kind)]
    assert absent == {name for name in fields if name in kind.may_be_absent}  # type: ignore[union-attr]
    assert list(own["properties"]) == list(fields)
    assert own["properties"]["op"] == {"const": op}
    assert set(own["required"]) == fields.keys() - absent
    assert own["additionalProperties"] is False
    # The parser misses exactly the members that the table doesn't let be absent.
    header = {"op": op, "protocol": 1} if op == "hello" else {"op": op}
    missing: set[str] = set()
    if fields.keys() - absent - header.keys():
        with pytest.raises(BundleError) as raised:
            headers.parse(json.dumps(header).encode())
        missing = {problem.expected.split("'")[1] for problem in raised.value.problems}
    assert missing == fields.keys() - absent - header.keys()
    assert longest(op).keys() == fields.keys()
    assert list(longest(op)) == list(fields)


def test_a_field_is_the_same_in_every_message() -> None:
    """Except for those that the parser reads in a way of their own."""
    found: dict[str, Any] = {}
    for op, kind in KINDS.items():
        for name in types(kind):
            if (op, name) not in {*headers._OWN_READERS, ("welcome", "protocol")}:
                own = SCHEMA["$defs"][op]["properties"][name]
                assert found.setdefault(name, own) == own, (op, name)


def test_the_limits_agree() -> None:
    fields, own = table("Object", "limits"), SCHEMA["$defs"]["limits"]
    assert list(fields) == list(types(Limits)) == list(own["properties"]) == own["required"]
    assert own["additionalProperties"] is False


TYPES = {
    "string": str,
    "string or null": (str, type(None)),
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "object": dict,
    "array of integers": list,
    "array of strings": list,
    "array of two integers": list,
    "array of two integers, or null": (list, type(None)),
}
OTHERS: list[Any] = [None, True, 7, -1, 0.5, "x", [], [7], ["x"], [True], {}, {"x": 1}]


@pytest.mark.rule("SB-X-004")
@pytest.mark.parametrize("op", KINDS)
def test_a_member_has_the_type_of_its_table(op: str) -> None:
    """A value of any other type is refused by the parser and by the schema alike."""
    for name, kind in table("Message", op).items():
        allowed = TYPES[kind.removesuffix(", or absent")]
        for value in OTHERS:
            header = longest(op) | {name: value}
            fits = isinstance(value, allowed) and not (isinstance(value, bool) and allowed is not bool)  # type: ignore[arg-type]
            try:
                headers.parse(json.dumps(header).encode())
                taken = True
            except BundleError:
                taken = False
            assert not (taken and not fits), (name, value)
            if VALIDATOR.is_valid(header) != taken:  # a schema can't compare two members
                assert name in ("past", "count", "rows", "sequence"), (name, value)
                assert not taken
