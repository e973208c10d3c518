"""Check a new bundle against the original model: the whole model at once, or one layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from splitbundle.backends.torch.router_ties import compare_by_layer
from splitbundle.backends.torch.stage import load_stages
from splitbundle.backends.torch.weight_files import write_weights
from splitbundle.backends.torch.weights import DTYPES, map_tensors
from splitbundle.bundle import Bundle
from splitbundle.errors import quoted
from splitbundle.format.manifest.document import File, Vectors
from splitbundle.format.weight_layout import Tensor as Stored
from splitbundle.opening import open_bundle
from splitbundle.stages import golden
from splitbundle.storage.files import Progress
from splitbundle.storage.reader import VECTORS
from splitbundle_converter.errors import refusal
from splitbundle_converter.families import unused_fields
from splitbundle_converter.families.composites import EXTENSION as PART
from splitbundle_converter.open_checkpoint import OpenedCheckpoint
from splitbundle_converter.options import CHECKS, Note
from splitbundle_converter.quantized.dequantizing import checked_with
from splitbundle_converter.reference.asked_fields import asked_fields
from splitbundle_converter.reference.golden_vectors import (
    case_lengths,
    layered_vectors,
    model_bytes,
    reference_vectors,
)
from splitbundle_converter.reference.memory import PeakMemory, give_back_freed_memory
from splitbundle_converter.reference.original_errors import BY_LAYER, UNCHECKED, explained, loaded

_PATH: Final = f"{VECTORS}.safetensors"
_FIRST: Final = "hidden.0"
"""The place of the embedding's result."""
_ROWS: Final = 16
"""The number of rows of tokens that are compared at once."""
_GRAPHS: Final = 'Bundle.run_vectors(backend="onnxruntime")'
"""What runs the graphs later."""


class OriginalCheck:
    """One check of a conversion: it computes golden vectors, and then compares the bundle with them."""

    def __init__(self, opened: OpenedCheckpoint, *, by_layer: bool, progress: Progress | None) -> None:
        """Prepare a check.

        Args:
            opened: The checkpoint.
            by_layer: Whether one layer of each model is in memory at a time.
            progress: A function that is called as for ``convert``.
        """
        self._opened, self._by_layer, self._progress = opened, by_layer, progress
        self._memory = PeakMemory()
        self._dtype: torch.dtype | None = None
        """The dtype that the weights were rounded to, or None."""

    def write_vectors(self, root: Path, dtype: str, listed: dict[str, File]) -> Vectors:
        """Run the original model, and write its results into a bundle. Add the file to ``listed``.

        Args:
            root: The directory of the new bundle.
            dtype: The dtype that the weights were rounded to, or "keep".
            listed: The files of the bundle.

        Raises:
            BundleError: ``memory``, ``source.*``.
        """
        opened, progress = self._opened, self._progress
        self._dtype = None if dtype == "keep" else DTYPES[dtype]
        if progress is not None:
            progress("running the original model", 0, 1)
        found = opened.checkpoint.configuration()
        with explained(found, UNCHECKED if self._by_layer else BY_LAYER), asked_fields() as asked:
            if self._by_layer:
                with self._memory.watch():
                    lengths, tensors = layered_vectors(
                        opened.layered_original, opened.architecture, dtype, self._after_layer
                    )
            else:
                lengths, tensors = reference_vectors(opened.load_original, opened.architecture, dtype)
        unused_fields.check_not_asked(opened.not_used, asked, found)
        stored = {
            name: Stored(dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
            for name, tensor in tensors.items()
        }
        produce: Callable[[str], Tensor] = tensors.__getitem__
        listed[_PATH] = write_weights(root / _PATH, stored, produce)()
        if progress is not None:
            progress("running the original model", 1, 1)
        return Vectors(file=_PATH, lengths=lengths)

    def compare(self, root: Path, *, graphs: bool, notes: Note | None) -> None:
        """Compare the complete bundle with the golden vectors.

        Args:
            root: The directory of the new bundle.
            graphs: Whether its shards have graphs. The check by layer does not run them.
            notes: A function that is called as for ``convert``.

        Raises:
            ParityError: ``parity``.
        """
        bundle, threads = open_bundle(root), torch.get_num_threads()
        how = checked_with(self._opened.checkpoint, by_layer=self._by_layer)
        if notes is not None and how is not None:
            notes(how)
        if not self._by_layer:
            bundle.run_vectors(backend="all" if graphs else "torch", threads=threads, progress=self._progress)
            return
        with self._memory.watch():
            differences = compare_by_layer(bundle, None, map_tensors(bundle, VECTORS), threads, self._after_layer)
            if all(difference.where != _FIRST for difference in golden.wrong(differences)):
                differences = [*self._compare_tokens(bundle, threads), *differences]
        golden.check(differences, _PATH, by_layer=True)
        if notes is not None and self._memory.bytes is not None:
            size = _in_words(model_bytes(self._opened.architecture))
            notes(
                f"The check took at most {_in_words(self._memory.bytes)} of memory, one layer at a time. "
                f"The whole original model in float32 takes {size}"
            )
        if notes is not None and graphs:
            notes(f"The check by layer did not run the graphs, which take memory for a whole shard. {_GRAPHS} does")

    def _compare_tokens(self, bundle: Bundle, threads: int) -> list[golden.Difference]:
        """Return the largest difference of the embedding over all token ids: the golden vectors have a few of them.

        A larger class may replace some ids by images, so a part of one is compared for the ids of the golden vectors.
        """
        architecture = self._opened.architecture
        if PART in self._opened.extensions:
            return []
        stage = load_stages(
            bundle, [bundle.select(layers=(0, 0), embeds=True, head=False)], dtype="float32", threads=threads
        )[0]
        found: list[golden.Difference] = []

        def take(ids: Tensor, hidden: Tensor) -> None:
            largest = float((stage(ids) - hidden).abs().max())
            found.append(
                golden.Difference(
                    where=_FIRST,
                    largest=largest,
                    scale=float(hidden.abs().max()),
                    between=("torch", golden.side(bundle)),
                    tolerance=golden.TOLERANCE,
                )
            )

        length = max(case_lengths(architecture))  # the original may have a table of few positions
        tokens = torch.arange(-(-architecture.vocab_size // length) * length) % architecture.vocab_size
        batches = torch.split(tokens.reshape(-1, length), _ROWS)
        loaded(self._opened.layered_original).embed(batches, self._dtype, take)
        self._after_layer("comparing the tokens", 1, 1)
        return [max(golden.wrong(found) or found, key=lambda difference: difference.relative)]

    def _after_layer(self, what: str, done: int, total: int) -> None:
        """Get the progress of a run by layer, when a layer was freed and the next one isn't loaded yet."""
        give_back_freed_memory()
        if self._progress is not None:
            self._progress(what, done, total)


def check_mode(check: bool | str) -> str:
    """Return one of ``CHECKS`` for what a caller gave. True means "whole", and False means "none".

    Raises:
        BundleError: ``usage.check``.
    """
    if isinstance(check, bool):
        return "whole" if check else "none"
    if not isinstance(check, str) or check not in CHECKS:
        expected = f"one of {', '.join(CHECKS)}, True or False"
        raise refusal("usage.check", None, expected, quoted(check), argument="check")
    return check


def _in_words(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
