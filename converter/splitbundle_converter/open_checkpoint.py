"""Opening a checkpoint to convert it: safetensors as they stand, pickles and parts only where that is allowed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from splitbundle.storage.files import Progress
from splitbundle_converter.checkpoint.hub import find_checkpoint
from splitbundle_converter.checkpoint.pickles import BIN, read_model
from splitbundle_converter.checkpoint.source import Source, has_weights
from splitbundle_converter.checkpoint.weight_files import SAFETENSORS
from splitbundle_converter.errors import refused
from splitbundle_converter.split_learning.parts import find_parts, read_parts
from splitbundle_converter.writing.atomic_directory import scratch


@contextmanager
def opened(
    source: str | os.PathLike[str],
    revision: str | None,
    *,
    output: Path,
    allow_pickle: bool,
    force: bool,
    progress: Progress | None,
) -> Iterator[Source]:
    """A checkpoint, for as long as the block takes: what was rewritten of it is removed at the end.

    Args:
        source: a directory, or a hub id.
        revision: of a hub id.
        output: where the bundle is to be; what has to be rewritten lies beside it.
        allow_pickle: whether to take pickles, where there are no safetensors.
        force: whether something may stand at ``output``.
        progress: as for ``convert``.

    Raises:
        BundleError: ``source.*``, ``output.*``, ``network``.
    """
    place = find_checkpoint(source, revision, allow_pickle=allow_pickle)
    parts = find_parts(place) if allow_pickle else []
    whole = next((naming for naming in (SAFETENSORS, BIN) if has_weights(place.directory, naming)), None)
    if parts and whole:
        # Whoever trained the parts would get a bundle of the model that they began with.
        expected, got = "parts of a model, or a whole one", f"both: {whole.single} or its index, and {parts[0].weights}"
        raise refused("source.parts", place.name, expected, got, "Move the ones that aren't meant elsewhere")
    if whole is SAFETENSORS or not allow_pickle:
        yield Source(place.directory, name=place.name, revision=place.revision)
        return
    with scratch(output, force=force) as private:
        read = read_parts(place, parts, private, progress) if parts else read_model(place, private, progress)
        yield read
