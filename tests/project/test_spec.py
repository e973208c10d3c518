"""Every rule of the specification has an id and a test, and prose, schemas and code agree."""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import splitbundle_schemas
from conformance.text_document import DOCUMENT
from splitbundle.errors import BundleError
from splitbundle.format.architecture import rotary
from splitbundle.format.architecture.parser import parse_architecture
from splitbundle.format.manifest.document import EXTENSIONS
from splitbundle.format.manifest.parser import parse_manifest
from splitbundle.format.text_document import parse_text
from tests.support.paths import ROOT, TESTS
from tests.support.variants import BASES

PAGES = [*sorted((ROOT / "spec" / "v1").glob("*.md")), ROOT / "spec" / "status.md"]
SPEC = {path.name: path.read_text("utf-8") for path in PAGES}
RULE = r"SB-[A-Z]-\d{3}"
KINDS = ("manifest", "architecture")


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs without code blocks. Rows of tables and items of lists are separate."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.split(r"\n\s*\n", text):
        if block.lstrip().startswith(("|", "- ")):
            yield from re.split(r"\n(?=\||- )", block)
        else:
            yield block


def defined() -> list[str]:
    return [rule for text in SPEC.values() for rule in re.findall(rf"\*\*\[({RULE})\]\*\*", text)]


def held() -> dict[str, set[str]]:
    """Return the schemas, vectors and tests that hold each rule."""
    holders: dict[str, set[str]] = {}
    for name in (
        *KINDS,
        "text",
        "signature",
        "statement",
        "image-manifest",
        "model-config",
        "wire-header",
        "weight-header",
    ):
        for comment in comments(splitbundle_schemas.load(name)):
            for rule in re.findall(RULE, comment):
                holders.setdefault(rule, set()).add(f"{name}.schema.json")
    folder = TESTS / "conformance"
    for path in (*folder.glob("*t/*.json"), *folder.glob("wire/*/*.json")):
        for rule in json.loads(path.read_text("utf-8"))["rules"]:
            holders.setdefault(rule, set()).add(path.name)
    for path in TESTS.rglob("test_*.py"):
        for arguments in re.findall(r"mark\.rule\(([^)]*)\)", path.read_text("utf-8")):
            for rule in re.findall(r"\"([^\"]*)\"", arguments):
                holders.setdefault(rule, set()).add(path.name)
    return holders


def comments(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$comment"), str):
            yield schema["$comment"]
        for value in schema.values():
            yield from comments(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from comments(value)


# Rules, and the files that hold them.


@pytest.mark.parametrize("name", SPEC)
def test_every_obligation_has_an_id(name: str) -> None:
    found = 0
    for paragraph in paragraphs(SPEC[name]):
        if "MUST" in paragraph.replace('"MUST"', "").replace('"MUST NOT"', ""):
            found += 1
            assert re.search(rf"\*\*\[{RULE}\]\*\*", paragraph), paragraph
    assert found > (0 if name == "status.md" else 10)


@pytest.mark.parametrize("name", SPEC)
def test_every_id_stands_before_an_obligation(name: str) -> None:
    for paragraph in paragraphs(SPEC[name]):
        for piece in re.split(rf"(?=\*\*\[{RULE}\]\*\*)", paragraph)[1:]:
            assert "MUST" in piece, piece


def test_ids_are_unique() -> None:
    assert [rule for rule, times in Counter(defined()).items() if times > 1] == []


def test_every_id_that_is_named_is_defined() -> None:
    known = set(defined())
    for name, text in SPEC.items():
        assert {rule for rule in re.findall(RULE, text) if rule not in known} <= {"SB-M-012"}, name
    assert {rule: who for rule, who in held().items() if rule not in known} == {}


def test_every_rule_is_held() -> None:
    holders = held()
    assert sorted(rule for rule in defined() if rule not in holders) == []


# Error codes.


def raised() -> set[str]:
    """Return every code that the code base gives to a problem."""
    found: set[str] = set()
    for folder in ("runtime/splitbundle", "converter/splitbundle_converter"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call):
                    found.update(code for argument in _code_arguments(node) for code in _constants(argument))
    return found


def _code_arguments(call: ast.Call) -> Iterator[ast.expr]:
    """Yield the arguments that give a code: ``code=``, or the first of a function that notes or raises a problem."""
    yield from (keyword.value for keyword in call.keywords if keyword.arg == "code")
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    noting = name in {
        *("add", "refuse", "_refuse", "refusal", "_field_refusal", "problem", "_Refused", "network_error"),
        *("Refusal", "_compare", "compare", "_wrong"),
    }
    if noting and call.args and re.fullmatch(r"[a-z]+\.[a-z-]+|network|memory", " ".join(_constants(call.args[0]))):
        yield call.args[0]


def _constants(node: ast.expr) -> Iterator[str]:
    yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))


@pytest.mark.rule("SB-V-004", "SB-V-005", "SB-V-011")
def test_the_registry_has_the_extensions_that_this_reader_knows() -> None:
    needed, described = (
        SPEC["status.md"].split("## Extensions that must be understood")[1].split("## Extensions that only")
    )
    assert set(re.findall(r"^\| `([a-z0-9_]+)` \| 1\.0 \|", needed, flags=re.MULTILINE)) == EXTENSIONS
    described = described.split("## How is a name added?")[0]
    named = set(re.findall(r"^\| `([a-z0-9_]+)` \|", described, flags=re.MULTILINE))
    assert named == splitbundle_schemas.load("extensions")["properties"].keys()
    assert not any("." in name for name in named | EXTENSIONS)


def test_the_table_of_codes_is_the_codes() -> None:
    section = SPEC["bundle.md"].partition("\n## Errors\n")[2]
    rows = re.findall(r"^\| `([a-z.-]+)` \| `([a-z]+)` \| (.+) \|$", section, flags=re.MULTILINE)
    listed = [code for code, _, _ in rows]
    assert len(listed) == len(set(listed))
    assert set(listed) == raised()
    assert {step for _, step, _ in rows} == {
        "open",
        "stage",
        "verify",
        "call",
        "convert",
        "train",
        "share",
        "wire",
        "command",
    }


def test_every_code_of_the_documents_has_a_vector() -> None:
    documents = {
        code
        for code in raised()
        if code.partition(".")[0] in {"json", "field", "format", "manifest", "architecture"} and code != "json.size"
    }
    paths = (TESTS / "conformance" / "reject").glob("*.json")
    assert {json.loads(path.read_text("utf-8"))["expect"]["code"] for path in paths} == documents


# Fields: their names in the prose, the schemas and the parser.


def tables() -> dict[tuple[str, str, str], list[str]]:
    """Return (file, path of the heading, kind in the heading) -> the fields of the table below it."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, text in SPEC.items():
        for heading, body in re.findall(r"^### (`.*?)$(.*?)(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL):
            path, *kind = re.findall(r"`([^`]*)`", heading)
            rows = body.partition("\n| field | type | ")[2].partition("\n\n")[0]
            fields = re.findall(r"^\| `([a-z0-9_]+)` \|(?! [^|]*\bor absent \|)", rows, flags=re.MULTILINE)
            if fields:
                found[name, path, "".join(kind)] = fields
    return found


MAY_BE_ABSENT = {
    "/model": {"parent", "dropout", "source_configuration", "text_file"},
    "/storage": {"encodings"},
    "/vectors": {"origin", "original"},
    "/source_names/0": {"axis", "shape"},
    "/layer_kinds/full": {"residual_scales"},
    "/layer_kinds/full/attention": {"output_gate", "value_dim", "value_multiplier"},
    "/layer_kinds/full/attention/query_temperature": {"growth"},
    "/layer_kinds/full/attention/position": {"direction"},
}
"""A pointer -> the fields of its table that may be absent: "or absent" is the end of their type."""
MESSAGES = {"wire.md"}
"""Files whose tables are of messages. ``tests/wire/test_headers.py`` reads these."""


PARSERS: dict[str, Callable[[bytes], object]] = {
    "manifest": parse_manifest,
    "architecture": parse_architecture,
    "text": lambda data: parse_text(data, 24),
}
WHERE = {
    ("bundle.md", "manifest.json", ""): "",
    ("bundle.md", "model", ""): "/model",
    ("bundle.md", "model.source_configuration", ""): "/model/source_configuration",
    ("bundle.md", "storage", ""): "/storage",
    ("bundle.md", "shards[i]", ""): "/shards/0",
    ("bundle.md", "shards[i].graph", ""): "/shards/0/graph",
    ("bundle.md", "shards[i].graph.inputs[i]", ""): "/shards/0/graph/inputs/0",
    ("bundle.md", "boundaries[i]", ""): "/boundaries/0",
    ("bundle.md", "boundaries[i].tensors", ""): "/boundaries/0/tensors",
    ("bundle.md", "boundaries[i].tensors.hidden", ""): "/boundaries/0/tensors/hidden",
    ("bundle.md", "boundaries[i].tensors.past", ""): "/boundaries/0/tensors/past",
    ("bundle.md", "units.NAME", ""): "/units/head",
    ("bundle.md", "files.PATH", ""): "/files/head.safetensors",
    ("bundle.md", "text", ""): "/text",
    ("bundle.md", "vectors", ""): "/vectors",
    ("bundle.md", "source_names[i]", ""): "/source_names/0",
    ("bundle.md", "text.json", ""): "",
    ("bundle.md", "templates[i]", ""): "/templates/0",
    ("bundle.md", "defaults", ""): "/defaults",
    ("bundle.md", "cases[i]", ""): "/cases/0",
    ("bundle.md", "chats[i]", ""): "/chats/0",
    ("decoder.md", "architecture.json", ""): "",
    ("decoder.md", "embedding", ""): "/embedding",
    ("decoder.md", "embedding.position", "learned"): "/embedding/position",
    ("decoder.md", "embedding.position", "sinusoidal"): "/embedding/position",
    ("decoder.md", "layer_kinds.NAME", ""): "/layer_kinds/full",
    ("decoder.md", "layer_kinds.NAME.residual_scales", ""): "/layer_kinds/full/residual_scales",
    ("decoder.md", "layer_kinds.NAME.residual_scales.attention", ""): "/layer_kinds/full/residual_scales/attention",
    ("decoder.md", "layer_kinds.NAME.norm", ""): "/layer_kinds/full/norm",
    ("decoder.md", "layer_kinds.NAME.attention", ""): "/layer_kinds/full/attention",
    ("decoder.md", "layer_kinds.NAME.attention.query_key_norm", ""): "/layer_kinds/full/attention/query_key_norm",
    ("decoder.md", "layer_kinds.NAME.attention.query_temperature", ""): "/layer_kinds/full/attention/query_temperature",
    ("decoder.md", "layer_kinds.NAME.attention.output_gate", ""): "/layer_kinds/full/attention/output_gate",
    ("decoder.md", "layer_kinds.NAME.attention.position", "alibi"): "/layer_kinds/full/attention/position",
    ("decoder.md", "layer_kinds.NAME.attention.position", "rotary"): "/layer_kinds/full/attention/position",
    **{
        ("decoder.md", "layer_kinds.NAME.attention.position.scaling", scaling): (
            "/layer_kinds/full/attention/position/scaling"
        )
        for scaling in rotary.SCALINGS
        if scaling != "none"
    },
    ("decoder.md", "layer_kinds.NAME.mlp", ""): "/layer_kinds/full/mlp",
    ("decoder.md", "layer_kinds.NAME.mlp", "experts"): "/layer_kinds/full/mlp",
    ("decoder.md", "layer_kinds.NAME.mlp.router", ""): "/layer_kinds/full/mlp/router",
    ("decoder.md", "layer_kinds.NAME.mlp.router.groups", ""): "/layer_kinds/full/mlp/router/groups",
    ("decoder.md", "layer_kinds.NAME.mlp.shared", ""): "/layer_kinds/full/mlp/shared",
    ("decoder.md", "head", ""): "/head",
}
"""Each table of fields, and an object that it describes."""


def example(table: tuple[str, str, str]) -> tuple[str, Any]:
    """Return a document that has the object of a table: a base, or an accepted vector."""
    file, path, kind = table
    if path.partition("[")[0] in {"text.json", *DOCUMENT}:
        return "text", copy.deepcopy(DOCUMENT)
    if file == "bundle.md":
        name = "source-configuration-part" if path == "model.source_configuration" else "graph"
        vector = json.loads((TESTS / "conformance" / "accept" / f"manifest-{name}.json").read_text("utf-8"))
        value = json.loads((BASES / "gpt2.manifest.json").read_text("utf-8"))
        for operation in vector["patch"]:
            put(value, operation["path"], operation["value"])
        return "manifest", value
    if kind == "experts" or path.endswith(("router", "groups", "shared")):
        return "architecture", accepted("experts")
    if "residual_scales" in path:
        return "architecture", accepted("residual-scales")
    if kind in ("", "learned", "rotary", "llama3") and path.rpartition(".")[2] not in (
        "query_key_norm",
        "query_temperature",
        "output_gate",
    ):
        name = "gpt2" if kind == "learned" else "llama3"
        return "architecture", json.loads((BASES / f"{name}.architecture.json").read_text("utf-8"))
    scaling = "scaling-" if path.endswith(".scaling") else ""
    return "architecture", accepted(f"{scaling}{kind}" if kind else path.rpartition(".")[2].replace("_", "-"))


def accepted(name: str) -> Any:
    """Return the architecture of an accepted vector."""
    vector = json.loads((TESTS / "conformance" / "accept" / f"architecture-{name}.json").read_text("utf-8"))
    value = json.loads((BASES / f"{vector['base']}.architecture.json").read_text("utf-8"))
    (operation,) = vector["patch"]
    put(value, operation["path"], operation["value"])
    return value


def put(value: Any, pointer: str, new: object) -> None:
    """Replace the value at a pointer."""
    *tokens, last = pointer.split("/")[1:]
    for token in tokens:
        value = value[int(token)] if isinstance(value, list) else value[token]
    value[int(last) if isinstance(value, list) else last] = new


def test_every_table_is_known() -> None:
    assert tables().keys() == WHERE.keys()
    absent = sum(text.count(" or absent |") for name, text in SPEC.items() if name not in MESSAGES)
    assert absent == sum(map(len, MAY_BE_ABSENT.values()))


@pytest.mark.rule("SB-M-001", "SB-A-001", "SB-V-007", "SB-V-008")
@pytest.mark.parametrize("table", WHERE, ids=lambda table: " ".join(table).strip())
def test_prose_schema_and_parser_have_the_same_fields(table: tuple[str, str, str]) -> None:
    _, _, kind = table
    pointer, fields = WHERE[table], tables()[table]
    document, value = example(table)
    found = value
    for token in pointer.split("/")[1:]:
        found = found[int(token)] if isinstance(found, list) else found[token]
    # The prose has the members in canonical order.
    assert list(found) == fields
    assert schema_fields(document, value, pointer) == set(fields)
    # The parser names every missing field of an empty object (of a union, only its kind).
    bare = {"kind": kind} if kind else {}
    if pointer:
        put(value, pointer, bare)
    else:
        value = bare
    problems = parser_problems(document, value)
    missing = {p.expected for p in problems if p.code == "field.missing" and p.pointer == pointer}
    asked = {re.sub(r"a field '(.*)'", r"\1", text) for text in missing}
    # format, format_version and requires are checked first, without the others.
    assert asked | bare.keys() == (
        {"format", "format_version", "requires"} if document == "manifest" and not pointer else set(fields)
    )


def schema_fields(document: str, instance: Any, pointer: str) -> set[str]:
    """The properties that the schema gives the object at a pointer, all of which it requires."""
    root = splitbundle_schemas.load(document)

    def resolve(schema: dict[str, Any], instance: Any) -> list[dict[str, Any]]:
        parts = [schema]
        if "$ref" in schema:
            parts += resolve(root["$defs"][schema["$ref"].removeprefix("#/$defs/")], instance)
        for branch in (schema, *schema.get("allOf", ())):
            if "then" not in branch:
                continue
            holds = not isinstance(instance, dict) or (
                all(name in instance for name in branch["if"].get("required", ()))
                and all(
                    "const" in rule and instance.get(key) == rule["const"]
                    for key, rule in branch["if"].get("properties", {}).items()
                )
            )
            if holds:
                parts += resolve(branch["then"], instance)
            elif "else" in branch:
                parts += resolve(branch["else"], instance)
        return parts

    parts = resolve(root, instance)
    for token in pointer.split("/")[1:]:
        following: list[dict[str, Any]] = []
        below = instance[int(token)] if isinstance(instance, list) else instance[token]
        for part in parts:
            named = part.get("properties", {}).get(token)
            patterns = [s for pattern, s in part.get("patternProperties", {}).items() if re.search(pattern, token)]
            if named is None and isinstance(instance, dict) and not part.get("properties"):
                other = [part["additionalProperties"]] if isinstance(part.get("additionalProperties"), dict) else []
                patterns = patterns or other
            items = [part["items"]] if isinstance(instance, list) and "items" in part else []
            for schema in ([named] if named else []) + patterns + items:
                following += resolve(schema, below)
        parts, instance = following, below
    objects = [part for part in parts if part.get("additionalProperties") is False or pointer == "/model"]
    properties = {name for part in objects for name in part.get("properties", {})}
    optional = MAY_BE_ABSENT.get(pointer, set()) & properties  # of a union, another kind may have them
    assert properties == {name for part in objects for name in part.get("required", ())} | optional
    return properties - optional


def parser_problems(document: str, value: Any) -> tuple[Any, ...]:
    data = json.dumps(value).encode("utf-8")
    with pytest.raises(BundleError) as raised_:
        PARSERS[document](data)
    return raised_.value.problems


# The worked example.


@pytest.mark.rule("SB-I-001", "SB-I-002", "SB-I-003", "SB-D-010")
def test_the_worked_example_can_be_recomputed(tmp_path: Path) -> None:
    section = SPEC["bundle.md"].partition("\n### Worked example\n")[2].partition("\n## ")[0]
    sums, shell = re.findall(r"^```(?:sh)?\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    digests = dict(reversed(line.split("  ")) for line in sums.splitlines())
    assert list(digests) == sorted(digests)
    for kind in KINDS:
        data = (BASES / f"gpt2.{kind}.json").read_bytes()
        assert digests[f"{kind}.json"] == hashlib.sha256(data).hexdigest()
        (tmp_path / f"{kind}.json").write_bytes(data)
    manifest = parse_manifest((BASES / "gpt2.manifest.json").read_bytes())
    listed = {path: file.sha256 for path, file in manifest.files.items()}
    assert digests == listed | {"manifest.json": digests["manifest.json"]}
    # Computed from the text, without the code: the lines of the architecture and of the units' files.
    model = {"architecture.json", *(path for paths in manifest.units.values() for path in paths)}
    lines = "".join(f"{digests[path]}  {path}\n" for path in sorted(model))
    fingerprint = hashlib.sha256(lines.encode("ascii")).hexdigest()
    assert f"sha256:{fingerprint}" == manifest.model.fingerprint
    commands = re.findall(r"^\$ (.*)\n(.*)$", shell, flags=re.MULTILINE)
    assert [answer.split()[0] for _, answer in commands] == [
        digests["manifest.json"],
        digests["architecture.json"],
        fingerprint,
    ]
    if not all(map(shutil.which, ("sh", "sha256sum", "grep", "sort"))):
        pytest.skip("no coreutils here")
    (tmp_path / "SHA256SUMS").write_bytes(sums.encode("ascii"))
    for command, answer in commands:
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout == answer + "\n"
