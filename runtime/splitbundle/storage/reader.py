"""Read a bundle: its two documents, and the bytes of the files that they list. Nothing is computed here."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import selection, weight_layout
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.manifest.document import Manifest, Shard
from splitbundle.format.selection import Selection
from splitbundle.format.weight_layout import Stored
from splitbundle.storage import files, weight_headers

VECTORS: Final = "vectors"
"""The name of the golden vectors among the units."""
ORIGINAL_VECTORS: Final = "original vectors"
"""The name of the golden vectors of the model before it was quantized."""


class BundleReader:
    """The documents of a bundle, and access to its checked weight files. It imports no backend."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        architecture: Architecture,
        id: str,  # noqa: A002
        *,
        strict: bool = False,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.architecture = architecture
        self.id = id
        """``sha256:`` of manifest.json. It pins every file, and the cuts."""
        self.strict = strict
        """Whether stages compute only on bytes that were hashed: ``open(..., verify="always")``."""

    def __repr__(self) -> str:
        shards = [shard.name for shard in self.shards]
        return f"{type(self).__name__}({str(self.path)!r}, {self.manifest.model.name!r}, shards={shards})"

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Return the shards in order."""
        return self.manifest.shards

    @property
    def fingerprint(self) -> str:
        """Return ``sha256:`` of the model. It doesn't depend on the cuts."""
        return self.manifest.model.fingerprint

    @property
    def architecture_id(self) -> str:
        """Return ``sha256:`` of architecture.json."""
        return self.manifest.model.architecture

    def shard(self, name: str) -> Shard:
        """Return the shard with this name.

        Raises:
            BundleError: ``stage.name``.
        """
        for shard in self.shards:
            if shard.name == name:
                return shard
        raise BundleError(
            Problem(
                code="stage.name",
                argument="shard",
                expected=f"a shard of {self.manifest.model.name}: {', '.join(s.name for s in self.shards)}",
                got=quoted(name),
                hint=f"Any other part: stage(layers=(start, stop)) within 0..{len(self.architecture.layers)}",
            )
        )

    def select(
        self,
        name: str | None = None,
        *,
        layers: tuple[int, int] | None = None,
        embeds: bool | None = None,
        head: bool | None = None,
    ) -> Selection:
        """Return the part of the model that a shard's name or a range of global layers means.

        Args:
            name: a shard's name.
            layers: in place of a name, the first layer and the last one plus one.
            embeds: whether the part has the embedding; by default if its range begins at 0.
            head: whether the part has the head; by default if its range ends at the last layer.

        Raises:
            BundleError: ``stage.name``, ``stage.range``.
        """
        shard = None if name is None else self.shard(name)
        return selection.select(self.architecture, shard, layers, embeds, head)

    def absent(self) -> tuple[str, ...]:
        """Return the listed files that are missing: none in a whole bundle, some in a partial one.

        Raises:
            BundleError: ``file.unreadable`` if the system can't tell.
        """
        return tuple(path for path in self.manifest.files if not files.is_there(self.path, path))

    def whole_shards(self) -> tuple[str, ...]:
        """Return the names of the shards whose weight files and graph are all there. A partial bundle lacks some."""
        absent = set(self.absent())
        return tuple(shard.name for shard in self.shards if absent.isdisjoint(self.files_of(shard)))

    def require(self, *shards: str) -> None:
        """Check that the files of some shards are there.

        Raises:
            BundleError: ``stage.name``; ``file.missing``.
        """
        needed = {path for name in shards for path in self.files_of(self.shard(name))}
        absent = [path for path in self.absent() if path in needed]
        if absent:
            raise BundleError(files.missing(path) for path in absent)

    def files_of(self, shard: Shard) -> list[str]:
        """Return the paths of a shard's weight files and of its graph."""
        graphs = [] if shard.graph is None else [shard.graph.file]
        return [*(path for unit in shard.units for path in self.manifest.units[unit]), *graphs]

    def weight_groups(self) -> dict[str, tuple[str, ...]]:
        """Return the weight files of each unit, and of the golden vectors, in order."""
        vectors = self.manifest.vectors
        files_ = () if vectors is None else vectors.files
        return self.manifest.units | dict(zip((VECTORS, ORIGINAL_VECTORS), ((path,) for path in files_), strict=False))

    def stored(self, group: str) -> dict[str, weight_layout.Tensor]:
        """Return the tensors in the files of a unit (or of the golden vectors), in order of use."""
        if group in (VECTORS, ORIGINAL_VECTORS):
            return {} if self.manifest.vectors is None else self.stored_vectors(self.manifest.vectors.lengths)
        storage = self.manifest.storage
        shapes = self.architecture.tensors_of(group)
        return {
            name: tensor for logical, shape in shapes.items() for name, tensor in storage.stored(logical, shape).items()
        }

    def logical(self, unit: str) -> dict[str, weight_layout.Tensor]:
        """Return the logical tensors of a unit, in order of use. A quantized one has the dtype of the model."""
        shapes, storage = self.architecture.tensors_of(unit), self.manifest.storage
        return {name: weight_layout.Tensor(dtype=storage.dtype_of(name), shape=shape) for name, shape in shapes.items()}

    def stored_vectors(self, lengths: tuple[int, ...]) -> dict[str, weight_layout.Tensor]:
        """Return the tensors of golden vectors with cases of these lengths, in order of use."""
        hidden = self.architecture.hidden_size
        tensors: dict[str, weight_layout.Tensor] = {}
        for i, length in enumerate(lengths):
            tensors[f"case.{i}.ids"] = weight_layout.Tensor(dtype="int64", shape=(length,))
            for layer in range(len(self.architecture.layers) + 1):
                tensors[f"case.{i}.hidden.{layer}"] = weight_layout.Tensor(dtype="float32", shape=(length, hidden))
            tensors[f"case.{i}.logits"] = weight_layout.Tensor(dtype="float32", shape=(self.architecture.vocab_size,))
        return tensors

    def open_weights(self, group: str) -> Iterator[tuple[BinaryIO, weight_layout.Weights]]:
        """Open the files of a unit (or of the golden vectors) in order. Read and check their headers.

        Raises:
            BundleError: ``file.*`` and ``weights.*``.
        """
        left = self.stored(group)
        paths = self.weight_groups()[group]
        for i, path in enumerate(paths):
            listed = self.manifest.files[path]
            with files.closed_at_last(files.open_file(self.path, path, listed)) as file:
                found = weight_headers.read_header(
                    file, path, listed, left, part=len(paths) > 1, more=i + 1 < len(paths)
                )
                yield file, found
            left = {name: tensor for name, tensor in left.items() if name not in found.layout}

    def weight_bytes(self, group: str) -> Iterator[tuple[mmap.mmap, weight_layout.Weights]]:
        """Map the files of a unit (or of the golden vectors) in order. Read and check their headers.

        The files are mapped copy-on-write. A page that is only read shares the memory of the file. A write changes this
        process's copy of the page and never the file (``spec/decisions/0005``). In a bundle that was opened strictly,
        the files are read into private memory, once, and hashed there.

        Raises:
            BundleError: as for ``open_weights``; ``file.digest`` in a strict bundle; ``file.unreadable`` if the system
                has no more memory, or no more mappings.
        """
        for path, (file, found) in zip(self.weight_groups()[group], self.open_weights(group), strict=True):
            listed = self.manifest.files[path]
            if self.strict:
                memory = files.read_private(file, path, listed)
                # The file may have changed since its header was read.
                weight_headers.check_header(memory[: found.start], path, listed)
                yield memory, found
            else:
                yield files.map_private(file, path, listed), found

    def locate_tensors(self, shard: Shard) -> dict[str, Stored]:
        """Return where each tensor of a shard's units lies, by the checked headers of its weight files.

        Raises:
            BundleError: as for ``open_weights``.
        """
        places: dict[str, Stored] = {}
        for unit in shard.units:
            for file, (_, found) in zip(self.manifest.units[unit], self.open_weights(unit), strict=True):
                for name, (tensor, offset) in found.layout.items():
                    places[name] = Stored(file=file, offset=found.start + offset, tensor=tensor)
        return places
