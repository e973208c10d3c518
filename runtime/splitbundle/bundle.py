"""The class ``Bundle``: a bundle on disk, which verifies its files and loads stages and pipelines."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from splitbundle import logs
from splitbundle.backends import registry
from splitbundle.bundle_files import BundleFiles
from splitbundle.storage.documents import find_bundle, read_documents
from splitbundle.storage.files import Progress

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from splitbundle.backends.onnxruntime import pipeline as onnxruntime_pipeline
    from splitbundle.backends.onnxruntime import stage as onnxruntime_stage
    from splitbundle.backends.registry import AllOptions, OnnxRuntimeOptions, TorchOptions
    from splitbundle.backends.torch import pipeline as torch_pipeline
    from splitbundle.backends.torch import stage as torch_stage
    from splitbundle.stages.golden import Difference


class Bundle(BundleFiles):
    """A ``.splitbundle`` directory. It is immutable: threads may share it, and worker processes may unpickle it."""

    def __reduce__(self) -> tuple[Any, tuple[Path, str, bool]]:
        # A worker reads the documents again. So a pickle names no internal module, which may move, and holds no copy
        # of the documents.
        return _reopen, (self.path, self.id, self.strict)

    def __copy__(self) -> Bundle:
        return self  # it is immutable

    def __deepcopy__(self, memo: object) -> Bundle:
        return self

    def run_vectors(
        self,
        shard: str | None = None,
        *,
        backend: str | None = None,
        threads: int | None = None,
        require_original: bool = False,
        progress: Progress | None = None,
    ) -> list[Difference]:
        """Compute the golden vectors, and compare them with the original model.

        The vectors run through all shards, or through one shard from its golden input. In a partial bundle they run
        through each whole shard from its golden input. torch computes in float32, and onnxruntime in the dtype of the
        graphs.

        Args:
            shard: the only shard to run; by default all.
            backend: ``"torch"``, ``"onnxruntime"``, or ``"all"`` to run both and compare them with each other, too. By
                default torch if it is installed, else onnxruntime.
            threads: the number of threads, as for ``stage``.
            require_original: whether to refuse golden vectors that come from the bundle itself. A bundle whose weights
                were changed has such ones. They prove that its results are reproduced, and not parity.
            progress: called with the name of the work, the amount that is done, and the total amount.

        Returns:
            The largest difference from the original model (or from the bundle's own results, when it was written) at
            each boundary and at the logits.

        Raises:
            ParityError: for a difference above 1e-5 of the scale there (``Difference.scale``); above 0.01 if the graphs
                compute in float16, and above 0.005 for graphs over quantized weights.
            BundleError: ``vectors.none``; the errors of loading.
        """
        from splitbundle.stages import golden

        if require_original:
            golden.check_original(self)

        chosen, whole = backend or registry.installed_backend(), self.whole_shards()
        parts = whole if shard is None and whole and len(whole) < len(self.shards) else (shard,)
        with self._told(shard):
            differences = [
                difference
                for part in parts
                for difference in registry.run_golden(self, part, chosen, threads, progress)
            ]
        if self.manifest.vectors is not None:
            golden.check(differences, self.manifest.vectors.file)
        return differences

    def distances(self, *, backend: str | None = None) -> list[Difference]:
        """Return how far the golden vectors of a quantized bundle are from those of the model before. Compute nothing.

        The list is empty for a bundle that isn't quantized, or lacks one of the two files of vectors.

        Args:
            backend: whose arrays to use: ``"torch"`` or ``"onnxruntime"``; by default an installed one.

        Raises:
            BundleError: ``file.*``, ``weights.*``.
        """
        vectors = self.manifest.vectors
        if vectors is None or vectors.original is None or not set(vectors.files).isdisjoint(self.absent()):
            return []
        chosen = registry.installed_backend() if backend in (None, "all") else backend
        found: list[Difference] = registry.module(chosen, "golden").distances(self)
        return found

    @overload
    def stage(
        self,
        name: str | None = None,
        *,
        layers: tuple[int, int] | None = None,
        embeds: bool | None = None,
        head: bool | None = None,
        backend: Literal["torch"] | None = None,
        **options: Unpack[TorchOptions],
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
        **options: Unpack[OnnxRuntimeOptions],
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
        **options: Unpack[AllOptions],
    ) -> Any: ...

    def stage(
        self,
        name: str | None = None,
        *,
        layers: tuple[int, int] | None = None,
        embeds: bool | None = None,
        head: bool | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> Any:
        """Load a shard, or any range of global layers, ready to compute.

        Weights are mapped and not copied, unless ``device`` or ``dtype`` differ from the stored ones.

        Args:
            name: a shard's name. Give either ``name`` or ``layers``.
            layers: ``(start, stop)``. With torch, any range; with onnxruntime, the range of one or more shards.
            embeds: whether to begin with the embedding; by default if ``start`` is 0.
            head: whether to end with the head; by default if ``stop`` is the number of layers.
            backend: ``"torch"`` takes and returns tensors. ``"onnxruntime"`` takes and returns numpy arrays in float32,
                and computes in the dtype of the graphs' variant. By default torch if it is installed, else onnxruntime.
            device: torch: the name of a device; by default the CPU.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"`` to compute in; by default the stored dtype. Under
                onnxruntime it must be the dtype of the graphs.
            trainable: torch: whether the parameters take gradients. Training never changes the bundle, as weights are
                mapped copy-on-write. Stages that are loaded separately have their own parameters, even for a tied
                embedding. In a ``pipeline`` they stay tied.
            kernels: torch: the kernels that multiply a few rows by weights, as ``splitbundle kernels`` prints them.
                ``"auto"``, the default, measures which are the fastest here, in some milliseconds at the first product.
                ``"torch"`` takes torch's usual ones, whose results don't depend on a measurement; it is the default of
                a trainable stage. The variable ``SPLITBUNDLE_KERNELS`` sets the default of the others.
            checkpoint_activations: torch: whether a call with gradients keeps only the input of each layer, and
                computes the layer a second time for the gradients. This takes less memory and more time.
            dropout: torch: the rates of dropout of a trainable stage in training mode, at some of ``"embedding"``,
                ``"attention"``, ``"attention_output"`` and ``"mlp_output"``; or ``"source"`` for those of the source's
                configuration; by default none.
            providers: onnxruntime: execution providers, the preferred first; by default the CPU's.
            threads: the number of threads that compute. By default torch's setting, or one for each core, but no more
                than the affinity and the container's quota allow. The setting of the process doesn't change. With torch
                a forked child always has one.
            prepack: onnxruntime: whether to copy the weights into a layout that is faster for many rows at once. By
                default the weights stay in their files and take no memory.

        Raises:
            BundleError: for an unknown part or backend, and for a file that is missing or differs from its entry.
        """
        selection = self.select(name, layers=layers, embeds=embeds, head=head)
        chosen = backend or registry.installed_backend()
        own = registry.own_options(chosen, options, "stage")
        with self._told(name):
            made = registry.module(chosen, "stage").load_stages(self, [selection], **own)[0]
        logs.debug("loaded layers [%d, %d) with %s", *selection.layers, chosen)
        return made

    @overload
    def pipeline(
        self, *, backend: Literal["torch"] | None = None, **options: Unpack[TorchOptions]
    ) -> torch_pipeline.Pipeline: ...

    @overload
    def pipeline(
        self, *, backend: Literal["onnxruntime"], **options: Unpack[OnnxRuntimeOptions]
    ) -> onnxruntime_pipeline.Pipeline: ...

    @overload
    def pipeline(self, *, backend: str | Mapping[str, str], **options: Unpack[AllOptions]) -> Any: ...

    def pipeline(self, *, backend: str | Mapping[str, str] | None = None, **options: Any) -> Any:
        """Load all shards as stages in order. Tied weights are one parameter.

        Arguments and errors are those of ``stage``. ``backend`` may also map shards to backends, as in
        ``{"bottom": "onnxruntime"}``; torch computes the other shards. A pipeline of two backends takes and returns
        numpy arrays.
        """
        chosen = backend if isinstance(backend, Mapping) else backend or registry.installed_backend()
        if not isinstance(chosen, Mapping):
            own = registry.own_options(chosen, options, "pipeline")
            with self._told():
                made = registry.module(chosen, "pipeline").load_pipeline(self, **own)
        else:
            with self._told():
                made = registry.mixed_pipeline(self, chosen, options)
        logs.debug("loaded a pipeline with %s", chosen)
        made.bundle = self  # for its tokenizer and its context length
        return made

    def cast(
        self,
        path: str | os.PathLike[str],
        dtype: str,
        *,
        vectors: bool = True,
        force: bool = False,
        notes: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> Bundle:
        """Write a bundle whose weights are all stored in another dtype. It needs torch, and no memory for the model.

        A wider dtype changes no value, so the golden vectors stay. A narrower one rounds, and the golden vectors are
        computed anew from the new bundle, as for ``save_as``.

        Args:
            path: the directory of the new bundle.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``.
            vectors: as for ``save_as``.
            force: whether to replace an existing bundle. It may be this one.
            notes: as for ``save_as``.
            progress: called with the name of the work, the amount that is done, and the total amount.

        Returns:
            The new bundle, opened.

        Raises:
            BundleError: ``input.value`` for another dtype; ``input.overflow``; ``output.*``; ``file.*``.
        """
        saving = registry.module("torch", "saving")
        with self._told():
            made: Bundle = saving.cast(self, path, dtype, vectors=vectors, force=force, notes=notes, progress=progress)
        return made

    def quantize(
        self,
        path: str | os.PathLike[str],
        to: str = "int4",
        *,
        group: int = 32,
        keep: Sequence[str] = (),
        method: str = "search",
        calibration: Sequence[Sequence[int]] | None = None,
        vectors: bool = True,
        force: bool = False,
        notes: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> Bundle:
        """Write a bundle whose matrices are stored in 8 or 4 bits. It needs torch, and memory for one tensor.

        The same bundle, method and calibration give the same bytes on the same machine. Norms, biases, routers and
        tables of positions stay as they are, as do matrices whose sizes no encoding fits.

        Args:
            path: the directory of the new bundle.
            to: ``"int8"``, or ``"int4"``, where the token table and the head are stored in 8 bits.
            group: for ``"int4"``: how many numbers of a row share a scale: 32, 64 or 128.
            keep: parts that stay as they are: ``"head"``, ``"embedding"``, ``"layers.0"``, ``"mlp.down"`` and such.
            method: how 4 bits are chosen. ``"rtn"`` rounds to the nearest code. ``"search"`` also searches for the
                scale with the least squared error. ``"gptq"`` (arXiv:2210.17323) lets each column make up for the
                rounding of those before it, which needs memory for one layer in float32.
            calibration: for ``"gptq"``: token ids of some texts; by default those of the golden vectors.
            vectors: as for ``save_as``. The bundle also keeps the golden vectors of this one, so that ``verify`` can
                tell how far it is from the original.
            force: whether to replace an existing bundle.
            notes: as for ``save_as``.
            progress: called with the name of the work, the amount that is done, and the total amount.

        Returns:
            The new bundle, opened.

        Raises:
            BundleError: ``input.value`` for a quantized bundle, and for an argument out of range; ``vectors.none``;
                ``output.*``; ``file.*``.
        """
        quantizing = registry.module("torch", "quantizing")
        with self._told():
            made: Bundle = quantizing.quantize(
                self,
                path,
                to,
                group=group,
                keep=keep,
                method=method,
                calibration=calibration,
                vectors=vectors,
                force=force,
                notes=notes,
                progress=progress,
            )
        return made

    def save_as(
        self,
        path: str | os.PathLike[str],
        stages: torch_stage.Stage | torch_pipeline.Pipeline | Sequence[torch_stage.Stage],
        *,
        dtype: str = "keep",
        vectors: bool = True,
        force: bool = False,
        notes: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> Bundle:
        """Write a bundle with the weights of some stages, as training or an edit left them.

        A weight file is written anew if one of its tensors has another value. All other files are copied byte for
        byte; the copies share disk blocks if the file system can. The new bundle has its own fingerprint, and
        ``manifest.model.parent`` is the fingerprint of this one. It appears complete, or not at all.

        Args:
            path: the directory of the new bundle.
            stages: torch stages of this bundle: one, several, or a pipeline. Every other weight is taken over. Wrappers
                such as ``DistributedDataParallel`` are looked through.
            dtype: ``"keep"`` stores each tensor in the dtype that it has in this bundle, and rounds to it. Or
                ``"float32"``, ``"float16"`` or ``"bfloat16"``, in which all weights are stored. Graphs
                name the dtype, so new ones are written then if ``onnx`` is installed. Otherwise they are left out.
            vectors: whether to compute golden vectors through the new bundle's own shards, if this bundle has some.
                They prove that another machine gives the same numbers. They can't prove parity with an original model.
            force: whether to replace an existing bundle. It may be this one.
            notes: called with a sentence for each thing that was left out; by default, it becomes a warning.
            progress: called with the name of the work, the amount that is done, and the total amount.

        Returns:
            The new bundle, opened.

        Raises:
            BundleError: ``input.value`` for stages that don't fit this bundle, for adapters that weren't merged, and
                for two values of a tied table, also if the other end was saved into this bundle before;
                ``input.overflow``; ``output.*``; ``file.*``.
        """
        saving = registry.module("torch", "saving")
        made: Bundle = saving.save_as(
            self, path, stages, dtype=dtype, vectors=vectors, force=force, notes=notes, progress=progress
        )
        return made


def _reopen(path: Path, id: str, strict: bool) -> Bundle:  # noqa: A002
    """Open the bundle that a pickle names.

    Raises:
        BundleError: ``file.digest`` if the path now has another bundle; the errors of ``splitbundle.open``.
    """
    root = find_bundle(path)
    return Bundle(root, *read_documents(root, id), strict=strict)
