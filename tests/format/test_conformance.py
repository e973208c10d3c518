"""The conformance vectors: documents that a reader accepts, documents that it refuses, and the codes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

import splitbundle_schemas
from conformance.documents import base, document
from splitbundle.errors import BundleError, Problem
from splitbundle.format import strict_json
from splitbundle.format.architecture.parser import parse_architecture
from splitbundle.format.manifest import rules
from splitbundle.format.manifest.parser import parse_manifest
from tests.support.paths import TESTS
from tests.support.yardsticks import at_most, parsing

HERE = TESTS / "conformance"
BASES = ("gpt2", "llama3", "experts")
KINDS = ("manifest", "architecture")
VALIDATORS = {kind: jsonschema.Draft202012Validator(splitbundle_schemas.load(kind)) for kind in KINDS}


def vectors(verdict: str) -> list[Any]:
    found = sorted((HERE / verdict).glob("*.json"))
    return [pytest.param(json.loads(path.read_text("utf-8")), id=path.stem) for path in found]


def problems(vector: dict[str, Any], data: bytes) -> list[Problem]:
    """Judge a document beside the other document of its base."""
    try:
        if vector["document"] == "architecture":
            parse_architecture(data)
        else:
            parsed = parse_manifest(data)
            rules.check_against(parsed, parse_architecture(base(vector["base"], "architecture")))
    except BundleError as error:
        return list(error.problems)
    return []


def pointers(errors: Any) -> Iterator[str]:
    """Return the places of a schema's errors."""
    for error in errors:
        yield "".join(f"/{str(token).replace('~', '~0').replace('/', '~1')}" for token in error.absolute_path)
        yield from pointers(error.context or ())


@pytest.mark.parametrize("vector", vectors("reject"))
def test_a_reader_refuses(vector: dict[str, Any]) -> None:
    data = document(vector)
    found = problems(vector, data)
    assert found, f"taken, though {vector['about']}"
    assert (found[0].code, found[0].pointer) == (vector["expect"]["code"], vector["expect"]["pointer"])
    assert found[0].file == f"{vector['document']}.json"
    assert found[0].expected
    assert found[0].got
    validator = VALIDATORS[vector["document"]]
    if vector["schema"] == "reject":
        at = vector["expect"]["pointer"]
        if vector["expect"]["code"] == "field.unknown":
            at = at.rpartition("/")[0]
        assert vector.get("schema_pointer", at) in set(pointers(validator.iter_errors(json.loads(data))))
    else:
        assert vector["schema"] == "silent"
        if found[0].code.partition(".")[0] != "json":
            assert validator.is_valid(json.loads(data))


@pytest.mark.parametrize("vector", vectors("accept"))
def test_a_reader_takes(vector: dict[str, Any]) -> None:
    data = document(vector)
    assert problems(vector, data) == []
    assert vector["schema"] == "accept"
    VALIDATORS[vector["document"]].validate(json.loads(data))


@pytest.mark.parametrize("verdict", ["accept", "reject"])
def test_vectors_have_the_members_that_their_readme_names(verdict: str) -> None:
    text = (HERE / "README.md").read_text("utf-8")
    known = {row.split("`")[1] for row in text.splitlines() if row.startswith("| `")}
    for param in vectors(verdict):
        vector = param.values[0]
        assert {"about", "rules", "document", "base", "schema"} <= vector.keys() <= known, param.id
        assert len({"patch", "text", "hex"} & vector.keys()) == 1, param.id
        assert ("expect" in vector) == (verdict == "reject"), param.id
        assert vector["rules"], param.id
        assert vector["document"] in KINDS, param.id
        assert vector["base"] in BASES, param.id
        assert param.id.startswith(f"{vector['document']}-")


@pytest.mark.rule("SB-J-009", "SB-V-010")
@pytest.mark.parametrize("name", BASES)
def test_bases_are_taken_and_are_in_canonical_form(name: str) -> None:
    data = {kind: base(name, kind) for kind in KINDS}
    manifest, architecture = parse_manifest(data["manifest"]), parse_architecture(data["architecture"])
    rules.check_against(manifest, architecture)
    for kind, validator in VALIDATORS.items():
        validator.validate(json.loads(data[kind]))
    assert manifest.to_bytes() == data["manifest"]
    assert architecture.to_bytes() == data["architecture"]
    assert json.loads(data["manifest"])["format_version"] == "1.0"
    listed = manifest.files["architecture.json"]
    assert (listed.size, listed.sha256) == (
        len(data["architecture"]),
        hashlib.sha256(data["architecture"]).hexdigest(),
    )


@pytest.mark.rule("SB-J-009")
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1.0"),
        (0.1, "0.1"),
        (1e-05, "1e-05"),
        (0.0001, "0.0001"),
        (1e16, "1e+16"),
        (123456789012345.0, "123456789012345.0"),
        (1 / 3, "0.3333333333333333"),
        ([], "[]"),
        ({}, "{}"),
        ([1, {"a": None}], '[\n  1,\n  {\n    "a": null\n  }\n]'),
        ('é\x7f\n\x01"\\/', '"\\u00e9\\u007f\\n\\u0001\\"\\\\/"'),
        ("\U0001f4dc", '"\\ud83d\\udcdc"'),
    ],
)
def test_canonical_json(value: object, text: str) -> None:
    assert strict_json.dump(value).decode("ascii") == text + "\n"


@pytest.mark.parametrize("kind", KINDS)
def test_schemas_are_schemas_and_ask_nobody(kind: str) -> None:
    schema = splitbundle_schemas.load(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:splitbundle:v1:{kind}"
    references = set(every(schema, "$ref"))
    assert references
    assert all(reference.startswith("#/$defs/") for reference in references)
    assert {reference.removeprefix("#/$defs/") for reference in references} == schema["$defs"].keys()


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_mean_the_same_in_python_and_ecmascript(kind: str) -> None:
    patterns = {*every(splitbundle_schemas.load(kind), "pattern")}
    assert patterns
    for pattern in patterns:
        # "$" alone would take a trailing line feed in Python; \Z and \z aren't ECMAScript, nor are inline flags.
        assert pattern.startswith("^")
        assert pattern.endswith(r"(?![\s\S])")
        assert not {r"\Z", r"\A", r"\z", "(?i", "(?P", "$", r"\d", r"\w"} & {
            pattern[i : i + n] for i in range(len(pattern)) for n in (1, 2, 3)
        }


def every(schema: Any, key: str) -> Iterator[Any]:
    """Yield the values of a keyword, anywhere in a schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get(key), str):
            yield schema[key]
        for value in schema.values():
            yield from every(value, key)
    elif isinstance(schema, list):
        for value in schema:
            yield from every(value, key)


def _layers(count: int) -> bytes:
    value = json.loads(base("gpt2", "architecture"))
    return json.dumps(value | {"layers": ["full"] * count}).encode("ascii")


@pytest.mark.rule("SB-A-006", "SB-M-040")
def test_the_deepest_model_and_a_unit_number_of_four_digits() -> None:
    deepest = parse_architecture(_layers(10_000))
    assert deepest.units()[1:3] == ("layer-0000", "layer-0001")
    assert parse_architecture(_layers(1001)).units()[1000:] == ("layer-0999", "layer-1000", "head")
    assert parse_architecture(_layers(1000)).units()[1000:] == ("layer-999", "head")
    # It takes about as long as parsing the largest document that a bundle may have; the square of the layers would take
    # a hundred times that.
    with at_most(12, parsing, strict_json.MAX_BYTES), pytest.raises(BundleError, match="missing a list of"):
        rules.check_against(parse_manifest(base("gpt2", "manifest")), deepest)


@pytest.mark.rule("SB-E-002")
def test_all_problems_of_a_group_are_reported_with_what_was_expected() -> None:
    value = json.loads(base("gpt2", "manifest"))
    value["files"]["README.md"]["size"] = -1
    value["shards"][0]["name"] = "Bottom"
    value["news"] = 1
    found = problems({"document": "manifest", "base": "gpt2"}, json.dumps(value).encode("ascii"))
    assert sorted((p.code, p.pointer) for p in found) == [
        ("field.unknown", "/news"),
        ("field.value", "/files/README.md/size"),
        ("field.value", "/shards/0/name"),
    ]
    size = next(p for p in found if p.pointer == "/files/README.md/size")
    assert str(size) == (
        "[field.value] manifest.json /files/README.md/size: expected an integer from 0 to 9007199254740991, got -1"
    )
