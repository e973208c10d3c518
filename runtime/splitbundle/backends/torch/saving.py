"""Save a bundle whose weights were changed in stages: new weight files, and the other files as they are."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import Tensor

from splitbundle.backends.torch.changes import loaded_weights, same_bits
from splitbundle.backends.torch.own_vectors import copy_original_vectors, vectors_of_itself
from splitbundle.backends.torch.quantized_stages import is_code
from splitbundle.backends.torch.stage import Stage, stages_in
from splitbundle.backends.torch.weight_files import write_weights
from splitbundle.backends.torch.weights import DTYPES, map_tensors, rounded
from splitbundle.errors import BundleError, quoted, wrong_argument
from splitbundle.format import names, weight_layout
from splitbundle.format.dtypes import WEIGHTS
from splitbundle.format.encodings import EXTENSIONS as ENCODING_NAMES
from splitbundle.format.genai import GENAI
from splitbundle.format.manifest.document import EMBEDDING, File, Manifest, Storage, fingerprint
from splitbundle.records import replace
from splitbundle.storage.documents import read_documents
from splitbundle.storage.files import Progress
from splitbundle.storage.reader import BundleReader
from splitbundle.verification.verify import check_digests
from splitbundle.version import __version__
from splitbundle.writing.atomic_directory import atomic_directory
from splitbundle.writing.copying import check_outside, copy_files, refuse_missing, unchanged
from splitbundle.writing.documents import write_documents

if TYPE_CHECKING:
    from splitbundle.backends.torch.pipeline import Pipeline

KEEP: Final = "keep"
Changed = Mapping[str, Tensor]
"""The name of a tensor -> its value, in any floating dtype and on any device."""
Note = Callable[[str], None]
ReaderT = TypeVar("ReaderT", bound=BundleReader)


def save_as(
    bundle: ReaderT,
    output: str | os.PathLike[str],
    stages: Stage | Pipeline | Sequence[Stage],
    *,
    dtype: str = KEEP,
    vectors: bool = True,
    force: bool = False,
    notes: Note | None = None,
    progress: Progress | None = None,
) -> ReaderT:
    """Write a bundle with the weights of some stages. See ``Bundle.save_as``."""
    if dtype not in (KEEP, *WEIGHTS):
        raise wrong_argument("dtype", f"{KEEP}, or one of {', '.join(WEIGHTS)}", quoted(dtype))
    storage = bundle.manifest.storage if dtype == KEEP else _in(bundle, dtype)
    tensors = tensors_of(bundle, stages)
    return save_changed(
        bundle, output, tensors, storage, vectors=vectors, exact=False, force=force, notes=notes, progress=progress
    )


def cast(
    bundle: ReaderT,
    output: str | os.PathLike[str],
    dtype: str,
    *,
    vectors: bool = True,
    force: bool = False,
    notes: Note | None = None,
    progress: Progress | None = None,
) -> ReaderT:
    """Write a bundle with all weights in another dtype. See ``Bundle.cast``."""
    if dtype not in WEIGHTS:
        raise wrong_argument("dtype", f"one of {', '.join(WEIGHTS)}", quoted(dtype))
    exact = dtype == "float32" or set(bundle.manifest.storage.dtypes) == {dtype}
    storage = _in(bundle, dtype)
    return save_changed(
        bundle, output, {}, storage, vectors=vectors, exact=exact, force=force, notes=notes, progress=progress
    )


def _in(bundle: BundleReader, dtype: str) -> Storage:
    """Return a storage in another dtype. Quantized weights stay as they are."""
    return Storage(encoding="plain", dtype=dtype, encodings=bundle.manifest.storage.encodings)


def save_changed(
    bundle: ReaderT,
    output: str | os.PathLike[str],
    tensors: Changed,
    storage: Storage,
    *,
    vectors: bool,
    exact: bool,
    force: bool,
    notes: Note | None,
    progress: Progress | None,
) -> ReaderT:
    """Write a bundle with some changed tensors, in a storage. If it is ``exact``, no value changes.

    If weights become quantized, the new bundle keeps the golden vectors of the old one beside its own.
    """
    units = _changed_units(bundle, tensors, storage)
    kept = _kept_files(bundle, units, storage, exact=exact)
    if storage != bundle.manifest.storage:
        refuse_missing(bundle, bundle.manifest.weight_files())  # every weight is written anew
    target = Path(os.path.abspath(output))
    check_outside(bundle, target)
    write_graphs = None if storage == bundle.manifest.storage else _graph_writer(bundle, storage, notes)
    with atomic_directory(target, force=force) as root, unchanged(bundle):
        listed = {path: bundle.manifest.files[path] for path in bundle.manifest.files if path in kept}
        copy_files(bundle, [path for path in kept if path not in bundle.absent()], root, check=True, progress=progress)
        # A weight that is taken over gets a new digest, so the old one must be right.
        absent = bundle.absent()
        taken = [unit for unit in units if any(name not in tensors for name in bundle.stored(unit))]
        paths = [path for unit in taken for path in bundle.manifest.units[unit] if path not in absent]
        check_digests(bundle, paths, progress)
        written = _write_units(bundle, units, tensors, storage, root, progress)
        manifest = _manifest(bundle, listed | written, storage, changed=bool(units), exact=exact)
        manifest = write_documents(root, manifest, bundle.architecture)
        if units and vectors and not exact and bundle.manifest.vectors is not None:
            found = vectors_of_itself(bundle, root, progress)
            if isinstance(found, str):
                _note(notes, found)
            else:
                entries = {found[0].file: found[1]}
                if storage.encodings and not bundle.manifest.storage.encodings:
                    kept_vectors = copy_original_vectors(bundle, root)
                    entries |= kept_vectors
                    found = replace(found[0], original=next(iter(kept_vectors))), found[1]
                manifest = replace(manifest, files=manifest.files | entries, vectors=found[0])
                write_documents(root, manifest, bundle.architecture)
        if write_graphs is not None:
            write_graphs(root)
        made = read_documents(root)
    return type(bundle)(target, made.manifest, made.architecture, made.id)


def tensors_of(bundle: BundleReader, stages: Stage | Pipeline | Sequence[Stage]) -> dict[str, Tensor]:
    """Return the tensors of stages by their canonical names.

    Raises:
        BundleError: ``input.value`` for stages of another architecture, for layers that were replaced (by adapters,
            for instance), and for a tensor that has two values.
    """
    found: dict[str, tuple[Tensor, str]] = {}
    stored = {
        name: tensor
        for logical, shape in bundle.architecture.tensors().items()
        for name, tensor in bundle.manifest.storage.stored(logical, shape).items()
    }
    for stage in stages_in(stages):
        if stage.architecture != bundle.architecture:
            expected = f"stages of a bundle with the architecture of {bundle.path.name}"
            raise wrong_argument("stages", expected, f"{quoted(stage.name)}, of another architecture")
        own = dict(stage.named_parameters(remove_duplicate=False))
        expected_names = set(_names_of(bundle, stage))
        if own.keys() != expected_names:
            more = sorted(own.keys() - expected_names)
            got = f"{quoted(more[0])}, which no bundle has" if more else f"no {min(expected_names - own.keys())!r}"
            hint = "Merge adapters into their layers first: stage.merge_lora(), or merge_and_unload() of PEFT"
            if bundle.manifest.storage.encodings:
                hint = "Adapters can't be merged into quantized weights: save them by themselves, with save_lora"
            raise wrong_argument("stages", f"the parameters of {quoted(stage.name)}, under their own names", got, hint)
        for name, parameter in own.items():
            parameter = getattr(parameter, "full_tensor", lambda own=parameter: own)()  # FSDP divides its parameters
            shape, floats = stored[name].shape, stored[name].dtype in WEIGHTS
            if tuple(parameter.shape) != shape or parameter.is_floating_point() != floats:
                got = f"{quoted(name)} of {parameter.dtype} {list(parameter.shape)}"
                raise wrong_argument("stages", f"numbers of the shape {list(shape)}", got)
            if parameter.is_meta:
                hint = "accelerate keeps it elsewhere: load the stage without offloading to save it"
                raise wrong_argument("stages", f"a value for {quoted(name)}", "a tensor without data", hint)
            before = found.setdefault(name, (parameter.detach(), stage.name))
            if before[0] is not parameter and not same_bits(before[0], parameter.detach()):
                expected = f"one value for {quoted(name)}, which {before[1]} and {stage.name} share"
                hint = "Stages of one pipeline share it; in others, sum its gradients: sum_tied_gradients"
                raise wrong_argument("stages", expected, "two values", hint)
    if not found:
        raise wrong_argument("stages", "at least one stage", "none")
    tensors = {name: tensor for name, (tensor, _) in found.items()}
    if EMBEDDING in tensors and bundle.architecture.head.tied:
        _settle_table(bundle, stages_in(stages), tensors)
    return tensors


def _settle_table(bundle: BundleReader, stages: Sequence[Stage], tensors: dict[str, Tensor]) -> None:
    """Decide which tied table a bundle gets from one of its ends, if the other end was saved into it before.

    A table that this end didn't change must not undo what the other end learned.

    Raises:
        BundleError: ``input.value`` if both ends changed it.
    """
    holders = [stage for stage in stages if stage.embedding is not None]
    both = any(stage.embeds for stage in holders) and any(stage.has_head for stage in holders)
    present = not any(path in bundle.absent() for path in bundle.manifest.units["embedding"])
    if both or not present or all(stage.source[1] == bundle.id for stage in holders):
        return
    theirs = map_tensors(bundle, "embedding")[EMBEDDING]
    ours = _to_store(EMBEDDING, tensors[EMBEDDING], theirs.dtype)
    loaded = loaded_weights(holders[0])
    before = None if loaded is None else _to_store(EMBEDDING, loaded[EMBEDDING], theirs.dtype)
    if same_bits(ours, theirs) or (before is not None and same_bits(before, theirs)):
        return
    if before is not None and same_bits(ours, before):
        del tensors[EMBEDDING]
        return
    hint = "Sum the gradients of both ends while you train (sum_tied_gradients), or give save_as both ends at once"
    got = f"another in {bundle.path.name}, and another in {holders[0].name}"
    raise wrong_argument("stages", f"one value for {quoted(EMBEDDING)}, which is tied", got, hint)


def _names_of(bundle: BundleReader, stage: Stage) -> Iterator[str]:
    first, last = stage.layer_range
    units = bundle.architecture.units_of((first, last), embeds=stage.embeds, head=stage.head is not None)
    for unit in units:
        whole = unit != "embedding" or stage.embeds
        # A stage with a tied head that doesn't embed holds only the token table of the embedding.
        yield from (name for name in bundle.stored(unit) if whole or name.startswith(EMBEDDING))


def _changed_units(bundle: BundleReader, tensors: Changed, storage: Storage) -> list[str]:
    """Return the units that must be written: those with another dtype, or with a tensor that has another value."""
    other = storage != bundle.manifest.storage
    changed = []
    for unit in bundle.manifest.units:
        given = [name for name in bundle.stored(unit) if name in tensors]
        if other or (given and _differs(bundle, unit, {name: tensors[name] for name in given})):
            changed.append(unit)
    return changed


def _differs(bundle: BundleReader, unit: str, tensors: Changed) -> bool:
    if any(path in bundle.absent() for path in bundle.manifest.units[unit]):
        return True
    stored = map_tensors(bundle, unit)
    return any(not same_bits(stored[name], _to_store(name, own, stored[name].dtype)) for name, own in tensors.items())


def _to_store(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return rounded(tensor.detach().to("cpu"), dtype, name)


def _kept_files(bundle: BundleReader, units: Sequence[str], storage: Storage, *, exact: bool) -> list[str]:
    """Return the paths of the files that the new bundle takes over."""
    manifest = bundle.manifest
    written = {path for unit in units for path in manifest.units[unit]}
    left = {names.CARD, *written}
    if units and not exact and manifest.vectors is not None:
        left |= set(manifest.vectors.files)
    if storage != manifest.storage:  # graphs name the dtype of each weight, and its place in the file
        left |= {shard.graph.file for shard in bundle.shards if shard.graph is not None} | set(GENAI)
    return [path for path in manifest.files if path not in left]


def _write_units(
    bundle: BundleReader,
    units: Sequence[str],
    tensors: Changed,
    storage: Storage,
    root: Path,
    progress: Progress | None,
) -> dict[str, File]:
    """Write the weight files of some units, one tensor at a time, and return their entries in the manifest."""
    shapes = bundle.architecture.unit_tensors()
    sizes = {unit: _stored(storage, shapes[unit]) for unit in units}
    total, done = sum(len(own) for own in sizes.values()), 0
    listed: dict[str, File] = {}
    for unit in units:
        if any(name not in tensors for name in sizes[unit]):
            refuse_missing(bundle, bundle.manifest.units[unit])
        whole = not any(path in bundle.absent() for path in bundle.manifest.units[unit])
        stored: Mapping[str, Tensor] = map_tensors(bundle, unit) if whole else {}

        def produce(name: str, stored: Mapping[str, Tensor] = stored) -> Tensor:
            nonlocal done
            if progress is not None:
                progress("writing", done, total)
            done += 1
            value = tensors[name] if name in tensors else stored[name]
            return value if is_code(name, value) else _to_store(name, value, DTYPES[storage.dtype_of(name)])

        for path, own in _files_of(bundle, unit).items():
            listed[path] = write_weights(root / path, _stored(storage, {n: shapes[unit][n] for n in own}), produce)()
    if progress is not None and total:
        progress("writing", total, total)
    return listed


def _stored(storage: Storage, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, weight_layout.Tensor]:
    return {name: tensor for logical, s in shapes.items() for name, tensor in storage.stored(logical, s).items()}


def _files_of(bundle: BundleReader, unit: str) -> dict[str, list[str]]:
    """Return the names of the logical tensors in each file of a unit. The new files have the same ones."""
    paths, own = bundle.manifest.units[unit], bundle.architecture.unit_tensors()[unit]
    if len(paths) == 1:
        return {paths[0]: list(own)}
    refuse_missing(bundle, paths)
    opened = zip(paths, bundle.open_weights(unit), strict=True)
    return {path: [name for name in own if name in found.layout] for path, (_, found) in opened}


def _manifest(
    bundle: BundleReader, listed: dict[str, File], storage: Storage, *, changed: bool, exact: bool
) -> Manifest:
    """Return the draft of the new manifest: without golden vectors if the weights changed."""
    old = bundle.manifest
    weights = old.weight_files()
    model = old.model
    if changed:
        model = replace(model, fingerprint=fingerprint(listed, weights), parent=model.fingerprint)
    if storage != old.storage and model.source_configuration is not None:
        model = replace(model, source_configuration=replace(model.source_configuration, cast=True))
    shards = tuple(
        replace(
            shard,
            bytes=sum(listed[path].size for unit in shard.units for path in old.units[unit]),
            graph=shard.graph if shard.graph is not None and shard.graph.file in listed else None,
        )
        for shard in old.shards
    )
    return replace(
        old,
        producer={"name": "splitbundle", "version": __version__},
        model=model,
        storage=storage,
        features=(*storage.extensions, *(name for name in old.features if name not in ENCODING_NAMES)),
        shards=shards,
        files=listed,
        vectors=None if changed and not exact else old.vectors,
    )


def _graph_writer(bundle: BundleReader, storage: Storage, notes: Note | None) -> Callable[[Path], object] | None:
    """Return a function that adds graphs for another dtype, or None if there were none, or if they can't be made here.

    The converter writes graphs. It is found by the metadata of installed packages, because the runtime imports no
    converter.
    """
    variants = {shard.graph.variant for shard in bundle.shards if shard.graph is not None}
    if not variants:
        return None
    from importlib.metadata import entry_points

    usable, before = storage.graph_variants, variants.pop()
    variant = before if before in usable else usable[0]
    try:
        (found,) = entry_points(group="splitbundle.graphs")
        writer: Any = found.load()(variant, genai=GENAI[0] in bundle.manifest.files)
        writer.check(storage)
    except (ValueError, ImportError, BundleError) as error:  # no converter, or no onnx
        why = "" if isinstance(error, ValueError) else f" ({' '.join(str(error).split())[:200]})"
        _note(notes, f"The graphs are left out, as they name the old dtype{why}: splitbundle add-onnx makes new ones.")
        return None
    return writer  # type: ignore[no-any-return]


def _note(notes: Note | None, text: str) -> None:
    if notes is None:
        warnings.warn(text, stacklevel=5)
    else:
        notes(text)
