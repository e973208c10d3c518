"""Write the weights of a checkpoint as transformers reads them: one safetensors file, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from torch import Tensor

from splitbundle.backends.torch.weight_files import tensor_bytes
from splitbundle.format.dtypes import TABLE
from splitbundle.format.weight_layout import Tensor as Stored
from splitbundle.storage.files import Progress
from splitbundle_converter.translation.restore import RestoredTensor

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"


def divide(tensors: Sequence[RestoredTensor], max_shard_size: int) -> dict[str, list[RestoredTensor]]:
    """Return the names of the weight files, each with its tensors.

    Several files are numbered as transformers numbers them. A tensor that is larger than ``max_shard_size`` bytes has
    a file of its own.
    """
    parts: list[list[RestoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.size > max_shard_size:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.size
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def write_shards(
    root: Path,
    files: dict[str, list[RestoredTensor]],
    names: Callable[[RestoredTensor], str],
    produce: Callable[[RestoredTensor], Tensor],
    progress: Progress | None,
) -> None:
    """Write the files, one tensor at a time, and the index if there are several.

    Args:
        root: The directory.
        files: The name of each file, with its tensors.
        names: Returns the name to store a tensor under.
        produce: Returns the value of a tensor, in the dtype and shape that it describes.
        progress: A function that is called with the current step, the bytes that are done, and the total in bytes.
    """
    total, done = sum(tensor.size for own in files.values() for tensor in own), 0
    for file, own in files.items():
        # Larger items first, so that every number lies at a multiple of its size.
        ordered = sorted(own, key=lambda tensor: -TABLE[tensor.dtype].size)
        with (root / file).open("wb") as opened:
            opened.write(_header(ordered, names))
            for tensor in ordered:
                if progress is not None:
                    progress("exporting", done, total)
                for piece in _bytes(tensor, produce(tensor)):
                    opened.write(piece)
                done += tensor.size
    if progress is not None:
        progress("exporting", total, total)
    if len(files) > 1:
        weight_map = {names(tensor): file for file, own in files.items() for tensor in own}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (root / INDEX).write_text(f"{json.dumps(index, indent=2)}\n", "utf-8")


def _header(tensors: Sequence[RestoredTensor], names: Callable[[RestoredTensor], str]) -> bytes:
    # transformers refuses a file whose metadata doesn't name the library of its tensors.
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[names(tensor)] = {
            "dtype": TABLE[tensor.dtype].safetensors,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: RestoredTensor, value: Tensor) -> Iterator[memoryview]:
    return tensor_bytes(value, Stored(dtype=tensor.dtype, shape=tensor.shape), tensor.name)
