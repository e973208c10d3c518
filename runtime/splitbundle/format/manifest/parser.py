"""Read ``manifest.json`` strictly: types, closed sets of fields, grammars."""

from __future__ import annotations

from splitbundle.errors import quoted
from splitbundle.format import names, strict_json
from splitbundle.format.architecture.sizes import MAX_SIZE
from splitbundle.format.dtypes import PORTS, WEIGHTS
from splitbundle.format.encodings import TABLE
from splitbundle.format.fields import Field, Problems
from splitbundle.format.graph import VARIANTS, Graph, Port
from splitbundle.format.manifest import rules as rules
from splitbundle.format.manifest.document import (
    BOUNDARY_TENSORS,
    DROPOUT,
    ENCODINGS,
    EXTENSIONS,
    FILE,
    MAX_CASES,
    MAY_BE_ABSENT,
    SELF_VECTORS,
    File,
    Manifest,
    Model,
    Shard,
    SourceConfiguration,
    SourceName,
    Storage,
    Text,
    Vectors,
    version_text,
)
from splitbundle.format.text_document import FILE as TEXT
from splitbundle.records import types
from splitbundle.version import FORMAT_VERSION


def parse_manifest(data: bytes) -> Manifest:
    """Read ``manifest.json``, and check every rule that doesn't need the architecture.

    Raises:
        BundleError: every problem of the file; only one problem for a format that is too new.
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
    required = [item.value for item in members["requires"].items()]
    own_vectors = SELF_VECTORS in required
    boundaries = [_boundary(item) for item in members["boundaries"].items()]
    manifest = Manifest(
        hidden_size=boundaries[0][1] if boundaries else None,
        model=_model(members["model"]),
        storage=_storage(members["storage"]),
        shards=tuple(_shard(item) for item in members["shards"].items(minimum=1)),
        units=_units(members["units"]),
        files={path: _file(path, item) for path, item in members["files"].mapping()},
        text=_text(members["text"]),
        vectors=None if members["vectors"].is_null and not own_vectors else _vectors(members["vectors"], own_vectors),
        source_names=tuple(_source_name(item) for item in members["source_names"].items()),
        features=tuple(name for name in required if name != SELF_VECTORS),
        producer=producer.value if isinstance(producer.value, dict) else {},
        extensions=extensions.value if isinstance(extensions.value, dict) else {},
    )
    problems.raise_if_any()
    rules.check_files(manifest, problems)
    rules.check_shards(manifest, boundaries, problems)
    problems.raise_if_any()
    return manifest


def _check_version(document: Field) -> None:
    """Refuse another format, or a newer version, before any other field is checked."""
    if not isinstance(document.value, dict):
        document.members([])
        document.problems.raise_if_any()
    head = document.members(["format", "format_version", "requires"], open=True)
    if head["format"].string() != "splitbundle" and isinstance(head["format"].value, str):
        head["format"].refuse('"splitbundle"', code="format.name")
    version = head["format_version"]
    parts = version.string().split(".")
    if not isinstance(version.value, str):
        pass  # noted, as a field that is missing or of another type
    elif len(parts) != 2 or not all(p.isascii() and p.isdigit() and len(p) < 5 and str(int(p)) == p for p in parts):
        version.refuse('a string "MAJOR.MINOR"', code="format.version")
    elif (int(parts[0]), int(parts[1])) > FORMAT_VERSION or int(parts[0]) == 0:
        version.refuse(
            f"1.0 to {version_text(FORMAT_VERSION)}",
            code="format.version",
            hint="A newer splitbundle reads this bundle",
        )
    for item in head["requires"].items():
        if item.string() not in EXTENSIONS and isinstance(item.value, str):
            item.refuse(
                f"an extension that this reader knows ({', '.join(sorted(EXTENSIONS)) or 'none'})",
                code="format.requires",
                hint="A newer splitbundle reads this bundle",
            )
    document.problems.raise_if_any()


def _model(field: Field) -> Model:
    members = field.members([name for name in types(Model) if name not in MAY_BE_ABSENT], open=True)
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
        parent=(
            members["parent"].string(names.IDENTITY, '"sha256:" and 64 digits of 0-9a-f')
            if "parent" in members
            else None
        ),
        dropout=_dropout(members["dropout"]) if "dropout" in members else None,
        source_configuration=(
            _source_configuration(members["source_configuration"]) if "source_configuration" in members else None
        ),
        text_file=members["text_file"].choice([TEXT]) if "text_file" in members else None,
    )


def _source_configuration(field: Field) -> SourceConfiguration:
    members = field.members(list(types(SourceConfiguration)))
    optional = {key: None if members[key].is_null else members[key].string() for key in ("part", "generation")}
    return SourceConfiguration(
        file=members["file"].string(),
        part=optional["part"],
        generation=optional["generation"],
        cast=members["cast"].boolean(),
    )


def _dropout(field: Field) -> dict[str, float]:
    members, rates = field.members(DROPOUT), {}
    for name in DROPOUT:
        item = members[name]
        if type(item.value) not in (int, float):
            item.refuse("a number", code="field.type")
        elif not 0 <= item.value < 1:
            item.refuse("a number from 0 to below 1")
        else:
            rates[name] = float(item.value)
    return rates


def _storage(field: Field) -> Storage:
    members = field.members(["encoding", "dtype", "exceptions"], ["encodings"])
    encoded = list(members["encodings"].mapping()) if "encodings" in members else []
    if "encodings" in members and members["encodings"].value == {}:
        members["encodings"].refuse("at least one tensor, or no such field")
    return Storage(
        encoding=members["encoding"].choice(ENCODINGS),
        dtype=members["dtype"].choice(WEIGHTS),
        exceptions={name: item.choice(WEIGHTS) for name, item in members["exceptions"].mapping()},
        encodings={name: item.choice(tuple(TABLE)) for name, item in encoded},
    )


def _shard(field: Field) -> Shard:
    members = field.members(["name", "layers", "embeds", "head", "units", "graph", "bytes", "parameters"])
    layers = [item.integer() for item in members["layers"].items(minimum=2, maximum=2)]
    name = members["name"]
    if isinstance(name.value, str) and not names.is_shard(name.value):
        name.refuse(names.SHARD_RULE)
    return Shard(
        name=name.string(),
        layers=(layers[0], layers[1]) if len(layers) == 2 else (0, 0),
        embeds=members["embeds"].boolean(),
        head=members["head"].boolean(),
        units=tuple(item.string() for item in members["units"].items()),
        graph=None if members["graph"].is_null else _graph(members["graph"]),
        bytes=members["bytes"].integer(),
        parameters=members["parameters"].integer(),
    )


def _graph(field: Field) -> Graph:
    members = field.members(["file", "variant", "opset", "inputs", "outputs"])
    return Graph(
        file=members["file"].string(),
        variant=members["variant"].choice(VARIANTS),
        opset=members["opset"].integer(),
        inputs=tuple(_port(item) for item in members["inputs"].items()),
        outputs=tuple(_port(item) for item in members["outputs"].items()),
    )


def _port(field: Field) -> Port:
    members = field.members(["name", "dtype", "shape"])
    sizes = [item.string() if isinstance(item.value, str) else item.integer(1) for item in members["shape"].items()]
    return Port(name=members["name"].string(), dtype=members["dtype"].choice(PORTS), shape=tuple(sizes))


def _boundary(field: Field) -> tuple[int, int]:
    """Return the cut, and the width of ``hidden``."""
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


def _vectors(field: Field, of_itself: bool) -> Vectors:
    members = field.members(["file", "lengths", *(["origin"] if of_itself else [])], ["original"])
    if of_itself:
        members["origin"].choice(["self"])
    return Vectors(
        file=members["file"].string(),
        lengths=tuple(item.integer(1, MAX_SIZE) for item in members["lengths"].items(minimum=1, maximum=MAX_CASES)),
        of_itself=of_itself,
        original=members["original"].string() if "original" in members else None,
    )


def _source_name(field: Field) -> SourceName:
    members = field.members(["source", "tensors", "groups", "transposed"], ["axis", "shape"])
    return SourceName(
        source=members["source"].string(),
        tensors=tuple(item.string() for item in members["tensors"].items(minimum=1)),
        groups=members["groups"].integer(1, MAX_SIZE),
        transposed=members["transposed"].boolean(),
        axis=members["axis"].integer(0, 2) if "axis" in members else 0,
        shape=tuple(item.integer(1, MAX_SIZE) for item in members["shape"].items(minimum=1, maximum=4))
        if "shape" in members
        else None,
    )
