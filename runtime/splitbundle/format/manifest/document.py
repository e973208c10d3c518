"""``manifest.json``: the content of a bundle. ``spec/v1/bundle.md`` explains each field."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from splitbundle.format import names, strict_json
from splitbundle.format.architecture.decoder import EXTENSIONS as OF_ARCHITECTURE
from splitbundle.format.architecture.decoder import FILE as ARCHITECTURE_FILE
from splitbundle.format.encodings import EXTENSIONS as OF_STORAGE
from splitbundle.format.encodings import TABLE, Encoding
from splitbundle.format.graph import NBITS, STANDARD, Graph
from splitbundle.format.manifest.row_names import ROW
from splitbundle.format.weight_layout import Tensor
from splitbundle.records import as_dict, field, members, record, replace
from splitbundle.version import FORMAT_VERSION

FILE: Final = names.MANIFEST
ENCODINGS: Final = ("plain",)
SELF_VECTORS: Final = "self_vectors"
"""The extension of a bundle whose golden vectors were computed from the bundle itself."""
EXTENSIONS: Final = frozenset({SELF_VECTORS, *OF_STORAGE, *OF_ARCHITECTURE})
"""The named extensions that this reader understands."""
BOUNDARY_TENSORS: Final = ("hidden", "past", "count")
EMBEDDING: Final = "embedding.token.weight"
"""The one logical tensor that a source may have twice: also as the projection of a tied head."""
DROPOUT: Final = ("embedding", "attention", "attention_output", "mlp_output")
"""The places of dropout. No dropout is applied but in training."""
MAY_BE_ABSENT: Final = ("parent", "dropout", "source_configuration", "text_file")
"""The fields of ``model`` that a document may lack."""
TOKENIZER: Final = "tokenizer/"
"""The directory of the tokenizer's files."""
SOURCE: Final = "source/"
"""The directory of the source's configuration files."""
MAX_CASES: Final = 64
"""The largest number of cases of golden vectors. Each case has a tensor for each layer. A reader names them all."""


@record(frozen=True, slots=True, kw_only=True)
class SourceConfiguration:
    """The configuration files of the source, as a bundle carries them. No reader computes with them."""

    file: str
    """The path of the source's ``config.json``."""
    part: str | None
    """The path of the configuration of the converted part alone, for the part's own class."""
    generation: str | None
    """The path of the source's ``generation_config.json``."""
    cast: bool
    """Whether the weights are stored in another dtype than in the source."""

    def paths(self) -> dict[str, str]:
        """Return the path of each file that there is, by the name of its field."""
        named = {"file": self.file, "part": self.part, "generation": self.generation}
        return {name: path for name, path in named.items() if path is not None}


@record(frozen=True, slots=True, kw_only=True)
class Model:
    """The name and the origin of the model. All fields but ``architecture`` and ``fingerprint`` are descriptive."""

    name: str
    family: str
    source: str
    revision: str | None
    license: str | None
    parameters: int
    context_length: int | None
    """The number of positions that the model was made for, if its configuration has it."""
    architecture: str
    fingerprint: str
    parent: str | None = None
    """The fingerprint of the bundle of which this one is a changed copy."""
    dropout: dict[str, float] | None = None
    """The rates of dropout with which the source's configuration trains, by the names of ``DROPOUT``, if known."""
    source_configuration: SourceConfiguration | None = None
    text_file: str | None = None
    """The path of ``text.json``: chat templates, defaults of generation, and golden texts."""


@record(frozen=True, slots=True, kw_only=True)
class Storage:
    """The dtype and encoding of stored tensors, with exceptions by name."""

    encoding: str
    dtype: str
    exceptions: dict[str, str] = field(default_factory=dict)
    """Logical name -> its dtype."""
    encodings: dict[str, str] = field(default_factory=dict)
    """Logical name -> the encoding of a quantized weight."""

    def dtype_of(self, name: str) -> str:
        """Return the dtype of a logical tensor: the stored one, or that of the model if the tensor is quantized."""
        return self.exceptions.get(name, self.dtype)

    def encoding_of(self, name: str) -> Encoding | None:
        """Return the encoding of a logical tensor, or None if it is stored as it is."""
        own = self.encodings.get(name)
        return None if own is None else TABLE[own]

    def stored(self, name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Return the stored tensors of a logical tensor, by their names in the file."""
        encoding = self.encoding_of(name)
        if encoding is not None:
            return encoding.stored(name, shape)
        return {name: Tensor(dtype=self.dtype_of(name), shape=shape)}

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Return every dtype of the tensors that aren't quantized."""
        return tuple(dict.fromkeys((self.dtype, *self.exceptions.values())))

    @property
    def extensions(self) -> tuple[str, ...]:
        """Return what a reader must understand by name."""
        used = {TABLE[name].extension for name in self.encodings.values()}
        return tuple(name for name in OF_STORAGE if name in used)

    @property
    def graph_variants(self) -> tuple[str, ...]:
        """Return the variants of graphs that can use these weights, the usual one first."""
        if any(TABLE[name].block is not None for name in self.encodings.values()):
            return (NBITS,)
        return (STANDARD, "float16") if self.dtypes == ("float16",) and not self.encodings else (STANDARD,)

    def as_json(self) -> dict[str, Any]:
        """Return the object with its fields. It has no ``encodings`` if no tensor is quantized."""
        return {name: value for name, value in members(self).items() if name != "encodings" or value}


@record(frozen=True, slots=True, kw_only=True)
class Shard:
    """A name for a range of layers, and the units that it needs."""

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
    """The size and the digests of a file."""

    size: int
    sha256: str
    header_sha256: str | None = None
    """For safetensors: the digest of all bytes before the data."""


@record(frozen=True, slots=True, kw_only=True)
class Text:
    """The tokenizer, and the ids that end generation."""

    tokenizer: str | None
    stop_ids: tuple[int, ...]


@record(frozen=True, slots=True, kw_only=True)
class Vectors:
    """Golden vectors: one case for each sequence length."""

    file: str
    lengths: tuple[int, ...]
    of_itself: bool = False
    """Whether they were computed from this bundle, and so prove that it is reproduced, and not parity."""
    original: str | None = None
    """For a quantized bundle: the file of the same cases, with the results of the model before it was quantized."""

    @property
    def files(self) -> tuple[str, ...]:
        """Return the paths of the files of vectors."""
        return (self.file,) if self.original is None else (self.file, self.original)

    @property
    def origin(self) -> str:
        """Return the model that they were computed from: ``"original"``, or ``"self"`` for this bundle."""
        return "self" if self.of_itself else "original"


@record(frozen=True, slots=True, kw_only=True)
class SourceName:
    """One source tensor, one for each layer (``{layer}`` in the names) or one for each row (``{row}`` in ``source``).

    The source tensor is the concatenation of ``tensors`` along the dimension ``axis``, with its last two dimensions
    exchanged if ``transposed``. With several ``groups``, that dimension of each tensor is in so many equal groups, and
    the first groups of all tensors come before the second groups. Some families store queries, keys and values of a
    head together in this way. If ``source`` has ``{row}``, each source tensor is one row of the only tensor.
    With ``shape``, the source tensor has the same numbers in the same order, in this shape.
    """

    source: str
    tensors: tuple[str, ...]
    groups: int
    transposed: bool
    axis: int = 0
    shape: tuple[int, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the entry with its fields. An axis of 0 and a shape of None aren't written."""
        return {name: value for name, value in members(self).items() if name not in ("axis", "shape") or value}


@record(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The fields of the manifest under their names."""

    model: Model
    storage: Storage
    shards: tuple[Shard, ...]
    hidden_size: int | None
    """The width of ``hidden`` at every boundary; None for a bundle without cuts."""
    units: dict[str, tuple[str, ...]]
    """Unit -> its files, in order."""
    files: dict[str, File]
    text: Text
    vectors: Vectors | None
    source_names: tuple[SourceName, ...]
    features: tuple[str, ...] = ()
    """What the architecture has that a reader must understand by name: a part of ``requires``."""
    producer: dict[str, Any] = field(default_factory=dict)
    extensions: dict[str, Any] = field(default_factory=dict)

    @property
    def cuts(self) -> tuple[int, ...]:
        """Return the numbers of the global layers at which shards meet."""
        return tuple(shard.layers[0] for shard in self.shards[1:])

    @property
    def requires(self) -> tuple[str, ...]:
        """Return the names of the extensions that a reader must understand."""
        own = (SELF_VECTORS,) if self.vectors is not None and self.vectors.of_itself else ()
        return (*own, *self.features)

    def weight_files(self) -> tuple[str, ...]:
        """Return the paths of all weight files, unit by unit."""
        return tuple(path for paths in self.units.values() for path in paths)

    def to_bytes(self) -> bytes:
        """Return the bytes of the file in its canonical form."""
        hidden = {"dtype": "compute", "shape": ["batch", "sequence", self.hidden_size]}
        row = {"dtype": "int64", "shape": ["batch"]}
        document = {
            "format": "splitbundle",
            "format_version": version_text(FORMAT_VERSION),
            "requires": list(self.requires),
            "producer": self.producer,
            "model": {
                key: value
                for key, value in as_dict(self.model).items()
                if value is not None or key not in MAY_BE_ABSENT
            },
            "storage": self.storage.as_json(),
            "shards": [as_dict(shard) for shard in self.shards],
            "boundaries": [{"at": cut, "tensors": {"hidden": hidden, "past": row, "count": row}} for cut in self.cuts],
            "units": {unit: {"files": list(files)} for unit, files in self.units.items()},
            "files": {
                path: {key: value for key, value in members(file).items() if value is not None}
                for path, file in self.files.items()
            },
            "text": members(self.text),
            "vectors": None if self.vectors is None else _vectors(self.vectors),
            "source_names": [entry.as_json() for entry in self.source_names],
            "extensions": self.extensions,
        }
        return strict_json.dump(document)


def _vectors(vectors: Vectors) -> dict[str, Any]:
    origin = {"origin": "self"} if vectors.of_itself else {}
    original = {} if vectors.original is None else {"original": vectors.original}
    return {"file": vectors.file, "lengths": list(vectors.lengths), **origin, **original}


def version_text(version: tuple[int, int]) -> str:
    """Return ``MAJOR.MINOR``."""
    return f"{version[0]}.{version[1]}"


def identity(data: bytes) -> str:
    """Return the id of some bytes: ``sha256:`` and 64 digits."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def fingerprint(files: dict[str, File], weight_files: tuple[str, ...]) -> str:
    """Return the digest of the SHA256SUMS lines of the architecture and the weights. All cuts of a model share it."""
    paths = sorted((ARCHITECTURE_FILE, *weight_files))
    return identity("".join(sums_line(files[path].sha256, path) for path in paths).encode("ascii"))


def sums_line(sha256: str, path: str) -> str:
    """Return a line of SHA256SUMS, as ``sha256sum`` writes and checks it."""
    return f"{sha256}  {path}\n"


def checksums(files: Mapping[str, File], manifest_sha256: str) -> bytes:
    """Return the content of SHA256SUMS: a line for each listed file and for the manifest, sorted by path."""
    digests = {path: file.sha256 for path, file in files.items()} | {FILE: manifest_sha256}
    return "".join(sums_line(digests[path], path) for path in sorted(digests)).encode("ascii")


def expand(entry: SourceName, layers: int) -> Iterator[SourceName]:
    """Yield the entries that a template stands for: one for each layer, or itself."""
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
    """Return the source tensors that a name stands for: one for each row of the logical tensor, or itself."""
    return tuple(source.replace(ROW, str(i)) for i in range(rows)) if ROW in source else (source,)
