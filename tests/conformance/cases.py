"""The cases of the kit: the vectors of accept/ and reject/ as directories, and whole directories that are spoilt.

Standard library only, and nothing of splitbundle: what is expected is said here, not asked of an implementation.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TINY = HERE / "bundles" / "tiny.splitbundle"
LAYER, VECTORS, TOKENIZER = "layer-000.safetensors", "vectors.safetensors", "tokenizer/tokenizer.json"
DOCUMENTS = {"manifest": "manifest.json", "architecture": "architecture.json"}
ONLY_ARCHITECTURE = "architecture.json"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A directory, and what a reader must say of it."""

    name: str
    about: str
    steps: tuple[str, ...]
    """At which the reader is asked, each by itself: it must say the same at all of them."""
    make: Callable[[Path], None]
    """Writes the bundle to a directory that isn't there yet. OSError and the like: this system can't have it."""
    code: str | None = None
    """Of the first problem; None: the reader takes it."""
    file: str | None = None
    pointer: str | None = None
    """Of the first problem, where ``points``."""
    points: bool = False
    schema: str = "silent"
    """What a JSON Schema validator says of the two documents: accept, reject, silent (either)."""
    about_file: str | None = None
    """Where only what is said of one file counts, that file."""
    limited: bool = False
    """To be judged within two seconds and 256 MiB."""


def cases() -> Iterator[Case]:
    """Every case; names are unique."""
    yield from vector_cases()
    yield from large_cases()
    yield from directory_cases()
    yield from header_cases()
    yield from tokenizer_cases()


# Documents.


def base(name: str, kind: str) -> bytes:
    """A document of a base."""
    return (HERE / "bases" / f"{name}.{kind}.json").read_bytes()


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


def vector_cases() -> Iterator[Case]:
    """The vectors: bundles of which just the documents are there, so that only opening is asked for."""
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
        # An architecture that is right needn't be the one that the base's manifest was made for.
        about_file=ONLY_ARCHITECTURE if kind == "architecture" and code is None else None,
        limited=limited,
    )


def _write_documents(root: Path, of: str, kind: str, data: bytes) -> None:
    documents = {each: base(of, each) for each in DOCUMENTS} | {kind: data}
    mixed = data == base("llama3" if of == "gpt2" else "gpt2", kind)  # a right document, beside another model's
    if kind == "architecture" or mixed:
        manifest = json.loads(documents["manifest"])
        manifest["files"]["architecture.json"] = _listed("architecture.json", documents["architecture"])
        _identify(manifest)
        documents["manifest"] = dump(manifest)
    root.mkdir()
    for each, content in documents.items():
        (root / DOCUMENTS[each]).write_bytes(content)


def dump(value: object) -> bytes:
    """Canonical JSON (SB-J-009)."""
    return (json.dumps(value, indent=2) + "\n").encode("ascii")


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
    """Documents that are too large for a file of vectors: each within two seconds and 256 MiB."""
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


# Whole directories: changes of one small bundle.


class Draft:
    """The small bundle, to be changed. ``seal`` lists what is there, so that just the change itself is wrong."""

    def __init__(self) -> None:
        places = sorted(path for path in TINY.rglob("*") if path.is_file())
        self.files = {path.relative_to(TINY).as_posix(): path.read_bytes() for path in places}
        del self.files["SHA256SUMS"]
        self.manifest = json.loads(self.files.pop("manifest.json"))

    def seal(self) -> Draft:
        """Lists each file's size and digests, and what follows from them."""
        for path, data in self.files.items():
            self.manifest["files"][path] = _listed(path, data)
        for shard in self.manifest["shards"]:
            paths = [path for unit in shard["units"] for path in self.manifest["units"][unit]["files"]]
            shard["bytes"] = sum(self.manifest["files"][path]["size"] for path in paths)
        _identify(self.manifest)
        return self

    def write(self, root: Path) -> None:
        """Everything, and SHA256SUMS of what the manifest lists."""
        manifest = dump(self.manifest)
        for path, data in {**self.files, "manifest.json": manifest, "SHA256SUMS": self.sums(manifest)}.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)

    def sums(self, manifest: bytes) -> bytes:
        lines = {path: entry["sha256"] for path, entry in self.manifest["files"].items()}
        lines["manifest.json"] = hashlib.sha256(manifest).hexdigest()
        return "".join(f"{lines[path]}  {path}\n" for path in sorted(lines)).encode("ascii")


def _listed(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if path.endswith(".safetensors"):
        end = 8 + int.from_bytes(data[:8], "little")
        entry["header_sha256"] = hashlib.sha256(data[:end]).hexdigest()
    return entry


def _identify(manifest: dict[str, Any]) -> None:
    """The architecture id and the fingerprint, by the listed digests (SB-I-002, SB-I-003)."""
    files = manifest["files"]
    manifest["model"]["architecture"] = f"sha256:{files['architecture.json']['sha256']}"
    model = sorted(["architecture.json", *(path for unit in manifest["units"].values() for path in unit["files"])])
    lines = "".join(f"{files[path]['sha256']}  {path}\n" for path in model)
    manifest["model"]["fingerprint"] = f"sha256:{hashlib.sha256(lines.encode('ascii')).hexdigest()}"


Spoil = Callable[[Path], object]
EVERY = ("open", "stage", "verify")


def _spoilt(name: str, about: str, steps: tuple[str, ...], spoil: Spoil, code: str | None, file: str | None) -> Case:
    """The bundle, written whole and then changed."""

    def make(root: Path) -> None:
        Draft().write(root)
        spoil(root)

    return Case(name=f"directory/{name}", about=about, steps=steps, make=make, code=code, file=file, schema="silent")


def directory_cases() -> Iterator[Case]:
    """Files that are missing, too many, no files, or other ones."""
    yield _spoilt("whole", "nothing is wrong", (*EVERY, "exact"), lambda root: None, None, None)
    sealed = Case(
        name="directory/sealed",
        about="the small bundle, listed anew: what the other cases start from is right",
        steps=(*EVERY, "exact"),
        make=lambda root: Draft().seal().write(root),
    )
    yield sealed
    yield from _missing_cases()
    yield from _kind_cases()
    yield from _other_content_cases()
    for name, make in _UNLISTED.items():
        path = f"more/{name}" if name.startswith("deep") else name
        about = f"a file that isn't listed: {name}"
        yield _spoilt(f"unlisted-{name}", f"{about} is reported", EVERY, _at(path, make), None, None)
        yield _spoilt(f"unlisted-{name}-exact", about, ("exact",), _at(path, make), "file.unlisted", path)


def _missing_cases() -> Iterator[Case]:
    def remove(path: str) -> Spoil:
        return lambda root: (root / path).unlink()

    yield _spoilt("no-manifest", "no manifest", EVERY, remove("manifest.json"), "file.missing", None)
    yield _spoilt("no-directory", "nothing at all", EVERY, lambda root: shutil.rmtree(root), "file.missing", None)
    about = "no architecture"
    yield _spoilt("no-architecture", about, EVERY, remove("architecture.json"), "file.missing", "architecture.json")
    yield _spoilt("no-sums", "no SHA256SUMS", ("verify",), remove("SHA256SUMS"), "file.missing", "SHA256SUMS")
    yield _spoilt("no-layer-open", "a partial bundle opens", ("open",), remove(LAYER), None, None)
    yield _spoilt("no-layer", "a layer's file is missing", ("stage", "verify"), remove(LAYER), "file.missing", LAYER)
    for path in (VECTORS, TOKENIZER, "README.md"):
        stem = Path(path).stem.lower()
        yield _spoilt(f"no-{stem}", f"{path} is missing", ("verify",), remove(path), "file.missing", path)


def _kind_cases() -> Iterator[Case]:
    for path, steps in (("manifest.json", EVERY), ("architecture.json", EVERY), (LAYER, ("stage", "verify"))):
        for kind, make in _KINDS.items():
            name = f"{kind}-{Path(path).name.partition('.')[0]}"
            about = f"{path} is a {kind}"
            if (path, kind) == ("manifest.json", "hanging-link"):
                yield _spoilt(name, about, steps, _at(path, make), "file.missing", None)
            else:
                yield _spoilt(name, about, steps, _at(path, make), "file.kind", path)
    for kind in ("link", "pipe"):
        about = f"SHA256SUMS is a {kind}"
        spoil = _at("SHA256SUMS", _KINDS[kind])
        yield _spoilt(f"{kind}-sums", about, ("verify",), spoil, "file.kind", "SHA256SUMS")

    def link_directory(root: Path) -> None:
        (root / "tokenizer").rename(root.parent / f"{root.name}-tokenizer")
        (root / "tokenizer").symlink_to(f"../{root.name}-tokenizer")

    about = "a directory on the way to a file is a link"
    yield _spoilt(
        "link-on-the-way", about, ("verify",), link_directory, "file.kind", "tokenizer/generation_config.json"
    )


def _at(path: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(root: Path) -> None:
        place = root / path
        if place.exists():
            place.rename(root.parent / f"{root.name}-moved")
        place.parent.mkdir(exist_ok=True)
        make(place)

    return spoil


def _link(place: Path) -> None:
    place.symlink_to(f"../{place.parent.name}-moved")


_KINDS: dict[str, Callable[[Path], object]] = {
    "link": _link,
    "hanging-link": lambda place: place.symlink_to("../nowhere"),
    "directory": lambda place: place.mkdir(),
    "pipe": lambda place: os.mkfifo(place),
    "socket": lambda place: os.mknod(place, stat.S_IFSOCK | 0o600),
    "device": lambda place: os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
}
_UNLISTED: dict[str, Callable[[Path], object]] = {
    "notes.txt": lambda place: place.write_text("mine"),
    "hanging-link": lambda place: place.symlink_to("nowhere"),
    "pipe": lambda place: os.mkfifo(place),
    "deep.safetensors": lambda place: place.write_bytes(b"\0" * 9),
}


def _other_content_cases() -> Iterator[Case]:
    def change(path: str, edit: Callable[[bytes], bytes]) -> Spoil:
        return lambda root: (root / path).write_bytes(edit((root / path).read_bytes()))

    def last(data: bytes) -> bytes:
        return data[:-1] + bytes([data[-1] ^ 1])

    def first_of_header(data: bytes) -> bytes:
        return data[:40] + bytes([data[40] ^ 1]) + data[41:]

    later = ("stage", "verify")
    yield _spoilt("layer-shorter", "a byte short", later, change(LAYER, lambda data: data[:-1]), "file.size", LAYER)
    yield _spoilt("layer-longer", "a byte more", later, change(LAYER, lambda data: data + b"\0"), "file.size", LAYER)
    yield _spoilt("layer-empty", "no byte", later, change(LAYER, lambda data: b""), "file.size", LAYER)
    yield _spoilt("layer-digest", "a byte of the data", ("verify",), change(LAYER, last), "file.digest", LAYER)
    about = "a byte of a header"
    yield _spoilt("layer-header", about, ("stage",), change(LAYER, first_of_header), "file.header-digest", LAYER)
    yield _spoilt("layer-header-verify", about, ("verify",), change(LAYER, first_of_header), "file.digest", LAYER)
    for path in (VECTORS, TOKENIZER, "README.md", "top.onnx"):
        name, about = f"{Path(path).name.lower()}-digest", f"a byte of {path}"
        yield _spoilt(name, about, ("verify",), change(path, last), "file.digest", path)
    spoil = change("architecture.json", lambda data: b"x" * len(data))
    yield _spoilt("architecture-digest", "hashed before it is parsed", EVERY, spoil, "file.digest", "architecture.json")
    spoil = change("architecture.json", lambda data: data + b" ")
    yield _spoilt("architecture-longer", "a byte more", EVERY, spoil, "file.size", "architecture.json")

    def of_another_model(root: Path) -> None:
        """The same names and shapes, and other numbers: only digests can tell."""
        data = (root / LAYER).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        numbers = bytes(len(data) - end)
        old = hashlib.sha256(data[end:]).hexdigest().encode("ascii")
        header = data[:end].replace(old, hashlib.sha256(numbers).hexdigest().encode("ascii"))
        (root / LAYER).write_bytes(header + numbers)

    about = "the layer of another model of this architecture"
    yield _spoilt("mixed", about, ("stage",), of_another_model, "file.header-digest", LAYER)
    yield _spoilt("mixed-verify", about, ("verify",), of_another_model, "file.digest", LAYER)

    def sparse(root: Path) -> None:
        os.truncate(root / LAYER, 2**43)

    about = "a sparse file of 8 TiB in place of a layer"
    yield _limited(_spoilt("sparse", about, later, sparse, "file.size", LAYER))
    for path in (LAYER, VECTORS, "README.md"):
        yield _listed_sparse(path)
    edits: dict[str, tuple[Callable[[bytes], bytes], str]] = {
        "blank-line": (lambda data: data + b"\n", "SHA256SUMS"),
        "star": (lambda data: data.replace(b"  ", b" *", 1), "SHA256SUMS"),
        "order": (lambda data: b"".join(reversed(data.splitlines(keepends=True))), "SHA256SUMS"),
        "line-less": (lambda data: b"".join(data.splitlines(keepends=True)[1:]), "SHA256SUMS"),
        "line-more": (lambda data: data + b"0" * 64 + b"  extra\n", "SHA256SUMS"),
        "line-feeds": (lambda data: data.replace(b"\n", b"\r\n"), "SHA256SUMS"),
        "cut": (lambda data: data[:-1], "SHA256SUMS"),
        "empty": (lambda data: b"", "SHA256SUMS"),
        "manifest": (lambda data: _redigest(data, b"manifest.json"), "manifest.json"),
        "layer": (lambda data: _redigest(data, LAYER.encode("ascii")), "SHA256SUMS"),
        "too-large": (lambda data: data + b"\n" * MAX_DOCUMENT, "SHA256SUMS"),
    }
    for name, (edit, culprit) in edits.items():
        code = "file.size" if name == "too-large" else "sums.mismatch"
        yield _spoilt(f"sums-{name}", f"SHA256SUMS: {name}", ("verify",), change("SHA256SUMS", edit), code, culprit)


def _redigest(data: bytes, path: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    return b"".join(b"0" * 64 + b"  " + path + b"\n" if line.endswith(b"  " + path + b"\n") else line for line in lines)


def _limited(case: Case) -> Case:
    return Case(**{**vars(case), "limited": True})


def _listed_sparse(path: str) -> Case:
    """8 TiB that the manifest lists: hashing them would take hours, so their size must be refused (SB-M-053)."""

    def make(root: Path) -> None:
        draft = Draft()
        draft.manifest["files"][path]["size"] = 2**43
        for shard in draft.manifest["shards"]:
            listed = [each for unit in shard["units"] for each in draft.manifest["units"][unit]["files"]]
            shard["bytes"] = sum(draft.manifest["files"][each]["size"] for each in listed)
        draft.write(root)
        os.truncate(root / path, 2**43)

    return Case(
        name=f"directory/listed-sparse-{Path(path).stem.lower()}",
        about=f"a sparse {path} of 8 TiB that the manifest lists",
        steps=("open", "verify"),
        make=make,
        code="manifest.files",
        file="manifest.json",
        pointer=f"/files/{path}/size",
        points=True,
        limited=True,
    )


# Headers of weight files. The manifest lists the wrong file, so that only its header is wrong.


def _header_case(name: str, about: str, edit: Callable[[bytes], bytes], code: str, limited: bool = False) -> Case:
    def make(root: Path) -> None:
        draft = Draft()
        draft.files[LAYER] = edit(draft.files[LAYER])
        draft.seal().write(root)

    steps = ("stage", "verify")
    return Case(name=f"header/{name}", about=about, steps=steps, make=make, code=code, file=LAYER, limited=limited)


def header_cases() -> Iterator[Case]:
    """Each way in which a weight file can be wrong."""

    def entries(edit: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            value = json.loads(_text(data))
            changed = edit(value)
            return _pack(json.dumps(changed or value, separators=(",", ":")).encode("ascii"), data)

        return change

    def text(edit: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
        return lambda data: _pack(edit(_text(data)), data)

    def of(name: str, **values: object) -> Callable[[bytes], bytes]:
        return entries(lambda value: value[name].update(values))

    def length(number: int) -> Callable[[bytes], bytes]:
        return lambda data: number.to_bytes(8, "little") + data[8:]

    q, k, v = (f"layers.0.attention.{name}.weight" for name in ("query", "key", "value"))
    fields: list[tuple[str, str, Callable[[bytes], bytes], str]] = [
        ("too-short", "under 8 bytes", lambda data: data[:7], "weights.header"),
        ("past-the-end", "a header past the end", length(4096 * 3 - 8), "weights.header"),
        ("length-2-64", "a length of 2^64 - 8", length(2**64 - 8), "weights.header"),
        ("length-0", "a length of 0", length(0), "weights.header"),
        ("unaligned", "data that doesn't begin at a page", length(4096), "weights.header"),
        ("not-utf8", "not UTF-8", text(lambda raw: b"\xff" + raw[1:]), "json.encoding"),
        ("bom", "a byte order mark", text(lambda raw: b"\xef\xbb\xbf" + raw), "json.encoding"),
        ("not-json", "not JSON", text(lambda raw: b"not json"), "json.syntax"),
        ("truncated", "truncated JSON", text(lambda raw: raw[:-1]), "json.syntax"),
        ("two", "two documents", text(lambda raw: raw + raw), "json.syntax"),
        ("array", "an array", text(lambda raw: b"[]"), "field.type"),
        ("nan", "NaN", text(lambda raw: raw.replace(b"[0,", b"[NaN,", 1)), "json.number"),
        ("duplicate", "a tensor twice", text(lambda raw: raw.replace(k.encode(), q.encode())), "json.duplicate-key"),
        ("leading-space", "a leading space", text(lambda raw: b" " + raw), "weights.layout"),
        ("line-feed", "a line feed at the end", text(lambda raw: raw + b"\n"), "weights.layout"),
        ("spaces", "spaces between", text(lambda raw: raw.replace(b",", b", ")), "weights.layout"),
        ("escape", "an escape", text(lambda raw: raw.replace(b"query", b"\\u0071uery")), "weights.layout"),
        ("dtype-unknown", "an unknown dtype", of(q, dtype="F8_E4M3"), "field.value"),
        ("dtype-other", "another dtype", of(q, dtype="I64"), "weights.tensors"),
        ("shape-other", "another shape of as many elements", of(q, shape=[4, 16]), "weights.tensors"),
        ("shape-swapped", "another number of dimensions", of(q, shape=[64]), "weights.tensors"),
        ("shape-negative", "two negative dimensions", of(q, shape=[-8, -8]), "field.value"),
        ("shape-fraction", "8.0", of(q, shape=[8.0, 8]), "field.type"),
        ("shape-overflow", "a product past 2^64", of(q, shape=[2**40] * 8), "weights.tensors"),
        ("shape-zero-times-2-62", "[0, 2^62]", of(q, shape=[0, 2**62]), "json.number"),
        ("shape-zero-times-2-52", "[0, 2^52]", of(q, shape=[0, 2**52]), "weights.tensors"),
        ("rank-100000", "100,000 dimensions", of(q, shape=[1] * 100_000), "field.value"),
        ("offset-negative", "a negative offset", of(q, data_offsets=[-256, 0]), "field.value"),
        ("offset-fraction", "a fractional offset", of(q, data_offsets=[0.5, 256.5]), "field.type"),
        ("offset-2-63", "an offset of 2^63", of(q, data_offsets=[2**63, 2**63 + 256]), "json.number"),
        ("offset-beyond", "an offset past the end", of(q, data_offsets=[2**52, 2**52 + 256]), "weights.layout"),
        ("offset-one", "one offset", of(q, data_offsets=[0]), "field.value"),
        ("overlap", "two tensors in one place", entries(_same_place(k, v)), "weights.layout"),
        ("hole", "a hole", entries(_shifted), "weights.layout"),
        ("backwards", "offsets backwards", entries(_backwards(q)), "weights.layout"),
        ("swapped", "two tensors of one shape change places", entries(_swapped(k, v)), "weights.layout"),
        ("order", "entries in another order", entries(_reversed), "weights.layout"),
        ("name-empty", "a tensor without a name", entries(lambda x: x.update({"": x[q]})), "weights.tensors"),
        ("name-dots", "a tensor ../x", entries(_renamed(q, "../x")), "weights.tensors"),
        ("missing", "a tensor is missing", entries(lambda x: x.pop(q) and None), "weights.tensors"),
        ("extra", "a tensor more", entries(lambda x: x.update(extra=x[q])), "weights.tensors"),
        (
            "other-layer",
            "the tensors of layer 1",
            text(lambda raw: raw.replace(b"layers.0.", b"layers.1.")),
            "weights.tensors",
        ),
        ("no-metadata", "no __metadata__", entries(lambda x: x.pop("__metadata__") and None), "field.missing"),
        ("metadata", "another member of __metadata__", of("__metadata__", format="pt"), "field.unknown"),
        ("metadata-short", "a digest of 63", of("__metadata__", sha256="0" * 63), "field.value"),
        ("metadata-newline", "a digest and a line feed", of("__metadata__", sha256="0" * 64 + "\n"), "field.value"),
        ("null", "null for a tensor", entries(lambda x: x.update({q: None})), "field.type"),
        ("appended", "appended bytes", lambda data: data + b"\0", "weights.layout"),
        ("byte-short", "one byte short", lambda data: data[:-1], "weights.layout"),
        ("no-data", "no data", lambda data: data[:4096], "weights.layout"),
        ("padding", "a page of padding too many", _padded, "weights.layout"),
        ("padding-tab", "a tab in the padding", lambda data: data[:4000] + b"\t" + data[4001:], "weights.layout"),
    ]
    for name, about, edit, code in fields:
        yield _header_case(name, about, edit, code, limited=name == "rank-100000")
    over = 2**24 + 4096 - 8

    def huge(data: bytes) -> bytes:
        return over.to_bytes(8, "little") + b" " * over + data[4096:]

    def nested(data: bytes) -> bytes:
        return _pack(b"[" * 4_000_000, data)

    def many(data: bytes) -> bytes:
        value = json.loads(_text(data))
        entry = next(entry for name, entry in value.items() if name != "__metadata__")
        value |= {f"t{i}": entry for i in range(80_000)}
        return _pack(json.dumps(value, separators=(",", ":")).encode("ascii"), data)

    yield _header_case("over-16-mib", "a header over 16 MiB", huge, "weights.header", limited=True)
    yield _header_case("nested", "4,000,000-fold nesting", nested, "json.size", limited=True)
    yield _header_case(
        "nested-less", "100,000-fold nesting", text(lambda _: b"[" * 100_000), "json.depth", limited=True
    )
    yield _header_case("many", "80,000 tensors more", many, "weights.tensors", limited=True)


def _text(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")].rstrip(b" ")


def _pack(text: bytes, data: bytes) -> bytes:
    """A file of this header, padded as it has to be, and the data of another."""
    length = -(-(8 + len(text)) // 4096) * 4096 - 8
    return length.to_bytes(8, "little") + text.ljust(length) + data[8 + int.from_bytes(data[:8], "little") :]


def _padded(data: bytes) -> bytes:
    text = _text(data)
    return (8192 - 8).to_bytes(8, "little") + text.ljust(8192 - 8) + data[4096:]


Edit = Callable[[dict[str, Any]], object]


def _same_place(one: str, other: str) -> Edit:
    return lambda value: value[one].update(data_offsets=value[other]["data_offsets"])


def _swapped(one: str, other: str) -> Edit:
    def edit(value: dict[str, Any]) -> None:
        a, b = value[one], value[other]
        a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]

    return edit


def _backwards(name: str) -> Edit:
    return lambda value: value[name]["data_offsets"].reverse()


def _shifted(value: dict[str, Any]) -> None:
    last = [entry for name, entry in value.items() if name != "__metadata__"][-1]
    last["data_offsets"] = [offset + 64 for offset in last["data_offsets"]]


def _reversed(value: dict[str, Any]) -> dict[str, Any]:
    return {name: value[name] for name in ("__metadata__", *reversed([n for n in value if n != "__metadata__"]))}


def _renamed(name: str, new: str) -> Edit:
    def edit(value: dict[str, Any]) -> dict[str, Any]:
        return {new if each == name else each: entry for each, entry in value.items()}

    return edit


# Tokenizers: listed as they are, so that only the tokenizer is wrong.


def tokenizer_cases() -> Iterator[Case]:
    """What the rules SB-T-003 to SB-T-006 refuse and take. The small model has 24 token ids."""

    def edited(edit: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
        def change(data: bytes) -> bytes:
            value = json.loads(data)
            edit(value)
            return json.dumps(value).encode("ascii")

        return change

    def vocab(**tokens: object) -> Callable[[bytes], bytes]:
        return edited(lambda value: value["model"]["vocab"].update(tokens))

    def added(*entries: dict[str, object]) -> Callable[[bytes], bytes]:
        return edited(lambda value: value["added_tokens"].extend(entries))

    def unigram(count: int) -> Callable[[bytes], bytes]:
        pieces = [["<|end|>", 0.0], *([f"p{i}", -1.5] for i in range(1, count))]
        return edited(lambda value: value.update(model={"type": "Unigram", "unk_id": 0, "vocab": pieces}))

    def set_(name: str, value: object) -> Callable[[bytes], bytes]:
        return edited(lambda document: document.update({name: value}))

    bert = {"type": "BertProcessing", "sep": ["the", 24], "cls": ["a", 2]}
    template = {"type": "TemplateProcessing", "special_tokens": {"x/y": {"id": "x/y", "ids": [0, 99], "tokens": []}}}
    rows: list[tuple[str, str, Callable[[bytes], bytes], str | None, str | None]] = [
        ("whole", "a token of the last id", vocab(last=23), None, None),
        ("unigram", "a list of as many pieces as the model has ids", unigram(24), None, None),
        ("added-again", "an added token that the vocabulary has", added({"id": 3, "content": "cat"}), None, None),
        ("truncated", "truncated JSON", lambda data: data[:-2], "json.syntax", None),
        ("utf16", "UTF-16", lambda data: data.decode("ascii").encode("utf-16"), "json.encoding", None),
        ("duplicate-token", "a token twice", lambda d: d.replace(b'"cat":', b'"dog":'), "json.duplicate-key", None),
        ("nested", "100,000-fold nesting", lambda data: b"[" * 100_000, "json.depth", None),
        ("array", "an array", lambda data: b"[]", "text.tokenizer", "/model"),
        (
            "type",
            "a model of an unknown type",
            edited(lambda v: v["model"].update(type="X")),
            "text.tokenizer",
            "/model/type",
        ),
        ("id-beyond", "a token id out of range", vocab(new=24), "text.tokenizer", "/model/vocab/new"),
        ("id-2-32", "a token id of 2^32", vocab(new=2**32), "text.tokenizer", "/model/vocab/new"),
        ("id-negative", "a negative token id", vocab(new=-1), "text.tokenizer", "/model/vocab/new"),
        ("id-float", "1.0 as a token id", vocab(the=1.0), "text.tokenizer", "/model/vocab/the"),
        ("id-true", "true as a token id", vocab(the=True), "text.tokenizer", "/model/vocab/the"),
        ("id-twice", "two tokens of one id", vocab(new=3), "text.tokenizer", "/model/vocab/new"),
        ("pointer", "a pointer is escaped", vocab(**{"a/~b": 99}), "text.tokenizer", "/model/vocab/a~1~0b"),
        (
            "larger",
            "more tokens than the embedding has rows",
            vocab(**{f"n{i}": i for i in range(11, 40)}),
            "text.tokenizer",
            "/model/vocab/n24",
        ),
        ("unigram-larger", "more pieces than the embedding has rows", unigram(25), "text.tokenizer", "/model/vocab/24"),
        (
            "added-beyond",
            "an added token out of range",
            added({"id": 24, "content": "new"}),
            "text.tokenizer",
            "/added_tokens/1/id",
        ),
        (
            "added-twice",
            "an added token of another's id",
            added({"id": 3, "content": "new"}),
            "text.tokenizer",
            "/added_tokens/1/id",
        ),
        (
            "added-other",
            "an added token of another id than in the vocabulary",
            added({"id": 12, "content": "cat"}),
            "text.tokenizer",
            "/added_tokens/1/id",
        ),
        (
            "added-no-id",
            "an added token without an id",
            added({"content": "new"}),
            "text.tokenizer",
            "/added_tokens/1/id",
        ),
        (
            "added-null",
            "null for an added token",
            edited(lambda v: v["added_tokens"].append(None)),
            "text.tokenizer",
            "/added_tokens/1",
        ),
        (
            "bert",
            "an id beside every text, out of range",
            set_("post_processor", bert),
            "text.tokenizer",
            "/post_processor/sep/1",
        ),
        (
            "template",
            "the same in a template of a sequence",
            set_("post_processor", {"type": "Sequence", "processors": [template]}),
            "text.tokenizer",
            "/post_processor/processors/0/special_tokens/x~1y/ids/1",
        ),
        ("padding", "a padding id out of range", set_("padding", {"pad_id": 24}), "text.tokenizer", "/padding/pad_id"),
    ]
    for name, about, edit, code, pointer in rows:

        def make(root: Path, edit: Callable[[bytes], bytes] = edit) -> None:
            draft = Draft()
            draft.files[TOKENIZER] = edit(draft.files[TOKENIZER])
            draft.seal().write(root)

        yield Case(
            name=f"tokenizer/{name}",
            about=about,
            steps=("verify",),
            make=make,
            code=code,
            file=TOKENIZER if code else None,
            pointer=pointer,
            points=code == "text.tokenizer",
            limited=name == "nested",
        )
