"""Read the weights of compressed-tensors, the format of llm-compressor and vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from splitbundle.errors import quoted
from splitbundle_converter.errors import refusal
from splitbundle_converter.quantized import formulas
from splitbundle_converter.quantized.packed_weights import (
    NOT_YET,
    TORCH,
    Get,
    PackedWeight,
    Quantization,
    checked_groups,
    group_of,
    is_named,
    patterns_of,
    whole,
    words,
)

_PACKED, _MIXED = "pack-quantized", "mixed-precision"
_FP4: Final = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}
_PLAIN: Final = ("int-quantized", "float-quantized", "naive-quantized")
FORMATS: Final = (_PACKED, *_PLAIN, *_FP4)
_SCALES: Final = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scheme:
    """How the weights of some modules are quantized."""

    format: str
    bits: int
    group: int | None
    block: tuple[int, int] | None
    symmetric: bool
    targets: list[str]
    pointer: str


def compressed_tensors(quantization: Quantization) -> dict[str, PackedWeight]:
    """Return the quantized weights. A module has the scheme whose targets name it, or else that of its class.

    Raises:
        BundleError: ``source.quantised``, ``source.tensor``.
    """
    sparsity = quantization.fields.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise quantization.unsupported("sparsity_config", "the format dense")
    transforms = quantization.fields.get("transform_config")
    if transforms and transforms != {"config_groups": {}}:
        raise quantization.unsupported("transform_config", "no transforms, which the model computes beside its weights")
    ignored = patterns_of(quantization, "ignore", quantization.fields.get("ignore"))
    schemes = _schemes(quantization)
    found = {}
    for name, module in quantization.names(".weight_packed", "I32", "U8"):
        scheme = _scheme_of(quantization, schemes, module, name)
        if quantization.tensors[name].dtype == "I32" and scheme.format == _PACKED:
            found[f"{module}.weight"] = _integers(quantization, scheme, module)
        elif quantization.tensors[name].dtype == "U8" and scheme.format in _FP4:
            found[f"{module}.weight"] = _fp4(quantization, scheme, module)
        else:
            quantization.refuse(name, f"a tensor of the format {scheme.format}", quantization.tensors[name].dtype)
    for name, module in quantization.names(".weight", "I8", "F8_E4M3"):
        scheme = _scheme_of(quantization, schemes, module, name)
        if scheme.format not in _PLAIN:
            quantization.refuse(name, f"a tensor of the format {scheme.format}", quantization.tensors[name].dtype)
        found[name] = _plain(quantization, scheme, module)
    for name in found:
        if is_named(name.removesuffix(".weight"), ignored):
            quantization.refuse(found[name].parts[0], "a plain weight, as ignore names the module", "a quantized one")
    return found


def activations(fields: Mapping[str, Any]) -> str | None:
    """Return what the source rounds while it runs, or None."""
    groups = fields.get("config_groups")
    inputs = isinstance(groups, dict) and any(
        isinstance(group, dict) and group.get("input_activations") for group in groups.values()
    )
    cache = bool(fields.get("kv_cache_scheme"))
    found = [words for words, there in (("the inputs of its products", inputs), ("keys and values", cache)) if there]
    return " and ".join(found) or None


def _schemes(quantization: Quantization) -> list[_Scheme]:
    groups = quantization.fields.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise quantization.unsupported("config_groups", "an object with at least one group")
    return [_scheme(quantization, name, group) for name, group in groups.items()]


def _scheme(quantization: Quantization, name: str, group: Any) -> _Scheme:
    pointer = f"{quantization.pointer}/config_groups/{name}"
    fields: Mapping[str, Any] = group if isinstance(group, dict) else {}
    weights = fields.get("weights")
    form = fields.get("format") or quantization.fields.get("format")
    targets = fields.get("targets")
    size: Any = None
    block: Any = None
    sound = form in FORMATS and isinstance(weights, dict) and isinstance(targets, list)
    if sound and isinstance(weights, dict):
        size, block = weights.get("group_size"), weights.get("block_structure")
        if isinstance(block, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", block):  # as older versions wrote it
            block = [int(number) for number in block.split("x")]
        size = None if size == -1 else size
        kind = "float" if weights.get("num_bits") == 4 and form in _FP4 else weights.get("type", "int")
        sound = (
            type(weights.get("num_bits")) is int
            and 1 <= weights["num_bits"] <= 8
            and (size is None or (type(size) is int and size > 0))
            and (
                block is None
                or (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block))
            )
            and (form not in _FP4 or size == _FP4[form])
            and kind in ("int", "float")
            and (form != _PACKED or kind == "int")
        )
    if not sound or not isinstance(weights, dict):
        expected = f"a group with targets, weights, and one of the formats {', '.join(FORMATS)}"
        got = f"{quoted(form)}, {quoted(group)}"
        raise refusal("source.quantised", quantization.file, expected, got, NOT_YET, pointer)
    return _Scheme(
        format=str(form),
        bits=weights["num_bits"],
        group=size,
        block=(block[0], block[1]) if block else None,
        symmetric=weights.get("symmetric", True) is not False,
        targets=patterns_of(quantization, f"config_groups/{name}/targets", targets),
        pointer=pointer,
    )


def _scheme_of(quantization: Quantization, schemes: list[_Scheme], module: str, name: str) -> _Scheme:
    """Return the scheme of a module: the only one, or the one that names it, or the only one that names classes."""
    if len(schemes) == 1:
        return schemes[0]
    named = [scheme for scheme in schemes if is_named(module, scheme.targets)]
    classes = [scheme for scheme in schemes if any("." not in t and ":" not in t for t in scheme.targets)]
    right = named or classes
    if len(right) != 1:
        quantization.refuse(name, "one group of config_groups that names its module", f"{len(right)}", NOT_YET)
    return right[0]


def _integers(quantization: Quantization, scheme: _Scheme, module: str) -> PackedWeight:
    codes, scales, zeros, index, size = (
        f"{module}.weight_{part}" for part in ("packed", "scale", "zero_point", "g_idx", "shape")
    )
    quantization.part(size, (2,), dtypes=("I64", "I32"), of=codes)
    rows, columns = (int(value) for value in quantization.get(size))
    if not (0 < rows < 2**40 and 0 < columns < 2**40):
        quantization.refuse(size, "sizes from 1", f"{rows} and {columns}")
    quantization.part(codes, (rows, words(columns, scheme.bits)), dtypes=("I32",), of=codes)
    group = scheme.group or columns
    count = -(-columns // group)
    quantization.part(scales, *((rows, count), (rows,), (1,))[: 3 if count == 1 else 1], dtypes=_SCALES, of=codes)
    if not scheme.symmetric:
        quantization.part(zeros, (words(rows, scheme.bits), count), dtypes=("I32",), of=codes)
    ordered = index in quantization.tensors
    if ordered:
        quantization.part(index, (columns,), dtypes=("I32", "I64"), of=codes)

    def numbers(get: Get) -> Tensor:
        scale = get(scales).reshape(-1, count).expand(rows, count)
        zero = None
        if not scheme.symmetric:
            stored = formulas.unpacked(get(zeros).T, scheme.bits, rows).T
            zero = stored.to(torch.int16) - 2 ** (scheme.bits - 1)
        order = get(index) if ordered else torch.tensor([-1])
        # An index of -1 says that the library has not set it.
        groups = group_of(columns, group) if -1 in order else checked_groups(quantization, index, order, count)
        result = formulas.groups(get(codes), scheme.bits, scale, zero, groups)
        return result.to(TORCH[quantization.product_dtype(quantization.tensors[scales])])

    parts = (codes, scales, size, *_zeros(quantization, scheme, zeros), *([index] if ordered else []))
    return PackedWeight(
        parts=parts,
        shape=(rows, columns),
        dtype=quantization.product_dtype(quantization.tensors[scales]),
        pieces=whole(numbers),
    )


def _plain(quantization: Quantization, scheme: _Scheme, module: str) -> PackedWeight:
    codes, scales, zeros = (f"{module}.weight{part}" for part in ("", "_scale", "_zero_point"))
    shape = rows, columns = quantization.sizes(codes, 2)
    one = scheme.block is None and scheme.group is None
    block = scheme.block or (1, scheme.group or columns)
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    shapes = [grid, (rows,), (1,), (1, 1), ()] if one else [grid]
    found = quantization.part(scales, *shapes, dtypes=_SCALES, of=codes)
    if one and found.shape in ((1,), (1, 1), ()):
        block, grid = (rows, columns), (1, 1)
    if not scheme.symmetric:
        quantization.part(zeros, found.shape, dtypes=("I8",), of=codes)
    dtype = quantization.product_dtype(found)

    def numbers(get: Get) -> Tensor:
        zero = None if scheme.symmetric else get(zeros).reshape(grid)
        return formulas.blocks(get(codes), get(scales).reshape(grid), block, TORCH[dtype], zero)

    parts = (codes, scales, *_zeros(quantization, scheme, zeros))
    return PackedWeight(parts=parts, shape=shape, dtype=dtype, pieces=whole(numbers))


def _zeros(quantization: Quantization, scheme: _Scheme, name: str) -> list[str]:
    """Return the name of the zero points in a list, or nothing. Older versions stored those of symmetric codes: 0."""
    if name not in quantization.tensors:
        return []
    if scheme.symmetric and bool(quantization.get(name).any()):
        quantization.refuse(name, "0, as the weights are symmetric", "other zero points")
    return [name]


def _fp4(quantization: Quantization, scheme: _Scheme, module: str) -> PackedWeight:
    codes, scales, second = (f"{module}.weight_{part}" for part in ("packed", "scale", "global_scale"))
    rows, half = quantization.sizes(codes, 2)
    group = _FP4[scheme.format]
    scaled_twice = scheme.format.startswith("nvfp4")
    quantization.part(scales, (rows, half * 2 // group), dtypes=("F8_E4M3",) if scaled_twice else ("U8",), of=codes)
    if scaled_twice:
        quantization.part(second, (1,), (), dtypes=("F32",), of=codes)

    def numbers(get: Get) -> Tensor:
        scale = formulas.scale_numbers(get(scales))
        scale = scale / get(second) if scaled_twice else scale
        return formulas.packed_e2m1(get(codes), scale, group, TORCH[quantization.target])

    parts = (codes, scales, *([second] if scaled_twice else []))
    return PackedWeight(parts=parts, shape=(rows, half * 2), dtype=quantization.target, pieces=whole(numbers))
