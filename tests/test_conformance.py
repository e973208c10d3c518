"""The conformance vectors, and whole directories: what a reader takes, what it refuses, and what it calls it."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import splitbundle
import splitbundle_schemas
from splitbundle import architecture_parser, manifest_parser, manifest_rules, strict_json, weights
from splitbundle.errors import BundleError, Problem
from splitbundle_converter.publish import publishing

HERE = Path(__file__).parent / "conformance"
BASES = ("gpt2", "llama3")
KINDS = ("manifest", "architecture")
VALIDATORS = {kind: jsonschema.Draft202012Validator(splitbundle_schemas.load(kind)) for kind in KINDS}


def base(name: str, kind: str) -> bytes:
    return (HERE / "bases" / f"{name}.{kind}.json").read_bytes()


def vectors(verdict: str) -> list[Any]:
    found = sorted((HERE / verdict).glob("*.json"))
    return [pytest.param(json.loads(path.read_text("utf-8")), id=path.stem) for path in found]


def document(vector: dict[str, Any]) -> bytes:
    """The bytes that a vector stands for."""
    if "hex" in vector:
        return bytes.fromhex(vector["hex"])
    if "text" in vector:
        return str(vector["text"]).encode("utf-8")
    value = json.loads(base(vector["base"], vector["document"]))
    for operation in vector["patch"]:
        patch(value, operation)
    return json.dumps(value).encode("utf-8")


def patch(value: Any, operation: dict[str, Any]) -> None:
    """One operation of RFC 6902, which never means the whole document here."""
    tokens = [token.replace("~1", "/").replace("~0", "~") for token in operation["path"].split("/")[1:]]
    for token in tokens[:-1]:
        value = value[int(token)] if isinstance(value, list) else value[token]
    key: Any = tokens[-1]
    if isinstance(value, list):
        key = len(value) if key == "-" else int(key)
    op = operation["op"]
    if op != "add":
        value[key]  # what is replaced or removed must be there
    if op == "remove":
        del value[key]
    elif op == "add" and isinstance(value, list):
        value.insert(key, copy.deepcopy(operation["value"]))
    else:
        value[key] = copy.deepcopy(operation["value"])


def problems(vector: dict[str, Any], data: bytes) -> list[Problem]:
    """What the reader says of a document, beside the other one of its base."""
    try:
        if vector["document"] == "architecture":
            architecture_parser.parse(data)
        else:
            parsed = manifest_parser.parse(data)
            manifest_rules.check_against(parsed, architecture_parser.parse(base(vector["base"], "architecture")))
    except BundleError as error:
        return list(error.problems)
    return []


def pointers(errors: Any) -> Iterator[str]:
    """Where a schema found something."""
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
    manifest, architecture = manifest_parser.parse(data["manifest"]), architecture_parser.parse(data["architecture"])
    manifest_rules.check_against(manifest, architecture)
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
    """The values of a keyword, wherever it stands in a schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get(key), str):
            yield schema[key]
        for value in schema.values():
            yield from every(value, key)
    elif isinstance(schema, list):
        for value in schema:
            yield from every(value, key)


# What is too large for a file.


def _sparse(size: int) -> bytes:
    return b'{"format": "' + b"s" * (size - 14) + b'"}'


@pytest.mark.rule("SB-J-005", "SB-J-006", "SB-J-010", "SB-A-006", "SB-M-004")
@pytest.mark.parametrize(
    ("kind", "make", "code", "pointer"),
    [
        ("manifest", lambda: b"[" * 100_000 + b"]" * 100_000, "json.depth", None),
        ("manifest", lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "json.depth", None),
        ("manifest", lambda: b"[" * 1_000_000, "json.depth", None),
        ("architecture", lambda: b"[" * 100_000 + b"]" * 100_000, "json.depth", None),
        ("manifest", lambda: _sparse(strict_json.MAX_BYTES + 1), "json.size", None),
        ("architecture", lambda: _sparse(strict_json.MAX_BYTES + 1), "json.size", None),
        ("manifest", lambda: _sparse(strict_json.MAX_BYTES), "field.missing", ""),
        ("manifest", lambda: b'{"size": ' + b"7" * 15_000_000 + b"}", "json.number", None),
        ("manifest", lambda: b'{"size": -' + b"7" * 15_000_000 + b"}", "json.number", None),
        ("manifest", lambda: b'{"size": 1.' + b"7" * 15_000_000 + b"}", "field.missing", ""),
        ("architecture", lambda: _layers(10_001), "field.value", "/layers"),
        ("architecture", lambda: _layers(900_000), "field.value", "/layers"),
        ("manifest", lambda: _with("source_names", [0] * 300_000), "field.value", "/source_names"),
        ("manifest", lambda: _with("extensions", {"x": [[]] * 600_000}), "json.size", None),
        ("manifest", lambda: _with("extensions", {"x": [[]] * 5_000_000}), "json.size", None),
        ("manifest", lambda: _with("source_names", [0] * 262_144), "field.type", "/source_names/0"),
        ("manifest", lambda: _with("files", dict.fromkeys(map(str, range(500_000)), 0)), "field.type", "/files/0"),
    ],
)
def test_large_documents_are_refused_soon(kind: str, make: Callable[[], bytes], code: str, pointer: str | None) -> None:
    data = make()
    start = time.process_time()
    found = problems({"document": kind, "base": "gpt2"}, data)
    assert time.process_time() - start < 2
    assert (found[0].code, found[0].pointer) == (code, pointer)


def _with(name: str, value: object) -> bytes:
    return json.dumps(json.loads(base("gpt2", "manifest")) | {name: value}).encode("ascii")


def _layers(count: int) -> bytes:
    value = json.loads(base("gpt2", "architecture"))
    return json.dumps(value | {"layers": ["full"] * count}).encode("ascii")


@pytest.mark.rule("SB-A-006", "SB-M-040")
def test_the_deepest_model_and_a_unit_number_of_four_digits() -> None:
    deepest = architecture_parser.parse(_layers(10_000))
    assert deepest.units()[1:3] == ("layer-0000", "layer-0001")
    assert architecture_parser.parse(_layers(1001)).units()[1000:] == ("layer-0999", "layer-1000", "head")
    assert architecture_parser.parse(_layers(1000)).units()[1000:] == ("layer-999", "head")
    start = time.process_time()
    with pytest.raises(BundleError, match="missing a list of"):
        manifest_rules.check_against(manifest_parser.parse(base("gpt2", "manifest")), deepest)
    assert time.process_time() - start < 2


@pytest.mark.rule("SB-M-085")
def test_many_templates_for_one_tensor_are_refused_soon() -> None:
    value = json.loads(base("gpt2", "manifest"))
    entry = {"tensors": ["layers.{layer}.mlp.up.weight"], "groups": 1, "transposed": True}
    value["source_names"] = [{"source": f"x{i}.{{layer}}"} | entry for i in range(50_000)]
    start = time.process_time()
    found = problems({"document": "manifest", "base": "gpt2"}, json.dumps(value).encode("ascii"))
    assert time.process_time() - start < 2
    assert (found[0].code, found[0].pointer) == ("manifest.sources", "/source_names/1/tensors")


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


# Whole directories. The weights of the base "llama3" are zeros, so that its bundle can be made from nothing.


def write_llama3(root: Path) -> Path:
    """The bundle of the base ``llama3``."""
    root.mkdir()
    for kind in KINDS:
        (root / f"{kind}.json").write_bytes(base("llama3", kind))
    manifest, architecture = (
        manifest_parser.parse(base("llama3", "manifest")),
        architecture_parser.parse(base("llama3", "architecture")),
    )
    for unit, shapes in architecture.unit_tensors().items():
        left = [(name, weights.Tensor(dtype=manifest.storage.dtype_of(name), shape=s)) for name, s in shapes.items()]
        paths = manifest.units[unit]
        # layer-003 has two parts; the first holds the attention's norm, queries and keys.
        parts = [left] if len(paths) == 1 else [left[:5], left[5:]]
        for path, part in zip(paths, parts, strict=True):
            data = bytes(sum(tensor.size for _, tensor in part))
            header = weights.header(weights.lay_out(dict(part)), hashlib.sha256(data).hexdigest())
            (root / path).write_bytes(header + data)
    lines = {path: file.sha256 for path, file in manifest.files.items()}
    lines["manifest.json"] = hashlib.sha256(base("llama3", "manifest")).hexdigest()
    (root / "SHA256SUMS").write_text("".join(f"{lines[path]}  {path}\n" for path in sorted(lines)), "ascii")
    return root


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_llama3(tmp_path / "llama3.splitbundle")


def codes(path: Path, *, exact: bool = False, shard: str | None = None) -> list[tuple[str, str | None]]:
    """What opening and verifying a bundle finds."""
    try:
        splitbundle.open(path).verify(shard, exact=exact)
    except BundleError as error:
        return [(problem.code, problem.file) for problem in error.problems]
    return []


@pytest.mark.rule(
    "SB-I-001",
    "SB-I-002",
    "SB-I-003",
    "SB-W-001",
    "SB-W-007",
    "SB-W-008",
    "SB-W-009",
    "SB-W-010",
    "SB-W-012",
    "SB-W-013",
)
def test_a_bundle_made_by_the_rules_is_whole(bundle: Path) -> None:
    assert codes(bundle, exact=True) == []
    opened = splitbundle.open(bundle)
    assert opened.id == f"sha256:{hashlib.sha256((bundle / 'manifest.json').read_bytes()).hexdigest()}"
    assert opened.architecture_id == f"sha256:{hashlib.sha256((bundle / 'architecture.json').read_bytes()).hexdigest()}"
    lines = (bundle / "SHA256SUMS").read_text("ascii").splitlines(keepends=True)
    model = "".join(line for line in lines if not line.endswith("  manifest.json\n"))
    assert opened.fingerprint == f"sha256:{hashlib.sha256(model.encode('ascii')).hexdigest()}"


@pytest.mark.rule("SB-D-001")
@pytest.mark.parametrize("name", ["manifest.json", "architecture.json", "SHA256SUMS"])
def test_a_bundle_has_its_three_documents(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    assert {code for code, _ in codes(bundle)} == {"file.missing"}


@pytest.mark.rule("SB-D-004")
@pytest.mark.parametrize("kind", ["link", "hanging link", "directory", "pipe"])
@pytest.mark.parametrize("name", ["manifest.json", "architecture.json", "head.safetensors"])
def test_only_regular_files_are_opened(bundle: Path, name: str, kind: str) -> None:
    place = bundle / name
    moved = bundle.parent / "moved"
    place.rename(moved)
    if kind == "directory":
        place.mkdir()
    elif kind == "pipe":
        if not hasattr(os, "mkfifo"):
            pytest.skip("no pipes here")
        os.mkfifo(place)
    else:
        if kind == "hanging link":
            moved.unlink()
        place.symlink_to(moved)
    expected = "file.missing" if (name, kind) == ("manifest.json", "hanging link") else "file.kind"
    assert [code for code, _ in codes(bundle)] == [expected]


@pytest.mark.rule("SB-D-005", "SB-D-006")
def test_unlisted_files_are_reported_and_never_opened(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine")
    (bundle / "more").mkdir()
    (bundle / "more" / "evil.json").symlink_to(bundle / "nowhere")  # opening it would fail
    if hasattr(os, "mkfifo"):
        os.mkfifo(bundle / "pipe")  # opening it would wait for ever
    unlisted = ["more/evil.json", "notes.txt", *(["pipe"] if hasattr(os, "mkfifo") else [])]
    assert list(splitbundle.open(bundle).verify().unlisted) == unlisted
    assert codes(bundle, exact=True) == [("file.unlisted", path) for path in unlisted]


@pytest.mark.rule("SB-D-007")
@pytest.mark.parametrize("name", ["architecture.json", "layer-001.safetensors"])
@pytest.mark.parametrize("change", [-1, 1])
def test_sizes_come_first(bundle: Path, name: str, change: int) -> None:
    place = bundle / name
    data = place.read_bytes()
    place.write_bytes(data[:-1] if change < 0 else data + b"\0")
    assert codes(bundle) == [("file.size", name)]


@pytest.mark.rule("SB-D-007", "SB-E-002")
def test_the_architecture_is_hashed_before_it_is_parsed(bundle: Path) -> None:
    place = bundle / "architecture.json"
    place.write_bytes(b"x" * place.stat().st_size)
    assert codes(bundle) == [("file.digest", "architecture.json")]


@pytest.mark.rule("SB-W-011")
def test_a_changed_byte_of_data_is_found(bundle: Path) -> None:
    place = bundle / "layer-002.safetensors"
    data = bytearray(place.read_bytes())
    data[-1] ^= 1
    place.write_bytes(data)
    assert codes(bundle) == [("file.digest", "layer-002.safetensors")]


@pytest.mark.rule("SB-D-008")
def test_a_partial_bundle_opens_and_its_shards_verify(bundle: Path) -> None:
    (bundle / "layer-003-part-002.safetensors").unlink()
    (bundle / "head.safetensors").unlink()
    absent = ["head.safetensors", "layer-003-part-002.safetensors"]
    assert list(splitbundle.open(bundle).absent()) == absent
    assert codes(bundle, shard="bottom") == []
    assert codes(bundle, shard="trunk") == [("file.missing", "layer-003-part-002.safetensors")]
    assert codes(bundle, shard="top") == [("file.missing", "head.safetensors")]
    assert codes(bundle) == [("file.missing", path) for path in absent]


@pytest.mark.rule("SB-D-009")
def test_a_bundle_appears_whole_or_not_at_all(bundle: Path) -> None:
    before = sorted(path.name for path in bundle.parent.iterdir())
    new = bundle.parent / "new.splitbundle"
    for target, force in ((new, False), (bundle, True)):
        with pytest.raises(RuntimeError, match="half-way"):
            _fail_half_way(target, force, bundle, new)
    assert sorted(path.name for path in bundle.parent.iterdir()) == before
    with publishing(new, force=False) as staging:
        shutil.copytree(bundle, staging, dirs_exist_ok=True)
    assert codes(new, exact=True) == []


def _fail_half_way(target: Path, force: bool, old: Path, new: Path) -> None:
    with publishing(target, force=force) as staging:
        (staging / "manifest.json").write_text("{}")
        assert not new.exists()
        assert codes(old) == []
        raise RuntimeError("half-way")


@pytest.mark.rule("SB-D-010")
@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda text: text + "\n", "SHA256SUMS"),
        (lambda text: text.replace("  ", " *", 1), "SHA256SUMS"),
        (lambda text: "".join(reversed(text.splitlines(keepends=True))), "SHA256SUMS"),
        (lambda text: "".join(text.splitlines(keepends=True)[1:]), "SHA256SUMS"),
        (lambda text: text + f"{'0' * 64}  extra\n", "SHA256SUMS"),
        (lambda text: text.replace("\n", "\r\n"), "SHA256SUMS"),
        (lambda text: text.rstrip("\n"), "SHA256SUMS"),
        (lambda text: "", "SHA256SUMS"),
        (lambda text: _redigest(text, "manifest.json"), "manifest.json"),
        (lambda text: _redigest(text, "head.safetensors"), "SHA256SUMS"),
    ],
)
def test_sums_are_exact(bundle: Path, change: Callable[[str], str], culprit: str) -> None:
    place = bundle / "SHA256SUMS"
    place.write_bytes(change(place.read_text("ascii")).encode("ascii"))
    assert codes(bundle) == [("sums.mismatch", culprit)]


def _redigest(text: str, path: str) -> str:
    lines = text.splitlines()
    return "".join(f"{'0' * 64}  {path}\n" if line.endswith(f"  {path}") else f"{line}\n" for line in lines)


@pytest.mark.rule("SB-E-001")
def test_problems_name_the_file_inside_the_bundle(bundle: Path) -> None:
    (bundle / "manifest.json").write_text('{"format": "zip", "format_version": "1.0", "requires": []}')
    with pytest.raises(BundleError) as raised:
        splitbundle.open(bundle)
    assert str(raised.value) == "[format.name] manifest.json /format: expected \"splitbundle\", got 'zip'"
