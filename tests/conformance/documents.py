"""The vectors of accept/ and reject/ as bundles, and documents that are too large for a file of vectors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from conformance.case import HERE, Case, dump, identify, listed

DOCUMENTS = {"manifest": "manifest.json", "architecture": "architecture.json"}


def base(name: str, kind: str) -> bytes:
    """Read a document of a base."""
    return (HERE / "bases" / f"{name}.{kind}.json").read_bytes()


def document(vector: dict[str, Any]) -> bytes:
    """Return the bytes that a vector stands for."""
    if "hex" in vector:
        return bytes.fromhex(vector["hex"])
    if "text" in vector:
        return str(vector["text"]).encode("utf-8")
    value = json.loads(base(vector["base"], vector["document"]))
    for operation in vector["patch"]:
        patch(value, operation)
    return json.dumps(value).encode("utf-8")


def patch(value: Any, operation: dict[str, Any]) -> None:
    """Apply one operation of RFC 6902. It never replaces the whole document here."""
    tokens = [token.replace("~1", "/").replace("~0", "~") for token in operation["path"].split("/")[1:]]
    for token in tokens[:-1]:
        value = value[int(token)] if isinstance(value, list) else value[token]
    key: Any = tokens[-1]
    if isinstance(value, list):
        key = len(value) if key == "-" else int(key)
    op = operation["op"]
    if op != "add":
        value[key]  # the value to replace or remove must be there
    if op == "remove":
        del value[key]
    elif op == "add" and isinstance(value, list):
        value.insert(key, copy.deepcopy(operation["value"]))
    else:
        value[key] = copy.deepcopy(operation["value"])


def vector_cases() -> Iterator[Case]:
    """Make bundles from the vectors. They have only the documents, so only opening is tested."""
    for verdict in ("accept", "reject"):
        for path in sorted((HERE / verdict).glob("*.json")):
            vector = json.loads(path.read_text("utf-8"))
            expect = vector.get("expect", {})
            case = _document_case(
                f"{verdict}/{path.stem}",
                vector["about"],
                tuple(vector["rules"]),
                vector["document"],
                vector["base"],
                lambda vector=vector: document(vector),
                code=expect.get("code"),
                pointer=expect.get("pointer"),
                schema=vector["schema"],
                manifest=vector.get("manifest"),
            )
            # No manifest can state the parameters of the largest architecture (SB-M-096).
            unstated = vector.get("expect_of_manifest")
            if unstated is not None:
                case = replace(case, **unstated, file="manifest.json", points=True)
            yield case


def _document_case(
    name: str,
    about: str,
    rules: tuple[str, ...],
    kind: str,
    of: str,
    data: Callable[[], bytes],
    code: str | None,
    pointer: str | None,
    schema: str = "silent",
    limited: bool = False,
    manifest: dict[str, Any] | None = None,
) -> Case:
    return Case(
        name=name,
        about=about,
        rules=rules,
        steps=("open",),
        make=lambda root: _write_documents(root, of, kind, data(), manifest),
        code=code,
        file=None if code is None else DOCUMENTS[kind],
        pointer=pointer,
        points=code is not None,
        schema=schema,
        limited=limited,
    )


def _write_documents(root: Path, of: str, kind: str, data: bytes, fitting: dict[str, Any] | None) -> None:
    """Write both documents: the changed one, and the other one of its base, or the manifest that fits it."""
    documents = {each: base(of, each) for each in DOCUMENTS} | {kind: data}
    mixed = data == base("llama3" if of == "gpt2" else "gpt2", kind)  # a correct document, beside another model's
    if kind == "architecture" or mixed:
        manifest = copy.deepcopy(fitting) if fitting is not None else json.loads(documents["manifest"])
        manifest["files"]["architecture.json"] = listed("architecture.json", documents["architecture"])
        identify(manifest)
        documents["manifest"] = dump(manifest)
    root.mkdir()
    for each, content in documents.items():
        (root / DOCUMENTS[each]).write_bytes(content)


def _deep(name: str, about: str, make: Callable[[Path], None], code: str | None, pointer: str | None) -> Case:
    return Case(
        name=f"large/{name}",
        about=about,
        rules=("SB-M-040", "SB-M-096") if code != "manifest.model" else ("SB-M-005", "SB-M-096"),
        steps=("open",),
        make=make,
        code=code,
        file=None if code is None else "manifest.json",
        pointer=pointer,
        points=code is not None,
        limited=True,
    )


def _sparse(size: int) -> bytes:
    return b'{"format": "' + b"s" * (size - 14) + b'"}'


def _with(name: str, value: object) -> bytes:
    return json.dumps(json.loads(base("gpt2", "manifest")) | {name: value}).encode("ascii")


def _layers(count: int) -> bytes:
    value = json.loads(base("gpt2", "architecture"))
    return json.dumps(value | {"layers": ["full"] * count}).encode("ascii")


def _templates(count: int) -> bytes:
    entry = {"tensors": ["layers.{layer}.mlp.up.weight"], "groups": 1, "transposed": True}
    return _with("source_names", [{"source": f"x{i}.{{layer}}"} | entry for i in range(count)])


MAX_DOCUMENT = 2**24


def large_cases() -> Iterator[Case]:
    """Documents that are too large for a vector file. A reader must judge each soon, and within 256 MiB."""
    json_rules, values = ("SB-J-005", "SB-J-006", "SB-J-010", "SB-J-011"), ("SB-A-006", "SB-M-004", "SB-M-085")
    rows: list[tuple[str, str, Callable[[], bytes], str, str | None]] = [
        ("arrays-100000", "manifest", lambda: b"[" * 100_000 + b"]" * 100_000, "json.depth", None),
        ("objects-100000", "manifest", lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "json.depth", None),
        ("arrays-unclosed", "manifest", lambda: b"[" * 1_000_000, "json.depth", None),
        ("architecture-arrays", "architecture", lambda: b"[" * 100_000 + b"]" * 100_000, "json.depth", None),
        ("over-16-mib", "manifest", lambda: _sparse(MAX_DOCUMENT + 1), "json.size", None),
        ("architecture-over-16-mib", "architecture", lambda: _sparse(MAX_DOCUMENT + 1), "json.size", None),
        ("just-16-mib", "manifest", lambda: _sparse(MAX_DOCUMENT), "field.missing", ""),
        ("integer", "manifest", lambda: b'{"size": ' + b"7" * 15_000_000 + b"}", "json.number", None),
        ("integer-negative", "manifest", lambda: b'{"size": -' + b"7" * 15_000_000 + b"}", "json.number", None),
        ("fraction", "manifest", lambda: b'{"size": 1.' + b"7" * 15_000_000 + b"}", "field.missing", ""),
        ("layers-10001", "architecture", lambda: _layers(10_001), "field.value", "/layers"),
        ("layers-900000", "architecture", lambda: _layers(900_000), "field.value", "/layers"),
        ("sources-300000", "manifest", lambda: _with("source_names", [0] * 300_000), "field.value", "/source_names"),
        ("sources-262144", "manifest", lambda: _with("source_names", [0] * 262_144), "field.type", "/source_names/0"),
        ("values-600000", "manifest", lambda: _with("extensions", {"x": [[]] * 600_000}), "json.size", None),
        ("values-5000000", "manifest", lambda: _with("extensions", {"x": [[]] * 5_000_000}), "json.size", None),
        (
            "files-500000",
            "manifest",
            lambda: _with("files", dict.fromkeys(map(str, range(500_000)), 0)),
            "field.type",
            "/files/0",
        ),
        ("templates-50000", "manifest", lambda: _templates(50_000), "manifest.sources", "/source_names/1/tensors"),
    ]
    for name, kind, make, code, pointer in rows:
        about = f"a large document: {name}"
        rules = json_rules if code.startswith("json.") else values
        yield _document_case(f"large/{name}", about, rules, kind, "gpt2", make, code, pointer, limited=True)
    yield from _deep_cases()


def _deep_cases() -> Iterator[Case]:
    """A model of 1,001 layers, and one whose number of parameters is above 2^64."""

    def write(architecture: dict[str, Any], edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
        def make(root: Path) -> None:
            vector = json.loads((HERE / "accept" / "architecture-one-layer.json").read_text("utf-8"))
            manifest = vector["manifest"]
            manifest["shards"][0]["graph"] = None
            del manifest["files"]["all.onnx"]
            edit(manifest)
            _write_documents(root, "gpt2", "architecture", json.dumps(architecture).encode("ascii"), manifest)

        return make

    def deep(digits: int) -> Callable[[dict[str, Any]], None]:
        def edit(manifest: dict[str, Any]) -> None:
            layers = 1001
            names = [f"layer-{i:0{digits}}" for i in range(layers)]
            old = manifest["files"].pop("layer-000.safetensors")
            manifest["files"] |= {f"{name}.safetensors": old for name in names}
            manifest["units"] = {"embedding": manifest["units"]["embedding"]} | {
                unit: {"files": [f"{unit}.safetensors"]} for unit in [*names, "head"]
            }
            shard = manifest["shards"][0]
            shard |= {"layers": [0, layers], "units": list(manifest["units"])}
            shard["bytes"] += old["size"] * (layers - 1)
            total = manifest["model"]["parameters"] + (old["size"] - 4096) // 4 * (layers - 1)
            shard["parameters"] = manifest["model"]["parameters"] = total

        return edit

    one = document(json.loads((HERE / "accept" / "architecture-one-layer.json").read_text("utf-8")))
    architecture = json.loads(one)
    thousand = architecture | {"layers": architecture["layers"] * 1001}
    about = "1,001 layers, whose units have numbers of four digits"
    yield _deep("units-1001", about, write(thousand, deep(4)), None, None)
    about = "1,001 layers, whose units have numbers of three digits or four"
    yield _deep("units-1001-short", about, write(thousand, deep(3)), "manifest.units", "/units")
    huge = json.loads(one) | {"hidden_size": 2**29}
    huge["embedding"]["token_size"] = 2**29
    (kind,) = huge["layer_kinds"].values()
    kind["attention"] |= {"heads": 2**20, "kv_heads": 2**20, "head_dim": 2**13}  # four matrices of 2^62 numbers

    def wrapped(manifest: dict[str, Any]) -> None:
        """State the parameters as 64-bit numbers give them: all but those of the four matrices."""
        width, heads = 2**29, 2**33
        rest = 2 * huge["vocab_size"] * width + 3 * width + 3 * heads + 3 * kind["mlp"]["intermediate_size"] * width
        manifest["model"]["parameters"] = manifest["shards"][0]["parameters"] = rest

    about = "a number of parameters above 2^64, stated modulo 2^64"
    yield _deep("parameters-wrapped", about, write(huge, wrapped), "manifest.model", "/model/parameters")
