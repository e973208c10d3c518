"""Read weights in packed integers: GPTQ, AWQ, and the affine groups of MLX."""

from __future__ import annotations

import torch
from torch import Tensor

from splitbundle.errors import quoted
from splitbundle_converter.quantized import formulas
from splitbundle_converter.quantized.packed_weights import (
    Get,
    PackedWeight,
    Quantization,
    checked_groups,
    group_of,
    whole,
    words,
)

_SCALES = ("F16", "BF16", "F32")
_CLASSIC, _SECOND = "gptq", "gptq_v2"
_NOT_ALIKE = "Save it again as gptq_v2, with the library that made it"


def gptq(quantization: Quantization) -> dict[str, PackedWeight]:
    """Return the weights of GPTQ, packed along the inputs. ``gptq`` stores each zero point less one, ``gptq_v2`` as is.

    Raises:
        BundleError: ``source.quantised``, ``source.tensor``.
    """
    field = "checkpoint_format" if quantization.fields.get("checkpoint_format") is not None else "format"
    form = quantization.fields.get(field) or _CLASSIC
    if form not in (_CLASSIC, _SECOND):
        raise quantization.unsupported(field, f"{_CLASSIC} or {_SECOND}")
    stated = quantization.number("bits")
    size = quantization.fields.get("group_size")
    found = {}
    for codes, module in quantization.names(".qweight", "I32"):
        scales, zeros, index = (f"{module}.{part}" for part in ("scales", "qzeros", "g_idx"))
        _, rows = quantization.sizes(codes, 2)
        has_index = index in quantization.tensors
        if has_index:
            quantization.part(index, dtypes=("I32", "I64"), of=codes)
            (inputs,) = quantization.sizes(index, 1)
        else:
            inputs = quantization.tensors[codes].shape[0] * 32 // stated
        bits = next((bits for bits in (2, 3, 4, 8) if words(inputs, bits) == quantization.tensors[codes].shape[0]), 0)
        if bits != stated and not (bits and quantization.fields.get("dynamic")):
            expected = f"shape {[words(inputs, stated), rows]}, for {stated} bits of {inputs} inputs"
            quantization.refuse(codes, expected, str(list(quantization.tensors[codes].shape)))
        quantization.part(scales, dtypes=_SCALES, of=codes)
        groups, _ = quantization.sizes(scales, 2)
        quantization.part(scales, (groups, rows), dtypes=_SCALES, of=codes)
        quantization.part(zeros, (groups, words(rows, bits)), dtypes=("I32",), of=codes)
        plain = size if type(size) is int and size > 0 else -(-inputs // groups)
        if not has_index and -(-inputs // plain) != groups:
            quantization.refuse(scales, f"{-(-inputs // plain)} groups of {plain} inputs", str(groups))

        def numbers(
            get: Get,
            parts: tuple[str, ...] = (codes, scales, zeros, index),
            bits: int = bits,
            shape: tuple[int, ...] = (rows, inputs),
            size: int | None = None if has_index else plain,
        ) -> Tensor:
            scale, zero = get(parts[1]), formulas.unpacked(get(parts[2]), bits, shape[0]).to(torch.int16)
            if form == _CLASSIC:
                # The library masks the sum, some kernels don't, and newer versions carry it to the next zero point.
                if bool((zero == 2**bits - 1).any()):
                    expected = f"zero points of at most {2**bits - 2}, which every reader of this format reads alike"
                    quantization.refuse(parts[2], expected, f"{2**bits - 1}", _NOT_ALIKE)
                zero += 1
            groups = (
                checked_groups(quantization, parts[3], get(parts[3]), len(scale))
                if size is None
                else group_of(shape[1], size)
            )
            return formulas.gptq(get(parts[0]), bits, scale, zero, groups)

        parts = (codes, scales, zeros, *([index] if has_index else []))
        dtype = quantization.tensors[scales].dtype
        found[f"{module}.weight"] = PackedWeight(parts=parts, shape=(rows, inputs), dtype=dtype, pieces=whole(numbers))
    return found


def awq(quantization: Quantization) -> dict[str, PackedWeight]:
    """Return the weights of AWQ in the order of its kernels for matrix products ("gemm"), packed along the outputs.

    Raises:
        BundleError: ``source.quantised``, ``source.tensor``.
    """
    version = quantization.fields.get("version", quantization.fields.get("format", "gemm"))
    if not isinstance(version, str) or version.lower() != "gemm":
        raise quantization.unsupported("version" if "version" in quantization.fields else "format", "gemm")
    if quantization.number("bits", 4) != 4:
        raise quantization.unsupported("bits", "4")
    size = quantization.fields.get("group_size", quantization.fields.get("q_group_size"))
    found = {}
    for codes, module in quantization.names(".qweight", "I32"):
        inputs, packed = quantization.sizes(codes, 2)
        scales, zeros = f"{module}.scales", f"{module}.qzeros"
        group = size if type(size) is int and size > 0 else inputs
        if inputs % group:
            quantization.refuse(codes, f"rows that {quoted(group)} of a group divide", str(inputs))
        quantization.part(scales, (inputs // group, packed * 8), dtypes=_SCALES, of=codes)
        quantization.part(zeros, (inputs // group, packed), dtypes=("I32",), of=codes)

        def numbers(get: Get, parts: tuple[str, ...] = (codes, scales, zeros), size: int = group) -> Tensor:
            codes, scale, zero = map(get, parts)
            return formulas.awq(codes, scale, zero, group_of(len(codes), size))

        found[f"{module}.weight"] = PackedWeight(
            parts=(codes, scales, zeros),
            shape=(packed * 8, inputs),
            dtype=quantization.tensors[scales].dtype,
            pieces=whole(numbers),
        )
    return found


def mlx(quantization: Quantization) -> dict[str, PackedWeight]:
    """Return the weights of MLX's mode "affine". A module may have its own bits and its own size of groups.

    Raises:
        BundleError: ``source.quantised``, ``source.tensor``.
    """
    if quantization.fields.get("mode", "affine") != "affine":
        raise quantization.unsupported("mode", "affine")
    found = {}
    for name, module in quantization.names(".weight", "U32"):
        own = quantization.fields.get(module)
        bits, size = quantization.number("bits"), quantization.number("group_size", 64)
        if isinstance(own, dict):
            bits, size = own.get("bits", bits), own.get("group_size", size)
            if own.get("mode", "affine") != "affine" or type(size) is not int or size < 1 or type(bits) is not int:
                raise quantization.unsupported(module, "the mode affine, and whole numbers for bits and group_size")
        if bits not in (2, 3, 4, 5, 6, 8):
            raise quantization.unsupported(module if isinstance(own, dict) else "bits", "2, 3, 4, 5, 6 or 8")
        scales, offsets = f"{module}.scales", f"{module}.biases"
        *lead, packed = quantization.sizes(name, 2, 3)
        columns = packed * 32 // bits
        wanted = (*lead, columns // size)
        quantization.part(scales, wanted, dtypes=_SCALES, of=name)
        quantization.part(offsets, wanted, dtypes=(quantization.tensors[scales].dtype,), of=name)
        if columns % size or words(columns, bits) != packed:
            quantization.refuse(name, f"rows of whole groups of {size} values of {bits} bits", f"{columns} values")

        def numbers(
            get: Get, parts: tuple[str, ...] = (name, scales, offsets), bits: int = bits, columns: int = columns
        ) -> Tensor:
            codes, scale, offset = map(get, parts)
            return formulas.affine(codes, bits, scale, offset, columns)

        found[name] = PackedWeight(
            parts=(name, scales, offsets),
            shape=(*lead, columns),
            dtype=quantization.tensors[scales].dtype,
            pieces=whole(numbers),
        )
    return found
