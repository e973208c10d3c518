"""The schemas of documents beside the manifest and the architecture hold for what is written, and refuse faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import splitbundle_schemas
from conformance.case import HERE as KIT
from conformance.cases import cases
from splitbundle.cli import main
from tests.support.paths import ROOT, TESTS

BUNDLES = sorted({path.parent for path in TESTS.rglob("manifest.json")})


def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(splitbundle_schemas.load(name))


def header(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


@pytest.mark.parametrize("name", splitbundle_schemas.NAMES)
def test_every_schema_is_one_and_has_a_file(name: str) -> None:
    schema = splitbundle_schemas.load(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == f"urn:splitbundle:v1:{name}"
    folder = ROOT / "schemas" / "splitbundle_schemas" / "v1"
    assert {path.name.removesuffix(".schema.json") for path in folder.iterdir()} == set(splitbundle_schemas.NAMES)


@pytest.mark.rule("SB-W-005", "SB-W-006", "SB-W-007")
def test_headers_of_weight_files() -> None:
    schema = validator("weight-header")
    files = [path for bundle in BUNDLES for path in bundle.glob("*.safetensors")]
    assert len(files) > 100
    for path in files:
        schema.validate(header(path.read_bytes()))


def test_faults_of_headers(tmp_path: Path) -> None:
    schema = validator("weight-header")
    found = 0
    for case in cases():
        if (
            case.name.startswith("header/")
            and (case.code or "").startswith("field.")
            and case.name != "header/rank-100000"
        ):
            root = tmp_path / case.name.replace("/", "-")
            case.make(root)
            value = header((root / "layer-000.safetensors").read_bytes())
            fraction = case.name in ("header/shape-fraction",)  # 8.0 is an integer to JSON Schema
            assert schema.is_valid(value) == fraction, case.name
            found += 1
    assert found > 8


@pytest.mark.rule("SB-O-018")
def test_what_genai_is_told(tmp_path: Path) -> None:
    schema = validator("genai-config")
    schema.validate(json.loads((KIT / "bundles" / "genai.splitbundle" / "genai_config.json").read_bytes()))
    others = {"genai/vocabulary", "genai/tokenizer", "genai/tokenizer-slash", "genai/vocabulary-float"}
    others |= {"genai/without-stop-id", "genai/search-other", "genai/without-genai-logits", "genai/whole"}
    for case in cases():
        if case.name.startswith("genai/") and case.name != "genai/without-genai_config":
            root = tmp_path / case.name.replace("/", "-")
            case.make(root)
            valid = schema.is_valid(json.loads((root / "genai_config.json").read_bytes()))
            assert valid == (case.name in others), case.name  # values that only the manifest tells


@pytest.mark.rule("SB-M-009")
def test_configurations_of_sources() -> None:
    schema = validator("source-configuration")
    files = [path for bundle in BUNDLES for path in bundle.glob("source/*.json")]
    assert len(files) > 30
    for path in files:
        schema.validate(json.loads(path.read_bytes()))
    assert not schema.is_valid([])


@pytest.mark.rule("SB-V-005")
def test_optional_extensions() -> None:
    schema = validator("extensions")
    for bundle in BUNDLES:
        schema.validate(json.loads((bundle / "manifest.json").read_bytes())["extensions"])
    part = {"name": "language", "of": "x", "class": "X", "left_out": [], "not_applied": {}, "own_names": {}}
    constants = [{"source": "a", "value": 1.0, "dtype": "float32", "shape": [2]}]
    quantization = {"method": "gptq", "formula": "s · c", "weights": 7}
    known = {
        "part": part,
        "constants": constants,
        "quantization": quantization,
        "configuration": {"not_used": {"a": 1}},
    }
    schema.validate(known | {"org.example.more": 1})
    for name in known:
        assert not schema.is_valid(known | {name: {"more": 1}}), name


@pytest.mark.rule("SB-E-001")
def test_what_a_command_prints_when_it_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    schema = validator("problems")
    (tmp_path / "manifest.json").write_text("{}")
    for words in (["inspect", str(tmp_path)], ["verify", str(tmp_path / "none")]):
        assert main.main([*words, "--json"]) != 0
        schema.validate(json.loads(capsys.readouterr().out))
    assert not schema.is_valid(
        {"ok": False, "problems": [{"code": "a.b", "expected": "x", "got": "y", "pointer": "a~2"}]}
    )
