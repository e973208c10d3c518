"""Read weights in FP8 and FP4: transformers' fp8 and fbgemm_fp8, NVIDIA's ModelOpt, and the MXFP4 of gpt-oss."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from splitbundle_converter.checkpoint.weight_files import SourceTensor
from splitbundle_converter.quantized import formulas
from splitbundle_converter.quantized.packed_weights import NOT_YET, TORCH, Get, PackedWeight, Quantization, whole

_SCALES = ("F32", "F16", "BF16", "U8", "F8_E8M0")
_ENDS = ("_scale_inv", "_scale")
_MODELOPT = {"FP8": None, "FP8_PER_CHANNEL_PER_TOKEN": None, "FP8_PB_WO": (128, 128)}
_MODELOPT_FP4 = ("NVFP4", "W4A16_NVFP4")


def fp8(quantization: Quantization) -> dict[str, PackedWeight]:
    """Return the FP8 weights of transformers' method ``fp8``: DeepSeek's blocks, or one scale for a tensor.

    The block's size comes from the configuration. The shape of the scales can't tell it: 576 rows are 4.5 blocks.

    Raises:
        BundleError: ``source.quantised``, ``source.tensor``.
    """
    block: tuple[int, int] | None = (128, 128)  # as FineGrainedFP8Config has it
    if "weight_block_size" in quantization.fields:
        stated = quantization.fields["weight_block_size"]
        sizes = stated if isinstance(stated, list) else []
        if stated is not None and not (len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)):
            raise quantization.unsupported("weight_block_size", "null, or two whole numbers from 1")
        block = None if stated is None else (sizes[0], sizes[1])
    return _fp8(quantization, block)


def fbgemm_fp8(quantization: Quantization) -> dict[str, PackedWeight]:
    """Return the FP8 weights of transformers' method ``fbgemm_fp8``, with one scale for each row.

    Raises:
        BundleError: ``source.tensor``.
    """
    return _fp8(quantization, None)


def modelopt(quantization: Quantization) -> dict[str, PackedWeight]:
    """Return the FP8 or NVFP4 weights of NVIDIA's ModelOpt. Its FP8 rounds a scale to the result's dtype first.

    Raises:
        BundleError: ``source.quantised``, ``source.tensor``.
    """
    for name in quantization.tensors:
        if name.endswith(".pre_quant_scale"):
            quantization.refuse(name, "no scales of inputs, which the weights alone don't hold", "a tensor", NOT_YET)
    algorithm = quantization.fields.get("quant_algo")
    if algorithm in _MODELOPT:
        return _fp8(quantization, _MODELOPT[algorithm], rounded_scales=True)
    if algorithm not in _MODELOPT_FP4:
        raise quantization.unsupported("quant_algo", f"one of {', '.join((*_MODELOPT, *_MODELOPT_FP4))}")
    found = {}
    for name, _ in quantization.names("weight", "U8"):
        rows, half = quantization.sizes(name, 2)
        scale, second = f"{name}_scale", f"{name}_scale_2"
        quantization.part(scale, (rows, half // 8), dtypes=("F8_E4M3",), of=name)
        quantization.part(second, (), (1,), dtypes=("F32",), of=name)

        def numbers(get: Get, name: str = name, scale: str = scale, second: str = second) -> Tensor:
            scales = get(scale).float() * get(second)
            return formulas.packed_e2m1(get(name), scales, 16, TORCH[quantization.target])

        found[name] = PackedWeight(
            parts=(name, scale, second), shape=(rows, 2 * half), dtype=quantization.target, pieces=whole(numbers)
        )
    return found


def mxfp4(quantization: Quantization) -> dict[str, PackedWeight]:
    """Return the MXFP4 weights of gpt-oss' experts. The class has them transposed: (experts, i, o).

    Raises:
        BundleError: ``source.tensor``.
    """
    found = {}
    for blocks, name in quantization.names("_blocks", "U8"):
        shape = quantization.sizes(blocks, 4)
        if shape[-1] != 16:
            quantization.refuse(blocks, "shape [experts, rows, groups, 16]", str(list(shape)))
        experts, rows, groups, _ = shape
        scales = f"{name}_scales"
        quantization.part(scales, shape[:3], dtypes=("U8",), of=blocks)

        def pieces(get: Get, blocks: str = blocks, scales: str = scales) -> Iterator[Tensor]:
            for codes, exponents in zip(get(blocks), get(scales), strict=True):
                own = formulas.scale_numbers(exponents)
                numbers = formulas.packed_e2m1(codes.flatten(1), own, 32, TORCH[quantization.target])
                yield numbers.T.contiguous()[None]

        found[name] = PackedWeight(
            parts=(blocks, scales), shape=(experts, groups * 32, rows), dtype=quantization.target, pieces=pieces
        )
    return found


def _fp8(
    quantization: Quantization, block: tuple[int, int] | None, *, rounded_scales: bool = False
) -> dict[str, PackedWeight]:
    found = {}
    for name, _ in quantization.names("", "F8_E5M2"):
        quantization.refuse(name, "codes of dtype F8_E4M3", "F8_E5M2", NOT_YET)
    for name, _ in quantization.names("", "F8_E4M3"):
        if name.endswith(_ENDS):
            continue
        scale = next((name + end for end in _ENDS if name + end in quantization.tensors), name + _ENDS[0])
        stored = quantization.part(scale, dtypes=_SCALES, of=name)
        shape = quantization.sizes(name, 2, 3)
        size = _block_of(quantization, scale, shape, stored, block)
        packed = _packed(quantization, name, scale, shape, size, rounded_scales)
        found[name] = packed
    return found


def _block_of(
    quantization: Quantization,
    name: str,
    shape: tuple[int, ...],
    scale: SourceTensor,
    block: tuple[int, int] | None,
) -> tuple[int, int]:
    """Return the size of the blocks that share a scale. One scale serves a whole matrix, or a row."""
    *lead, rows, columns = shape
    per_tensor = [(), (1,), (1, 1)] if not lead else [(*lead, 1, 1), (*lead, 1), tuple(lead)]
    if scale.shape in per_tensor:
        return rows, columns
    if block is not None:
        wanted = (*lead, -(-rows // block[0]), -(-columns // block[1]))
        if scale.shape == wanted:
            return block
        expected = f"shape {list(wanted)}, for blocks of {block[0]} x {block[1]}"
        quantization.refuse(name, expected, str(list(scale.shape)))
    if scale.shape not in ((*lead, rows, 1), (*lead, rows)):
        quantization.refuse(name, f"one scale, or shape {[*lead, rows, 1]}", str(list(scale.shape)))
    return 1, columns


def _packed(
    quantization: Quantization,
    name: str,
    scale: str,
    shape: tuple[int, ...],
    block: tuple[int, int],
    rounded_scales: bool,
) -> PackedWeight:
    rows, columns = shape[-2:]
    dtype = TORCH[quantization.target]

    def pieces(get: Get) -> Iterator[Tensor]:
        codes, scales = get(name), get(scale)
        scales = scales.to(dtype) if rounded_scales else scales
        grid = scales.reshape(*shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
        if codes.ndim == 2:
            yield formulas.blocks(codes, grid, block, dtype)
        else:
            yield from (formulas.blocks(own, part, block, dtype)[None] for own, part in zip(codes, grid, strict=True))

    even = rows % block[0] == 0 and columns % block[1] == 0
    return PackedWeight(parts=(name, scale), shape=shape, dtype=quantization.target, even=even, pieces=pieces)
