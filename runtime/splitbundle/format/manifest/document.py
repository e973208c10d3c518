"""``manifest.json``: what a bundle consists of. Field by field in ``spec/v1/bundle.md``."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Final

from splitbundle.format import names, strict_json
from splitbundle.format.architecture.decoder import FILE as ARCHITECTURE_FILE
from splitbundle.format.graph import Graph
from splitbundle.records import as_dict, field, members, record, replace
from splitbundle.version import FORMAT_VERSION

FILE: Final = names.MANIFEST
ENCODINGS: Final = ("plain",)
EXTENSIONS: Final[frozenset[str]] = frozenset()
"""The named extensions that this reader understands."""
BOUNDARY_TENSORS: Final = ("hidden", "past", "count")
EMBEDDING: Final = "embedding.token.weight"
"""The one logical tensor that a source may hold twice: once more as a tied head's projection."""
ROW: Final = "{row}"
"""Stands in the name of a source tensor for the number of a row, where each row is a tensor."""
MAX_CASES: Final = 64
"""The most golden vectors: each case has a tensor a layer, and a reader names them all."""


@record(frozen=True, slots=True, kw_only=True)
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


@record(frozen=True, slots=True, kw_only=True)
class Storage:
    """How logical tensors are stored: all alike, but for some exceptions."""

    encoding: str
    dtype: str
    exceptions: dict[str, str] = field(default_factory=dict)
    """Logical name -> its dtype."""

    def dtype_of(self, name: str) -> str:
        """The stored dtype of a logical tensor."""
        return self.exceptions.get(name, self.dtype)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Every dtype that tensors are stored in."""
        return tuple(dict.fromkeys((self.dtype, *self.exceptions.values())))


@record(frozen=True, slots=True, kw_only=True)
class Shard:
    """A name for a range of layers, and what it needs on disk."""

    name: str
    layers: tuple[int, int]
    embeds: bool
    head: bool
    units: tuple[str, ...]
    bytes: int
    parameters: int
    graph: Graph | None


@record(frozen=True, slots=True, kw_only=True)
class File:
    """What a file must be."""

    size: int
    sha256: str
    header_sha256: str | None = None
    """For safetensors: of everything before the data."""


@record(frozen=True, slots=True, kw_only=True)
class Text:
    """What turns text into ids and ends generation."""

    tokenizer: str | None
    stop_ids: tuple[int, ...]


@record(frozen=True, slots=True, kw_only=True)
class Vectors:
    """Golden vectors: one case a sequence length."""

    file: str
    lengths: tuple[int, ...]


@record(frozen=True, slots=True, kw_only=True)
class SourceName:
    """One source tensor; one a layer where the names hold ``{layer}``, and one a row where ``source`` holds ``{row}``.

    The source tensor is ``tensors`` concatenated along their first dimension, then transposed if ``transposed``. With
    more ``groups`` than one, each tensor's rows are in so many equal groups, and the first group of every tensor comes
    before the second of any: so some families keep queries, keys and values of a head together. Where ``source`` holds
    ``{row}``, each source tensor is one row of the only tensor.
    """

    source: str
    tensors: tuple[str, ...]
    groups: int
    transposed: bool


@record(frozen=True, slots=True, kw_only=True)
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
            "model": members(self.model),
            "storage": members(self.storage),
            "shards": [as_dict(shard) for shard in self.shards],
            "boundaries": [{"at": cut, "tensors": {"hidden": hidden, "past": row, "count": row}} for cut in self.cuts],
            "units": {unit: {"files": list(files)} for unit, files in self.units.items()},
            "files": {
                path: {key: value for key, value in members(file).items() if value is not None}
                for path, file in self.files.items()
            },
            "text": members(self.text),
            "vectors": None if self.vectors is None else members(self.vectors),
            "source_names": [members(entry) for entry in self.source_names],
            "extensions": self.extensions,
        }
        return strict_json.dump(document)


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


def expand(entry: SourceName, layers: int) -> Iterator[SourceName]:
    """The entries that a template stands for, one by one: one a layer, or itself."""
    if "{layer}" not in entry.source:
        yield entry
        return
    for i in range(layers):
        yield replace(
            entry,
            source=entry.source.replace("{layer}", str(i)),
            tensors=tuple(name.replace("{layer}", str(i)) for name in entry.tensors),
        )


def row_sources(source: str, rows: int) -> tuple[str, ...]:
    """The source tensors that a name stands for: one a row of its logical tensor, or itself."""
    return tuple(source.replace(ROW, str(i)) for i in range(rows)) if ROW in source else (source,)
