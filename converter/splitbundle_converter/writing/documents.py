"""Writing a bundle's files: weights tensor by tensor, then everything that says what they are."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from splitbundle.bundle import Bundle
from splitbundle.errors import BundleError, MissingExtra, Problem, quoted
from splitbundle.format import names, weight_layout
from splitbundle.format.architecture.decoder import Architecture, count
from splitbundle.format.manifest import document, rules
from splitbundle.format.manifest.document import File, Manifest, Shard, Storage
from splitbundle.format.manifest.parser import parse_manifest
from splitbundle.format.weight_layout import Tensor as Stored
from splitbundle.storage import files
from splitbundle_converter.errors import refused

Produce = Callable[[str], Tensor]
"""Gives a logical tensor by its name, in the dtype to store."""


def write_weights(path: Path, tensors: dict[str, Stored], produce: Produce) -> Callable[[], File]:
    """Writes one safetensors file in the canonical layout, holding one tensor at a time in memory.

    *Shape:* ``tensors`` in order of use; ``produce`` must give each with just that dtype and shape.

    Returns:
        What says, from any thread, what the manifest lists of the file. The file's digest begins with the header, which
        holds the data's: so this is a second pass, out of the page cache.
    """
    layout = weight_layout.lay_out(tensors)
    space = len(weight_layout.header(layout, "0" * 64))  # a digest has one length, so the header has too
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.seek(space)
        for name, (stored, _) in layout.items():
            for piece in _bytes(produce(name), stored, name):
                digest.update(piece)
                file.write(piece)
        header = weight_layout.header(layout, digest.hexdigest())
        file.seek(0)
        file.write(header)
    size = space + sum(stored.size for stored in tensors.values())
    return partial(_second_pass, path, size, hashlib.sha256(header).hexdigest())


def _second_pass(path: Path, size: int, header_sha256: str) -> File:
    with path.open("rb", buffering=0) as file:
        return File(size=size, sha256=files.sha256(file), header_sha256=header_sha256)


def _bytes(tensor: Tensor, stored: Stored, name: str) -> Iterator[memoryview]:
    if tuple(tensor.shape) != stored.shape or str(tensor.dtype) != f"torch.{stored.dtype}":
        raise ValueError(f"{name}: {stored} was to be written, {tensor.dtype} {list(tensor.shape)} came")
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(flat), files.CHUNK):
        yield flat[start : start + files.CHUNK].numpy().data


def unit_files(
    architecture: Architecture, stored: Callable[[str], Stored], max_file_size: int | None
) -> dict[str, dict[str, dict[str, Stored]]]:
    """Unit -> file -> its tensors. A unit above ``max_file_size`` has numbered parts; a tensor is never divided."""
    units: dict[str, dict[str, dict[str, Stored]]] = {}
    for unit, shapes in architecture.unit_tensors().items():
        parts: list[dict[str, Stored]] = [{}]
        size = weight_layout.ALIGNMENT
        for name in shapes:
            tensor = stored(name)
            if max_file_size is not None and parts[-1] and size + tensor.size > max_file_size:
                parts.append({})
                size = weight_layout.ALIGNMENT
            parts[-1][name] = tensor
            size += tensor.size
        if len(parts) == 1:
            units[unit] = {f"{unit}.safetensors": parts[0]}
        else:
            units[unit] = {f"{unit}-part-{i:03d}.safetensors": part for i, part in enumerate(parts, 1)}
    return units


DEFAULT_NAMES: Final = {1: ("model",), 2: ("bottom", "top"), 3: ("bottom", "trunk", "top")}


def shard_names(cuts: tuple[int, ...], given: tuple[str, ...] | None) -> tuple[str, ...]:
    """The shards' names: those given, else bottom, trunk, top, with trunk-1 … when there are more.

    Raises:
        BundleError: ``usage.names``.
    """
    number = len(cuts) + 1
    if given is None:
        middle = tuple(f"trunk-{i}" for i in range(1, number - 1))
        return DEFAULT_NAMES.get(number, ("bottom", *middle, "top"))
    if len(given) != number or len(set(given)) != number or not all(names.is_shard(n) for n in given):
        raise BundleError(
            Problem(
                code="usage.names",
                argument="names",
                expected=f"{number} different names, one for each shard, each {names.SHARD_RULE}",
                got=", ".join(given),
            )
        )
    return given


def check_cuts(cuts: tuple[int, ...], layers: int) -> None:
    """Whether a model of so many layers can be cut there.

    Raises:
        BundleError: ``usage.cut``.
    """
    whole = all(type(cut) is int and 0 <= cut <= layers for cut in cuts)
    if not whole or any(a >= b for a, b in pairwise(cuts)):
        raise BundleError(
            Problem(
                code="usage.cut",
                argument="split",
                expected=f"rising layer numbers from 0 to {layers}, the model's number of layers",
                got=",".join(map(str, cuts)),
                hint="A cut is the number of the layer that the shard after it begins with",
            )
        )


def make_shards(
    architecture: Architecture,
    cuts: tuple[int, ...],
    given: tuple[str, ...] | None,
    units: dict[str, tuple[str, ...]],
    listed: dict[str, File],
) -> tuple[Shard, ...]:
    """The shards that some cuts make."""
    layers = len(architecture.layers)
    check_cuts(cuts, layers)
    tensors = architecture.unit_tensors()
    edges = (0, *cuts, layers)
    shards = []
    for i, name in enumerate(shard_names(cuts, given)):
        first, last = i == 0, i == len(cuts)
        needed = architecture.units_of((edges[i], edges[i + 1]), embeds=first, head=last)
        shards.append(
            Shard(
                name=name,
                layers=(edges[i], edges[i + 1]),
                embeds=first,
                head=last,
                units=needed,
                graph=None,
                bytes=sum(listed[path].size for unit in needed for path in units[unit]),
                parameters=sum(count(tensors[unit]) for unit in needed),
            )
        )
    return tuple(shards)


def write_file(root: Path, path: str, data: bytes) -> File:
    """Writes a small file of the bundle, and says what the manifest lists of it."""
    place = root / path
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(data)
    return File(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def finish(root: Path, draft: Manifest, architecture: Architecture) -> Manifest:
    """Writes the model card, manifest.json and SHA256SUMS, after checking the manifest as a reader would."""
    listed = {**draft.files, names.CARD: write_file(root, names.CARD, card(draft, architecture))}
    complete = replace(draft, files=dict(sorted(listed.items())))
    data = complete.to_bytes()
    rules.check_against(parse_manifest(data), architecture)
    check_schemas(data, architecture.to_bytes())
    write_file(root, document.FILE, data)
    lines = {path: file.sha256 for path, file in complete.files.items()}
    lines[document.FILE] = hashlib.sha256(data).hexdigest()
    sums = "".join(document.sums_line(lines[path], path) for path in sorted(lines))
    write_file(root, names.SUMS, sums.encode("ascii"))
    return complete


def placed(made: Bundle, target: Path) -> Bundle:
    """A bundle that was read where it was written, at the place that it has now: nothing is left that could fail."""
    return Bundle(target, made.manifest, made.architecture, made.id)


@dataclass(frozen=True, slots=True)
class GraphWriter:
    """What adds graphs to a bundle that is being written, and what onnxruntime-genai needs to run them."""

    variant: str
    genai: bool

    def check(self, storage: Storage) -> None:
        """Whether weights that are stored so can have such graphs.

        Raises:
            BundleError: ``usage.onnx``.
        """
        dtype = document.VARIANTS[self.variant]
        others = [stored for stored in storage.dtypes if stored != dtype]
        if self.variant != "standard" and others:
            expected = f"weights that are all stored as {dtype}, for graphs that compute in it"
            hint = f"Standard graphs take any weights; convert --dtype {dtype} stores all weights so"
            raise refused("usage.onnx", None, expected, f"some in {others[0]}", argument="onnx", hint=hint)

    def __call__(self, root: Path) -> None:
        """Adds a graph to each shard of the bundle in ``root``."""
        from splitbundle_converter.graphs.add_graphs import add_graphs

        add_graphs(root, self.variant, genai=self.genai)


def graph_writer(onnx: bool | str, *, genai: bool = False) -> GraphWriter | None:
    """What adds the graphs that were asked for; None where none were.

    Raises:
        BundleError: ``usage.onnx`` for a variant that isn't known.
        MissingExtra: without the libraries that make graphs and check them.
    """
    if not onnx and not genai:
        return None
    variant = onnx if isinstance(onnx, str) else "standard"
    if variant not in document.VARIANTS:
        hint = "Weights in bfloat16 are widened to float32 by the standard graphs: onnxruntime can't multiply bfloat16"
        told = hint if variant == "bfloat16" else None
        raise refused("usage.onnx", None, " or ".join(document.VARIANTS), quoted(variant), argument="onnx", hint=told)
    for library in ("onnx", "onnxruntime"):  # the second checks what the graphs compute
        if importlib.util.find_spec(library) is None:
            raise MissingExtra.of(library, "onnx", "make graphs")
    return GraphWriter(variant, genai)


def check_schemas(manifest_data: bytes, architecture_data: bytes) -> None:
    """Holds both documents against the published schemas: what is written here, others must be able to read."""
    import jsonschema

    import splitbundle_schemas

    for schema, data in (("manifest", manifest_data), ("architecture", architecture_data)):
        jsonschema.Draft202012Validator(splitbundle_schemas.load(schema)).validate(json.loads(data))


def card(draft: Manifest, architecture: Architecture) -> bytes:
    """The bundle's README.md: a model card with front matter, made of nothing but the manifest's facts."""
    model = draft.model
    front = ["---", "library_name: splitbundle", "tags:", "- splitbundle", f"- {model.family}"]
    if model.license:
        front.append(f"license: {model.license}")
    if "/" in model.source:
        front.append(f"base_model: {model.source}")
    rows = [
        f"| {shard.name} | [{shard.layers[0]}, {shard.layers[1]}) | {'yes' if shard.embeds else ''} "
        f"| {'yes' if shard.head else ''} | {shard.parameters:,} | {shard.bytes:,} |"
        for shard in draft.shards
    ]
    text = [
        *front,
        "---",
        "",
        f"# {model.name}",
        "",
        f"The {model.family} model `{model.source}`, {model.parameters:,} parameters in {draft.storage.dtype}, "
        f"{len(architecture.layers)} layers, as a splitbundle: shards that run on their own.",
        "",
        "| shard | layers | embeds | head | parameters | bytes |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "```python",
        "import splitbundle",
        "",
        'bundle = splitbundle.open("path/of/this/directory")',
        "logits = bundle.pipeline()(token_ids)",
        f'part = bundle.stage("{draft.shards[0].name}")',
        "```",
        "",
        "`sha256sum -c SHA256SUMS` verifies every file.",
        "",
    ]
    return "\n".join(text).encode("utf-8")
