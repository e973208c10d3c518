"""Restore the source's tensors from a bundle with the table in its manifest. This needs no model zoo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from splitbundle.backends.torch.logical import LogicalTensors
from splitbundle.backends.torch.weights import DTYPES, map_tensors, rounded
from splitbundle.bundle import Bundle
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.dtypes import TABLE
from splitbundle.format.manifest.document import Manifest, SourceName, expand, row_sources
from splitbundle.format.manifest.row_names import ROW
from splitbundle_converter.translation.constants import read_constants


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredTensor:
    """A tensor of the source, as the manifest's table describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    entry: SourceName | None = None
    """The entry of the table, with ``{layer}`` replaced. A constant has none."""
    row: int | None = None
    """The number of the row, if each row is a tensor of its own."""
    value: float | None = None
    """The value of a constant."""

    @property
    def size(self) -> int:
        """Return the number of bytes."""
        return TABLE[self.dtype].size * prod(self.shape)

    def restore(self, tensors: Callable[[str], Tensor]) -> Tensor:
        """Return the tensor, contiguous, from the logical tensors by name. It is exact to the bit."""
        if self.entry is None:
            return torch.full(self.shape, self.value or 0.0, dtype=DTYPES[self.dtype])
        if self.row is not None:
            return tensors(self.entry.tensors[0])[self.row].contiguous()
        return join(self.entry, tensors)[self.name]


def join(entry: SourceName, tensors: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Return the source tensors by name: the inverse of ``Origin.extract``, exact to the bit."""
    if ROW in entry.source:
        rows = tensors(entry.tensors[0])
        return dict(zip(row_sources(entry.source, len(rows)), rows, strict=True))
    axis, parts = entry.axis, [grouped(tensors(name), entry.groups, entry.axis) for name in entry.tensors]
    whole = torch.cat(parts, dim=axis + 1).flatten(axis, axis + 1)
    whole = whole.mT.contiguous() if entry.transposed else whole
    return {entry.source: whole if entry.shape is None else whole.reshape(entry.shape)}


def grouped(whole: Tensor, groups: int, axis: int) -> Tensor:
    """Split a dimension into groups. *Shape:* with axis 0, (rows, …) -> (groups, rows / groups, …)."""
    shape = whole.shape
    return whole.reshape(*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])


def joined_shape(entry: SourceName, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of a source tensor that isn't one of several rows, before it gets a shape of its own."""
    axis, shape = entry.axis, list(shapes[entry.tensors[0]])
    shape[axis] = sum(shapes[name][axis] for name in entry.tensors)
    if entry.transposed:
        shape[-2:] = shape[:-3:-1]
    return tuple(shape)


def restored_tensors(manifest: Manifest, architecture: Architecture) -> list[RestoredTensor]:
    """Return every tensor of the source, in the order of the units of a bundle: embedding, layers, head, constants.

    Raises:
        BundleError: ``field.value`` if the manifest's constants can't be read.
    """
    shapes = architecture.tensors()
    order = {name: i for i, name in enumerate(shapes)}
    entries = [entry for template in manifest.source_names for entry in expand(template, len(architecture.layers))]
    entries.sort(key=lambda entry: order[entry.tensors[0]])
    carried = manifest.model.source_configuration
    cast = manifest.storage.dtype if carried is not None and carried.cast else None
    return [
        *(tensor for entry in entries for tensor in _of_entry(manifest, entry, shapes)),
        *(
            RestoredTensor(name=own.name, dtype=cast or own.dtype, shape=own.shape, value=own.value)
            for own in read_constants(manifest)
        ),
    ]


def _of_entry(manifest: Manifest, entry: SourceName, shapes: dict[str, tuple[int, ...]]) -> Iterator[RestoredTensor]:
    dtype = manifest.storage.dtype_of(entry.tensors[0])  # one dtype for all of them (SB-M-086)
    first = shapes[entry.tensors[0]]
    if ROW in entry.source:
        for i, name in enumerate(row_sources(entry.source, first[0])):
            yield RestoredTensor(name=name, dtype=dtype, shape=first[1:], entry=entry, row=i)
        return
    shape = entry.shape or joined_shape(entry, shapes)
    yield RestoredTensor(name=entry.source, dtype=dtype, shape=shape, entry=entry)


def logical_tensors(bundle: Bundle) -> Callable[[str], Tensor]:
    """Return a function that gives a logical tensor by its name. The tensors are mapped, and the files stay open.

    The numbers of a quantized tensor are made for each call, and rounded to the dtype of the model.
    """
    units = {name: unit for unit, tensors in bundle.architecture.unit_tensors().items() for name in tensors}
    mapped: dict[str, LogicalTensors] = {}  # mapped tensors are not read, so keeping them costs no memory
    storage = bundle.manifest.storage

    def tensor(name: str) -> Tensor:
        unit = units[name]
        if unit not in mapped:
            mapped[unit] = LogicalTensors(bundle, unit)
        found = mapped[unit][name]
        return rounded(found, DTYPES[storage.dtype_of(name)], name) if name in storage.encodings else found

    return tensor


def stored_tensors(bundle: Bundle) -> Callable[[str], Tensor]:
    """Return a function that gives a stored tensor, such as codes or scales, by its name. The tensors are mapped."""
    units = {name: unit for unit in bundle.manifest.units for name in bundle.stored(unit)}
    mapped: dict[str, Mapping[str, Tensor]] = {}

    def tensor(name: str) -> Tensor:
        unit = units[name]
        if unit not in mapped:
            mapped[unit] = map_tensors(bundle, unit)
        return mapped[unit][name]

    return tensor


def source_tensors(bundle: Bundle) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the source checkpoint with its original name and layout, one at a time.

    The tensors have the stored dtype, and lie on the CPU. They are exact to the bit, except for the rounding of
    ``--dtype``.

    Args:
        bundle: the bundle, with the files of all its units.

    Raises:
        BundleError: A unit is absent, or differs from the manifest.
    """
    tensors = logical_tensors(bundle)
    for tensor in restored_tensors(bundle.manifest, bundle.architecture):
        yield tensor.name, tensor.restore(tensors)
