"""A bundle on disk: what it says of itself, whether its files are what it says, and stages of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from splitbundle.backends import registry
from splitbundle.storage.documents import read_documents
from splitbundle.storage.files import Progress
from splitbundle.storage.reader import BundleReader

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from splitbundle.backends.onnxruntime import pipeline as onnxruntime_pipeline
    from splitbundle.backends.onnxruntime import stage as onnxruntime_stage
    from splitbundle.backends.registry import AllOptions, OnnxRuntimeOptions, TorchOptions
    from splitbundle.backends.torch import pipeline as torch_pipeline
    from splitbundle.backends.torch import stage as torch_stage
    from splitbundle.stages.golden import Difference
    from splitbundle.verification.verify import Verification


class Bundle(BundleReader):
    """A ``.splitbundle`` directory. Immutable, and safe to share between threads and to pickle to workers."""

    def __reduce__(self) -> tuple[Any, tuple[Path, str, bool]]:
        # A worker reads the documents itself: a pickle names no module that may move, and holds no copy of them.
        return _reopen, (self.path, self.id, self.strict)

    def verify(
        self, shard: str | None = None, *, exact: bool = False, progress: Progress | None = None
    ) -> Verification:
        """Checks every file's size, digest and header; with ``shard``, those of that shard alone.

        With ``exact``, a file that the manifest doesn't list is a problem too. A listed file that is absent is a
        problem; to check a partial bundle, name its shards.

        Raises:
            BundleError: every problem of every file.
        """
        # Imported here, as it brings all that judges graphs and tokenizers: computing needs none of it.
        from splitbundle.verification.verify import verify

        return verify(self, shard, exact=exact, progress=progress)

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
        from splitbundle.stages import golden

        differences = registry.run_golden(self, shard, backend, progress)
        if self.manifest.vectors is not None:
            golden.check(differences, self.manifest.vectors.file)
        return differences

    @overload
    def stage(
        self,
        name: str | None = None,
        *,
        layers: tuple[int, int] | None = None,
        embeds: bool | None = None,
        head: bool | None = None,
        backend: Literal["torch"] = "torch",
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
        backend: str = "torch",
        **options: Any,
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
        own = registry.own_options(backend, options, "stage")
        return registry.module(backend, "stage").load_stages(self, [selection], **own)[0]

    @overload
    def pipeline(
        self, *, backend: Literal["torch"] = "torch", **options: Unpack[TorchOptions]
    ) -> torch_pipeline.Pipeline: ...

    @overload
    def pipeline(
        self, *, backend: Literal["onnxruntime"], **options: Unpack[OnnxRuntimeOptions]
    ) -> onnxruntime_pipeline.Pipeline: ...

    @overload
    def pipeline(self, *, backend: str | Mapping[str, str], **options: Unpack[AllOptions]) -> Any: ...

    def pipeline(self, *, backend: str | Mapping[str, str] = "torch", **options: Any) -> Any:
        """All shards, as stages in order. Arguments and errors as for ``stage``; tied weights are one parameter.

        ``backend`` may name one for each shard, ``{"bottom": "onnxruntime"}``; the others are computed with torch. A
        pipeline of two backends takes and gives numpy arrays.
        """
        if not isinstance(backend, Mapping):
            own = registry.own_options(backend, options, "pipeline")
            return registry.module(backend, "pipeline").load_pipeline(self, **own)
        return registry.mixed_pipeline(self, backend, options)


def _reopen(path: Path, id: str, strict: bool) -> Bundle:  # noqa: A002
    """Open the bundle that a pickle names.

    Raises:
        BundleError: ``file.digest`` where another bundle stands there by now; as for ``splitbundle.open``.
    """
    return Bundle(path, *read_documents(path, id), strict=strict)
