"""Read the weights of bitsandbytes: 4 bits (NF4 and its FP4, with plain or quantized scales), and 8 bits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from splitbundle.errors import quoted
from splitbundle.format.dtypes import SAFETENSORS_CODES, WEIGHTS
from splitbundle_converter.errors import MISSING, refusal, source_json
from splitbundle_converter.quantized import formulas
from splitbundle_converter.quantized.packed_weights import TORCH, Get, PackedWeight, Quantization, whole

_STATE: Final = ".quant_state.bitsandbytes__"
_NUMBERS: Final = {"nf4": formulas.NF4, "fp4": formulas.FP4}
_BLOCKS: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_MOST: Final = 4096
"""The most bytes of a state: it has a few numbers."""


@dataclass(frozen=True, slots=True)
class _State:
    """The facts that stand beside the codes of a weight of 4 bits."""

    numbers: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: str
    block: int
    nested_block: int
    offset: float


def bitsandbytes(quantization: Quantization) -> dict[str, PackedWeight]:
    """Return the weights of 4 and of 8 bits.

    Raises:
        BundleError: ``source.tensor``.
    """
    return _four_bits(quantization) | _eight_bits(quantization)


def _eight_bits(quantization: Quantization) -> dict[str, PackedWeight]:
    found = {}
    for name, module in quantization.names(".weight", "I8"):
        scales, layout = f"{module}.SCB", f"{module}.weight_format"
        shape = quantization.sizes(name, 2)
        quantization.part(scales, shape[:1], dtypes=("F32",), of=name)
        if layout in quantization.tensors:
            quantization.part(layout, (), (1,), dtypes=("U8",), of=name)
            if int(quantization.get(layout)) != 0:
                quantization.refuse(layout, "0, for rows that follow each other", str(int(quantization.get(layout))))

        def numbers(get: Get, name: str = name, scales: str = scales) -> Tensor:
            return formulas.eight_bit_rows(get(name), get(scales), TORCH[quantization.target])

        parts = (name, scales, *([layout] if layout in quantization.tensors else []))
        found[name] = PackedWeight(parts=parts, shape=shape, dtype=quantization.target, pieces=whole(numbers))
    return found


def _four_bits(quantization: Quantization) -> dict[str, PackedWeight]:
    found = {}
    for place in [name for name in quantization.tensors if _STATE in name]:
        name, _, kind = place.partition(_STATE)
        quantization.part(name, dtypes=("U8", "BF16", "F16", "F32"), of=place)
        quantization.part(place, dtypes=("U8",), of=name)
        state = _state(quantization, place, kind)
        count = math.prod(state.shape)
        blocks = -(-count // state.block)
        nested = state.nested_block > 0
        quantization.part(f"{name}.absmax", (blocks,), dtypes=("U8",) if nested else ("F32",), of=name)
        parts = [name, place, f"{name}.absmax", f"{name}.quant_map"]
        if nested:
            parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]
            quantization.part(parts[-2], (-(-blocks // state.nested_block),), dtypes=("F32",), of=name)
            quantization.part(parts[-1], (256,), dtypes=("F32",), of=name)
        quantization.part(parts[3], (16,), dtypes=("F32",), of=name)
        if not torch.equal(quantization.get(parts[3]), torch.tensor(state.numbers)):
            # The library has the numbers in its code, and doesn't use the stored ones.
            quantization.refuse(parts[3], f"the numbers of {kind}", "others")

        def numbers(get: Get, parts: tuple[str, ...] = tuple(parts), state: _State = state) -> Tensor:
            scales = get(parts[2])
            if state.nested_block:
                scales = formulas.nested_scales(scales, get(parts[5]), get(parts[4]), state.nested_block, state.offset)
            codes = get(parts[0]).flatten().view(torch.uint8)
            return formulas.four_bit_blocks(codes, state.numbers, scales, state.block, state.shape, TORCH[state.dtype])

        size = quantization.tensors[name]
        if math.prod(size.shape) * {"U8": 1, "F32": 4}.get(size.dtype, 2) != -(-count // 2):
            quantization.refuse(name, f"{-(-count // 2)} bytes, for shape {list(state.shape)}", str(list(size.shape)))
        found[name] = PackedWeight(parts=tuple(parts), shape=state.shape, dtype=state.dtype, pieces=whole(numbers))
    return found


def _state(quantization: Quantization, place: str, kind: str) -> _State:
    """Return what a tensor of bytes says in JSON.

    Raises:
        BundleError: ``source.tensor``, ``json.*``.
    """
    if kind not in _NUMBERS:
        quantization.refuse(place, "the end nf4 or fp4", quoted(kind))
    file = quantization.tensors[place].file
    if math.prod(quantization.tensors[place].shape) > _MOST:
        quantization.refuse(place, f"at most {_MOST} bytes", str(quantization.tensors[place].shape))
    data = bytes(quantization.get(place).flatten().tolist())
    raw: Any = source_json(data, file)
    fields = raw if isinstance(raw, dict) else {}
    shape, dtype, block = (fields.get(name) for name in ("shape", "dtype", "blocksize"))
    nested, offset = fields.get("nested_blocksize", 0), fields.get("nested_offset", 0.0)
    sizes = shape if isinstance(shape, list) else []
    sound = (
        len(sizes) == 2
        and all(type(size) is int and 0 < size < 2**40 for size in sizes)
        and isinstance(dtype, str)
        and dtype in WEIGHTS
        and block in _BLOCKS
        and fields.get("quant_type") == kind
        and (nested == 0 or nested in _BLOCKS)
        and type(nested) is int
        and type(offset) in (int, float)
    )
    if not sound:
        expected = f"a state with quant_type {kind}, a shape, a dtype and sizes of blocks that bitsandbytes knows"
        raise refusal("source.tensor", file, expected, quoted(raw), MISSING, f"/{place}")
    return _State(_NUMBERS[kind], tuple(sizes), SAFETENSORS_CODES[str(dtype)], int(block or 0), nested, float(offset))
