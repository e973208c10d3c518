"""Export a bundle as a GGUF file, which llama.cpp runs. Quantized weights keep their codes and scales bit for bit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy
import torch
from torch import Tensor

from splitbundle.bundle import Bundle
from splitbundle.errors import MissingExtra
from splitbundle.format.weight_layout import SCALE
from splitbundle.storage.files import Progress
from splitbundle.verification.verify import check_digests
from splitbundle.writing.atomic_file import atomic_file
from splitbundle.writing.copying import unchanged
from splitbundle_converter.exporting.adapter import check_adapter, with_adapter
from splitbundle_converter.exporting.configuration import other_files
from splitbundle_converter.exporting.gguf_blocks import BLOCK, block_type, blocks, plain_type, rotated
from splitbundle_converter.exporting.gguf_metadata import GgufModel, described
from splitbundle_converter.exporting.gguf_tokenizer import add_tokenizer
from splitbundle_converter.exporting.texts import with_texts
from splitbundle_converter.gguf_files.checkpoint import rotary_factors
from splitbundle_converter.gguf_files.metadata import ROTARY_FACTORS
from splitbundle_converter.options import Note
from splitbundle_converter.quantized.packed_weights import TORCH
from splitbundle_converter.translation.restore import logical_tensors, stored_tensors

_MAGIC: Final = b"GGUF"
_FILE_TYPES: Final = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "BF16": "MOSTLY_BF16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_0": "MOSTLY_Q4_0",
}
"""The type of most numbers -> what the library calls such a file."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of the file."""

    name: str
    kind: str
    """Its type, as ggml names it."""
    shape: tuple[int, ...]
    value: Callable[[], Tensor]
    """Returns the bytes of blocks, or the numbers."""


def export_gguf(
    bundle: Bundle,
    target: Path,
    *,
    adapter: str | os.PathLike[str] | None,
    dequantize: bool,
    check: bool,
    force: bool,
    note: Note,
    progress: Progress | None,
) -> Path:
    """Write a GGUF file with the weights, the facts and the tokenizer of a bundle. One tensor at a time is in memory.

    The arguments are those of ``export``.

    Raises:
        BundleError: ``source.family`` if llama.cpp has no name for the model; ``output.*``, ``file.*``, ``adapter.*``.
        MissingExtra: The library gguf isn't installed.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        raise MissingExtra.of("gguf", "gguf", "write GGUF files") from None
    model = described(bundle)
    tensors: Callable[[str], Tensor] = logical_tensors(bundle)
    if adapter is not None:
        check_adapter(bundle, adapter)
        tensors = with_adapter(bundle, adapter, tensors)
    with unchanged(bundle):
        if check:
            check_digests(bundle, bundle.manifest.weight_files(), progress)
        found = list(_tensors(bundle, model, tensors, plain=dequantize or adapter is not None, note=note))
        with atomic_file(target, force=force, ours=_is_gguf) as file:
            writer = gguf.GGUFWriter(file.name, model.kind)
            try:
                _describe(writer, bundle, model, found, note)
                _write(writer, found, progress)
            finally:
                writer.close()
    return target


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as opened:
        return opened.read(len(_MAGIC)) == _MAGIC


def _tensors(
    bundle: Bundle, model: GgufModel, numbers: Callable[[str], Tensor], *, plain: bool, note: Note
) -> Iterator[_Stored]:
    storage, stored = bundle.manifest.storage, stored_tensors(bundle)
    if model.rotary is not None:
        rotary = model.rotary
        yield _Stored(ROTARY_FACTORS, "F32", (rotary.dim // 2,), lambda: rotary_factors(rotary))
    unpacked = 0
    for name, shape in bundle.architecture.tensors().items():
        encoding = None if plain else storage.encodings.get(name)
        heads = model.heads(name, bundle.architecture)
        kind = block_type(encoding, shape, None if encoding is None else stored(f"{name}{SCALE}"))
        if kind is not None:
            yield _Stored(model.names[name], kind, shape, _blocks(stored, name, heads))
            continue
        unpacked += encoding is not None
        kind = plain_type(storage.dtype_of(name), shape)
        yield _Stored(model.names[name], kind, shape, _numbers(numbers, name, TORCH[kind], heads))
    if unpacked:
        note(
            f"Quantized tensors written as plain numbers: {unpacked}. Their rows aren't a multiple of {BLOCK} long, or "
            f"float16 can't hold their scales. Each number is rounded to {storage.dtype}."
        )


def _blocks(stored: Callable[[str], Tensor], name: str, heads: int | None) -> Callable[[], Tensor]:
    def value() -> Tensor:
        own = (stored(name), stored(f"{name}{SCALE}"))
        return blocks(*(own if heads is None else (rotated(part, heads) for part in own)))

    return value


def _numbers(
    numbers: Callable[[str], Tensor], name: str, dtype: torch.dtype, heads: int | None
) -> Callable[[], Tensor]:
    def value() -> Tensor:
        own = numbers(name).to(dtype)
        return own if heads is None else rotated(own, heads)

    return value


def _describe(writer: Any, bundle: Bundle, model: GgufModel, found: list[_Stored], note: Note) -> None:
    """Add the metadata, and the types and sizes of the tensors."""
    import gguf

    for name, value in model.fields.items():
        if isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
    writer.add_name(bundle.manifest.model.source.rstrip("/").rpartition("/")[2])
    amounts: Counter[str] = Counter()
    for tensor in found:
        amounts[tensor.kind] += prod(tensor.shape)
        kind = gguf.GGMLQuantizationType[tensor.kind]
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        raw = (*tensor.shape[:-1], tensor.shape[-1] // numbers * size)
        writer.add_tensor_info(tensor.name, raw, numpy.dtype("uint8"), prod(raw), kind)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[amounts.most_common(1)[0][0]]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    files, stop_ids = with_texts(other_files(bundle, lambda _: None), bundle, note), bundle.manifest.text.stop_ids
    add_tokenizer(writer, files, bundle.architecture.vocab_size, stop_ids, note)


def _write(writer: Any, found: list[_Stored], progress: Progress | None) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total, done = sum(prod(tensor.shape) for tensor in found), 0
    for tensor in found:
        if progress is not None:
            progress("exporting", done, total)
        writer.write_tensor_data(tensor.value().contiguous().view(torch.uint8).numpy())
        done += prod(tensor.shape)
    if progress is not None:
        progress("exporting", total, total)
