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
from splitbundle.wire import frames, headers
from splitbundle.wire.messages import ANSWERS, KINDS, Limits, Run
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


# The ranges of numbers.


def ranges() -> dict[str, tuple[float, float]]:
    """Return the name of a field, or "open.rows" -> the range that the document gives it."""
    rule = TEXT.partition("**[SB-X-033]**")[2]
    body = rule.partition("| field | from | to |\n|---|---|---|\n")[2].partition("\n\n")[0]
    found: dict[str, tuple[float, float]] = {}
    for row in body.splitlines():
        fields, least, most = (cell.strip() for cell in row.strip("|").split("|"))
        low, high = (_number(cell.removeprefix("above ")) for cell in (least, most))
        names = re.findall(r"`([a-z_]+)`", fields.partition(" in `")[0])
        if "`limits`" in fields:
            names = [*names[:-1], *(f"limits.{name}" for name in types(Limits) if name != "lease")]
        found |= {f"open.{name}" if fields.endswith("in `open`") else name: (low, high) for name in names}
    return found


def _number(text: str) -> float:
    power = re.fullmatch(r"(\d+)\^(−?\d+)( − 1)?", text)
    if power is None:
        return float(text.replace(",", ""))
    return float(f"1e{power[2].replace('−', '-')}") if power[1] == "10" else 2 ** int(power[2]) - bool(power[3])


def numbers() -> list[tuple[str, str, dict[str, Any]]]:
    """Return each kind, its fields with numbers, and the schema of the number."""
    found = []
    for op in KINDS:
        for name, own in SCHEMA["$defs"][op]["properties"].items():
            for each in own.get("anyOf", [own]):
                inner = SCHEMA["$defs"][each["$ref"].rpartition("/")[2]] if "$ref" in each else each
                if name == "limits":
                    found += [(op, f"limits.{key}", value) for key, value in inner["properties"].items()]
                elif (inner := inner.get("items", inner)).get("type") in ("integer", "number"):
                    found.append((op, name, inner))
    return found


@pytest.mark.rule("SB-X-033")
def test_the_document_and_the_schema_give_each_number_the_same_range() -> None:
    said, used = ranges(), set()
    for op, name, own in numbers():
        key = next(key for key in (f"{op}.{name}", name, name.partition(".")[2]) if key in said)
        used.add(key)
        assert said[key] == (own.get("minimum", own.get("exclusiveMinimum")), own["maximum"]), (op, name)
    assert used == said.keys()


@pytest.mark.rule("SB-X-033")
@pytest.mark.parametrize(("op", "name", "own"), numbers(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_parser_takes_the_range_of_the_schema(op: str, name: str, own: dict[str, Any]) -> None:
    least, most = own.get("minimum", own.get("exclusiveMinimum")), own["maximum"]
    if own["type"] == "integer":
        values = [(least - 1, False), (least, True), (most, True), (most + 1, False)]
    else:
        values = [(least, "minimum" in own), (most, True), (most * 1.0001, False), (-1.0, False)]
    for value, fits in values:
        header = longest(op)
        if name in ("past", "count", "rows", "order", "layers") and op != "open":
            header[name] = [value] * len(header[name] or (1, 2))
        elif name.startswith("limits."):
            header["limits"] = header["limits"] | {name.partition(".")[2]: value}
        else:
            header[name] = value
        header |= {"sequence": 2**31 - 1} if name == "count" else {}
        header |= {"width": 1} if name in ("count", "sequence") else {}
        try:
            headers.parse(json.dumps(header).encode())
            taken = True
        except BundleError as error:
            beyond = {problem.pointer for problem in error.problems} & {"/sequence", "/count"}
            taken = bool(beyond) and fits  # the fields must fit each other, too (SB-X-009)
        if not (op == "hello" and name == "protocol"):
            assert taken == fits, (value, fits)
            assert VALIDATOR.is_valid(header) == fits, (value, fits)


@pytest.mark.rule("SB-X-002", "SB-X-033")
def test_the_longest_header_fits() -> None:
    most, rows = 2**31 - 1, tuple(range(4096))
    run = Run(
        session="f" * 32,
        number=2**53 - 1,
        past=(most,) * 4096,
        count=(most,) * 4096,
        sequence=most,
        width=2**20,
        encoding="bfloat16",
        rows=rows,
        order=rows,
        capacity=most,
    )
    size = len(headers.dump(run))
    assert f"takes\n{size:,} bytes" in TEXT
    assert size + frames.ALIGNMENT <= headers.MAX_BYTES


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
