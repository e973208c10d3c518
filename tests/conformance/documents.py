"""The vectors of accept/ and reject/ as bundles, and documents that are too large for a file of vectors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conformance.case import HERE, Case, dump, identify, listed

DOCUMENTS = {"manifest": "manifest.json", "architecture": "architecture.json"}
ONLY_ARCHITECTURE = "architecture.json"


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
            yield _document_case(
                f"{verdict}/{path.stem}",
                vector["about"],
                vector["document"],
                vector["base"],
                lambda vector=vector: document(vector),
                code=expect.get("code"),
                pointer=expect.get("pointer"),
                schema=vector["schema"],
            )


def _document_case(
    name: str,
    about: str,
    kind: str,
    of: str,
    data: Callable[[], bytes],
    code: str | None,
    pointer: str | None,
    schema: str = "silent",
    limited: bool = False,
) -> Case:
    return Case(
        name=name,
        about=about,
        steps=("open",),
        make=lambda root: _write_documents(root, of, kind, data()),
        code=code,
        file=None if code is None else DOCUMENTS[kind],
        pointer=pointer,
        points=code is not None,
        schema=schema,
        # A correct architecture may not be the one that the base's manifest was made for.
        about_file=ONLY_ARCHITECTURE if kind == "architecture" and code is None else None,
        limited=limited,
    )


def _write_documents(root: Path, of: str, kind: str, data: bytes) -> None:
    documents = {each: base(of, each) for each in DOCUMENTS} | {kind: data}
    mixed = data == base("llama3" if of == "gpt2" else "gpt2", kind)  # a correct document, beside another model's
    if kind == "architecture" or mixed:
        manifest = json.loads(documents["manifest"])
        manifest["files"]["architecture.json"] = listed("architecture.json", documents["architecture"])
        identify(manifest)
        documents["manifest"] = dump(manifest)
    root.mkdir()
    for each, content in documents.items():
        (root / DOCUMENTS[each]).write_bytes(content)


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
        yield _document_case(f"large/{name}", about, kind, "gpt2", make, code, pointer, limited=True)
