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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import splitbundle_schemas
from splitbundle import architecture as architectures
from splitbundle import architecture_parser, manifest_parser
from splitbundle.errors import BundleError
from splitbundle.torch_decoder import ACTIVATIONS, Embedding, Head, Layer, Norm
from splitbundle.torch_positions import Positions, frequencies

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SPEC = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "spec" / "v1").glob("*.md"))}
RULE = r"SB-[A-Z]-\d{3}"
KINDS = ("manifest", "architecture")


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
    noting = name in {"add", "refuse", "_refuse", "_refused", "_problem", "_Refused"}
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
    ("decoder.md", "layer_kinds.NAME", ""): "/layer_kinds/full",
    ("decoder.md", "layer_kinds.NAME.norm", ""): "/layer_kinds/full/norm",
    ("decoder.md", "layer_kinds.NAME.attention", ""): "/layer_kinds/full/attention",
    ("decoder.md", "layer_kinds.NAME.attention.position", "rotary"): "/layer_kinds/full/attention/position",
    ("decoder.md", "layer_kinds.NAME.attention.position.scaling", "linear"): (
        "/layer_kinds/full/attention/position/scaling"
    ),
    ("decoder.md", "layer_kinds.NAME.attention.position.scaling", "llama3"): (
        "/layer_kinds/full/attention/position/scaling"
    ),
    ("decoder.md", "layer_kinds.NAME.mlp", ""): "/layer_kinds/full/mlp",
    ("decoder.md", "head", ""): "/head",
}
"""Each table of fields, and an object that it describes."""


def example(file: str, kind: str) -> tuple[str, Any]:
    """The document of a base that has what a table describes."""
    document = "manifest" if file == "bundle.md" else "architecture"
    name = "gpt2" if document == "manifest" or kind == "learned" else "llama3"
    value = json.loads((TESTS / "conformance" / "bases" / f"{name}.{document}.json").read_text("utf-8"))
    if kind == "linear":
        value["layer_kinds"]["full"]["attention"]["position"]["scaling"] = {"kind": "linear", "factor": 2.0}
    return document, value


def test_every_table_is_known() -> None:
    assert tables().keys() == WHERE.keys()


@pytest.mark.rule("SB-M-001", "SB-A-001", "SB-V-007", "SB-V-008")
@pytest.mark.parametrize("table", WHERE, ids=lambda table: " ".join(table).strip())
def test_prose_schema_and_parser_have_the_same_fields(table: tuple[str, str, str]) -> None:
    file, _, kind = table
    pointer, fields = WHERE[table], tables()[table]
    document, value = example(file, kind)
    owner, key = None, ""
    found = value
    for token in pointer.split("/")[1:]:
        owner, key = found, token
        found = found[int(token)] if isinstance(found, list) else found[token]
    # In canonical form, the prose has the order of the members.
    assert list(found) == fields
    assert schema_fields(document, found, pointer) == set(fields)
    # The parser names every field of an object that has none (of a union, none but its kind).
    bare = {"kind": kind} if kind else {}
    if owner is None:
        value = bare
    else:
        owner[int(key) if isinstance(owner, list) else key] = bare
    problems = parser_problems(document, value)
    missing = {p.expected for p in problems if p.code == "field.missing" and p.pointer == pointer}
    asked = {re.sub(r"a field '(.*)'", r"\1", text) for text in missing}
    # format, format_version and requires are asked for first, and alone.
    assert asked | bare.keys() == (
        {"format", "format_version", "requires"} if document == "manifest" and not pointer else set(fields)
    )


def schema_fields(document: str, found: dict[str, Any], pointer: str) -> set[str]:
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

    instance: Any = example("bundle.md" if document == "manifest" else "decoder.md", str(found.get("kind", "")))[1]
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
        (manifest_parser if document == "manifest" else architecture_parser).parse(data)
    return raised_.value.problems


# The worked example.


@pytest.mark.rule("SB-I-001", "SB-I-002", "SB-I-003", "SB-D-010")
def test_the_worked_example_can_be_recomputed(tmp_path: Path) -> None:
    section = SPEC["bundle.md"].partition("\n### Worked example\n")[2].partition("\n## ")[0]
    sums, shell = re.findall(r"^```(?:sh)?\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    digests = dict(reversed(line.split("  ")) for line in sums.splitlines())
    assert list(digests) == sorted(digests)
    bases = TESTS / "conformance" / "bases"
    for kind in KINDS:
        data = (bases / f"gpt2.{kind}.json").read_bytes()
        assert digests[f"{kind}.json"] == hashlib.sha256(data).hexdigest()
        (tmp_path / f"{kind}.json").write_bytes(data)
    manifest = manifest_parser.parse((bases / "gpt2.manifest.json").read_bytes())
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


@pytest.mark.rule("SB-C-018")
def test_tensors_are_those_of_the_table() -> None:
    section = SPEC["decoder.md"].partition("\n## Tensors\n")[2]
    rows = re.findall(r"^\| (.*?) \| `(.*?)` \| \[(.*?)\] \| (.*?) \|$", section, flags=re.MULTILINE)
    for architecture in (facts("gpt2"), facts("llama3"), variant()):
        for layer, name in enumerate(architecture.layers):
            kind = architecture.layer_kinds[name]
            sizes = architecture_sizes(architecture, kind)
            for unit, title in (
                ("embedding", "embedding"),
                (architecture.layer_unit(layer), "layer i"),
                ("head", "head"),
            ):
                norm = architecture.head.norm if unit == "head" else kind.norm
                there = {
                    "always": True,
                    "positions are learned": isinstance(architecture.embedding.position, architectures.Learned),
                    "norm has a bias": norm.bias,
                    "qkv_bias": kind.attention.qkv_bias,
                    "output_bias": kind.attention.output_bias,
                    "gated": kind.mlp.gated,
                    "mlp has biases": kind.mlp.bias,
                    "gated, and mlp has biases": kind.mlp.gated and kind.mlp.bias,
                    "the head isn't tied": not architecture.head.tied,
                }
                expected = {
                    tensor.replace("layers.i.", f"layers.{layer}."): tuple(
                        math.prod(sizes[factor] for factor in size.split("·")) for size in shape.split(", ")
                    )
                    for group, tensor, shape, condition in rows
                    if group.strip("`") == title and there[condition]
                }
                assert list(architecture.unit_tensors()[unit].items()) == list(expected.items())


def facts(name: str) -> architectures.Architecture:
    return architecture_parser.parse((TESTS / "conformance" / "bases" / f"{name}.architecture.json").read_bytes())


def variant() -> architectures.Architecture:
    """What neither base has: linear scaling, an offset, biases of a gated MLP, a window without rotation."""
    value = json.loads((TESTS / "conformance" / "bases" / "llama3.architecture.json").read_text("utf-8"))
    norm = {"kind": "layer_norm", "eps": 0.01, "weight_offset": 1.0, "bias": True}
    full, sliding = value["layer_kinds"]["full"], value["layer_kinds"]["sliding"]
    full["norm"] = norm
    full["attention"] |= {"kv_heads": 1, "output_bias": True, "qkv_bias": False, "scale": 0.2}
    full["attention"]["position"] |= {"base": 10000.0, "dim": 8, "scaling": {"kind": "linear", "factor": 4.0}}
    full["mlp"] |= {"bias": True, "activation": "gelu"}
    sliding["norm"]["weight_offset"] = 1.0
    sliding["attention"] |= {"window": 3, "position": {"kind": "none"}}
    sliding["mlp"] |= {"gated": False, "activation": "relu"}
    value["embedding"]["multiplier"] = 4.898979485566356
    value["head"] = {"norm": norm, "tied": True}
    return architecture_parser.parse(json.dumps(value).encode("ascii"))


def architecture_sizes(architecture: architectures.Architecture, kind: architectures.LayerKind) -> dict[str, int]:
    position = architecture.embedding.position
    return {
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "count": position.count if isinstance(position, architectures.Learned) else 0,
        "heads": kind.attention.heads,
        "kv_heads": kind.attention.kv_heads,
        "head_dim": kind.attention.head_dim,
        "intermediate_size": kind.mlp.intermediate_size,
    }


Vector = list[float]


class Reference:
    """A row of tokens through decoder.md, number by number."""

    def __init__(self, architecture: architectures.Architecture, tensors: dict[str, torch.Tensor]) -> None:
        self.document = json.loads(architecture.to_bytes())
        self.tensors = {name: tensor.tolist() for name, tensor in tensors.items()}

    def linear(self, name: str, x: Vector) -> Vector:
        product = [sum(map(float.__mul__, row, x)) for row in self.tensors[f"{name}.weight"]]
        bias = self.tensors.get(f"{name}.bias")
        return product if bias is None else [a + b for a, b in zip(product, bias, strict=True)]

    def norm(self, name: str, norm: dict[str, Any], x: Vector) -> Vector:
        n = len(x)
        weight = [w + norm["weight_offset"] for w in self.tensors[f"{name}.weight"]]
        bias = self.tensors.get(f"{name}.bias", [0.0] * n)
        mean = sum(x) / n if norm["kind"] == "layer_norm" else 0.0
        spread = math.sqrt(sum((a - mean) ** 2 for a in x) / n + norm["eps"])
        return [w * (a - mean) / spread + b for w, a, b in zip(weight, x, bias, strict=True)]

    def rotate(self, x: Vector, p: int, position: dict[str, Any]) -> Vector:
        if position["kind"] == "none":
            return x
        result, half = list(x), position["dim"] // 2
        for i in range(half):
            angle = p * frequency(position, i)
            cos, sin = math.cos(angle), math.sin(angle)
            result[i] = x[i] * cos - x[i + half] * sin
            result[i + half] = x[i + half] * cos + x[i] * sin
        return result

    def attention(self, name: str, facts_: dict[str, Any], rows: list[Vector]) -> list[Vector]:
        heads, groups, width = facts_["heads"], facts_["heads"] // facts_["kv_heads"], facts_["head_dim"]
        window = facts_["window"] or len(rows)

        def split(part: str, count: int, turned: bool) -> list[list[Vector]]:
            whole = [self.linear(f"{name}.{part}", x) for x in rows]
            pieces = [[y[h * width : (h + 1) * width] for h in range(count)] for y in whole]
            if not turned:
                return pieces
            return [[self.rotate(piece, p, facts_["position"]) for piece in row] for p, row in enumerate(pieces)]

        queries = split("query", heads, True)
        keys, values = split("key", facts_["kv_heads"], True), split("value", facts_["kv_heads"], False)
        results = []
        for p in range(len(rows)):
            y: Vector = []
            for h in range(heads):
                seen = [j for j in range(len(rows)) if j <= p and j > p - window]
                k = h // groups
                scores = [facts_["scale"] * sum(map(float.__mul__, queries[p][h], keys[j][k])) for j in seen]
                powers = [math.exp(s - max(scores)) for s in scores]
                y += [
                    sum(a * values[j][k][d] for a, j in zip(powers, seen, strict=True)) / sum(powers)
                    for d in range(width)
                ]
            results.append(self.linear(f"{name}.output", y))
        return results

    def mlp(self, name: str, mlp: dict[str, Any], x: Vector) -> Vector:
        up = self.linear(f"{name}.up", x)
        if mlp["gated"]:
            gate = [activate(mlp["activation"], a) for a in self.linear(f"{name}.gate", x)]
            return self.linear(f"{name}.down", [a * b for a, b in zip(gate, up, strict=True)])
        return self.linear(f"{name}.down", [activate(mlp["activation"], a) for a in up])

    def run(self, ids: list[int]) -> tuple[list[list[Vector]], list[Vector]]:
        """The hidden states before and after each layer, and the logits."""
        embedding = self.document["embedding"]
        table, positions = self.tensors["embedding.token.weight"], self.tensors.get("embedding.position.weight")
        rows = [[embedding["multiplier"] * a for a in table[token]] for token in ids]
        if positions is not None:
            rows = [[a + b for a, b in zip(x, positions[p], strict=True)] for p, x in enumerate(rows)]
        states = [rows]
        for layer, name in enumerate(self.document["layers"]):
            kind, at = self.document["layer_kinds"][name], f"layers.{layer}"
            normed = [self.norm(f"{at}.attention_norm", kind["norm"], x) for x in rows]
            mixed = self.attention(f"{at}.attention", kind["attention"], normed)
            rows = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(rows, mixed, strict=True)]
            fed = [self.mlp(f"{at}.mlp", kind["mlp"], self.norm(f"{at}.mlp_norm", kind["norm"], x)) for x in rows]
            rows = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(rows, fed, strict=True)]
            states.append(rows)
        head = self.document["head"]
        self.tensors.setdefault("head.projection.weight", table)
        return states, [self.linear("head.projection", self.norm("head.norm", head["norm"], x)) for x in rows]


def frequency(position: dict[str, Any], i: int) -> float:
    f = float(position["base"] ** (-2 * i / position["dim"]))
    scaling = position["scaling"]
    if scaling["kind"] == "linear":
        return f / float(scaling["factor"])
    if scaling["kind"] == "llama3":
        s, low, high = scaling["factor"], scaling["low_frequency_factor"], scaling["high_frequency_factor"]
        c, wavelength = scaling["original_positions"], 2 * math.pi / f
        if wavelength > c / low:
            return float(f / s)
        if wavelength >= c / high:
            r = (c / wavelength - low) / (high - low)
            return float((1 - r) * f / s + r * f)
    return f


def activate(name: str, x: float) -> float:
    return {
        "silu": lambda: x / (1 + math.exp(-x)),
        "gelu": lambda: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda: max(x, 0.0),
    }[name]()


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
)
@pytest.mark.parametrize("name", ["gpt2", "llama3", "variant"])
def test_the_decoder_computes_what_the_text_says(name: str) -> None:
    architecture = variant() if name == "variant" else facts(name)
    generator = torch.Generator().manual_seed(11)
    shapes = {tensor: shape for unit in architecture.unit_tensors().values() for tensor, shape in unit.items()}
    # Large enough that whatever is left out, swapped or taken twice moves the result.
    tensors = {
        tensor: torch.randn(shape, generator=generator) * (0.5 if len(shape) == 1 else shape[-1] ** -0.5)
        for tensor, shape in shapes.items()
    }
    ids = torch.randint(architecture.vocab_size, (12,), generator=generator)
    states, logits = Reference(architecture, tensors).run(ids.tolist())
    got_states, got_logits = _run(architecture, tensors, ids)
    for expected, got in ((logits, got_logits), *zip(states, got_states, strict=True)):
        reference = torch.tensor(expected, dtype=torch.float64)
        assert (got.double() - reference).abs().max() <= 1e-5 * reference.abs().max()


def _run(
    architecture: architectures.Architecture, tensors: dict[str, torch.Tensor], ids: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    positions = Positions([0], [len(ids)], len(ids), torch.device("cpu"), torch.float32)

    def load(module: torch.nn.Module, prefix: str) -> Any:
        names = module.state_dict()
        module.load_state_dict({key: tensors[f"{prefix}.{key}"] for key in names}, assign=True)
        return module

    with torch.no_grad():
        x = load(Embedding(architecture, embeds=True), "embedding")(ids[None], positions)
        states = [x[0]]
        for i in range(len(architecture.layers)):
            x = load(Layer(architecture.kind_of(i), architecture.hidden_size, i), f"layers.{i}")(x, positions, None)
            states.append(x[0])
        return states, load(Head(architecture), "head")(x, tensors["embedding.token.weight"])[0]


@pytest.mark.rule("SB-C-016")
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_the_formulas(name: str) -> None:
    x = torch.linspace(-12, 12, 481, dtype=torch.float64)
    expected = torch.tensor([activate(name, value) for value in x.tolist()], dtype=torch.float64)
    assert torch.allclose(ACTIVATIONS[name](x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.rule("SB-C-012", "SB-C-013", "SB-C-014")
@pytest.mark.parametrize("scaling", ["none", "linear", "llama3"])
def test_frequencies_are_the_formulas_in_float32(scaling: str) -> None:
    choices: dict[str, architectures.Scaling] = {
        "none": architectures.Unscaled(),
        "linear": architectures.Linear(factor=4.0),
        "llama3": architectures.Llama3(
            factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=8192
        ),
    }
    rotary = architectures.Rotary(base=500000.0, dim=128, layout="half", scaling=choices[scaling])
    document = {"base": 500000.0, "dim": 128, "scaling": {"kind": scaling}}
    if scaling != "none":
        document["scaling"] |= {  # type: ignore[operator]
            field: getattr(rotary.scaling, field) for field in rotary.scaling.__slots__ if field != "kind"
        }
    got = frequencies(rotary, torch.device("cpu"))
    assert got.dtype == torch.float32
    expected = torch.tensor([frequency(document, i) for i in range(64)], dtype=torch.float64)
    assert torch.allclose(got.double(), expected, rtol=2e-6, atol=0)
    # Positions and products are float32 too, even where a stage computes in 16 bits: only cos and sin are rounded.
    far = Positions([100_001], [1], 1, torch.device("cpu"), torch.bfloat16)
    cos, sin = far.rotary(rotary)
    angles = (torch.tensor(100_001.0) * got)[None, None, None]
    assert torch.equal(cos, angles.cos().bfloat16())
    assert torch.equal(sin, angles.sin().bfloat16())


@pytest.mark.rule("SB-C-007")
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_an_offset_is_added_in_float32(kind: str) -> None:
    norm = Norm(architectures.Norm(kind=kind, eps=1e-6, weight_offset=1.0, bias=kind == "layer_norm"), 64)
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
