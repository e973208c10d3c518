"""Read a safetensors file of any origin, such as an adapter of PEFT. Weight files of bundles have a stricter reader."""

from __future__ import annotations

import math
import mmap
import os
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from splitbundle.errors import BundleError, Problem
from splitbundle.format import strict_json
from splitbundle.format.dtypes import TABLE
from splitbundle.format.fields import Field, Problems
from splitbundle.storage import files

_DTYPES: Final = {dtype.safetensors: (name, dtype.size) for name, dtype in TABLE.items()}
MAX_HEADER: Final = 16 * 2**20


def read_safetensors(root: Path, path: str) -> dict[str, Tensor]:
    """Return the tensors of a file by name. They are mapped copy-on-write.

    Raises:
        BundleError: ``file.*`` for a file that can't be read; ``weights.header`` and ``json.*`` for a header that
            doesn't describe the file exactly.
    """
    with files.open_file(root, path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(files.read_fully(file, 8), "little")
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise _wrong(path, f"a header of 2 to {min(MAX_HEADER, max(size - 8, 2))} bytes", f"{length}")
        raw = files.read_fully(file, length)
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    problems = Problems(path)
    tensors: dict[str, Tensor] = {}
    spans: list[tuple[int, int]] = []
    for name, field in Field(strict_json.parse(raw.rstrip(b" "), path), problems).mapping():
        if name == "__metadata__":
            continue
        members = field.members(["dtype", "shape", "data_offsets"])
        dtype, item = _DTYPES[members["dtype"].choice(tuple(_DTYPES))]
        shape = tuple(own.integer() for own in members["shape"].items(maximum=8))
        offsets = [own.integer() for own in members["data_offsets"].items(minimum=2, maximum=2)]
        problems.raise_if_any()
        start, stop = offsets
        if stop - start != item * math.prod(shape) or 8 + length + stop > size:
            raise _wrong(
                path, f"{item * math.prod(shape)} bytes for {name!a}, inside of the file", f"{start} to {stop}"
            )
        spans.append((start, stop))
        place, own = 8 + length + start, getattr(torch, dtype)
        count = math.prod(shape)
        if place % item and count:  # torch needs aligned numbers, and the format doesn't promise them
            flat = torch.frombuffer(bytearray(data[place : place + stop - start]), dtype=own)
        else:
            flat = torch.frombuffer(data, dtype=own, count=count, offset=place) if count else torch.empty(0, dtype=own)
        tensors[name] = flat.view(shape)
    problems.raise_if_any()
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise _wrong(path, f"a tensor that begins at {end}", f"{start}")
        end = stop
    if 8 + length + end != size:
        raise _wrong(path, f"the file's end at {8 + length + end}", f"{size}")
    return tensors


def _wrong(path: str, expected: str, got: str) -> BundleError:
    return BundleError(Problem(code="weights.header", file=path, expected=expected, got=got))
