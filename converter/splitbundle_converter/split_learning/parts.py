"""Read the parts of a model that split learning saved: state dicts, and a metadata file beside each.

    bottom.pt  bottom_metadata.json     {"component": "bottom", "start_layer": 0, "end_layer": 2, "config": {...}}
    trunk.pt   trunk_metadata.json
    top.pt     top_metadata.json

The parts are joined under the tensor names of the whole model, and then converted like any checkpoint. A part may also
be the state dict of a bundle's stage (``stage_parts``). The converter does not guess. ``end_layer`` may be the last
layer or the number after it; the number of layers in each file decides. Parts that do not cover the model exactly once
are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format import strict_json
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.fields import MAX_PROBLEMS, Field, Problems
from splitbundle.storage.files import Progress
from splitbundle_converter.checkpoint.directory import CheckpointDirectory
from splitbundle_converter.checkpoint.file_names import CONFIG
from splitbundle_converter.checkpoint.pickles import SUFFIXES, PickledCheckpoint, rewrite
from splitbundle_converter.checkpoint.source import Configuration
from splitbundle_converter.checkpoint.weight_files import SourceTensor, check_unwrapped, read_headers
from splitbundle_converter.errors import problem, refusal, source_json
from splitbundle_converter.families.configuration import JudgedConfiguration, read_configuration
from splitbundle_converter.families.inert_fields import is_inert
from splitbundle_converter.families.row import Family
from splitbundle_converter.split_learning.part import Part, PartFiles
from splitbundle_converter.split_learning.stage_parts import with_source_names
from splitbundle_converter.split_learning.tensor_names import EMBEDDING, HEAD, LAYER, PartNames

METADATA: Final = "_metadata.json"
COMPONENTS: Final = ("bottom", "trunk", "top")
FIELDS: Final = ("component", "start_layer", "end_layer", "config")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPart:
    """The tensors of a part, under the names of the whole model. ``{layer}`` in a name is replaced later."""

    part: Part
    tensors: tuple[tuple[str, int | None, SourceTensor], ...]
    """For each tensor: its name, the number of its layer in the part or None, and the tensor."""
    layers: str
    """The name of the part's list of layers."""
    count: int
    """The number of layers in the part."""


class PartsCheckpoint(PickledCheckpoint):
    """A model that was joined from its parts."""

    def __init__(
        self,
        directory: CheckpointDirectory,
        held: list[LoadedPart],
        judged: JudgedConfiguration,
        tensors: dict[str, SourceTensor],
    ) -> None:
        super().__init__(directory, tensors)
        self.judged = judged
        """The configuration that all parts share."""
        self._held, self._layers = held, judged.family.layers
        self._starts = [sum(other.count for other in held[:i]) for i in range(len(held))]
        self.cuts = tuple(self._starts[1:])
        first = held[0].part
        self._configuration = Configuration(raw=first.config, file=first.files.metadata, pointer="/config")

    def configuration(self) -> Configuration:
        """Return the configuration that all parts share."""
        return self._configuration

    def place_of(self, name: str) -> tuple[str, str]:
        """Return the file of the part that should have a missing tensor, and the tensor's name there."""
        number, _, inner = name.removeprefix(f"{self._layers}.").partition(".")
        if name.startswith(f"{self._layers}.") and number.isdecimal():
            for start, held in zip(self._starts, self._held, strict=True):
                if start <= int(number) < start + held.count:
                    return held.part.files.weights, f"{held.layers}.{int(number) - start}.{inner}"
        return super().place_of(name)


def find_parts(directory: CheckpointDirectory) -> list[PartFiles]:
    """Find the parts in a directory: each ``X_metadata.json`` belongs to ``X.pt``.

    Returns:
        The parts, or an empty list if no metadata file has weights.

    Raises:
        BundleError: ``source.missing`` if some metadata files have weights and others have none; ``source.parts`` if a
            metadata file could belong to two weight files.
    """
    found: list[PartFiles] = []
    alone: list[str] = []
    problems: list[Problem] = []
    for path in sorted(directory.path.glob(f"*{METADATA}")):
        stem = path.name.removesuffix(METADATA)
        names = [stem] if stem.endswith(SUFFIXES) else [f"{stem}{suffix}" for suffix in SUFFIXES]
        weights = [name for name in names if (directory.path / name).is_file()]
        found += [PartFiles(metadata=path.name, weights=name) for name in weights[:1]]
        alone += names[:1] if not weights else []
        if len(weights) > 1:
            expected, hint = "one file of weights beside it", "Remove the one that you do not want"
            problems.append(problem("source.parts", path.name, expected, " and ".join(weights), hint))
    if found:
        problems += [
            problem("source.missing", name, "the weights that its metadata describe", "none") for name in alone
        ]
    if problems:
        raise BundleError(problems[:MAX_PROBLEMS])
    return found


def read_parts(
    directory: CheckpointDirectory, found: list[PartFiles], private: Path, progress: Progress | None
) -> PartsCheckpoint:
    """Join parts into one model. Their pickles are rewritten as safetensors in the directory ``private``.

    Raises:
        BundleError: ``source.parts`` if the parts do not fit each other; ``source.tensor`` for names that the family
            does not have; ``field.*`` and ``json.*`` for metadata; and the errors of ``read_configuration`` and
            ``rewrite``.
    """
    parts = _in_order([_metadata(directory, files) for files in found], directory)
    _check_configs(parts)
    first, *others = (Configuration(raw=part.config, file=part.files.metadata, pointer="/config") for part in parts)
    judged = read_configuration(first)
    family, architecture = judged.family, judged.architecture
    for other in others:
        _check_same_model(other, first, family, architecture, "Save every part with the configuration of the whole")
    if directory.has(CONFIG):
        raw = source_json(directory.read(CONFIG), CONFIG)
        hint = "Remove the one that you do not want"
        _check_same_model(Configuration(raw=raw, file=CONFIG), first, family, architecture, hint)
    files = {part.files.weights: directory.weights(part.files.weights, part.files.metadata) for part in parts}
    rewritten = with_source_names(parts, rewrite(files, private, progress), family, architecture)
    names = PartNames(family, architecture)
    held = [_load_part(part, rewritten[part.files.weights], names, family) for part in parts]
    _check_tiling(held, len(architecture.layers), _without_metadata(directory, found))
    return PartsCheckpoint(directory, held, judged, _join_parts(held, names, family))


def _metadata(directory: CheckpointDirectory, files: PartFiles) -> Part:
    problems = Problems(files.metadata)
    document = Field(source_json(directory.read(files.metadata), files.metadata), problems)
    members = document.members(FIELDS, open=True)
    config = members["config"]
    if not isinstance(config.value, dict):
        config.refuse("an object", code="field.type")
    part = Part(
        files=files,
        component=members["component"].choice(COMPONENTS),
        start=members["start_layer"].integer(),
        end=members["end_layer"].integer(-1),  # -1 is the last layer of a bottom that has only the embedding
        config=config.value,
    )
    problems.raise_if_any()
    return part


def _in_order(parts: list[Part], directory: CheckpointDirectory) -> list[Part]:
    """Sort parts: bottom, trunks, top. There may be any number of trunks."""
    components = sorted((part.component for part in parts), key=COMPONENTS.index)
    if components.count("bottom") != 1 or components.count("top") != 1:
        got = ", ".join(f"{part.component} ({part.files.metadata})" for part in parts[:8])
        raise refusal("source.parts", directory.name, "one bottom, one top, and what lies between them", got)
    return sorted(parts, key=lambda part: (COMPONENTS.index(part.component), part.start))


def _check_configs(parts: list[Part]) -> None:
    """Check that all parts have the same configuration, except for fields that change no logits."""
    first = parts[0]
    problems = []
    for part in parts[1:]:
        for name in sorted(part.config.keys() | first.config.keys()):
            if is_inert(name):
                continue
            wanted, got = (quoted(config[name]) if name in config else "none" for config in (first.config, part.config))
            if name not in first.config or name not in part.config or not _same(first.config[name], part.config[name]):
                expected = f"{wanted}, as in {first.files.metadata}"
                problems.append(problem("source.parts", part.files.metadata, expected, got, pointer=f"/config/{name}"))
    if problems:
        raise BundleError(problems[:MAX_PROBLEMS])


def _check_same_model(
    other: Configuration, first: Configuration, family: Family, architecture: Architecture, hint: str
) -> None:
    """Check that a configuration describes the same model as the first one. Its fields may be different."""
    its = read_configuration(other)
    expected = f"the model that {first.file} describes"
    if its.family.model_type != family.model_type:
        got = f"another: {its.family.model_type}, and not {family.model_type}"
    elif its.architecture != architecture:
        got = "another"
    else:
        return
    raise refusal("source.parts", other.file, expected, got, hint, other.pointer or None)


def _same(one: object, other: object) -> bool:
    return strict_json.dump_compact(one) == strict_json.dump_compact(other)  # 1 == True in Python


def _load_part(part: Part, path: Path, names: PartNames, family: Family) -> LoadedPart:
    """Read the tensors of a part. Check that each name is known, and that layers are numbered from 0 without gaps."""
    problems: list[Problem] = []
    tensors, lists, numbers = [], set(), set()
    headers = list(read_headers(part.files.weights, path))
    check_unwrapped((name for name, _ in headers), part.files.weights)
    for name, tensor in headers:
        found = names.find(name)
        if found is None:
            expected = (
                f"a name of {family.model_type}'s tensors, with or without {quoted(family.prefix)}, "
                f"its layers numbered from 0: such as {quoted(names.example)}"
            )
            got, hint = f"{tensor.dtype} {list(tensor.shape)}", "Save the part with the names that the model has"
            problems.append(problem("source.tensor", part.files.weights, expected, got, hint, f"/{name}"))
            continue
        owner = {EMBEDDING: "bottom", HEAD: "top"}.get(found.unit or "", part.component)
        if owner != part.component:
            expected, got = f"the {found.unit} in the {owner} alone", f"it in the {part.component}"
            hint = "Remove it" + (": a tied head needs no copy of the embedding" if found.unit == EMBEDDING else "")
            problems.append(problem("source.tensor", part.files.weights, expected, got, hint, f"/{name}"))
        if found.layers is not None and found.layer is not None:
            lists.add(found.layers)
            numbers.add(found.layer)
        tensors.append((found.source, found.layer, tensor))
    if problems:
        raise BundleError(problems[:MAX_PROBLEMS])
    if len(lists) > 1:
        got = ", ".join(sorted(lists))
        raise refusal("source.parts", part.files.weights, "one list of layers", f"several: {got}")
    if numbers and max(numbers) != len(numbers) - 1:
        hint = "In each part the layers count from 0; start_layer says where they stand in the model"
        got = f"{len(numbers)} layers, {min(numbers)} to {max(numbers)}"
        raise refusal("source.parts", part.files.weights, f"layers numbered from 0 to {len(numbers) - 1}", got, hint)
    layers = lists.pop() if lists else family.layers
    return LoadedPart(part=part, tensors=tuple(tensors), layers=layers, count=len(numbers))


def _without_metadata(directory: CheckpointDirectory, found: list[PartFiles]) -> list[str]:
    """Return the names of pickles that have no metadata file. A message names them, because they may be parts."""
    known = {part.weights for part in found}
    return sorted(path.name for path in directory.path.iterdir() if path.suffix in SUFFIXES and path.name not in known)


def _check_tiling(held: list[LoadedPart], layers: int, ignored: list[str]) -> None:
    """Check that the layer ranges in the metadata match the layers in the files and cover the model in order."""
    problems: list[Problem] = []

    def add(one: LoadedPart, field: str, expected: str, got: object) -> None:
        found = ", ".join(other.part.component for other in held)
        hint = f"The parts are {found}, with {', '.join(str(other.count) for other in held)} layers"
        if ignored:
            hint += f"; no metadata describes {', '.join(ignored[:8])}"
        problems.append(problem("source.parts", one.part.files.metadata, expected, str(got), hint, pointer=f"/{field}"))

    stop = 0
    for one in held:
        part = one.part
        if part.start != stop:
            add(one, "start_layer", f"{stop}, so that the parts cover the model", part.start)
        if part.component == "trunk" and one.count == 0:
            add(one, "component", "a trunk with layers", "one without")
        after, last = part.start + one.count, part.start + one.count - 1
        if part.end not in (after, last):
            expected = f"{after} (or {last}, the last layer), as {part.files.weights} has {one.count} layers"
            add(one, "end_layer", expected, part.end)
        stop += one.count
    if not problems and len({one.part.end - one.part.start - one.count for one in held}) > 1:
        got = ", ".join(f"{one.part.start} to {one.part.end}" for one in held)
        add(held[-1], "end_layer", "the last layer in all parts, or the number after it in all parts", got)
    if not problems and stop != layers:
        add(held[-1], "end_layer", f"{layers} layers in all, as the configuration has them", f"{stop}")
    if problems:
        raise BundleError(problems[:MAX_PROBLEMS])


def _join_parts(held: list[LoadedPart], names: PartNames, family: Family) -> dict[str, SourceTensor]:
    tensors: dict[str, SourceTensor] = {}
    problems: list[Problem] = []
    start = 0
    for one in held:
        for source, layer, tensor in one.tensors:
            name = source if layer is None else source.replace(LAYER, str(start + layer))
            if name in tensors and not names.is_dropped(source, family):
                expected, got = (
                    f"only one {quoted(name)}",
                    f"another, beside {tensors[name].stored} of {tensors[name].file}",
                )
                problems.append(problem("source.tensor", tensor.file, expected, got, pointer=f"/{tensor.stored}"))
            tensors.setdefault(name, tensor)
        start += one.count
    if problems:
        raise BundleError(problems[:MAX_PROBLEMS])
    return tensors
