"""Convert a checkpoint into a bundle. The bundle appears complete and checked, or not at all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from splitbundle.backends.torch.weight_files import UnitFiles, unit_files, write_weights
from splitbundle.backends.torch.weights import DTYPES as TORCH_DTYPES
from splitbundle.backends.torch.weights import rounded
from splitbundle.bundle import Bundle
from splitbundle.errors import quoted
from splitbundle.format.architecture import decoder as architectures
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.architecture.sizes import count
from splitbundle.format.manifest.document import TOKENIZER as DIRECTORY
from splitbundle.format.manifest.document import File, Manifest, Model, Storage, Text, fingerprint, identity
from splitbundle.format.text_document import FILE as TEXT
from splitbundle.format.weight_layout import Tensor as Stored
from splitbundle.format.weight_layout import file_size
from splitbundle.opening import open_bundle, relocated
from splitbundle.planning.costs import ModelCosts, model_costs
from splitbundle.planning.cuts import check_only_one, cuts_for
from splitbundle.storage.files import Progress
from splitbundle.version import __version__
from splitbundle.writing.atomic_directory import atomic_directory, scratch_directory
from splitbundle.writing.documents import write_documents, write_file
from splitbundle.writing.shards import check_cuts, make_shards, shard_names
from splitbundle_converter.carried_configuration import configuration_files
from splitbundle_converter.checkpoint.file_names import TOKENIZER
from splitbundle_converter.checkpoint.source import Checkpoint, dtype_of
from splitbundle_converter.errors import refusal
from splitbundle_converter.families import unused_fields
from splitbundle_converter.families.composites import PARTS
from splitbundle_converter.families.configuration import refuse_unchecked_code
from splitbundle_converter.families.dropout import rates
from splitbundle_converter.graphs import request
from splitbundle_converter.open_checkpoint import OpenedCheckpoint, open_checkpoint
from splitbundle_converter.options import DTYPES, QUANTIZED, Note
from splitbundle_converter.original_check import OriginalCheck, check_mode
from splitbundle_converter.published_schemas import check_schemas
from splitbundle_converter.quantized import dequantizing
from splitbundle_converter.text.golden_texts import text_document
from splitbundle_converter.text.text_files import text_files
from splitbundle_converter.translation import constants
from splitbundle_converter.translation.translate import Translation, translate


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    split: Sequence[int] | None = None,
    equal: int | None = None,
    max_shard_size: int | None = None,
    names: Sequence[str] | None = None,
    dtype: str = "keep",
    revision: str | None = None,
    part: str | None = None,
    check: bool | str = True,
    force: bool = False,
    max_file_size: int | None = None,
    onnx: bool | str = False,
    genai: bool = False,
    allow_pickle: bool = False,
    tokenizer: bool = True,
    quantize: str | None = None,
    notes: Note | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Convert a checkpoint into a bundle.

    The conversion never builds the model: it reads, translates and writes one tensor at a time.

    Args:
        source: A checkpoint directory, a GGUF file, or a hub id.
        output: The directory of the bundle. It appears complete or not at all.
        split: The cuts: rising layer numbers from 0 to the number of layers. By default there are none; a source that
            consists of parts keeps its own cuts. Give at most one of ``split``, ``equal`` and ``max_shard_size``.
        equal: The number of shards. The cuts make the largest shard as small as possible.
        max_shard_size: The largest size of a shard's files in bytes. There are as few shards as possible.
        names: The names of the shards; by default bottom, trunk, top (trunk-1 … when there are more).
        dtype: "float32", "float16", "bfloat16", or "keep" to keep the dtype of each tensor.
        revision: The branch, tag or commit of a hub id.
        part: "language" to convert only the language part of a checkpoint that has other parts, for images or sounds.
            The bundle's ``manifest.extensions["part"]`` names the parts that are left out.
        check: How to check the bundle with golden vectors, which the original class computes. True or "whole" loads the
            whole original model in float32, and compares the chained shards. "layers" has one layer of the original
            or of the bundle in memory at a time. It gives each layer the original's hidden state, compares the result,
            and runs no graphs. False or "none" checks nothing, and leaves the golden vectors out.
        force: Whether to replace an existing bundle. The old one stays in place until the new one is complete.
        max_file_size: The size in bytes above which a unit is written as several files.
        onnx: Whether to add a graph for onnxruntime to each shard. True adds graphs that compute in float32, of the
            variant that fits the weights; "float16" adds graphs that compute in float16, as the weights are stored.
        genai: Whether to add the configuration that onnxruntime-genai needs to run the graphs. It adds the graphs too.
        allow_pickle: Whether to accept weights in pickles. Only names and tensors are read, in a separate process.
        tokenizer: Whether to copy the tokenizer. Without it, the bundle takes and gives only token ids.
        quantize: "int8" or "int4" to quantize the bundle as ``Bundle.quantize`` does by default. The check compares the
            plain bundle with the original, before it is quantized. The plain bundle lies beside ``output`` for a while.
        notes: A function that is called with a sentence for each thing that the conversion accepted, skipped or could
            not do.
        progress: A function that is called with the current step, the amount done, and the total amount.

    Returns:
        The new bundle, opened.

    Raises:
        BundleError: ``source.*``, ``usage.*``, ``output.*``, ``memory``, ``network``.
        ParityError: The chained shards do not compute the same results as the original model. No files remain.
    """
    if dtype not in DTYPES:
        raise refusal("usage.dtype", None, f"one of {', '.join(DTYPES)}", quoted(dtype), argument="dtype")
    if part is not None and part not in PARTS:
        raise refusal("usage.part", None, f"one of {', '.join(PARTS)}", quoted(part), argument="part")
    if max_file_size is not None and (type(max_file_size) is not int or max_file_size < 1):
        expected, got = "a number of bytes from 1", quoted(max_file_size)
        raise refusal("usage.size", None, expected, got, argument="max_file_size")
    mode = check_mode(check)
    check_only_one({"split": split, "equal": equal, "max_shard_size": max_shard_size})
    graphs = request.graph_writer(onnx if quantize is None else bool(onnx), genai=genai)
    # The path is made absolute first: replacing the current directory of this process would change its meaning.
    target = Path(os.path.abspath(output))
    if quantize is not None:
        if quantize not in QUANTIZED:
            raise refusal("usage.dtype", None, f"one of {', '.join(QUANTIZED)}", quoted(quantize), argument="quantize")
        fitting = {"int8": "standard", "int4": "matmul_nbits"}[quantize]
        if isinstance(onnx, str) and onnx != fitting:
            hint = (
                f"onnx=True takes {fitting}, the variant of graphs over weights of {quantize.removeprefix('int')} bits"
            )
            raise refusal("usage.onnx", None, fitting, quoted(onnx), argument="onnx", hint=hint)
        with scratch_directory(target, force=force) as beside:
            plain = convert(
                source,
                beside / target.name,
                split=split,
                equal=equal,
                max_shard_size=max_shard_size,
                names=names,
                dtype=dtype,
                revision=revision,
                part=part,
                check=check,
                max_file_size=max_file_size,
                onnx=bool(onnx),
                genai=genai,
                allow_pickle=allow_pickle,
                tokenizer=tokenizer,
                notes=notes,
                progress=progress,
            )
            return plain.quantize(target, quantize, vectors=mode != "none", force=force, notes=notes, progress=progress)
    with open_checkpoint(
        source,
        revision,
        part=part,
        output=target,
        allow_pickle=allow_pickle,
        force=force,
        exact=dtype != "keep",
        notes=notes,
        progress=progress,
    ) as opened:
        if mode == "none":
            refuse_unchecked_code(opened.checkpoint.configuration())
        if notes is not None and opened.not_used:
            notes(unused_fields.note(opened.not_used, opened.checkpoint.configuration().file))
        return _convert(
            opened,
            target,
            split=split,
            equal=equal,
            max_shard_size=max_shard_size,
            names=names,
            dtype=dtype,
            mode=mode,
            force=force,
            max_file_size=max_file_size,
            graphs=graphs,
            tokenizer=tokenizer,
            notes=notes,
            progress=progress,
        )


def _convert(
    opened: OpenedCheckpoint,
    target: Path,
    *,
    split: Sequence[int] | None,
    equal: int | None,
    max_shard_size: int | None,
    names: Sequence[str] | None,
    dtype: str,
    mode: str,
    force: bool,
    max_file_size: int | None,
    graphs: request.GraphWriter | None,
    tokenizer: bool,
    notes: Note | None,
    progress: Progress | None,
) -> Bundle:
    checkpoint, family, architecture = opened.checkpoint, opened.family, opened.architecture
    check = None if mode == "none" else OriginalCheck(opened, by_layer=mode == "layers", progress=progress)
    translation = translate(checkpoint, family, architecture)
    storage, kept = _storage(checkpoint, translation, dtype)
    plan = _files(architecture, storage, max_file_size)

    def costs() -> ModelCosts:
        sizes = {unit: sum(map(file_size, files.values())) for unit, files in plan.items()}
        return model_costs(architecture, sizes, storage.dtype)

    cuts = cuts_for(split, equal, max_shard_size, costs, default=checkpoint.cuts)
    check_cuts(cuts, len(architecture.layers))
    given_names = shard_names(cuts, names)
    if graphs is not None:
        graphs.check(storage)
    stop_ids = checkpoint.stop_ids(opened.values)
    texts = {}
    if tokenizer:
        texts = text_files(checkpoint, family.model_type, architecture.vocab_size, notes, compare=check is not None)
    configuration, carried = configuration_files(opened, cast=not kept or checkpoint.quantization is not None)
    if TOKENIZER in texts:
        generation = carried.get(configuration.generation or "")
        checked = check is not None
        document = text_document(texts, family.model_type, architecture.vocab_size, generation, notes, golden=checked)
        carried[TEXT] = document.to_bytes()
    with atomic_directory(target, force=force) as root:
        listed, units = _write_units(root, checkpoint, translation, storage, plan, progress)
        listed[architectures.FILE] = write_file(root, architectures.FILE, architecture.to_bytes())
        vectors = None if check is None else check.write_vectors(root, dtype, listed)
        for path, data in (carried | {f"{DIRECTORY}{name}": data for name, data in texts.items()}).items():
            listed[path] = write_file(root, path, data)
        weight_files = tuple(path for paths in units.values() for path in paths)
        write_documents(
            root,
            Manifest(
                producer={"name": "splitbundle", "version": __version__},
                model=Model(
                    name=checkpoint.name.rpartition("/")[2],
                    family=family.model_type,
                    source=checkpoint.name,
                    revision=checkpoint.revision,
                    license=checkpoint.license(),
                    parameters=count(architecture.tensors()),
                    context_length=_context_length(opened.values),
                    architecture=identity(architecture.to_bytes()),
                    fingerprint=fingerprint(listed, weight_files),
                    dropout=rates(family.model_type, opened.values),
                    source_configuration=configuration,
                    text_file=TEXT if TEXT in carried else None,
                ),
                storage=storage,
                shards=make_shards(architecture, cuts, given_names, units, listed),
                hidden_size=architecture.hidden_size if cuts else None,
                units=units,
                files=listed,
                text=Text(
                    tokenizer=f"{DIRECTORY}{TOKENIZER}" if TOKENIZER in texts else None,
                    stop_ids=stop_ids,
                ),
                vectors=vectors,
                source_names=translation.source_names,
                features=architecture.extensions,
                extensions=opened.extensions
                | dequantizing.extension(checkpoint)
                | unused_fields.extension(opened.not_used)
                | constants.extension(translation.constants),
            ),
            architecture,
        )
        if graphs is not None:
            graphs(root)
        if check is not None:
            check.compare(root, graphs=graphs is not None, notes=notes)
        made = open_bundle(root)
        check_schemas(made)
        made.check_texts()
        checkpoint.directory.check_unchanged()
    return relocated(made, target)


def _context_length(config: dict[str, Any]) -> int | None:
    length = config.get("max_position_embeddings", config.get("n_positions"))
    return length if type(length) is int and length > 0 else None


def _storage(source: Checkpoint, translation: Translation, dtype: str) -> tuple[Storage, bool]:
    """Return how the weights will be stored, and whether each of them keeps its dtype."""
    kept = {name: dtype_of(source.tensors[origin.source]) or "" for name, origin in translation.origins.items()}
    if dtype != "keep":
        return Storage(encoding="plain", dtype=dtype), set(kept.values()) == {dtype}
    common = Counter(kept.values()).most_common(1)[0][0]
    exceptions = {name: own for name, own in kept.items() if own != common}
    return Storage(encoding="plain", dtype=common, exceptions=exceptions), True


def _files(architecture: Architecture, storage: Storage, max_file_size: int | None) -> UnitFiles:
    shapes = architecture.tensors()
    return unit_files(
        architecture, lambda name: Stored(dtype=storage.dtype_of(name), shape=shapes[name]), max_file_size
    )


def _write_units(
    root: Path,
    source: Checkpoint,
    translation: Translation,
    storage: Storage,
    plan: UnitFiles,
    progress: Progress | None,
) -> tuple[dict[str, File], dict[str, tuple[str, ...]]]:
    stored = {name: tensor for files in plan.values() for part in files.values() for name, tensor in part.items()}
    total = sum(tensor.size for tensor in stored.values())
    done = 0
    started: dict[str, Future[File]] = {}
    with source.reader() as reader, ThreadPoolExecutor(max_workers=1) as pool:

        def produce(name: str) -> Iterator[Tensor]:
            nonlocal done
            if progress is not None:
                progress("converting", done, total)
            done += stored[name].size
            origin = translation.origins[name]
            found = source.tensors[origin.source]
            for piece in origin.pieces(reader):
                yield rounded(piece, TORCH_DTYPES[storage.dtype_of(name)], found.stored, found.file)

        for files in plan.values():
            for path, tensors in files.items():
                second_pass = write_weights(root / path, tensors, produce)
                for before in list(started.values())[-1:]:
                    # An error ends the conversion soon, and at most one written file waits in the page cache.
                    before.result()
                started[path] = pool.submit(second_pass)
    listed = {path: running.result() for path, running in started.items()}
    if progress is not None:
        progress("converting", total, total)
    return listed, {unit: tuple(files) for unit, files in plan.items()}
