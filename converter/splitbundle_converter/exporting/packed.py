"""Export quantized weights as compressed-tensors, the format of llm-compressor and vLLM (``pack-quantized``).

A weight becomes three tensors. ``weight_packed`` has codes of 4 or 8 bits in words of 32 bits, the first one in
the lowest bits, each as its distance from the smallest code. ``weight_scale`` has one number for each group or row. The
third is ``weight_shape``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from splitbundle.backends.torch.weights import DTYPES
from splitbundle.bundle import Bundle
from splitbundle.format.encodings import TABLE, Encoding
from splitbundle.format.manifest.document import EMBEDDING
from splitbundle.format.weight_layout import SCALE
from splitbundle_converter.options import Note
from splitbundle_converter.translation.restore import RestoredTensor, stored_tensors

_WEIGHT: Final = ".weight"
_LEFT_OUT: Final = (EMBEDDING, "head.projection.weight")
"""The table and the head. The format packs linear layers, and the programs that read it leave the head out."""
_WORD: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor(RestoredTensor):
    """One of the tensors of a quantized weight."""

    of: RestoredTensor
    """The weight."""
    part: str
    """What its name ends with, after ``weight``: ``_packed``, ``_scale`` or ``_shape``."""
    encoding: Encoding
    stored: Callable[[str], Tensor]
    """Returns a stored tensor by its name."""

    def restore(self, tensors: Callable[[str], Tensor]) -> Tensor:
        """Return the tensor, from the stored codes and scales. The logical tensors aren't needed."""
        if self.part == "_shape":
            return torch.tensor(self.of.shape)
        names = () if self.of.entry is None else self.of.entry.tensors
        end = "" if self.part == "_packed" else SCALE
        whole = [self.stored(f"{name}{end}") for name in names]
        parts = whole if self.of.row is None else [whole[0][self.of.row]]
        joined = torch.cat(
            [_words(part, self.encoding) if not end else part.flatten(1) for part in map(_matrix, parts)]
        )
        return joined.contiguous().to(DTYPES[self.dtype]) if end else joined.contiguous()


def _matrix(part: Tensor) -> Tensor:
    return part[:, None] if part.ndim == 1 else part


def _words(codes: Tensor, encoding: Encoding) -> Tensor:
    """Put codes into words. *Shape:* codes as stored -> (rows, columns · bits / 32), int32."""
    # Codes of 8 bits are in two's complement. A byte of 4 bits has the first code in its low bits, as words do.
    raw = codes.view(torch.uint8).bitwise_xor(128) if encoding.block is None else codes.flatten(1)
    return raw.contiguous().view(torch.int32)


def packed_tensors(bundle: Bundle, restored: Sequence[RestoredTensor], note: Note) -> list[RestoredTensor]:
    """Return the tensors of the checkpoint: each quantized weight that the format can hold as three of them."""
    storage = bundle.manifest.storage
    stored = stored_tensors(bundle)
    # A reader computes each number in the dtype of the scale.
    scales = "bfloat16" if storage.dtype == "bfloat16" else "float32"
    found: list[RestoredTensor] = []
    plain = 0
    for tensor in restored:
        names = () if tensor.entry is None else tensor.entry.tensors
        encodings = {storage.encodings.get(name) for name in names}
        name = next(iter(encodings)) if len(encodings) == 1 else None
        if name is None or not _fits(tensor):
            plain += bool(encodings - {None}) and not set(names) & set(_LEFT_OUT)
            found.append(tensor)
            continue
        encoding = TABLE[name]
        rows, columns = tensor.shape
        for part, dtype, shape in (
            ("_packed", "int32", (rows, columns * encoding.bits // _WORD)),
            ("_scale", scales, (rows, columns // (encoding.block or columns))),
            ("_shape", "int64", (2,)),
        ):
            own = PackedTensor(
                name=f"{tensor.name}{part}",
                dtype=dtype,
                shape=shape,
                of=tensor,
                part=part,
                encoding=encoding,
                stored=stored,
            )
            found.append(own)
    if plain:
        note(
            f"{plain} quantized tensors are written as plain numbers: compressed-tensors packs linear layers that are "
            "stored as (outputs, inputs)."
        )
    return found


def _fits(tensor: RestoredTensor) -> bool:
    entry = tensor.entry
    return (
        entry is not None
        and tensor.name.endswith(_WEIGHT)
        and len(tensor.shape) == 2
        and not (entry.transposed or entry.shape or entry.axis)
        and entry.groups == 1
        and not set(entry.tensors) & set(_LEFT_OUT)
    )


def packed_name(names: Callable[[RestoredTensor], str]) -> Callable[[RestoredTensor], str]:
    """Return a function that gives the name of a tensor in the checkpoint, also for the parts of a weight."""
    return lambda tensor: f"{names(tensor.of)}{tensor.part}" if isinstance(tensor, PackedTensor) else names(tensor)


def with_quantization(
    config: bytes, tensors: Sequence[RestoredTensor], names: Callable[[RestoredTensor], str]
) -> bytes:
    """Return a config.json that says how the weights are packed, if some are."""
    modules = {
        names(tensor.of).removesuffix(_WEIGHT): tensor.encoding.name
        for tensor in tensors
        if isinstance(tensor, PackedTensor) and tensor.part == "_packed"
    }
    if not modules:
        return config
    ignored = {
        names(tensor).removesuffix(_WEIGHT)
        for tensor in tensors
        if not isinstance(tensor, PackedTensor) and len(tensor.shape) == 2 and tensor.name.endswith(_WEIGHT)
    }
    groups = {}
    for number, (name, _) in enumerate(Counter(modules.values()).most_common()):
        # The class stands for most modules. The names of the others go before it.
        targets = ["Linear"] if number == 0 else [module for module, own in modules.items() if own == name]
        groups[f"group_{number}"] = {"targets": targets, "weights": _scheme(TABLE[name])}
    value = json.loads(config)
    value["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*ignored, "lm_head"}),
    }
    return f"{json.dumps(value, indent=2)}\n".encode()


def _scheme(encoding: Encoding) -> dict[str, Any]:
    return {
        "num_bits": encoding.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if encoding.block is None else "group",
        "group_size": encoding.block,
        "actorder": None,
        "dynamic": False,
    }
