"""The class ``Bundle``: a bundle on disk, which verifies its files and loads stages and pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from splitbundle import logs, remote_stages
from splitbundle.backends import registry
from splitbundle.bundle_saving import BundleSaving
from splitbundle.storage.documents import find_bundle, read_documents
from splitbundle.storage.files import Progress

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from splitbundle.backends.onnxruntime import pipeline as onnxruntime_pipeline
    from splitbundle.backends.onnxruntime import stage as onnxruntime_stage
    from splitbundle.backends.registry import (
        AllOptions,
        OnnxRuntimeOptions,
        RemotePipelineOptions,
        RemoteStageOptions,
        TorchOptions,
    )
    from splitbundle.backends.torch import pipeline as torch_pipeline
    from splitbundle.backends.torch import remote as torch_remote
    from splitbundle.backends.torch import stage as torch_stage
    from splitbundle.stages.golden import Difference


class Bundle(BundleSaving):
    """A ``.splitbundle`` directory. It is immutable: threads may share it, and worker processes may unpickle it.

    ``splitbundle.open`` makes one. ``path`` is the directory, ``id`` the bundle id (``sha256:…``), and ``strict`` tells
    whether it was opened with ``verify="always"``. ``manifest`` and ``architecture`` have the fields of the two
    documents, under their names in the specification.
    """

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

    @overload
    def stage(
        self,
        name: str | None = None,
        *,
        layers: tuple[int, int] | None = None,
        embeds: bool | None = None,
        head: bool | None = None,
        backend: Literal["torch"] | None = None,
        remote: str | Sequence[str],
        **options: Unpack[RemoteStageOptions],
    ) -> torch_remote.RemoteStage: ...

    @overload
    def stage(
        self,
        name: str | None = None,
        *,
        layers: tuple[int, int] | None = None,
        embeds: bool | None = None,
        head: bool | None = None,
        backend: str,
        remote: str | Sequence[str],
        **options: Unpack[RemoteStageOptions],
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
            remote: the address of a server that holds this part, ``grpcs://HOST:PORT``, or ``grpc://HOST:PORT`` without
                TLS. Or a list of them, in the order in which they are tried. The part may neither embed nor have the
                head, and ``layers`` means no ends here. Of the options above it takes ``device`` and ``trainable``; the
                others are the server's. The files of its layers may be missing here. The following options need
                ``remote``.
            tls: the directory with this machine's ``ca.pem``, ``cert.pem`` and ``key.pem``, or with ``ca.pem`` alone;
                by default the authorities of the system.
            token: a token that the server knows; by default the variable ``SPLITBUNDLE_STAGE_TOKEN``.
            wire: the encoding of hidden states and gradients: ``"float32"``, ``"float16"``, ``"bfloat16"`` or
                ``"int8"``. By default the dtype in which the server computes, which is exact.
            replay: how a server gets a session that another one lost. ``"exact"``, the default, sends the same calls
                again, and gives the same bits. ``"merged"`` sends one prompt, which is faster.
            timeout: how long to look for a server that answers, in seconds; by default 30.
            step_timeout: how long a server that lives may take for one step, in seconds; by default 300.
            insecure: whether an address without TLS may be one of another machine.
            same_weights: whether the server must have this bundle's fingerprint; by default True.

        Raises:
            BundleError: for an unknown part or backend, and for a file that is missing or differs from its entry. With
                ``remote``: ``stage.range`` for a part that embeds or has the head; ``stage.backend`` for an option that
                is the server's; ``train.refused``; ``keys.file``; ``peer.*``.
            MissingExtra: ``grpcio`` isn't installed, with ``remote``.
        """
        chosen = backend or registry.installed_backend()
        remote, remote_options = remote_stages.take_options(options)
        if remote is not None and layers is not None:  # the ends stay here
            embeds, head = embeds or False, head or False
        selection = self.select(name, layers=layers, embeds=embeds, head=head)
        if remote is not None:
            return remote_stages.load_stage(self, selection, chosen, remote, remote_options, options)
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

    @overload
    def pipeline(
        self,
        *,
        backend: Literal["torch"] | None = None,
        remote: Mapping[str, str | Sequence[str]],
        **options: Unpack[RemotePipelineOptions],
    ) -> torch_pipeline.Pipeline: ...

    @overload
    def pipeline(
        self,
        *,
        backend: str | Mapping[str, str],
        remote: Mapping[str, str | Sequence[str]],
        **options: Unpack[RemotePipelineOptions],
    ) -> Any: ...

    def pipeline(self, *, backend: str | Mapping[str, str] | None = None, **options: Any) -> Any:
        """Load all shards as stages in order. Tied weights are one parameter.

        Arguments and errors are those of ``stage``. ``backend`` may also map shards to backends, as in
        ``{"bottom": "onnxruntime"}``; torch computes the other shards. A pipeline of two backends takes and returns
        numpy arrays.

        ``remote`` maps shards to the addresses of their servers, as in ``{"trunk": "grpcs://HOST:PORT"}``. The other
        shards are computed here, with the options of their backend.
        """
        chosen = backend if isinstance(backend, Mapping) else backend or registry.installed_backend()
        remote, remote_options = remote_stages.take_options(options)
        if remote is not None:
            with self._told():
                made = remote_stages.load_pipeline(self, chosen, remote, remote_options, options)
        elif not isinstance(chosen, Mapping):
            own = registry.own_options(chosen, options, "pipeline")
            with self._told():
                made = registry.module(chosen, "pipeline").load_pipeline(self, **own)
        else:
            with self._told():
                made = registry.mixed_pipeline(self, chosen, options)
        logs.debug("loaded a pipeline with %s", chosen)
        made.bundle = self  # for its tokenizer and its context length
        return made


def _reopen(path: Path, id: str, strict: bool) -> Bundle:  # noqa: A002
    """Open the bundle that a pickle names.

    Raises:
        BundleError: ``file.digest`` if the path now has another bundle; the errors of ``splitbundle.open``.
    """
    root = find_bundle(path)
    return Bundle(root, *read_documents(root, id), strict=strict)
