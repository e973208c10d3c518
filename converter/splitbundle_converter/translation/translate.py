"""Translate source tensors into logical tensors: match names and split layouts. ``restore`` is the way back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.fields import MAX_PROBLEMS
from splitbundle.format.manifest.document import EMBEDDING, SourceName, expand, row_sources
from splitbundle.format.manifest.row_names import ROW
from splitbundle_converter.checkpoint.quantized import HINT, check_plain, is_quantized
from splitbundle_converter.checkpoint.source import Checkpoint, Reader, dtype_of
from splitbundle_converter.checkpoint.weight_files import SourceTensor, check_unwrapped
from splitbundle_converter.errors import MISSING, problem
from splitbundle_converter.families.row import Family
from splitbundle_converter.translation.constants import Constant
from splitbundle_converter.translation.heads import wrong_head
from splitbundle_converter.translation.restore import grouped, joined_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The origin of a logical tensor: ``start`` to ``stop`` in each of the ``groups`` of a source's dimension."""

    source: str
    start: int
    stop: int
    groups: int
    transposed: bool
    axis: int = 0
    shape: tuple[int, ...] | None = None
    """The shape of the source tensor before it is divided, if the source stores its numbers in another one."""
    stacked: bool = False
    """Whether the source tensor has the weights of all experts, so that those of each one can be read alone."""
    rows: tuple[str, ...] = ()
    """The names of the source tensors, if each row is a separate tensor. ``source`` is then the first of them."""

    def extract(self, reader: Reader) -> Tensor:
        """Return the logical tensor, contiguous, in the dtype of the source."""
        pieces = list(self.pieces(reader))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def pieces(self, reader: Reader) -> Iterator[Tensor]:
        """Yield the logical tensor in pieces along its first dimension: rows that are tensors, and experts, alone.

        So the tensor of all experts of a layer is never in memory as a whole.
        """
        if self.rows:
            yield from (reader.get(name)[None] for name in self.rows)
            return
        for piece in self._stored(reader):  # mapped, and read where it is copied below; a quantized one is computed
            own = piece.mT if self.transposed else piece
            if self.stacked and self.axis == 0:
                yield own.contiguous()
                continue
            parts = grouped(own, self.groups, self.axis).narrow(self.axis + 1, self.start, self.stop - self.start)
            yield parts.flatten(self.axis, self.axis + 1).contiguous()

    def _stored(self, reader: Reader) -> Iterator[Tensor]:
        if self.stacked and self.shape is None:
            yield from reader.slices(self.source)
            return
        whole = reader.get(self.source)
        whole = whole if self.shape is None else whole.reshape(self.shape)
        yield from torch.split(whole, 1) if self.stacked else [whole]


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """The origin of each logical tensor, and the table that restores the source tensors."""

    origins: dict[str, Origin]
    source_names: tuple[SourceName, ...]
    """The entries of the table. An entry has ``{layer}`` in its names if it is valid for all layers."""
    constants: tuple[Constant, ...] = ()
    """The source tensors that the bundle doesn't store, because the decoder has their value."""


def translate(source: Checkpoint, family: Family, architecture: Architecture) -> Translation:
    """Match the tensors of the checkpoint with those that the architecture implies. The match must be exact.

    Raises:
        BundleError: ``source.tensor`` if the head is not a causal language model's head. Otherwise ``source.tensor``
            for each tensor that is missing, is extra, or has another shape or dtype; for a constant that differs from
            the decoder's value; and for a stored copy of a tied embedding that differs from the embedding.
    """
    check_unwrapped(source.tensors, source.name)
    check_plain(source.tensors, (source.quantization or {}).get("method"))
    shapes = architecture.tensors()
    layers = len(architecture.layers)
    problems: list[Problem] = []
    origins: dict[str, Origin] = {}
    kept: list[SourceName] = []
    claimed: set[str] = set()
    prefix = _prefix(source, family)
    table = [replace(row, source=_stored_name(row.source, family, prefix)) for row in family.names(architecture)]
    table = [_stored_as_head(row, source, table, architecture) for row in table]
    head = {row.source: row.tensors[0] in shapes for row in table if row.tensors[0] in HEAD}
    wrong = wrong_head(source, head, base_alone=not prefix)
    if wrong is not None:
        raise BundleError(wrong)
    for named in table:
        entries = [entry for entry in expand(named, layers) if all(name in shapes for name in entry.tensors)]
        for entry in entries:
            names = row_sources(entry.source, shapes[entry.tensors[0]][0])
            claimed.update(names)
            match = partial(_match_rows, names=names) if ROW in entry.source else _match
            problems += match(source, entry, shapes=shapes, origins=origins)
        everywhere = len(entries) == ("{layer}" not in named.source or layers)
        kept += [named] if everywhere else entries  # if layers differ, the template would name absent tensors
    kept += _tied_copy(source, table, architecture, origins, claimed, problems)
    dropped = {
        _stored_name(pattern, family, prefix).replace("{layer}", str(i))
        for pattern in family.dropped
        for i in range(layers)
    }
    dropped |= {name for name in source.tensors if _is_further(name, family, layers)}
    constants = _check_constants(source, family, prefix, layers, problems)
    dropped.update(constants)
    for name in sorted(source.tensors.keys() - claimed - dropped):
        if not (name.removesuffix("bias") + "weight" in claimed and _is_zero(source, name)):
            problems.append(_extra(source, name, layers))
    if problems:
        raise BundleError(problems[:MAX_PROBLEMS])  # a wrong number of layers gives very many problems
    return Translation(origins=origins, source_names=tuple(kept), constants=tuple(constants.values()))


def _is_zero(source: Checkpoint, name: str) -> bool:
    """Return whether a tensor is a bias of nothing but zeros. AutoGPTQ adds one to each module that it quantizes."""
    if not name.endswith(".bias") or len(source.tensors[name].shape) != 1:
        return False
    with source.reader() as reader:
        return not bool(reader.get(name).any())


def _is_further(name: str, family: Family, layers: int) -> bool:
    """Return whether a tensor belongs to a layer that predicts further tokens."""
    for pattern in family.further:
        found = re.match(re.escape(pattern).replace(r"\{further\}", r"(\d{1,5})"), name)
        if found is not None and (not found.groups() or int(found[1]) >= layers):
            return True
    return False


def _stored_as_head(
    row: SourceName, source: Checkpoint, table: list[SourceName], architecture: Architecture
) -> SourceName:
    """Return the embedding's entry with the name of the head's projection, if the source stores the tied matrix so."""
    if row.tensors != (EMBEDDING,) or not architecture.head.tied or row.source in source.tensors:
        return row
    head = next(other.source for other in table if other.tensors == (PROJECTION,))
    return replace(row, source=head) if head in source.tensors else row


def _check_constants(
    source: Checkpoint, family: Family, prefix: bool, layers: int, problems: list[Problem]
) -> dict[str, Constant]:
    """Return the constants of the source by name. Add a problem for each that differs from the decoder's value."""
    constants: dict[str, Constant] = {}
    with source.reader() as reader:
        for pattern, value in family.constants.items():
            for i in range(layers):
                name = _stored_name(pattern, family, prefix).replace("{layer}", str(i))
                if name not in source.tensors:
                    continue
                whole = reader.get(name)
                stored = whole.float().flatten()
                wrong = stored[~torch.isin(stored, _roundings(value))]
                constants[name] = Constant(
                    name=name,
                    value=stored[0].item() if len(stored) else value,
                    dtype=str(whole.dtype).removeprefix("torch."),
                    shape=tuple(whole.shape),
                )
                if len(wrong) or bool((stored != stored[:1]).any()):
                    got = f"{(wrong if len(wrong) else stored)[-1].item():g}"
                    problems.append(_off(source.tensors[name], f"{value:g}, which the decoder uses", got, _FIXED))
    return constants


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _roundings(value: float) -> Tensor:
    """Return the number rounded to each dtype of a checkpoint: a constant may be stored in 16 bits. *Shape:* (3)."""
    return torch.stack([torch.tensor(value).to(dtype).float() for dtype in _FLOATS])


_FIXED = "A model with another value of this constant can't be converted yet"


def _prefix(source: Checkpoint, family: Family) -> bool:
    """Return whether the names of the base model have its prefix. They lack it if the base model was saved alone."""
    return any(name.startswith(family.prefix) for name in source.tensors)


def _stored_name(name: str, family: Family, prefix: bool) -> str:
    return name if prefix else name.removeprefix(family.prefix)


def _match_rows(
    source: Checkpoint,
    entry: SourceName,
    shapes: Mapping[str, tuple[int, ...]],
    origins: dict[str, Origin],
    *,
    names: tuple[str, ...],
) -> list[Problem]:
    """Match a tensor whose rows are separate tensors. Each row must exist, and all must have the same dtype."""
    (name,) = entry.tensors
    own: dict[str, Origin] = {}
    problems = [
        problem
        for each in names
        for problem in _match(source, replace(entry, source=each), {name: shapes[name][1:]}, own)
    ]
    if not problems:
        dtype = source.tensors[names[0]].dtype
        other = [source.tensors[each] for each in names if source.tensors[each].dtype != dtype]
        problems += [_off(found, f"dtype {dtype}, as {names[0]}", found.dtype, MISSING) for found in other[:1]]
        origins[name] = replace(own[name], source=names[0], rows=names)
    return problems


def _match(
    source: Checkpoint, entry: SourceName, shapes: Mapping[str, tuple[int, ...]], origins: dict[str, Origin]
) -> list[Problem]:
    rows = [shapes[name][entry.axis] for name in entry.tensors]
    joined = joined_shape(entry, shapes)
    expected = entry.shape or joined
    found = source.tensors.get(entry.source)
    if found is None and entry.source in source.promised:
        wanted = f"{quoted(entry.source)} in {source.promised[entry.source]}"
        return [problem("source.tensor", source.naming.index, wanted, "none", MISSING)]
    if found is None:
        file, stored = source.place_of(entry.source)
        wanted = f"a tensor {quoted(stored)} of shape {list(expected)}"
        return [problem("source.tensor", file, wanted, "none", MISSING)]
    problems: list[Problem] = []
    if found.shape != expected:
        problems.append(_off(found, f"shape {list(expected)}", f"{list(found.shape)}", MISSING))
    if dtype_of(found) is None:
        hint = HINT if is_quantized(found.dtype) else "Save it as one of these"
        problems.append(_off(found, "dtype F32, F16 or BF16", found.dtype, hint))
    start = 0
    for name, size in zip(entry.tensors, rows, strict=True):
        stop = start + size // entry.groups
        origins[name] = Origin(
            source=entry.source,
            start=start,
            stop=stop,
            groups=entry.groups,
            transposed=entry.transposed,
            axis=entry.axis,
            shape=None if entry.shape is None else joined,
            stacked=len(joined) == 3 and (entry.axis > 0 or len(entry.tensors) == 1),
        )
        start = stop
    return problems


_EXTRA = "Use the configuration that was published with these weights"
_APART = "If the head was trained apart from the embedding, save the model with tie_word_embeddings false"


def _tied_copy(
    source: Checkpoint,
    table: list[SourceName],
    architecture: Architecture,
    origins: dict[str, Origin],
    claimed: set[str],
    problems: list[Problem],
) -> list[SourceName]:
    """Return the entry of a tied head's projection, if the source stores this tensor.

    The tensor must be equal to the embedding. The bundle does not store it again.
    """
    if not architecture.head.tied:
        return []
    name = next(row.source for row in table if row.tensors == (PROJECTION,))
    if name not in source.tensors or name in claimed:
        return []
    claimed.add(name)
    found, embedding = source.tensors[name], origins.get(EMBEDDING)
    if embedding is None or problems:
        return []
    with source.reader() as reader:
        equal = found.shape == source.tensors[embedding.source].shape and torch.equal(
            reader.get(name), reader.get(embedding.source)
        )
    if not equal:
        expected = f"the values of {embedding.source}, as tie_word_embeddings is true"
        problems.append(_off(found, expected, "other values", _APART))
    return [SourceName(source=name, tensors=(EMBEDDING,), groups=1, transposed=False)]


PROJECTION = "head.projection.weight"
HEAD = (PROJECTION, "head.projection.bias")


def _off(found: SourceTensor, expected: str, got: str, hint: str | None = None) -> Problem:
    return problem("source.tensor", found.file, expected, got, hint, f"/{found.stored}")


def _extra(source: Checkpoint, name: str, layers: int) -> Problem:
    found = source.tensors[name]
    expected = f"only the tensors of a model of {layers} layers as its configuration describes it"
    return _off(found, expected, f"an extra tensor {found.dtype} {list(found.shape)}", _EXTRA)
