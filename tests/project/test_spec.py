"""The specification as a product: every rule has an id and is held, and prose, schemas and code say the same."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

import pytest
import torch

import splitbundle_schemas
from splitbundle.backends.torch.cache import KVCache
from splitbundle.backends.torch.decoder import Embedding, Head, Layer
from splitbundle.backends.torch.feedforward import ACTIVATIONS, Xielu
from splitbundle.backends.torch.norms import Norm
from splitbundle.backends.torch.pipeline import Session
from splitbundle.backends.torch.positions import Positions
from splitbundle.backends.torch.rotary import frequencies
from splitbundle.errors import BundleError
from splitbundle.format.architecture import attention, feedforward, norms, positions, rotary
from splitbundle.format.architecture import decoder as architectures
from splitbundle.format.architecture.parser import parse_architecture
from splitbundle.format.architecture.positions import AttentionSpan
from splitbundle.format.manifest.document import SourceName
from splitbundle.format.manifest.parser import parse_manifest
from splitbundle_converter.translation.translate import join
from tests.support.paths import ROOT, TESTS

SPEC = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "spec" / "v1").glob("*.md"))}
RULE = r"SB-[A-Z]-\d{3}"
KINDS = ("manifest", "architecture")
BASES = TESTS / "conformance" / "bases"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These tensors are tiny: threads that wait for each other would take several times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs, and rows of tables and items of lists each for itself, without code blocks."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.split(r"\n\s*\n", text):
        if block.lstrip().startswith(("|", "- ")):
            yield from re.split(r"\n(?=\||- )", block)
        else:
            yield block


def defined() -> list[str]:
    return [rule for text in SPEC.values() for rule in re.findall(rf"\*\*\[({RULE})\]\*\*", text)]


def held() -> dict[str, set[str]]:
    """Rule -> who holds it: schemas, vectors and tests."""
    holders: dict[str, set[str]] = {}
    for name in KINDS:
        for comment in comments(splitbundle_schemas.load(name)):
            for rule in re.findall(RULE, comment):
                holders.setdefault(rule, set()).add(f"{name}.schema.json")
    for path in (TESTS / "conformance").glob("*t/*.json"):
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


# Rules and who holds them.


@pytest.mark.parametrize("name", SPEC)
def test_every_obligation_has_an_id(name: str) -> None:
    found = 0
    for paragraph in paragraphs(SPEC[name]):
        if "MUST" in paragraph.replace('"MUST"', "").replace('"MUST NOT"', ""):
            found += 1
            assert re.search(rf"\*\*\[{RULE}\]\*\*", paragraph), paragraph
    assert found > 30


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
    """Every code that the code base gives to a problem."""
    found: set[str] = set()
    for folder in ("runtime/splitbundle", "converter/splitbundle_converter"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call):
                    found.update(code for argument in _code_arguments(node) for code in _constants(argument))
    return found


def _code_arguments(call: ast.Call) -> Iterator[ast.expr]:
    """What a call gives as a code: ``code=``, or first to a function that notes or raises a problem."""
    yield from (keyword.value for keyword in call.keywords if keyword.arg == "code")
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    noting = name in {"add", "refuse", "_refuse", "refused", "_refused", "problem", "_Refused"}
    if noting and call.args and re.fullmatch(r"[a-z]+\.[a-z-]+|network|memory", " ".join(_constants(call.args[0]))):
        yield call.args[0]


def _constants(node: ast.expr) -> Iterator[str]:
    yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))


def test_the_table_of_codes_is_the_codes() -> None:
    section = SPEC["bundle.md"].partition("\n## Errors\n")[2]
    rows = re.findall(r"^\| `([a-z.-]+)` \| `([a-z]+)` \| (.+) \|$", section, flags=re.MULTILINE)
    listed = [code for code, _, _ in rows]
    assert len(listed) == len(set(listed))
    assert set(listed) == raised()
    assert {step for _, step, _ in rows} == {"open", "stage", "verify", "call", "convert", "command"}


def test_every_code_of_the_documents_has_a_vector() -> None:
    documents = {
        code
        for code in raised()
        if code.partition(".")[0] in {"json", "field", "format", "manifest", "architecture"} and code != "json.size"
    }
    paths = (TESTS / "conformance" / "reject").glob("*.json")
    assert {json.loads(path.read_text("utf-8"))["expect"]["code"] for path in paths} == documents


# Fields: what the prose, the schemas and the parser call them.


def tables() -> dict[tuple[str, str, str], list[str]]:
    """(file, path of the heading, kind in the heading) -> the fields of the table below it."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, text in SPEC.items():
        for heading, body in re.findall(r"^### (`.*?)$(.*?)(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL):
            path, *kind = re.findall(r"`([^`]*)`", heading)
            rows = body.partition("\n| field | type | ")[2].partition("\n\n")[0]
            fields = re.findall(r"^\| `([a-z0-9_]+)` \|", rows, flags=re.MULTILINE)
            if fields:
                found[name, path, "".join(kind)] = fields
    return found


WHERE = {
    ("bundle.md", "manifest.json", ""): "",
    ("bundle.md", "model", ""): "/model",
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
    ("decoder.md", "architecture.json", ""): "",
    ("decoder.md", "embedding", ""): "/embedding",
    ("decoder.md", "embedding.position", "learned"): "/embedding/position",
    ("decoder.md", "embedding.position", "sinusoidal"): "/embedding/position",
    ("decoder.md", "layer_kinds.NAME", ""): "/layer_kinds/full",
    ("decoder.md", "layer_kinds.NAME.norm", ""): "/layer_kinds/full/norm",
    ("decoder.md", "layer_kinds.NAME.attention", ""): "/layer_kinds/full/attention",
    ("decoder.md", "layer_kinds.NAME.attention.query_key_norm", ""): "/layer_kinds/full/attention/query_key_norm",
    ("decoder.md", "layer_kinds.NAME.attention.query_temperature", ""): "/layer_kinds/full/attention/query_temperature",
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
    ("decoder.md", "head", ""): "/head",
}
"""Each table of fields, and an object that it describes."""


def example(table: tuple[str, str, str]) -> tuple[str, Any]:
    """A document that has what a table describes: a base, or a vector that is accepted."""
    file, path, kind = table
    if file == "bundle.md":
        vector = json.loads((TESTS / "conformance" / "accept" / "manifest-graph.json").read_text("utf-8"))
        value = json.loads((BASES / "gpt2.manifest.json").read_text("utf-8"))
        for operation in vector["patch"]:
            put(value, operation["path"], operation["value"])
        return "manifest", value
    if kind in ("", "learned", "rotary", "llama3") and path.rpartition(".")[2] not in (
        "query_key_norm",
        "query_temperature",
    ):
        name = "gpt2" if kind == "learned" else "llama3"
        return "architecture", json.loads((BASES / f"{name}.architecture.json").read_text("utf-8"))
    scaling = "scaling-" if path.endswith(".scaling") else ""
    name = f"{scaling}{kind}" if kind else path.rpartition(".")[2].replace("_", "-")
    vector = json.loads((TESTS / "conformance" / "accept" / f"architecture-{name}.json").read_text("utf-8"))
    value = json.loads((BASES / f"{vector['base']}.architecture.json").read_text("utf-8"))
    (operation,) = vector["patch"]
    put(value, operation["path"], operation["value"])
    return "architecture", value


def put(value: Any, pointer: str, new: object) -> None:
    """Replaces what a pointer points at."""
    *tokens, last = pointer.split("/")[1:]
    for token in tokens:
        value = value[int(token)] if isinstance(value, list) else value[token]
    value[int(last) if isinstance(value, list) else last] = new


def test_every_table_is_known() -> None:
    assert tables().keys() == WHERE.keys()


@pytest.mark.rule("SB-M-001", "SB-A-001", "SB-V-007", "SB-V-008")
@pytest.mark.parametrize("table", WHERE, ids=lambda table: " ".join(table).strip())
def test_prose_schema_and_parser_have_the_same_fields(table: tuple[str, str, str]) -> None:
    _, _, kind = table
    pointer, fields = WHERE[table], tables()[table]
    document, value = example(table)
    found = value
    for token in pointer.split("/")[1:]:
        found = found[int(token)] if isinstance(found, list) else found[token]
    # In canonical form, the prose has the order of the members.
    assert list(found) == fields
    assert schema_fields(document, value, pointer) == set(fields)
    # The parser names every field of an object that has none (of a union, none but its kind).
    bare = {"kind": kind} if kind else {}
    if pointer:
        put(value, pointer, bare)
    else:
        value = bare
    problems = parser_problems(document, value)
    missing = {p.expected for p in problems if p.code == "field.missing" and p.pointer == pointer}
    asked = {re.sub(r"a field '(.*)'", r"\1", text) for text in missing}
    # format, format_version and requires are asked for first, and alone.
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
            if "then" in branch and all(
                instance.get(key) == rule["const"]
                for key, rule in branch["if"].get("properties", {}).items()
                if isinstance(instance, dict)
            ):
                parts += resolve(branch["then"], instance)
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
    assert properties == {name for part in objects for name in part.get("required", ())}
    return properties


def parser_problems(document: str, value: Any) -> tuple[Any, ...]:
    data = json.dumps(value).encode("utf-8")
    with pytest.raises(BundleError) as raised_:
        (parse_manifest if document == "manifest" else parse_architecture)(data)
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
    # By the text, without the code: the lines of the architecture and of the units' files.
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


# Tensors and equations: computed as decoder.md says, in Python's own floats, and held against the decoder.


# What bases, and variants of the base "llama3", have: together every value of every field of an architecture.

Change = Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None]
"""Makes a variant of a document: given the whole, and its layer kinds ``full`` and ``sliding``."""


def norm(kind: str = "rms_norm", *, affine: bool = True, offset: float = 0.0, bias: bool = False) -> dict[str, Any]:
    return {"kind": kind, "eps": 0.01, "affine": affine, "weight_offset": offset, "bias": bias}


LAYER_NORM = norm("layer_norm", bias=True)
LENGTH = 12
THRESHOLD = 8
"""Where a variant's scaling begins: within the tokens that are run."""


def offsets(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    """What neither base has: linear scaling, an offset, biases of a gated MLP, a window without rotation."""
    full["norm"] = norm("layer_norm", offset=1.0, bias=True)
    full["attention"] |= {"kv_heads": 1, "output_bias": True, "qkv_bias": False, "scale": 0.2}
    full["attention"]["position"] |= {"base": 10000.0, "dim": 8, "scaling": {"kind": "linear", "factor": 4.0}}
    full["mlp"] |= {"bias": True, "activation": "gelu"}
    sliding["norm"]["weight_offset"] = 1.0
    sliding["attention"] |= {"window": 3, "position": {"kind": "none"}}
    sliding["mlp"] |= {"gated": False, "activation": "relu"}
    whole["embedding"]["multiplier"] = 4.898979485566356
    whole["head"] |= {"norm": norm("layer_norm", offset=1.0, bias=True), "tied": True}


def placement(name: str) -> Change:
    def change(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
        full |= {"placement": name, "norm": LAYER_NORM, "residual_multiplier": 0.7}
        sliding |= {"placement": name, "norm": norm(offset=1.0)}

    return change


def unweighted(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full |= {"placement": "sandwich", "norm": norm("layer_norm", affine=False)}
    sliding["norm"] = whole["head"]["norm"] = norm(affine=False)


def query_key_norm(width: str, after: bool) -> Change:
    def change(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
        for kind, its in ((full, LAYER_NORM), (sliding, norm(offset=1.0))):
            kind["attention"]["query_key_norm"] = {"norm": its, "width": width, "after_rotation": after}
            kind["attention"]["position"] |= {"base": 50.0, "dim": 8}  # turned far enough to tell before from after

    return change


def unweighted_query_key_norm(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    for kind, its in ((full, norm(affine=False)), (sliding, norm("layer_norm", affine=False))):
        kind["attention"]["query_key_norm"] = {"norm": its, "width": "head", "after_rotation": True}


def alibi(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full["attention"] |= {"heads": 6, "kv_heads": 3, "position": {"kind": "alibi", "max_bias": 6.0, "multiplier": 0.5}}
    sliding["attention"] |= {"window": 4, "position": {"kind": "alibi", "max_bias": 8.0, "multiplier": 1.0}}


def sinusoidal(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    whole["hidden_size"] = whole["embedding"]["token_size"] = 25  # odd: a zero stands at the end
    whole["embedding"] |= {"position": {"kind": "sinusoidal", "offset": 2}, "multiplier": 2.0}


def embedding(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    position = {"kind": "learned", "count": LENGTH, "offset": 2}
    whole["embedding"] = {"token_size": 10, "multiplier": 3.0, "position": position, "norm": LAYER_NORM}
    whole["head"] |= {"bias": True}


def head(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    whole["embedding"] |= {"token_size": 30, "multiplier": 2.0}
    whole["head"] = {"norm": None, "tied": True, "bias": True, "multiplier": 0.5, "logit_cap": 1.5}


def scores(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full["attention"] |= {"logit_cap": 0.7}
    full["attention"]["query_temperature"] = {"beta": 0.5, "original_positions": 3, "offset": 0}
    sliding["attention"] |= {"window": 4, "logit_cap": 1.3, "position": {"kind": "none"}}


def sinks(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full["attention"] |= {"sinks": True, "chunk": 5}
    sliding["attention"] |= {"sinks": True, "logit_cap": 0.7, "window": 4}


def chunks(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full["attention"] |= {"heads": 6, "kv_heads": 3, "chunk": 4}
    full["attention"]["query_temperature"] = {"beta": 0.5, "original_positions": 3, "offset": 1}
    sliding["attention"] |= {
        "window": None,
        "chunk": 3,
        "position": {"kind": "alibi", "max_bias": 8.0, "multiplier": 1.0},
    }


def clip(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    for kind, width in ((full, "full"), (sliding, "head")):
        its = {"norm": norm(), "width": width, "after_rotation": False}
        kind["attention"] |= {"clip": 0.6, "query_key_norm": its}


def activations(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full["mlp"]["activation"] = "xielu"
    sliding["mlp"] |= {"activation": "relu_squared", "gated": False}


def ungated_xielu(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
    full["mlp"] |= {"activation": "xielu", "gated": False, "bias": True}


def scaling(layout: str, **of_full: Any) -> Change:
    """Layers of both kinds turn channels by one scaling; those of the kind ``full`` turn all of them."""

    def change(whole: dict[str, Any], full: dict[str, Any], sliding: dict[str, Any]) -> None:
        longer = {key: [*value, 7.5] if isinstance(value, list) else value for key, value in of_full.items()}
        full["attention"]["position"] |= {"base": 100.0, "dim": 8, "layout": layout, "scaling": longer}
        sliding["attention"]["position"] |= {"base": 1000.0, "layout": layout, "scaling": of_full}

    return change


YARN = {
    "kind": "yarn",
    "factor": 4.0,
    "original_positions": 64,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
    "truncate": True,
    "attention_factor": 1.2,
}
VARIANTS: dict[str, Change] = {
    "offsets": offsets,
    **{f"placement {name}": placement(name) for name in norms.PLACEMENTS},
    "norms without weights": unweighted,
    "query and key norms: head": query_key_norm("head", after=False),
    "query and key norms: head, after": query_key_norm("head", after=True),
    "query and key norms: heads": query_key_norm("heads", after=False),
    "query and key norms: heads, after": query_key_norm("heads", after=True),
    "query and key norms: full": query_key_norm("full", after=False),
    "query and key norms without weights": unweighted_query_key_norm,
    "alibi": alibi,
    "sinusoidal": sinusoidal,
    "embedding": embedding,
    "head": head,
    "scores": scores,
    "sinks": sinks,
    "chunks": chunks,
    "clip": clip,
    "activations": activations,
    "xielu without a gate": ungated_xielu,
    "interleaved": scaling("interleaved", kind="none"),
    "dynamic": scaling("half", kind="dynamic", factor=4.0, original_positions=THRESHOLD),
    "longrope": scaling(
        "half",
        kind="longrope",
        original_positions=THRESHOLD,
        short_factors=[1.0, 1.5, 2.0],
        long_factors=[1.2, 4.0, 9.0],
        attention_factor=1.3,
    ),
    "yarn": scaling("interleaved", **YARN),
    "yarn with parts of pairs": scaling("half", **(YARN | {"truncate": False})),
    "yarn without a ramp": scaling("half", **(YARN | {"original_positions": 1})),
    "proportional": scaling("half", kind="proportional", factor=2.0, pairs=2),
}


def facts(name: str) -> architectures.Architecture:
    """A base or a variant."""
    base = "llama3" if name in VARIANTS else name
    value = json.loads((BASES / f"{base}.architecture.json").read_text("utf-8"))
    if name in VARIANTS:
        VARIANTS[name](value, value["layer_kinds"]["full"], value["layer_kinds"]["sliding"])
    return parse_architecture(json.dumps(value).encode("ascii"))


def test_bases_and_variants_have_every_choice() -> None:
    documents = [json.loads(facts(name).to_bytes()) for name in ("gpt2", "llama3", *VARIANTS)]
    kinds = [kind for document in documents for kind in document["layer_kinds"].values()]
    positions = [kind["attention"]["position"] for kind in kinds]
    norms = [kind["attention"]["query_key_norm"] for kind in kinds if kind["attention"]["query_key_norm"]]
    assert {kind["placement"] for kind in kinds} == set(norms.PLACEMENTS)
    assert {kind["mlp"]["activation"] for kind in kinds} == set(feedforward.ACTIVATIONS)
    assert {kind["norm"]["kind"] for kind in kinds} == set(norms.NORM_KINDS)
    assert {its["width"] for its in norms} == set(attention.QUERY_KEY_WIDTHS)
    assert {position["kind"] for position in positions} == {"none", "rotary", "alibi"}
    assert {position.get("layout", "half") for position in positions} == set(rotary.ROTARY_LAYOUTS)
    assert {position.get("scaling", {"kind": "none"})["kind"] for position in positions} == {*rotary.SCALINGS}
    assert {document["embedding"]["position"]["kind"] for document in documents} == {"none", "learned", "sinusoidal"}


# Tensors and equations: computed as decoder.md says, in Python's own floats, and held against the decoder.


@pytest.mark.rule("SB-C-018", "SB-C-021")
@pytest.mark.parametrize("name", ["gpt2", "llama3", *VARIANTS])
def test_tensors_are_those_of_the_table(name: str) -> None:
    section = SPEC["decoder.md"].partition("\n## Tensors\n")[2]
    rows = re.findall(r"^\| (.*?) \| `(.*?)` \| \[(.*?)\] \| (.*?) \|$", section, flags=re.MULTILINE)
    shapes = re.findall(r"^\| `(\w+)` \| .* \| \[(.*?)\] \| \[(.*?)\] \|$", SPEC["decoder.md"], flags=re.MULTILINE)
    widths = {width: {"query_norm": query, "key_norm": key} for width, query, key in shapes}
    assert widths.keys() == set(attention.QUERY_KEY_WIDTHS)
    architecture = facts(name)
    embedding, head = architecture.embedding, architecture.head
    for layer, kind_name in enumerate(architecture.layers):
        kind = architecture.layer_kinds[kind_name]
        sizes = architecture_sizes(architecture, kind)
        own = kind.attention.query_key_norm
        for unit, title in (("embedding", "embedding"), (architecture.layer_unit(layer), "layer i"), ("head", "head")):
            there = {
                "always": True,
                "positions are learned": isinstance(embedding.position, positions.Learned),
                "token_size isn't hidden_size": embedding.token_size != architecture.hidden_size,
                "the embedding has a norm": embedding.norm is not None,
                "qkv_bias": kind.attention.qkv_bias,
                "query_key_norm": own is not None,
                "sinks": kind.attention.sinks,
                "output_bias": kind.attention.output_bias,
                "gated": kind.mlp.gated,
                "mlp has biases": kind.mlp.bias,
                "gated, and mlp has biases": kind.mlp.gated and kind.mlp.bias,
                "activation is xielu": kind.mlp.activation == "xielu",
                "the head has a norm": head.norm is not None,
                "the head isn't tied": not head.tied,
                "the head has a bias": head.bias,
            }
            expected = {}
            for group, tensor, shape, condition in rows:
                module, part = tensor.split(".")[-2:]
                placements = re.findall(r"[a-z_]+", condition.removeprefix("placement "))
                wanted = kind.placement in placements if condition.startswith("placement ") else there[condition]
                if group.strip("`") != title or not wanted:
                    continue
                if module in ("query_norm", "key_norm") and own is not None:
                    its: norms.Norm | None = own.norm
                    shape = widths[own.width][module]
                else:
                    its = {"embedding": embedding.norm, "layer i": kind.norm, "head": head.norm}[title]
                if module.endswith("norm") and its is not None and not (its.affine if part == "weight" else its.bias):
                    continue
                expected[tensor.replace("layers.i.", f"layers.{layer}.")] = tuple(map(sizes, shape.split(", ")))
            assert list(architecture.unit_tensors()[unit].items()) == list(expected.items())


def architecture_sizes(architecture: architectures.Architecture, kind: architectures.LayerKind) -> Callable[[str], int]:
    """What a dimension in the table is: a name, a number, a product or a sum."""
    position = architecture.embedding.position
    named = {
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "token_size": architecture.embedding.token_size,
        "count": position.count if isinstance(position, positions.Learned) else 0,
        "offset": position.offset if isinstance(position, positions.Learned) else 0,
        "heads": kind.attention.heads,
        "kv_heads": kind.attention.kv_heads,
        "head_dim": kind.attention.head_dim,
        "intermediate_size": kind.mlp.intermediate_size,
        "1": 1,
    }
    return lambda size: sum(math.prod(named[factor] for factor in term.split("·")) for term in size.split(" + "))


Vector = list[float]


def added(x: Vector, y: Vector) -> Vector:
    return [a + b for a, b in zip(x, y, strict=True)]


def sees(facts_: dict[str, Any], p: int, j: int) -> bool:
    """SB-C-009, for j up to p."""
    if facts_["window"] is not None:
        return j > p - int(facts_["window"])
    return facts_["chunk"] is None or j // facts_["chunk"] == p // facts_["chunk"]


def times(factor: float, x: Vector) -> Vector:
    return [factor * a for a in x]


def dot(x: Vector, y: Vector) -> float:
    return float(sum(map(mul, x, y)))


class Reference:
    """A row of tokens through decoder.md, number by number: a call at a time, with what came before."""

    def __init__(self, architecture: architectures.Architecture, tensors: dict[str, torch.Tensor]) -> None:
        self.document = json.loads(architecture.to_bytes())
        self.tensors = {name: tensor.double().tolist() for name, tensor in tensors.items()}
        self.past = 0
        self.seen: dict[str, list[tuple[list[Vector], list[Vector]]]] = {}
        """For each layer, the keys and values of each position's heads."""

    def linear(self, name: str, x: Vector) -> Vector:
        product = [dot(row, x) for row in self.tensors[f"{name}.weight"]]
        return added(product, self.tensors.get(f"{name}.bias", [0.0] * len(product)))

    def norm(self, name: str, norm: dict[str, Any], x: Vector) -> Vector:
        weight = self.tensors.get(f"{name}.weight")
        return self.normalise(norm, x, weight, self.tensors.get(f"{name}.bias"))

    def normalise(self, norm: dict[str, Any], x: Vector, weight: Vector | None, bias: Vector | None) -> Vector:
        """SB-C-005, SB-C-006."""
        n = len(x)
        assert (weight is not None, bias is not None) == (norm["affine"], norm["bias"])
        weight = [1.0] * n if weight is None else [w + norm["weight_offset"] for w in weight]
        mean = sum(x) / n if norm["kind"] == "layer_norm" else 0.0
        spread = math.sqrt(sum((a - mean) ** 2 for a in x) / n + norm["eps"])
        scaled = [w * (a - mean) / spread for w, a in zip(weight, x, strict=True)]
        return scaled if bias is None else added(scaled, bias)

    def rotate(self, x: Vector, p: int, n: int, position: dict[str, Any]) -> Vector:
        """SB-C-011 and SB-C-030, in a row of length n."""
        if position["kind"] != "rotary":
            return x
        result, half = list(x), position["dim"] // 2
        factor = position["scaling"].get("attention_factor", 1.0)
        for i in range(half):
            u, v = (i, i + half) if position["layout"] == "half" else (2 * i, 2 * i + 1)
            angle = p * frequency(position, i, n)
            cos, sin = factor * math.cos(angle), factor * math.sin(angle)
            result[u] = x[u] * cos - x[v] * sin
            result[v] = x[v] * cos + x[u] * sin
        return result

    def heads(self, name: str, part: str, facts_: dict[str, Any], x: Vector, p: int, n: int) -> list[Vector]:
        """A position's queries, keys or values, by heads: SB-C-008 with SB-C-020, SB-C-021 and SB-C-022."""
        own, width, norm_name = facts_["query_key_norm"], facts_["head_dim"], f"{name}.{part}_norm"
        y = self.linear(f"{name}.{part}", x)
        if facts_["clip"] is not None:
            y = [max(-facts_["clip"], min(facts_["clip"], a)) for a in y]
        if part != "value" and own and own["width"] == "full":
            y = self.norm(norm_name, own["norm"], y)
        pieces = [y[start : start + width] for start in range(0, len(y), width)]
        if part == "value":
            return pieces

        def normed() -> list[Vector]:
            weight, bias = (self.tensors.get(f"{norm_name}.{which}") for which in ("weight", "bias"))
            several = own["width"] == "heads"
            return [
                self.normalise(own["norm"], piece, *(it[h] if several and it else it for it in (weight, bias)))
                for h, piece in enumerate(pieces)
            ]

        if own and own["width"] != "full" and not own["after_rotation"]:
            pieces = normed()
        pieces = [self.rotate(piece, p, n, facts_["position"]) for piece in pieces]
        if own and own["after_rotation"]:
            pieces = normed()
        temperature = facts_["query_temperature"]
        if part == "query" and temperature:
            growth = 1 + temperature["beta"] * math.log(
                1 + (p + temperature["offset"]) // temperature["original_positions"]
            )
            pieces = [times(growth, piece) for piece in pieces]
        return pieces

    def attention(self, name: str, facts_: dict[str, Any], rows: list[Vector]) -> list[Vector]:
        n, groups = self.past + len(rows), facts_["heads"] // facts_["kv_heads"]
        seen = self.seen.setdefault(name, [])
        for p, x in enumerate(rows, self.past):
            key, value = (self.heads(name, part, facts_, x, p, n) for part in ("key", "value"))
            seen.append((key, value))
        results = []
        for p, x in enumerate(rows, self.past):
            queries = self.heads(name, "query", facts_, x, p, n)
            y: Vector = []
            for h, query in enumerate(queries):
                visible = [j for j in range(p + 1) if sees(facts_, p, j)]
                scores = [self.score(facts_, h, query, seen[j][0][h // groups], p, j) for j in visible]
                powers = [math.exp(s - max(scores)) for s in scores]
                whole = sum(powers)
                if facts_["sinks"]:
                    whole += math.exp(self.tensors[f"{name}.sinks"][h] - max(scores))
                mixed = [times(a / whole, seen[j][1][h // groups]) for a, j in zip(powers, visible, strict=True)]
                y += [sum(channel) for channel in zip(*mixed, strict=True)]
            results.append(self.linear(f"{name}.output", y))
        return results

    def score(self, facts_: dict[str, Any], h: int, query: Vector, key: Vector, p: int, j: int) -> float:
        """SB-C-009, SB-C-023 and SB-C-024."""
        score, cap, position = float(facts_["scale"] * dot(query, key)), facts_["logit_cap"], facts_["position"]
        if cap is not None:
            score = cap * math.tanh(score / cap)
        if position["kind"] == "alibi":
            score += position["multiplier"] * slope(h, facts_["heads"], position["max_bias"]) * (j - p)
        return score

    def mlp(self, name: str, mlp: dict[str, Any], x: Vector) -> Vector:
        learned = [self.tensors.get(f"{name}.activation.{which}", [0.0])[0] for which in ("alpha_p", "alpha_n")]
        up = self.linear(f"{name}.up", x)
        if not mlp["gated"]:
            return self.linear(f"{name}.down", [activate(mlp["activation"], a, *learned) for a in up])
        gate = [activate(mlp["activation"], a, *learned) for a in self.linear(f"{name}.gate", x)]
        return self.linear(f"{name}.down", [a * b for a, b in zip(gate, up, strict=True)])

    def layer(self, at: str, kind: dict[str, Any], rows: list[Vector]) -> list[Vector]:
        """SB-C-004."""
        r, how = kind["residual_multiplier"], kind["placement"]

        def attention(rows: list[Vector]) -> list[Vector]:
            return self.attention(f"{at}.attention", kind["attention"], rows)

        def mlp(rows: list[Vector]) -> list[Vector]:
            return [self.mlp(f"{at}.mlp", kind["mlp"], x) for x in rows]

        def normed(name: str, rows: list[Vector]) -> list[Vector]:
            return [self.norm(f"{at}.{name}", kind["norm"], x) for x in rows]

        def scaled_sum(rows: list[Vector], *terms: list[Vector]) -> list[Vector]:
            for term in terms:
                rows = [added(x, times(r, y)) for x, y in zip(rows, term, strict=True)]
            return rows

        if how in ("parallel", "parallel_two"):
            second = "attention_norm" if how == "parallel" else "mlp_norm"
            return scaled_sum(rows, attention(normed("attention_norm", rows)), mlp(normed(second, rows)))
        for block, name in ((attention, "attention"), (mlp, "mlp")):
            given = block(normed(f"{name}_norm", rows) if how in ("pre", "sandwich") else rows)
            if how == "output":
                given = normed(f"{name}_norm", given)
            if how == "sandwich":
                given = normed(f"{name}_output_norm", given)
            rows = scaled_sum(rows, given)
            if how == "post":
                rows = normed(f"{name}_norm", rows)
        return rows

    def embed(self, token: int, p: int) -> Vector:
        """SB-C-003 and SB-C-019."""
        embedding, size = self.document["embedding"], self.document["hidden_size"]
        position = embedding["position"]
        x = times(embedding["multiplier"], self.tensors["embedding.token.weight"][token])
        if embedding["token_size"] != size:
            x = self.linear("embedding.projection", x)
        if position["kind"] == "learned":
            x = added(x, self.tensors["embedding.position.weight"][p + position["offset"]])
        if position["kind"] == "sinusoidal":
            half = size // 2
            angles = [(p + position["offset"]) * 10000 ** (-i / (half - 1)) for i in range(half)]
            x = added(x, [*map(math.sin, angles), *map(math.cos, angles), *([0.0] * (size % 2))])
        return x if embedding["norm"] is None else self.norm("embedding.norm", embedding["norm"], x)

    def logits(self, x: Vector) -> Vector:
        """SB-C-017."""
        head, size = self.document["head"], self.document["hidden_size"]
        if head["norm"] is not None:
            x = self.norm("head.norm", head["norm"], x)
        if self.document["embedding"]["token_size"] != size:
            x = self.linear("head.narrowing", x)
        if head["tied"]:
            self.tensors["head.projection.weight"] = self.tensors["embedding.token.weight"]
        x = times(head["multiplier"], self.linear("head.projection", x))
        return x if head["logit_cap"] is None else [head["logit_cap"] * math.tanh(a / head["logit_cap"]) for a in x]

    def run(self, ids: list[int]) -> list[list[Vector]]:
        """A call: the hidden states before and after each layer, and the logits."""
        rows = [self.embed(token, p) for p, token in enumerate(ids, self.past)]
        states = [rows]
        for layer, name in enumerate(self.document["layers"]):
            rows = self.layer(f"layers.{layer}", self.document["layer_kinds"][name], rows)
            states.append(rows)
        self.past += len(ids)
        return [*states, [self.logits(x) for x in rows]]


def slope(h: int, heads: int, max_bias: float) -> float:
    """SB-C-024."""
    if heads & (heads - 1) == 0:
        return float(2 ** (-max_bias * (h + 1) / heads))
    n = 1
    while n < heads:
        n *= 2
    order = [*range(2, n + 1, 2), *range(1, n + 1, 2)]
    return float(2 ** (-max_bias * order[h] / n))


def frequency(position: dict[str, Any], i: int, n: int = 0) -> float:
    """SB-C-012 to SB-C-014 and SB-C-026 to SB-C-029, in a row of length n."""
    base, dim, scaling = position["base"], position["dim"], position["scaling"]
    s, c = scaling.get("factor", 1.0), scaling.get("original_positions", 1)
    if scaling["kind"] == "dynamic":
        base *= (s * max(n, c) / c - (s - 1)) ** (dim / (dim - 2))
    f = float(base ** (-2 * i / dim))
    if scaling["kind"] == "linear":
        return f / float(s)
    if scaling["kind"] == "proportional":
        return f / float(s) if i < scaling["pairs"] else 0.0
    if scaling["kind"] == "longrope":
        return f / float(scaling["long_factors" if n > c else "short_factors"][i])
    if scaling["kind"] == "yarn":
        low, high = (
            dim * math.log(c / (2 * math.pi * scaling[beta])) / (2 * math.log(base))
            for beta in ("beta_fast", "beta_slow")
        )
        if scaling["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        share = min(1.0, max(0.0, (i - low) / (high - low)))
        return float(share * f / s + (1 - share) * f)
    if scaling["kind"] == "llama3":
        low, high = scaling["low_frequency_factor"], scaling["high_frequency_factor"]
        wavelength = 2 * math.pi / f
        if wavelength > c / low:
            return float(f / s)
        if wavelength >= c / high:
            r = (c / wavelength - low) / (high - low)
            return float((1 - r) * f / s + r * f)
    return f


def activate(name: str, x: float, alpha_p: float = 0.0, alpha_n: float = 0.0) -> float:
    """SB-C-016."""

    def xielu() -> float:
        if x > 0:
            return math.log(1 + math.exp(alpha_p)) * x**2 + 0.5 * x
        return (0.5 + math.log(1 + math.exp(alpha_n))) * (math.expm1(min(x, -1e-6)) - x) + 0.5 * x

    value: float = {
        "silu": lambda: x / (1 + math.exp(-x)),
        "gelu": lambda: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda: max(x, 0.0),
        "relu_squared": lambda: max(x, 0.0) ** 2,
        "xielu": xielu,
    }[name]()
    return value


class Runtime:
    """The runtime's embedding, layers and head over some tensors, a call at a time as a stage makes it."""

    def __init__(self, architecture: architectures.Architecture, tensors: dict[str, torch.Tensor]) -> None:
        def load(module: torch.nn.Module, prefix: str) -> Any:
            names = module.state_dict()
            module.load_state_dict({key: tensors[f"{prefix}.{key}"] for key in names}, assign=True)
            return module

        self.architecture, self.table = architecture, tensors["embedding.token.weight"]
        self.embedding = load(Embedding(architecture, embeds=True), "embedding")
        self.layers = [
            load(Layer(architecture.kind_of(i), architecture.hidden_size, i), f"layers.{i}")
            for i in range(len(architecture.layers))
        ]
        self.head = load(Head(architecture), "head")

    def cache(self, rows: int) -> KVCache:
        layers = (0, len(self.layers))
        return KVCache(self.architecture, layers, rows, LENGTH, torch.device("cpu"), torch.float32)

    def run(
        self, ids: torch.Tensor, cache: KVCache | None = None, count: list[int] | None = None
    ) -> list[torch.Tensor]:
        """A call: the hidden states before and after each layer, and the logits. *Shape:* each (batch, sequence, …)."""
        rows, length = ids.shape
        past = [0] * rows if cache is None else cache.filled
        positions = Positions(past, count or [length] * rows, length, torch.device("cpu"), torch.float32)
        if cache is not None:
            cache.check(positions)
        with torch.no_grad():
            x = self.embedding(ids, positions)
            states = [x]
            for layer in self.layers:
                x = layer(x, positions, cache)
                states.append(x)
            if cache is not None:
                cache.advance(positions)
            return [*states, self.head(x, self.table)]


def made(architecture: architectures.Architecture) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors, and two rows of token ids."""
    generator = torch.Generator().manual_seed(11)
    shapes = {tensor: shape for unit in architecture.unit_tensors().values() for tensor, shape in unit.items()}
    # Large enough that whatever is left out, swapped or taken twice moves the result.
    tensors = {
        tensor: torch.randn(shape, generator=generator)
        * (0.5 if "norm" in tensor or len(shape) == 1 else 1)
        / (1 if "norm" in tensor or len(shape) == 1 else math.sqrt(shape[-1]))
        for tensor, shape in shapes.items()
    }
    return tensors, torch.randint(architecture.vocab_size, (2, LENGTH), generator=generator)


def close(got: torch.Tensor, expected: list[Vector]) -> bool:
    """SB-C-001."""
    reference = torch.tensor(expected, dtype=torch.float64)
    return bool((got.double() - reference).abs().max() <= 1e-5 * reference.abs().max())


@pytest.mark.rule(
    "SB-C-001",
    "SB-C-002",
    "SB-C-003",
    "SB-C-004",
    "SB-C-005",
    "SB-C-006",
    "SB-C-008",
    "SB-C-009",
    "SB-C-010",
    "SB-C-011",
    "SB-C-013",
    "SB-C-014",
    "SB-C-015",
    "SB-C-016",
    "SB-C-017",
    "SB-C-019",
    "SB-C-020",
    "SB-C-021",
    "SB-C-022",
    "SB-C-023",
    "SB-C-032",
    "SB-C-024",
    "SB-C-026",
    "SB-C-027",
    "SB-C-028",
    "SB-C-029",
    "SB-C-030",
)
@pytest.mark.parametrize("name", ["gpt2", "llama3", *VARIANTS])
def test_the_decoder_computes_what_the_text_says(name: str) -> None:
    architecture = facts(name)
    tensors, ids = made(architecture)
    expected = Reference(architecture, tensors).run(ids[0].tolist())
    for got, reference in zip(Runtime(architecture, tensors).run(ids[:1]), expected, strict=True):
        assert close(got[0], reference)


@pytest.mark.rule("SB-C-025", "SB-B-004", "SB-B-006")
@pytest.mark.parametrize("name", ["llama3", *VARIANTS])
@pytest.mark.parametrize(
    "counts",
    [
        pytest.param([(5, 5), (1, 1), (2, 2), (1, 1), (3, 3)], id="rows alike"),
        # Row 0 grows past THRESHOLD in the second call, row 1 in the third, which brings row 0 nothing.
        pytest.param([(7, 2), (4, 5), (0, 3), (1, 1)], id="rows of their own"),
    ],
)
def test_calls_with_a_cache_compute_what_the_text_says(name: str, counts: list[tuple[int, int]]) -> None:
    architecture = facts(name)
    tensors, ids = made(architecture)
    runtime, references = Runtime(architecture, tensors), [Reference(architecture, tensors) for _ in range(2)]
    cache = runtime.cache(2)
    for call in counts:
        length = max(call)
        brought = [row[start : start + n].tolist() for row, start, n in zip(ids, cache.filled, call, strict=True)]
        padded = torch.tensor([[*tokens, *([0] * (length - len(tokens)))] for tokens in brought])
        states = runtime.run(padded, cache, list(call))
        for row, tokens in enumerate(brought):
            if tokens:
                for got, reference in zip(states, references[row].run(tokens), strict=True):
                    assert close(got[row, : len(tokens)], reference)
    assert cache.filled == [list(accumulate(row))[-1] for row in zip(*counts, strict=True)]


@pytest.mark.rule("SB-C-031", "SB-B-008", "SB-B-011")
@pytest.mark.parametrize("name", ["dynamic", "longrope", "yarn"])
def test_rolling_back_across_a_change_of_scale_is_refused(name: str) -> None:
    runtime = Runtime(facts(name), made(facts(name))[0])
    ids = made(facts(name))[1]

    def filled(*lengths: int) -> tuple[KVCache, Session]:
        cache = runtime.cache(2)
        runtime.run(ids[:, : max(lengths)], cache, list(lengths))
        session = Session([cache], 2, LENGTH)
        session.past = list(lengths)
        return cache, session

    cache, _ = filled(LENGTH - 1, THRESHOLD)
    for past in range(LENGTH):
        positions = Positions([past, 3], [1, 1], 1, torch.device("cpu"), torch.float32)
        # Row 0 is longer than the threshold, row 1 isn't.
        if name == "yarn" or past == 0 or past > THRESHOLD:
            cache.check(positions)
        else:
            with pytest.raises(BundleError, match=r"session\.rollback"):
                cache.check(positions)
    assert cache.filled == [LENGTH - 1, THRESHOLD]
    for back in ([LENGTH - 1, THRESHOLD], [2, 5], [0, 1]):
        _, session = filled(LENGTH - 1, THRESHOLD)
        session.rollback(back)
        assert session.past == [LENGTH - 1 - back[0], THRESHOLD - back[1]]
    if name != "yarn":
        _, session = filled(LENGTH - 1, THRESHOLD)
        with pytest.raises(BundleError, match=r"session\.rollback"):
            session.rollback([LENGTH - 1 - THRESHOLD, 0])
        assert session.past == [LENGTH - 1, THRESHOLD]


@pytest.mark.rule("SB-M-087", "SB-M-080")
def test_a_source_tensor_is_put_together_by_groups() -> None:
    query, key, value = torch.arange(8), torch.arange(100, 104), torch.arange(200, 204)
    entry = SourceName(source="s", tensors=("q", "k", "v"), groups=2, transposed=False)
    tensors = {name: rows.reshape(-1, 1).expand(-1, 3) for name, rows in zip("qkv", (query, key, value), strict=True)}
    got = join(entry, tensors.__getitem__)["s"]
    assert got[:, 1].tolist() == [0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203]


@pytest.mark.rule("SB-M-088")
def test_source_tensors_that_are_rows() -> None:
    entry = SourceName(source="s.{row}.weight", tensors=("q",), groups=1, transposed=False)
    got = join(entry, {"q": torch.arange(6).reshape(3, 2)}.__getitem__)
    assert {name: row.tolist() for name, row in got.items()} == {
        "s.0.weight": [0, 1],
        "s.1.weight": [2, 3],
        "s.2.weight": [4, 5],
    }


@pytest.mark.rule("SB-C-016")
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_the_formulas(name: str) -> None:
    x = torch.linspace(-12, 12, 481, dtype=torch.float64)
    expected = torch.tensor([activate(name, value) for value in x.tolist()], dtype=torch.float64)
    assert torch.allclose(ACTIVATIONS[name](x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.rule("SB-C-016")
def test_xielu_is_the_formula() -> None:
    module = Xielu()
    module.load_state_dict(
        {name: torch.tensor([value], dtype=torch.float64) for name, value in (("alpha_p", 0.3), ("alpha_n", -1.2))},
        assign=True,
    )
    x = torch.cat((torch.linspace(-12, 12, 480), torch.tensor([0.0, 1e-7, -1e-7, -1e-6, -2e-6]))).double()
    expected = torch.tensor([activate("xielu", value, 0.3, -1.2) for value in x.tolist()], dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(module(x), expected, rtol=1e-12, atol=1e-16)


LONG_FACTORS = tuple(1.0 + i / 2 for i in range(64))
SCALED: dict[str, rotary.Scaling] = {
    "none": rotary.Unscaled(),
    "linear": rotary.Linear(factor=4.0),
    "llama3": rotary.Llama3(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=8192),
    "dynamic": rotary.Dynamic(factor=2.0, original_positions=8192),
    "yarn": rotary.Yarn(
        factor=4.0,
        original_positions=8192,
        beta_fast=32.0,
        beta_slow=1.0,
        truncate=True,
        attention_factor=1.1386294361119891,
    ),
    "longrope": rotary.LongRope(
        original_positions=8192, short_factors=(1.0,) * 64, long_factors=LONG_FACTORS, attention_factor=1.19
    ),
    "proportional": rotary.Proportional(factor=8.0, pairs=16),
}


@pytest.mark.rule(
    "SB-C-012", "SB-C-013", "SB-C-014", "SB-C-026", "SB-C-027", "SB-C-028", "SB-C-029", "SB-C-030", "SB-C-025"
)
@pytest.mark.parametrize("scaling", rotary.SCALINGS)
@pytest.mark.parametrize("length", [1, 8192, 8193, 100_002])
def test_frequencies_are_the_formulas_in_float32(scaling: str, length: int) -> None:
    position = rotary.Rotary(base=500000.0, dim=128, layout="half", scaling=SCALED[scaling])
    got = frequencies(position, length, torch.device("cpu"))
    assert got.dtype == torch.float32
    document = {"base": 500000.0, "dim": 128, "scaling": asdict(position.scaling)}
    expected = torch.tensor([frequency(document, i, length) for i in range(64)], dtype=torch.float64)
    assert torch.allclose(got.double(), expected, rtol=4e-6, atol=0)
    # Positions and products are float32 too, even where a stage computes in 16 bits: only cos and sin are rounded.
    row = Positions([length - 1], [1], 1, torch.device("cpu"), torch.bfloat16)
    cos, sin = row.rotary(position)
    angles = (torch.tensor(float(length - 1)) * got)[None, None, None]
    factor = getattr(position.scaling, "attention_factor", 1.0)
    assert torch.equal(cos, (angles.cos() * factor).bfloat16().repeat(1, 1, 1, 2))
    assert torch.equal(sin[..., 64:], (angles.sin() * factor).bfloat16())
    assert torch.equal(sin[..., :64], -sin[..., 64:])


@pytest.mark.rule("SB-C-012", "SB-C-019", "SB-C-022", "SB-C-024")
@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
def test_tables_of_positions_are_computed_in_float32_and_then_rounded(default: torch.dtype) -> None:
    alibi = positions.Alibi(max_bias=8.0, multiplier=0.3)
    temperature = positions.QueryTemperature(beta=0.1, original_positions=3, offset=0)

    def tables(dtype: torch.dtype) -> list[torch.Tensor]:
        far = Positions([70_001], [5], 5, torch.device("cpu"), dtype)
        turned = [
            part
            for scaling in SCALED.values()
            for part in far.rotary(rotary.Rotary(base=500000.0, dim=128, layout="half", scaling=scaling))
        ]
        return [
            far.sinusoids(2, 30),
            far.temperature(temperature),
            far.biased_mask(alibi, 6, AttentionSpan(40, None))[1],
            *turned,
        ]

    exact = tables(torch.float32)
    angles = [70_003 * math.exp(i * -math.log(10000.0) / 14) for i in range(15)]
    assert exact[0][0, 0].tolist() == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=0.02)
    assert exact[1].flatten().tolist() == pytest.approx([1 + 0.1 * math.log(1 + p // 3) for p in range(70_001, 70_006)])
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        rounded = tables(torch.bfloat16)
    finally:
        torch.set_default_dtype(before)
    for wide, narrow in zip(exact, rounded, strict=True):
        assert wide.dtype == torch.float32
        assert torch.equal(wide.bfloat16(), narrow)


@pytest.mark.rule("SB-C-007")
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_an_offset_is_added_in_float32(kind: str) -> None:
    norm = Norm(norms.Norm(kind=kind, eps=1e-6, affine=True, weight_offset=1.0, bias=kind == "layer_norm"), 64)
    generator = torch.Generator().manual_seed(2)
    # In bfloat16, 1 + w is 1 for these weights.
    small = {name: torch.full((64,), 2.0**-10, dtype=torch.bfloat16) for name in norm.state_dict()}
    norm.load_state_dict(small, assign=True)
    x = torch.randn(8, 64, generator=generator).bfloat16()
    with torch.no_grad():
        got = norm(x)
        mean = x.double().mean(-1, keepdim=True) if kind == "layer_norm" else 0.0
        centred = x.double() - mean
        exact = (1 + 2.0**-10) * centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    exact = exact + 2.0**-10 if kind == "layer_norm" else exact
    assert got.dtype == torch.bfloat16
    lost = (exact / (1 + 2.0**-10)).bfloat16() if kind == "rms_norm" else None
    assert (got != exact.bfloat16()).float().mean() < 0.02  # a tie that falls to the other side
    assert lost is None or (got != lost).float().mean() > 0.05
