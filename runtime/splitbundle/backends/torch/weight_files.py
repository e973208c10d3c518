"""Write weight files in the canonical layout, one tensor at a time."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from splitbundle.format import weight_layout
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.manifest.document import File
from splitbundle.format.weight_layout import Tensor as Stored
from splitbundle.storage import files

Produce = Callable[[str], Tensor | Iterable[Tensor]]
"""Returns a logical tensor by its name, in the dtype to store: as a whole, or in pieces along its first dimension."""
UnitFiles = dict[str, dict[str, dict[str, Stored]]]
"""Unit -> its files -> their tensors."""


def write_weights(path: Path, tensors: dict[str, Stored], produce: Produce) -> Callable[[], File]:
    """Write one safetensors file in the canonical layout. Only one tensor at a time is in memory.

    Args:
        path: The path of the new file.
        tensors: The name of each tensor, in order of use -> its dtype and shape.
        produce: Returns a tensor by its name, or its pieces. It must have exactly this dtype and shape.

    Returns:
        A function that returns the file's entry in the manifest. Any thread may call it. The file begins with the
        header, and the header has the digest of the data. So the digest of the file needs a second pass, which reads
        the page cache.

    Raises:
        ValueError: A tensor has another dtype or shape.
    """
    layout = weight_layout.lay_out(tensors)
    space = len(weight_layout.header(layout, "0" * 64))  # all digests have one length, so this is the final size
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.seek(space)
        for name, (stored, _) in layout.items():
            for piece in _pieces(produce(name), stored, name):
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


def _pieces(given: Tensor | Iterable[Tensor], stored: Stored, name: str) -> Iterator[memoryview]:
    if isinstance(given, Tensor):
        yield from tensor_bytes(given, stored, name)
        return
    rows = 0
    for tensor in given:
        rows += len(tensor)
        yield from tensor_bytes(tensor, Stored(dtype=stored.dtype, shape=(len(tensor), *stored.shape[1:])), name)
    if rows != stored.shape[0]:
        raise ValueError(f"{name}: expected {stored}, got {rows} rows")


def tensor_bytes(tensor: Tensor, stored: Stored, name: str) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in pieces, in the order of its numbers. It needs no numpy.

    Raises:
        ValueError: It has another dtype or shape.
    """
    if tuple(tensor.shape) != stored.shape or str(tensor.dtype) != f"torch.{stored.dtype}":
        raise ValueError(f"{name}: expected {stored}, got {tensor.dtype} {list(tensor.shape)}")
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    # torch's own way to a buffer is numpy, which an environment with torch alone doesn't have.
    whole = memoryview((ctypes.c_ubyte * len(flat)).from_address(flat.data_ptr()))
    for start in range(0, len(flat), files.CHUNK):
        yield whole[start : start + files.CHUNK]


def unit_files(architecture: Architecture, stored: Callable[[str], Stored], max_file_size: int | None) -> UnitFiles:
    """Return for each unit its files, and for each file its tensors.

    A unit larger than ``max_file_size`` bytes has several numbered files. A tensor is never split.
    """
    units: UnitFiles = {}
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
