"""Open a checkpoint for conversion: find it, read it, and check its configuration once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from splitbundle.errors import BundleError
from splitbundle.format import strict_json
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.storage.files import Progress
from splitbundle.writing.atomic_directory import scratch_directory
from splitbundle_converter.checkpoint.directory import CheckpointDirectory
from splitbundle_converter.checkpoint.file_names import CONFIG
from splitbundle_converter.checkpoint.hub import find_checkpoint
from splitbundle_converter.checkpoint.pickles import BIN, read_model
from splitbundle_converter.checkpoint.source import Checkpoint, Configuration, has_weights
from splitbundle_converter.checkpoint.weight_files import SAFETENSORS
from splitbundle_converter.errors import refusal, source_json
from splitbundle_converter.families.composites import EXTENSION
from splitbundle_converter.families.configuration import an_object, read_configuration
from splitbundle_converter.families.row import Family
from splitbundle_converter.gguf_files.checkpoint import SUFFIX, gguf_file, read_gguf
from splitbundle_converter.language_part.language_part import read_language_part
from splitbundle_converter.language_part.original import layered_original_part, load_original_part
from splitbundle_converter.language_part.own_configuration import own_configuration
from splitbundle_converter.options import Note
from splitbundle_converter.quantized.dequantizing import dequantized, told
from splitbundle_converter.reference.golden_vectors import load_original
from splitbundle_converter.reference.layered_original import LayeredOriginal, layered_original
from splitbundle_converter.split_learning.parts import PartsCheckpoint, find_parts, read_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedCheckpoint:
    """A checkpoint, or its language part, with the facts of its configuration."""

    checkpoint: Checkpoint
    family: Family
    architecture: Architecture
    values: dict[str, Any]
    """The fields of the configuration."""
    not_used: dict[str, Any]
    """The fields of the configuration that neither the family nor transformers uses."""
    load_original: Callable[[], tuple[Any, str]]
    """Loads the original model in float32. Returns it with the name of the module list that has its layers."""
    layered_original: Callable[..., LayeredOriginal]
    """Builds the original model without its weights, to run it layer by layer."""
    part_configuration: dict[str, Any] | None = None
    """The configuration of the language part for its own class, if only this part is converted."""
    extensions: dict[str, Any] = field(default_factory=dict)
    """The entries for the manifest's ``extensions``."""


@contextmanager
def open_checkpoint(
    source: str | os.PathLike[str],
    revision: str | None,
    *,
    part: str | None,
    output: Path,
    allow_pickle: bool,
    force: bool,
    progress: Progress | None,
    exact: bool = False,
    notes: Note | None = None,
) -> Iterator[OpenedCheckpoint]:
    """Open a checkpoint for the duration of the block. Weights that were rewritten are removed at the end.

    Args:
        source: A directory, a GGUF file, or a hub id.
        revision: The branch, tag or commit of a hub id.
        part: "language" for the language part alone, or None.
        output: The directory of the bundle. Rewritten weights are stored beside it until the end of the block.
        allow_pickle: Whether to read pickles if there are no safetensors.
        force: Whether something may exist at ``output``.
        progress: A function that is called as for ``convert``.
        exact: Whether quantized weights that are computed in float32 keep this precision.
        notes: A function that is called with a sentence about quantized weights.

    Raises:
        BundleError: ``source.*``, ``usage.part``, ``output.*``, ``network``.
        MissingExtra: The library gguf isn't installed, and a GGUF file is given.
    """
    file = _gguf_file(source)
    if file is not None:
        with scratch_directory(output, force=force) as private:
            of_file = read_gguf(file, private, exact=exact, notes=notes)
            if notes is not None and of_file.blocks:
                notes(told(of_file.blocks, "gguf"))
            yield _judge(of_file, part)
        return

    def judged(checkpoint: Checkpoint) -> OpenedCheckpoint:
        return _judge(dequantized(checkpoint, exact=exact, notes=notes), part)

    directory = find_checkpoint(source, revision, allow_pickle=allow_pickle)
    parts = find_parts(directory) if allow_pickle else []
    whole = next((naming for naming in (SAFETENSORS, BIN) if has_weights(directory.path, naming)), None)
    if parts and whole:
        # A whole model beside trained parts is often the model before training: converting it would be a mistake.
        expected, got = "parts of a model, or a whole one", f"both: {whole.single} or its index, and {parts[0].weights}"
        raise refusal(
            "source.parts", directory.name, expected, got, "Move the files that you do not want to another directory"
        )
    if whole is SAFETENSORS or not allow_pickle:
        with _telling_of_the_configuration(directory):
            checkpoint = Checkpoint(directory.path, name=directory.name, revision=directory.revision)
        yield judged(checkpoint)
        return
    with scratch_directory(output, force=force) as private:
        if parts:
            yield _judge(read_parts(directory, parts, private, progress), part)
            return
        with _telling_of_the_configuration(directory):
            read = read_model(directory, private, progress)
        yield judged(read)


def _gguf_file(source: str | os.PathLike[str]) -> Path | None:
    """Return the GGUF file that a user means: by its path, or as the only weights of a directory."""
    path = Path(source)
    if path.suffix == SUFFIX and not path.is_dir():
        if not path.is_file():
            raise refusal(
                "source.missing", str(source), "a GGUF file", "nothing there" if not path.exists() else "no file"
            )
        return path
    if not path.is_dir() or any(has_weights(path, naming) for naming in (SAFETENSORS, BIN)):
        return None
    return gguf_file(path)


@contextmanager
def _telling_of_the_configuration(directory: CheckpointDirectory) -> Iterator[None]:
    """If the weights can't be read, report a configuration that can't be read either, in the same error."""
    try:
        yield
    except BundleError as error:
        try:
            if directory.has(CONFIG):
                raw = source_json(directory.read(CONFIG, strict_json.MAX_BYTES), CONFIG, constant=str)
                an_object(Configuration(raw=raw, file=CONFIG))
        except BundleError as other:
            raise BundleError([*other.problems, *error.problems]) from error
        raise


def _judge(checkpoint: Checkpoint, part: str | None) -> OpenedCheckpoint:
    if part is not None:
        language = read_language_part(checkpoint)
        return OpenedCheckpoint(
            checkpoint=language.source,
            family=language.family,
            architecture=language.architecture,
            values=language.values,
            not_used=language.not_used,
            load_original=partial(load_original_part, language),
            layered_original=partial(layered_original_part, language),
            part_configuration=own_configuration(language),
            extensions={EXTENSION: language.extension()},
        )
    if isinstance(checkpoint, PartsCheckpoint):  # joining the parts has already checked their configuration
        judged = checkpoint.judged
    else:
        judged = read_configuration(checkpoint.configuration())
    return OpenedCheckpoint(
        checkpoint=checkpoint,
        family=judged.family,
        architecture=judged.architecture,
        values=judged.values,
        not_used=judged.not_used,
        load_original=partial(load_original, checkpoint, judged.family),
        layered_original=partial(layered_original, checkpoint, judged.family),
    )
