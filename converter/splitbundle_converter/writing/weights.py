"""Writing weight files in the canonical layout, one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from splitbundle.format import weight_layout
from splitbundle.format.architecture.decoder import Architecture
from splitbundle.format.manifest.document import File
from splitbundle.format.weight_layout import Tensor as Stored
from splitbundle.storage import files

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
