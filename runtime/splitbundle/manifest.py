"""``manifest.json``: what a bundle consists of. Field by field in ``spec/v1/bundle.md``."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Final

from splitbundle import names, strict_json
from splitbundle.architecture import FILE as ARCHITECTURE_FILE
from splitbundle.architecture import MAX_SIZE, Architecture, count
from splitbundle.errors import quoted
from splitbundle.fields import Field, Problems, escape
from splitbundle.version import FORMAT_VERSION

FILE: Final = names.MANIFEST
DTYPES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
"""What weights may be stored as, and the bytes of an item."""
ENCODINGS: Final = ("plain",)
EXTENSIONS: Final[frozenset[str]] = frozenset()
"""The named extensions that this reader understands."""
BOUNDARY_TENSORS: Final = ("hidden", "past", "count")
EMBEDDING: Final = "embedding.token.weight"
"""The one logical tensor that a source may hold twice: once more as a tied head's projection."""
MAX_CASES: Final = 64
"""The most golden vectors: each case has a tensor a layer, and a reader names them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What the model is called and where it comes from: descriptive, but for the two ids."""

    name: str
    family: str
    source: str
    revision: str | None
    license: str | None
    parameters: int
    context_length: int | None
    """The positions that the model was made for, where its configuration says."""
    architecture: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How logical tensors are stored: all alike, but for some exceptions."""

    encoding: str
    dtype: str
    exceptions: dict[str, str] = field(default_factory=dict)
    """Logical name -> its dtype."""

    def dtype_of(self, name: str) -> str:
        """The stored dtype of a logical tensor."""
        return self.exceptions.get(name, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A name for a range of layers, and what it needs on disk."""

    name: str
    layers: tuple[int, int]
    embeds: bool
    head: bool
    units: tuple[str, ...]
    bytes: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """What a file must be."""

    size: int
    sha256: str
    header_sha256: str | None = None
    """For safetensors: of everything before the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What turns text into ids and ends generation."""

    tokenizer: str | None
    stop_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """Golden vectors: one case a sequence length."""

    file: str
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceName:
    """One source tensor, or one a layer where the names hold ``{layer}``.

    The source tensor is ``tensors`` concatenated along their first dimension, then transposed if ``transposed``.
    """

    source: str
    tensors: tuple[str, ...]
    transposed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The manifest's fields under the manifest's names."""

    model: Model
    storage: Storage
    shards: tuple[Shard, ...]
    hidden_size: int | None
    """The width of ``hidden`` at every boundary; None where nothing is cut."""
    units: dict[str, tuple[str, ...]]
    """Unit -> its files, in order."""
    files: dict[str, File]
    text: Text
    vectors: Vectors | None
    source_names: tuple[SourceName, ...]
    producer: dict[str, Any] = field(default_factory=dict)
    extensions: dict[str, Any] = field(default_factory=dict)

    @property
    def cuts(self) -> tuple[int, ...]:
        """The global layer indices at which the shards meet."""
        return tuple(shard.layers[0] for shard in self.shards[1:])

    def weight_files(self) -> tuple[str, ...]:
        """The paths of all weight files, unit by unit."""
        return tuple(path for paths in self.units.values() for path in paths)

    def to_bytes(self) -> bytes:
        """The file, in its canonical form."""
        hidden = {"dtype": "compute", "shape": ["batch", "sequence", self.hidden_size]}
        row = {"dtype": "int64", "shape": ["batch"]}
        document = {
            "format": "splitbundle",
            "format_version": version_text(FORMAT_VERSION),
            "requires": [],
            "producer": self.producer,
            "model": _members(self.model),
            "storage": _members(self.storage),
            "shards": [_members(shard) | {"graph": None} for shard in self.shards],
            "boundaries": [{"at": cut, "tensors": {"hidden": hidden, "past": row, "count": row}} for cut in self.cuts],
            "units": {unit: {"files": list(files)} for unit, files in self.units.items()},
            "files": {
                path: {key: value for key, value in _members(file).items() if value is not None}
                for path, file in self.files.items()
            },
            "text": _members(self.text),
            "vectors": None if self.vectors is None else _members(self.vectors),
            "source_names": [_members(entry) for entry in self.source_names],
            "extensions": self.extensions,
        }
        return strict_json.dump(document)


def _members(record: Any) -> dict[str, Any]:
    return {member.name: getattr(record, member.name) for member in fields(record)}


def version_text(version: tuple[int, int]) -> str:
    """``MAJOR.MINOR``."""
    return f"{version[0]}.{version[1]}"


def identity(data: bytes) -> str:
    """The id of some bytes: ``sha256:`` and 64 digits."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def fingerprint(files: dict[str, File], weight_files: tuple[str, ...]) -> str:
    """The model's digest, however it is cut: of the SHA256SUMS lines of the architecture and the weights."""
    paths = sorted((ARCHITECTURE_FILE, *weight_files))
    return identity("".join(sums_line(files[path].sha256, path) for path in paths).encode("ascii"))


def sums_line(sha256: str, path: str) -> str:
    """A line of SHA256SUMS, as ``sha256sum`` writes and checks it."""
    return f"{sha256}  {path}\n"


def parse(data: bytes) -> Manifest:
    """Reads ``manifest.json``, as far as it can be judged without the architecture.

    Raises:
        BundleError: every problem of the file; for a format that is too new, that alone.
    """
    problems = Problems(FILE)
    document = Field(strict_json.parse(data, FILE), problems)
    _check_version(document)
    members = document.members(
        [
            "format",
            "format_version",
            "requires",
            "producer",
            "model",
            "storage",
            "shards",
            "boundaries",
            "units",
            "files",
            "text",
            "vectors",
            "source_names",
            "extensions",
        ]
    )
    producer, extensions = members["producer"], members["extensions"]
    producer.members([], open=True)
    extensions.members([], open=True)
    boundaries = [_boundary(item) for item in members["boundaries"].items()]
    manifest = Manifest(
        hidden_size=boundaries[0][1] if boundaries else None,
        model=_model(members["model"]),
        storage=_storage(members["storage"]),
        shards=tuple(_shard(item) for item in members["shards"].items(minimum=1)),
        units=_units(members["units"]),
        files={path: _file(path, item) for path, item in members["files"].mapping()},
        text=_text(members["text"]),
        vectors=None if members["vectors"].is_null else _vectors(members["vectors"]),
        source_names=tuple(_source_name(item) for item in members["source_names"].items()),
        producer=producer.value if isinstance(producer.value, dict) else {},
        extensions=extensions.value if isinstance(extensions.value, dict) else {},
    )
    problems.raise_if_any()
    _check_files(manifest, problems)
    _check_shards(manifest, boundaries, problems)
    problems.raise_if_any()
    return manifest


def _check_version(document: Field) -> None:
    """Refuses another format, or a newer one, before any field is judged by this one's rules."""
    if not isinstance(document.value, dict):
        document.members([])
        document.problems.raise_if_any()
    head = document.members(["format", "format_version", "requires"], open=True)
    if head["format"].string() != "splitbundle":
        head["format"].refuse('"splitbundle"', code="format.name")
    version = head["format_version"]
    text = version.string()
    parts = text.split(".")
    if len(parts) != 2 or not all(p.isascii() and p.isdigit() and len(p) < 5 and str(int(p)) == p for p in parts):
        version.refuse('a string "MAJOR.MINOR"', code="format.version")
    elif (int(parts[0]), int(parts[1])) > FORMAT_VERSION or int(parts[0]) == 0:
        version.refuse(
            f"1.0 to {version_text(FORMAT_VERSION)}",
            code="format.version",
            hint="A newer splitbundle reads this bundle",
        )
    for item in head["requires"].items():
        if item.string() not in EXTENSIONS:
            item.refuse(
                f"an extension that this reader knows ({', '.join(sorted(EXTENSIONS)) or 'none'})",
                code="format.requires",
                hint="A newer splitbundle reads this bundle",
            )
    document.problems.raise_if_any()


def _model(field: Field) -> Model:
    required = [f.name for f in fields(Model)]
    members = field.members(required, open=True)
    optional = {key: None if members[key].is_null else members[key].string() for key in ("revision", "license")}
    context = members["context_length"]
    return Model(
        name=members["name"].string(),
        family=members["family"].string(),
        source=members["source"].string(),
        revision=optional["revision"],
        license=optional["license"],
        parameters=members["parameters"].integer(1),
        context_length=None if context.is_null else context.integer(1),
        architecture=members["architecture"].string(names.IDENTITY, '"sha256:" and 64 digits of 0-9a-f'),
        fingerprint=members["fingerprint"].string(names.IDENTITY, '"sha256:" and 64 digits of 0-9a-f'),
    )


def _storage(field: Field) -> Storage:
    members = field.members(["encoding", "dtype", "exceptions"])
    return Storage(
        encoding=members["encoding"].choice(ENCODINGS),
        dtype=members["dtype"].choice(DTYPES),
        exceptions={name: item.choice(DTYPES) for name, item in members["exceptions"].mapping()},
    )


def _shard(field: Field) -> Shard:
    members = field.members(["name", "layers", "embeds", "head", "units", "graph", "bytes", "parameters"])
    layers = [item.integer() for item in members["layers"].items(minimum=2, maximum=2)]
    if not members["graph"].is_null:
        members["graph"].refuse("null")
    return Shard(
        name=members["name"].string(names.SHARD_NAME, "1 to 64 of a-z 0-9 _ -, not first _ or -"),
        layers=(layers[0], layers[1]) if len(layers) == 2 else (0, 0),
        embeds=members["embeds"].boolean(),
        head=members["head"].boolean(),
        units=tuple(item.string() for item in members["units"].items()),
        bytes=members["bytes"].integer(),
        parameters=members["parameters"].integer(),
    )


def _boundary(field: Field) -> tuple[int, int]:
    """The cut, and the width of ``hidden``."""
    members = field.members(["at", "tensors"])
    tensors = members["tensors"].members(BOUNDARY_TENSORS)
    hidden = tensors["hidden"].members(["dtype", "shape"])
    hidden["dtype"].choice(["compute"])
    width = 0
    shape = hidden["shape"].items(minimum=3, maximum=3)
    if len(shape) == 3:
        shape[0].choice(["batch"])
        shape[1].choice(["sequence"])
        width = shape[2].integer(1)
    for name in ("past", "count"):
        row = tensors[name].members(["dtype", "shape"])
        row["dtype"].choice(["int64"])
        for item in row["shape"].items(minimum=1, maximum=1):
            item.choice(["batch"])
    return members["at"].integer(), width


def _units(field: Field) -> dict[str, tuple[str, ...]]:
    return {
        unit: tuple(path.string() for path in item.members(["files"])["files"].items(minimum=1))
        for unit, item in field.mapping()
    }


def _file(path: str, field: Field) -> File:
    if not names.is_path(path) or names.is_own(path):
        field.problems.add("field.value", field.pointer, names.PATH_RULE, quoted(path))
    weights = path.endswith(".safetensors")
    members = field.members(["size", "sha256", *(["header_sha256"] if weights else [])])
    digest = "64 digits of 0-9a-f"
    return File(
        size=members["size"].integer(),
        sha256=members["sha256"].string(names.SHA256, digest),
        header_sha256=members["header_sha256"].string(names.SHA256, digest) if weights else None,
    )


def _text(field: Field) -> Text:
    members = field.members(["tokenizer", "stop_ids"])
    tokenizer = members["tokenizer"]
    return Text(
        tokenizer=None if tokenizer.is_null else tokenizer.string(),
        stop_ids=tuple(item.integer() for item in members["stop_ids"].items()),
    )


def _vectors(field: Field) -> Vectors:
    members = field.members(["file", "lengths"])
    return Vectors(
        file=members["file"].string(),
        lengths=tuple(item.integer(1, MAX_SIZE) for item in members["lengths"].items(minimum=1, maximum=MAX_CASES)),
    )


def _source_name(field: Field) -> SourceName:
    members = field.members(["source", "tensors", "transposed"])
    return SourceName(
        source=members["source"].string(),
        tensors=tuple(item.string() for item in members["tensors"].items(minimum=1)),
        transposed=members["transposed"].boolean(),
    )


def _check_files(manifest: Manifest, problems: Problems) -> None:
    """Every file that is named is listed, and no two paths meet on any file system."""
    if ARCHITECTURE_FILE not in manifest.files:
        problems.add("manifest.files", "/files", f"an entry {quoted(ARCHITECTURE_FILE)}", "none")
    folded: dict[str, str] = {}
    directories = {path[:i].lower() for path in manifest.files for i, letter in enumerate(path) if letter == "/"}
    for path in manifest.files:
        other = folded.setdefault(path.lower(), path)
        if other != path or path.lower() in directories:
            problems.add("manifest.files", "/files", "paths that differ in more than case", quoted(path))
    listed: set[str] = set()
    for unit, paths in manifest.units.items():
        for i, path in enumerate(paths):
            pointer = f"/units/{escape(unit)}/files/{i}"
            if path not in manifest.files or not path.endswith(".safetensors") or "/" in path:
                problems.add("manifest.files", pointer, "a .safetensors file of /files, at the top", quoted(path))
            elif path in listed:
                problems.add("manifest.files", pointer, "a file of one unit alone", quoted(path))
            listed.add(path)
    if manifest.text.tokenizer is not None and manifest.text.tokenizer not in manifest.files:
        problems.add("manifest.files", "/text/tokenizer", "a path of /files", quoted(manifest.text.tokenizer))
    vectors = manifest.vectors
    if vectors is not None and (
        vectors.file not in manifest.files or vectors.file in listed or not vectors.file.endswith(".safetensors")
    ):
        problems.add(
            "manifest.files",
            "/vectors/file",
            "a .safetensors file of /files, of no unit",
            quoted(vectors.file),
        )


def _check_shards(manifest: Manifest, boundaries: list[tuple[int, int]], problems: Problems) -> None:
    """Shards tile the model in order, and there is a boundary wherever two of them meet."""
    seen: set[str] = set()
    start = 0
    for i, shard in enumerate(manifest.shards):
        at = f"/shards/{i}"
        if shard.name in seen:
            problems.add("manifest.shards", f"{at}/name", "a name of one shard alone", quoted(shard.name))
        seen.add(shard.name)
        first, last = i == 0, i == len(manifest.shards) - 1
        if shard.layers[0] != start:
            problems.add(
                "manifest.layers",
                f"{at}/layers/0",
                f"{start}, where the shard before ends",
                str(shard.layers[0]),
            )
        # Only the ends may be empty: a bottom that only embeds, a top that is only the head.
        if shard.layers[1] < shard.layers[0] + (0 if first or last else 1):
            problems.add("manifest.layers", f"{at}/layers/1", f"more than {shard.layers[0]}", str(shard.layers[1]))
        start = shard.layers[1]
        for name, value, expected in (("embeds", shard.embeds, first), ("head", shard.head, last)):
            if value is not expected:
                which = "first" if name == "embeds" else "last"
                problems.add("manifest.shards", f"{at}/{name}", f"true for the {which} shard alone", quoted(value))
    cuts = list(manifest.cuts)
    if [cut for cut, _ in boundaries] != cuts:
        problems.add("manifest.boundaries", "/boundaries", f"one at each cut, {cuts}", f"{[b for b, _ in boundaries]}")
    for i, (_, width) in enumerate(boundaries[1:], 1):
        if width != boundaries[0][1]:
            pointer = f"/boundaries/{i}/tensors/hidden/shape/2"
            problems.add("manifest.boundaries", pointer, str(boundaries[0][1]), str(width))


def check_against(manifest: Manifest, architecture: Architecture) -> None:
    """The rules that need both files.

    Raises:
        BundleError: every rule of ``manifest.json`` that the architecture breaks.
    """
    problems = Problems(FILE)
    units = architecture.unit_tensors()
    shapes = {name: shape for tensors in units.values() for name, shape in tensors.items()}
    total = len(architecture.layers)
    missing = [unit for unit in units if unit not in manifest.units]
    extra = [unit for unit in manifest.units if unit not in units]
    if missing or extra:
        got = f"missing {quoted(missing)}, extra {quoted(extra)}"
        problems.add("manifest.units", "/units", f"the {len(units)} units of the architecture", got)
    if manifest.shards[-1].layers[1] != total:
        at = f"/shards/{len(manifest.shards) - 1}/layers/1"
        problems.add("manifest.layers", at, f"{total}, the number of layers", str(manifest.shards[-1].layers[1]))
    if manifest.hidden_size not in (None, architecture.hidden_size):
        at = "/boundaries/0/tensors/hidden/shape/2"
        expected = f"hidden_size of the architecture, {architecture.hidden_size}"
        problems.add("manifest.boundaries", at, expected, str(manifest.hidden_size))
    for name in manifest.storage.exceptions:
        if name not in shapes:
            problems.add("manifest.storage", "/storage/exceptions", "names of logical tensors", quoted(name))
    for i, stop in enumerate(manifest.text.stop_ids):
        if stop >= architecture.vocab_size:
            at, below = f"/text/stop_ids/{i}", f"an id below vocab_size ({architecture.vocab_size})"
            problems.add("manifest.text", at, below, str(stop))
    limit = architecture.position_limit
    for i, length in enumerate(() if manifest.vectors is None else manifest.vectors.lengths):
        if limit is not None and length > limit:
            problems.add("manifest.vectors", f"/vectors/lengths/{i}", f"at most {limit}, the positions", str(length))
    if manifest.model.parameters != count(shapes):
        problems.add("manifest.model", "/model/parameters", str(count(shapes)), str(manifest.model.parameters))
    problems.raise_if_any()
    for i, shard in enumerate(manifest.shards):
        _check_shard_totals(manifest, architecture, units, shard, f"/shards/{i}", problems)
    _check_source_names(manifest, shapes, total, problems)
    known = fingerprint(manifest.files, manifest.weight_files())
    for key, expected in (
        ("architecture", f"sha256:{manifest.files[ARCHITECTURE_FILE].sha256}"),
        ("fingerprint", known),
    ):
        got = getattr(manifest.model, key)
        if got != expected:
            problems.add("manifest.ids", f"/model/{key}", f"{expected}, by the digests in /files", got)
    problems.raise_if_any()


def _check_shard_totals(
    manifest: Manifest,
    architecture: Architecture,
    units: dict[str, dict[str, tuple[int, ...]]],
    shard: Shard,
    at: str,
    problems: Problems,
) -> None:
    needed = architecture.units_of(shard.layers, embeds=shard.embeds, head=shard.head)
    if shard.units != needed:
        problems.add("manifest.shards", f"{at}/units", ", ".join(needed), ", ".join(map(quoted, shard.units)))
        return
    size = sum(manifest.files[path].size for unit in needed for path in manifest.units[unit])
    parameters = sum(count(units[unit]) for unit in needed)
    for key, expected in (("bytes", size), ("parameters", parameters)):
        if getattr(shard, key) != expected:
            problems.add("manifest.shards", f"{at}/{key}", str(expected), str(getattr(shard, key)))


def expand(entry: SourceName, layers: int) -> Iterator[SourceName]:
    """The entries that a template stands for, one by one: one a layer, or itself."""
    if "{layer}" not in entry.source:
        yield entry
        return
    for i in range(layers):
        yield SourceName(
            source=entry.source.replace("{layer}", str(i)),
            tensors=tuple(name.replace("{layer}", str(i)) for name in entry.tensors),
            transposed=entry.transposed,
        )


def _check_source_names(
    manifest: Manifest, shapes: dict[str, tuple[int, ...]], layers: int, problems: Problems
) -> None:
    """The table back to the source names every logical tensor, and no source tensor twice, and can be followed."""
    sources: set[str] = set()
    covered: set[str] = set()
    for i, entry in enumerate(manifest.source_names):
        at = f"/source_names/{i}"
        if any(("{layer}" in name) != ("{layer}" in entry.source) for name in entry.tensors):
            problems.add(
                "manifest.sources",
                f"{at}/tensors",
                "{layer} in all names of an entry or in none",
                quoted(entry.tensors),
            )
            continue
        for expanded in expand(entry, layers):
            if expanded.source in sources:
                problems.add(
                    "manifest.sources",
                    f"{at}/source",
                    "a source tensor of one entry alone",
                    quoted(expanded.source),
                )
            unknown = [name for name in expanded.tensors if name not in shapes]
            if unknown:
                problems.add("manifest.sources", f"{at}/tensors", "names of logical tensors", quoted(unknown[0]))
                break
            if len({(shapes[name][1:], manifest.storage.dtype_of(name)) for name in expanded.tensors}) > 1:
                wanted = "tensors of one dtype that can be concatenated along their first dimension"
                problems.add("manifest.sources", f"{at}/tensors", wanted, quoted(expanded.tensors))
                break
            if expanded.transposed and len(shapes[expanded.tensors[0]]) != 2:
                wanted = "false, as the tensors haven't two dimensions"
                problems.add("manifest.sources", f"{at}/transposed", wanted, "true")
                break
            again = [name for name in expanded.tensors if name in covered and name != EMBEDDING]
            if again or len(set(expanded.tensors)) != len(expanded.tensors):
                wanted = f"tensors that no other source tensor holds, but for {EMBEDDING}"
                problems.add("manifest.sources", f"{at}/tensors", wanted, quoted(expanded.tensors))
                break
            sources.add(expanded.source)
            covered.update(expanded.tensors)
    left = shapes.keys() - covered
    if left and not problems.found:
        problems.add(
            "manifest.sources",
            "/source_names",
            "an entry for every logical tensor",
            f"none for {quoted(min(left))}",
        )


def stored_bytes(manifest: Manifest, tensors: dict[str, tuple[int, ...]]) -> int:
    """The bytes of some logical tensors as they are stored."""
    return sum(DTYPES[manifest.storage.dtype_of(name)] * math.prod(shape) for name, shape in tensors.items())
