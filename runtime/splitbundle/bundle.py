"""A bundle on disk: what it says of itself, whether its files are what it says, and stages of it."""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, overload

from splitbundle import architecture as architectures
from splitbundle import (
    architecture_parser,
    backends,
    files,
    golden,
    manifest,
    manifest_parser,
    manifest_rules,
    strict_json,
    verification,
    weights,
)
from splitbundle.architecture import Architecture
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.files import Progress
from splitbundle.manifest import Manifest, Shard
from splitbundle.verification import Verification

if TYPE_CHECKING:
    from splitbundle import onnxruntime_pipeline, onnxruntime_stage, torch_pipeline, torch_stage
    from splitbundle.golden import Difference

VECTORS: Final = "vectors"
"""Names the golden vectors where units are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """A part of the model: what a stage computes, and the units that it needs."""

    name: str
    layers: tuple[int, int]
    embeds: bool
    head: bool
    units: tuple[str, ...]


class Bundle:
    """A ``.splitbundle`` directory. Immutable, and safe to share between threads and to pickle to workers."""

    def __init__(self, path: Path, manifest: Manifest, architecture: Architecture, id: str) -> None:  # noqa: A002
        self.path = path
        self.manifest = manifest
        self.architecture = architecture
        self.id = id
        """``sha256:`` of manifest.json: pins everything, cuts included."""

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, {self.manifest.model.name!r}, shards={[s.name for s in self.shards]})"

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards in order."""
        return self.manifest.shards

    @property
    def fingerprint(self) -> str:
        """``sha256:`` of the model, the same however it is cut."""
        return self.manifest.model.fingerprint

    @property
    def architecture_id(self) -> str:
        """``sha256:`` of architecture.json."""
        return self.manifest.model.architecture

    def shard(self, name: str) -> Shard:
        """A shard by its name.

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
                expected=f"a shard of {self.path.name}: {', '.join(s.name for s in self.shards)}",
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
        """The part of the model that a shard's name or a range of global layers means.

        A range that begins at 0 embeds, and one that ends at the last layer has the head, unless told otherwise.

        Raises:
            BundleError: ``stage.name``, ``stage.range``.
        """
        if (name is None) == (layers is None):
            raise BundleError(
                Problem(
                    code="stage.range",
                    argument="layers",
                    expected="a shard's name or layers=",
                    got="both or neither",
                )
            )
        if name is not None:
            shard = self.shard(name)
            return Selection(name=name, layers=shard.layers, embeds=shard.embeds, head=shard.head, units=shard.units)
        total = len(self.architecture.layers)
        if (
            not isinstance(layers, tuple | list)
            or len(layers) != 2
            or not all(type(i) is int for i in layers)
            or not 0 <= layers[0] <= layers[1] <= total
        ):
            raise BundleError(
                Problem(
                    code="stage.range",
                    argument="layers",
                    expected=f"(start, stop) with 0 <= start <= stop <= {total}",
                    got=quoted(layers),
                )
            )
        start, stop = layers
        embeds = start == 0 if embeds is None else embeds
        head = stop == total if head is None else head
        if (embeds and start != 0) or (head and stop != total) or (start == stop and not embeds and not head):
            raise BundleError(
                Problem(
                    code="stage.range",
                    argument="layers",
                    expected=f"a range with a layer, the embedding (at 0) or the head (at {total})",
                    got=f"layers=({start}, {stop}), embeds={embeds}, head={head}",
                )
            )
        units = self.architecture.units_of((start, stop), embeds=embeds, head=head)
        return Selection(name=f"layers[{start}:{stop}]", layers=(start, stop), embeds=embeds, head=head, units=units)

    def absent(self) -> tuple[str, ...]:
        """The listed files that aren't there: none in a whole bundle, some in a partial one."""
        return tuple(path for path in self.manifest.files if not (self.path / path).exists())

    def verify(
        self, shard: str | None = None, *, exact: bool = False, progress: Progress | None = None
    ) -> Verification:
        """Checks every file's size, digest and header; with ``shard``, those of that shard alone.

        With ``exact``, a file that the manifest doesn't list is a problem too. A listed file that is absent is a
        problem; to check a partial bundle, name its shards.

        Raises:
            BundleError: every problem of every file.
        """
        return verification.verify(self, shard, exact=exact, progress=progress)

    def run_vectors(
        self, shard: str | None = None, *, backend: str = "torch", progress: Progress | None = None
    ) -> list[Difference]:
        """Computes the golden vectors in float32 through all shards, or through one from its golden input.

        Args:
            shard: the one to run alone.
            backend: ``"torch"``, ``"onnxruntime"``, or ``"all"`` for both, and then the one against the other.
            progress: called with what is being done, how much is done, and how much there is.

        Returns:
            The largest difference to the original model at each boundary and at the logits.

        Raises:
            ParityError: a difference above 1e-5 of the largest magnitude there.
            BundleError: ``vectors.none``; what loading refuses.
        """
        if backend != "all":
            backends.options(backend, {})
        modules = [backends.module(each, "verify") for each in backends.BACKENDS if backend in (each, "all")]
        run = modules[-1].run_both if backend == "all" else modules[0].run_vectors
        differences: list[Difference] = run(self, shard, progress)
        if self.manifest.vectors is not None:
            golden.check(differences, self.manifest.vectors.file)
        return differences

    def weight_groups(self) -> dict[str, tuple[str, ...]]:
        """Everything that is stored as tensors: each unit, and the golden vectors, with its files in order."""
        vectors = self.manifest.vectors
        return self.manifest.units | ({} if vectors is None else {VECTORS: (vectors.file,)})

    def stored(self, group: str) -> dict[str, weights.Tensor]:
        """The tensors that the files of a unit (or of the vectors) hold, in order of use."""
        if group == VECTORS:
            return self._stored_vectors()
        storage = self.manifest.storage
        shapes = self.architecture.tensors_of(group)
        return {name: weights.Tensor(dtype=storage.dtype_of(name), shape=shape) for name, shape in shapes.items()}

    def _stored_vectors(self) -> dict[str, weights.Tensor]:
        vectors, hidden = self.manifest.vectors, self.architecture.hidden_size
        tensors: dict[str, weights.Tensor] = {}
        for i, length in enumerate(() if vectors is None else vectors.lengths):
            tensors[f"case.{i}.ids"] = weights.Tensor(dtype="int64", shape=(length,))
            for layer in range(len(self.architecture.layers) + 1):
                tensors[f"case.{i}.hidden.{layer}"] = weights.Tensor(dtype="float32", shape=(length, hidden))
            tensors[f"case.{i}.logits"] = weights.Tensor(dtype="float32", shape=(self.architecture.vocab_size,))
        return tensors

    def open_weights(self, group: str) -> Iterator[tuple[BinaryIO, weights.Weights]]:
        """The files of a unit (or of the vectors), opened in order, with their headers read and checked.

        Raises:
            BundleError: ``file.*`` and ``weights.*``.
        """
        left = self.stored(group)
        paths = self.weight_groups()[group]
        for i, path in enumerate(paths):
            listed = self.manifest.files[path]
            with files.open_file(self.path, path, listed) as file:
                found = weights.read(file, path, listed, left, part=len(paths) > 1, more=i + 1 < len(paths))
                yield file, found
            left = {name: tensor for name, tensor in left.items() if name not in found.layout}

    @overload
    def stage(
        self,
        name: str | None = None,
        *,
        layers: tuple[int, int] | None = None,
        embeds: bool | None = None,
        head: bool | None = None,
        backend: Literal["torch"] = "torch",
        device: str | None = None,
        dtype: str | None = None,
        trainable: bool = False,
    ) -> torch_stage.Stage: ...

    @overload
    def stage(
        self,
        name: str | None = None,
        *,
        layers: tuple[int, int] | None = None,
        embeds: bool | None = None,
        head: bool | None = None,
        backend: Literal["onnxruntime"],
        providers: Sequence[Any] | None = None,
        threads: int | None = None,
        prepack: bool = False,
    ) -> onnxruntime_stage.Stage: ...

    @overload
    def stage(
        self,
        name: str | None = None,
        *,
        layers: tuple[int, int] | None = None,
        embeds: bool | None = None,
        head: bool | None = None,
        backend: str,
        device: str | None = None,
        dtype: str | None = None,
        trainable: bool = False,
        providers: Sequence[Any] | None = None,
        threads: int | None = None,
        prepack: bool = False,
    ) -> Any: ...

    def stage(
        self,
        name: str | None = None,
        *,
        layers: tuple[int, int] | None = None,
        embeds: bool | None = None,
        head: bool | None = None,
        backend: str = "torch",
        device: str | None = None,
        dtype: str | None = None,
        trainable: bool = False,
        providers: Sequence[Any] | None = None,
        threads: int | None = None,
        prepack: bool = False,
    ) -> Any:
        """A shard, or any range of global layers, loaded and ready to compute.

        Weights are mapped, not copied, unless ``device`` or ``dtype`` ask for another one than is stored.

        Args:
            name: a shard's name; or
            layers: ``(start, stop)``: with torch whatever the cuts on disk, with onnxruntime one shard or several.
            embeds: whether to begin with the embedding; by default when ``start`` is 0.
            head: whether to end with the head; by default when ``stop`` is the number of layers.
            backend: ``"torch"``, which computes with tensors, or ``"onnxruntime"``, with numpy arrays in float32.
            device: torch: as torch names it; by default the CPU.
            dtype: torch: ``"float32"``, ``"float16"`` or ``"bfloat16"`` to compute in; by default the stored one.
            trainable: torch: whether the parameters take gradients. Training never changes the bundle: weights are
                mapped copy-on-write. Stages that are opened apart have parameters of their own, even a tied
                embedding; open a ``pipeline`` to have them tied.
            providers: onnxruntime: its execution providers, by falling preference; by default the CPU's.
            threads: onnxruntime: how many compute; by default one a core.
            prepack: onnxruntime: whether to copy the weights into the layout in which many rows at once are faster; by
                default they stay in their files, and no memory is taken for them.

        Raises:
            BundleError: no such part, a file that is absent or not the listed one, or no such backend.
        """
        selection = self.select(name, layers=layers, embeds=embeds, head=head)
        options = backends.options(backend, locals())
        return backends.module(backend, "stage").load_stages(self, [selection], **options)[0]

    @overload
    def pipeline(
        self,
        *,
        backend: Literal["torch"] = "torch",
        device: str | None = None,
        dtype: str | None = None,
        trainable: bool = False,
    ) -> torch_pipeline.Pipeline: ...

    @overload
    def pipeline(
        self,
        *,
        backend: Literal["onnxruntime"],
        providers: Sequence[Any] | None = None,
        threads: int | None = None,
        prepack: bool = False,
    ) -> onnxruntime_pipeline.Pipeline: ...

    @overload
    def pipeline(
        self,
        *,
        backend: str | Mapping[str, str],
        device: str | None = None,
        dtype: str | None = None,
        trainable: bool = False,
        providers: Sequence[Any] | None = None,
        threads: int | None = None,
        prepack: bool = False,
    ) -> Any: ...

    def pipeline(
        self,
        *,
        backend: str | Mapping[str, str] = "torch",
        device: str | None = None,
        dtype: str | None = None,
        trainable: bool = False,
        providers: Sequence[Any] | None = None,
        threads: int | None = None,
        prepack: bool = False,
    ) -> Any:
        """All shards, as stages in order. Arguments and errors as for ``stage``; tied weights are one parameter.

        ``backend`` may name one for each shard, ``{"bottom": "onnxruntime"}``; the others are computed with torch. A
        pipeline of two backends takes and gives numpy arrays.
        """
        given = locals()
        if isinstance(backend, str):
            options = backends.options(backend, given)
            return backends.module(backend, "pipeline").load_pipeline(self, **options)
        return backends.mixed_pipeline(self, backend, given)


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Opens a bundle: reads its manifest and architecture, and no weights.

    Raises:
        BundleError: what is wrong with either file; ``file.missing`` where there is no bundle.
    """
    root = Path(os.path.abspath(path))  # so that it stays where it is when the process changes its directory
    there = ""
    try:
        mend(root)
        if not (root / manifest.FILE).exists():
            there = "a directory without it" if root.is_dir() else "a file" if root.exists() else "nothing there"
    except OSError as error:
        there = f"{error.strerror}"
    if there:
        raise BundleError(
            Problem(
                code="file.missing",
                file=str(path),
                expected=f"a bundle, a directory with a {manifest.FILE}",
                got=there,
                hint="splitbundle convert SOURCE -o NAME.splitbundle makes one",
            )
        )
    data = files.read_file(root, manifest.FILE, strict_json.MAX_BYTES)
    parsed = manifest_parser.parse(data)
    listed = parsed.files[architectures.FILE]
    try:
        document = files.read_listed(root, architectures.FILE, listed, strict_json.MAX_BYTES)
    except BundleError as error:
        raise BundleError([*error.problems, *verification.blame_manifest(root, data)]) from error
    architecture = architecture_parser.parse(document)
    manifest_rules.check_against(parsed, architecture)
    return Bundle(root, parsed, architecture, manifest.identity(data))


def mend(root: Path) -> None:
    """Puts the old bundle back where a replacement was interrupted between its two renames."""
    if not os.path.lexists(root) and root.parent.is_dir():
        # More than one can only be there when several were interrupted; the newest was in place last.
        old = sorted(root.parent.glob(f".{glob.escape(root.name)}.old-*"), key=lambda path: path.stat().st_mtime)
        if old:
            with contextlib.suppress(OSError):  # another process mended it first
                old[-1].rename(root)
