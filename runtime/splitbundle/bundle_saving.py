"""The half of ``Bundle`` that writes other weights: cast, quantize, and save what was trained."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from splitbundle.backends import registry
from splitbundle.bundle_files import BundleFiles
from splitbundle.storage.files import Progress

if TYPE_CHECKING:
    from typing_extensions import Self

    from splitbundle.backends.torch import pipeline as torch_pipeline
    from splitbundle.backends.torch import stage as torch_stage


class BundleSaving(BundleFiles):
    """A bundle of which other ones are written. It needs torch."""

    def cast(
        self,
        path: str | os.PathLike[str],
        dtype: str,
        *,
        vectors: bool = True,
        force: bool = False,
        notes: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> Self:
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
            made: Self = saving.cast(self, path, dtype, vectors=vectors, force=force, notes=notes, progress=progress)
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
    ) -> Self:
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
            made: Self = quantizing.quantize(
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
    ) -> Self:
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
        made: Self = saving.save_as(
            self, path, stages, dtype=dtype, vectors=vectors, force=force, notes=notes, progress=progress
        )
        return made
