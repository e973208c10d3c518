"""A bundle on disk: what it says of itself, whether its files are what it says, and stages of it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, overload

from splitbundle import backends, files, selections, weights
from splitbundle.architecture import Architecture
from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.files import Progress
from splitbundle.manifest import Manifest, Shard
from splitbundle.selections import Selection

if TYPE_CHECKING:
    from splitbundle import onnxruntime_pipeline, onnxruntime_stage, torch_pipeline, torch_stage
    from splitbundle.golden import Difference
    from splitbundle.verification import Verification

VECTORS: Final = "vectors"
"""Names the golden vectors where units are named."""


class Bundle:
    """A ``.splitbundle`` directory. Immutable, and safe to share between threads and to pickle to workers."""

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
        """``sha256:`` of manifest.json: pins everything, cuts included."""
        self.strict = strict
        """Whether only bytes are computed on that were hashed: ``open(..., verify="always")``."""

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
        return selections.select(self, name, layers, embeds, head)

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
        from splitbundle import verification  # with all that judges graphs and tokenizers: computing needs none of it

        return verification.verify(self, shard, exact=exact, progress=progress)

    def run_vectors(
        self, shard: str | None = None, *, backend: str = "torch", progress: Progress | None = None
    ) -> list[Difference]:
        """Computes the golden vectors through all shards, or through one from its golden input: in float32, or in what
        the graphs compute in.

        Args:
            shard: the one to run alone.
            backend: ``"torch"``, ``"onnxruntime"``, or ``"all"`` for both, and then the one against the other.
            progress: called with what is being done, how much is done, and how much there is.

        Returns:
            The largest difference to the original model at each boundary and at the logits.

        Raises:
            ParityError: a difference above 1e-5 of the largest magnitude there; above 0.01 where graphs compute in
                float16.
            BundleError: ``vectors.none``; what loading refuses.
        """
        from splitbundle import golden

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

    def weight_bytes(self, group: str) -> Iterator[tuple[mmap.mmap, weights.Weights]]:
        """The bytes of a unit's files (or of the vectors'), in order, with their headers read and checked.

        They are mapped copy-on-write: what is only read shares the memory of the file, and what is written changes this
        process's copy of a page and never the file (``spec/decisions/0005``). In a bundle that was opened strictly they
        are read into private memory, once, and hashed there.

        Raises:
            BundleError: as for ``open_weights``; ``file.digest`` in a strict bundle; ``file.unreadable`` where the
                system has no memory, or no more mappings, to give.
        """
        for path, (file, found) in zip(self.weight_groups()[group], self.open_weights(group), strict=True):
            listed = self.manifest.files[path]
            if self.strict:
                memory = files.read_private(file, path, listed)
                weights.check_header(memory[: found.start], path, listed)  # that of these bytes, too
                yield memory, found
            else:
                yield files.map_private(file, path, listed), found

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
        dtype: str | None = None,
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
            backend: ``"torch"``, which computes with tensors, or ``"onnxruntime"``, with numpy arrays in float32 (and
                in what the graphs compute in, by their variant in the manifest).
            device: torch: as torch names it; by default the CPU.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"`` to compute in; by default the stored one, and under
                onnxruntime the graphs', which know no other.
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
        dtype: str | None = None,
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
        if not isinstance(backend, Mapping):
            options = backends.options(backend, given)
            return backends.module(backend, "pipeline").load_pipeline(self, **options)
        return backends.mixed_pipeline(self, backend, given)
