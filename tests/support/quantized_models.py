"""Checkpoints with quantized weights, made of plain ones: random codes and scales in each format's layout.

A packer gives the parts of a weight, and the numbers that they stand for. It computes these numbers from the codes
before it packs them, so they don't depend on what a reader unpacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import change_config

WEIGHTS: Final = "model.safetensors"
Packed = tuple[dict[str, Tensor], Tensor]
"""The parts of a weight by the ends of their names, and its numbers."""
Packer = Callable[[Tensor, torch.Generator], Packed]
E2M1: Final = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclass(frozen=True, kw_only=True)
class Form:
    """A format: how a weight is packed, and what the configuration says."""

    pack: Packer
    fields: dict[str, Any]
    field: str = "quantization_config"
    chosen: str = r"model\.layers\.\d+\..*proj\.weight"
    """The weights that are quantized."""
    weight: str = "weight"
    """The end of the name that the parts replace."""


def quantize(path: Path, form: Form, seed: int = 0) -> dict[str, Tensor]:
    """Quantize the weights of a checkpoint in place. Return the plain numbers of all tensors by name."""
    tensors, plain = load_file(path / WEIGHTS), {}
    generator = torch.Generator().manual_seed(seed)
    stored = {}
    for name, tensor in tensors.items():
        plain[name] = tensor
        if not re.fullmatch(form.chosen, name):
            stored[name] = tensor
            continue
        parts, plain[name] = form.pack(tensor, generator)
        stored |= {name.removesuffix(form.weight) + end: part.contiguous() for end, part in parts.items()}
    save_file(stored, path / WEIGHTS, {"format": "pt"})
    change_config(path, **{form.field: form.fields})
    return plain


def words(values: Tensor, bits: int) -> Tensor:
    """Pack integers along the last dimension into words of 32 bits, the low bits first.

    *Shape:* (…, n) -> (…, words).
    """
    each = (values.numpy().astype(numpy.uint8)[..., None] >> numpy.arange(bits, dtype=numpy.uint8)) & 1
    stream = each.reshape(*values.shape[:-1], -1)
    padded = numpy.pad(stream, [(0, 0)] * (values.ndim - 1) + [(0, -stream.shape[-1] % 32)])
    return torch.from_numpy(numpy.packbits(padded, axis=-1, bitorder="little").view(numpy.int32).copy())


def codes(shape: tuple[int, ...], bits: int, generator: torch.Generator, least: int = 0) -> Tensor:
    """Return random integers of ``bits`` bits."""
    return torch.randint(least, 2**bits, shape, generator=generator)


def scales(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return random scales, of which no two are alike."""
    return (torch.rand(shape, generator=generator) * 0.02 + 0.002).to(dtype)


def wide(values: Tensor, size: int, count: int) -> Tensor:
    """Repeat each column for the columns of its group."""
    return values.repeat_interleave(size, 1)[:, :count]


def fp8(block: int | None, *, end: str = "weight_scale_inv", rounded: bool = False) -> Packer:
    """Codes of 8 bits with a scale for each block, or for the whole weight."""

    def pack(weight: Tensor, generator: torch.Generator) -> Packed:
        rows, columns = weight.shape
        own = (torch.randn(weight.shape, generator=generator) * 3).to(torch.float8_e4m3fn)
        if block is None:
            scale = scales((), generator)
            every = scale
        else:
            scale = scales((-(-rows // block), -(-columns // block)), generator)
            every = wide(scale, block, columns).repeat_interleave(block, 0)[:rows]
        every = every.to(torch.bfloat16).float() if rounded else every
        return {"weight": own, end: scale}, (own.float() * every).to(torch.bfloat16)

    return pack


def mxfp4(weight: Tensor, generator: torch.Generator) -> Packed:
    """The experts of gpt-oss: their numbers are transposed."""
    experts, columns, rows = weight.shape
    own = codes((experts, rows, columns), 4, generator)
    exponent = codes((experts, rows, columns // 32), 3, generator) + 118
    numbers = E2M1[own] * torch.exp2(exponent.float() - 127).repeat_interleave(32, -1)
    half = (own[..., 0::2] | (own[..., 1::2] << 4)).to(torch.uint8)
    blocks = half.unflatten(-1, (-1, 16))
    return {"_blocks": blocks, "_scales": exponent.to(torch.uint8)}, numbers.mT.to(torch.bfloat16).contiguous()


def compressed(bits: int, group: int, *, symmetric: bool = True, ordered: bool = False) -> Packer:
    """Integers in words, as compressed-tensors packs them."""

    def pack(weight: Tensor, generator: torch.Generator) -> Packed:
        rows, columns = weight.shape
        count, offset = columns // group, 2 ** (bits - 1)
        own, scale = codes(weight.shape, bits, generator), scales((rows, count), generator, torch.bfloat16)
        zero = torch.full((rows, count), offset) if symmetric else codes((rows, count), bits, generator)
        order = torch.arange(columns) // group
        order = order[torch.randperm(columns, generator=generator)] if ordered else order
        numbers = ((own - zero[:, order]).float() * scale.float()[:, order]).to(torch.bfloat16)
        parts = {
            "weight_packed": words(own, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(weight.shape),
        }
        parts |= {} if symmetric else {"weight_zero_point": words(zero.T, bits).T}
        return parts | ({"weight_g_idx": order.int()} if ordered else {}), numbers

    return pack


def compressed_int8(weight: Tensor, generator: torch.Generator) -> Packed:
    """One scale for each row, codes as bytes."""
    own = codes(tuple(weight.shape), 8, generator).to(torch.uint8).view(torch.int8)
    scale = scales((len(weight), 1), generator, torch.bfloat16)
    return {"weight": own, "weight_scale": scale}, (own.float() * scale.float()).to(torch.bfloat16)


def nvfp4(*, modelopt: bool) -> Packer:
    """FP4 in groups of 16 with a scale of 8 bits, and a scale of the whole weight, which multiplies or divides."""

    def pack(weight: Tensor, generator: torch.Generator) -> Packed:
        rows, columns = weight.shape
        own, scale = codes(weight.shape, 4, generator), scales((rows, columns // 16), generator)
        scale = (scale * 1000).to(torch.float8_e4m3fn)
        second = torch.tensor(3e-4) if modelopt else torch.tensor([3000.0])
        each = scale.float() * second if modelopt else scale.float() / second
        half = (own[:, 0::2] | (own[:, 1::2] << 4)).to(torch.uint8)
        numbers = (E2M1[own] * wide(each, 16, columns)).to(torch.bfloat16)
        names = ("weight", "weight_scale", "weight_scale_2" if modelopt else "weight_global_scale")
        names = names if modelopt else ("weight_packed", *names[1:])
        return dict(zip(names, (half, scale, second), strict=True)), numbers

    return pack


def gptq(bits: int, group: int, *, ordered: bool = False, second: bool = False) -> Packer:
    """Integers in words along the inputs. The first format stores each zero point less one."""

    def pack(weight: Tensor, generator: torch.Generator) -> Packed:
        rows, columns = weight.shape
        count = -(-columns // group)
        own, scale = codes((columns, rows), bits, generator), scales((count, rows), generator, torch.float16)
        zero = codes((count, rows), bits, generator, least=1)
        order = torch.arange(columns) // group
        order = order[torch.randperm(columns, generator=generator)] if ordered else order
        numbers = ((own - zero[order]).float() * scale.float()[order]).half().T.contiguous()
        stored = zero if second else zero - 1
        parts = {"qweight": words(own.T, bits).T, "qzeros": words(stored, bits), "scales": scale}
        return parts | {"g_idx": order.int()}, numbers

    return pack


def awq(group: int) -> Packer:
    """Four bits in words along the outputs, in AWQ's order."""

    def ordered(values: Tensor) -> Tensor:
        return words(values.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    def pack(weight: Tensor, generator: torch.Generator) -> Packed:
        rows, columns = weight.shape
        own, zero = codes((columns, rows), 4, generator), codes((columns // group, rows), 4, generator)
        scale = scales((columns // group, rows), generator, torch.float16)
        each = torch.arange(columns) // group
        numbers = ((own - zero[each]).float() * scale.float()[each]).half().T.contiguous()
        return {"qweight": ordered(own), "qzeros": ordered(zero), "scales": scale}, numbers

    return pack


def mlx(bits: int, group: int) -> Packer:
    """Integers in words, with a scale and an offset for each group."""

    def pack(weight: Tensor, generator: torch.Generator) -> Packed:
        rows, columns = weight.shape
        own, scale = codes(weight.shape, bits, generator), scales((rows, columns // group), generator, torch.bfloat16)
        offset = (-scale.float() * 2 ** (bits - 1)).to(torch.bfloat16)
        numbers = (wide(scale, group, columns) * own.to(torch.bfloat16)) + wide(offset, group, columns)
        return {"weight": words(own, bits).view(torch.uint32), "scales": scale, "biases": offset}, numbers

    return pack


def nf4(numbers: tuple[float, ...]) -> Packer:
    """Four bits of bitsandbytes, in blocks of 64 that run through the rows, with plain scales."""

    def pack(weight: Tensor, generator: torch.Generator) -> Packed:
        count = weight.numel()
        own, scale = codes((count,), 4, generator), scales((-(-count // 64),), generator) * 10
        table = torch.tensor(numbers)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        result = (table[own] * scale.repeat_interleave(64)[:count]).to(torch.bfloat16).reshape(weight.shape)
        return {
            "weight": ((own[0::2] << 4) | own[1::2]).to(torch.uint8)[:, None],
            "weight.absmax": scale,
            "weight.quant_map": table,
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }, result

    return pack


def int8(weight: Tensor, generator: torch.Generator) -> Packed:
    """Eight bits of bitsandbytes."""
    own = codes(tuple(weight.shape), 8, generator).to(torch.uint8).view(torch.int8)
    scale = scales((len(weight),), generator) * 100
    numbers = (own.float() * scale[:, None] * 7.874015718698502e-3).to(torch.bfloat16)
    return {"weight": own, "SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}, numbers


def _group(bits: int, kind: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": False, **more}
    return {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}


def _compressed(form: str, groups: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"], "config_groups": groups}


_NF4: Final = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635)
_NF4_REST: Final = (-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725)
_NF4_LAST: Final = (0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941)
NF4: Final = (*_NF4, *_NF4_REST, *_NF4_LAST, 0.7229568362236023, 1.0)
_GPTQ: Final = {"quant_method": "gptq", "desc_act": False, "sym": False}
FORMS: Final[dict[str, Form]] = {
    "fp8": Form(
        pack=fp8(64),
        fields={"quant_method": "fp8", "weight_block_size": [64, 64], "activation_scheme": "dynamic", "fmt": "e4m3"},
    ),
    "fp8-tensor": Form(
        pack=fp8(None),
        fields={"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
    ),
    "fbgemm_fp8": Form(pack=fp8(None, end="weight_scale"), fields={"quant_method": "fbgemm_fp8"}),
    "mxfp4": Form(pack=mxfp4, fields={"quant_method": "mxfp4"}, chosen=r".*experts\.(gate_up|down)_proj", weight=""),
    "compressed-int4": Form(
        pack=compressed(4, 32), fields=_compressed("pack-quantized", _group(4, "int", strategy="group", group_size=32))
    ),
    "compressed-int4-zeros": Form(
        pack=compressed(4, 32, symmetric=False),
        fields=_compressed("pack-quantized", _group(4, "int", strategy="group", group_size=32, symmetric=False)),
    ),
    "compressed-int4-ordered": Form(
        pack=compressed(4, 32, ordered=True),
        fields=_compressed("pack-quantized", _group(4, "int", strategy="group", group_size=32, actorder="group")),
    ),
    "compressed-int8": Form(
        pack=compressed_int8, fields=_compressed("int-quantized", _group(8, "int", strategy="channel"))
    ),
    "compressed-nvfp4": Form(
        pack=nvfp4(modelopt=False),
        fields=_compressed("nvfp4-pack-quantized", _group(4, "float", strategy="tensor_group", group_size=16)),
    ),
    "modelopt-fp8": Form(
        pack=fp8(None, end="weight_scale", rounded=True), fields={"quant_method": "modelopt", "quant_algo": "FP8"}
    ),
    "modelopt-nvfp4": Form(pack=nvfp4(modelopt=True), fields={"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "gptq": Form(pack=gptq(4, 32), fields={**_GPTQ, "bits": 4, "group_size": 32}),
    "gptq-3": Form(pack=gptq(3, 64), fields={**_GPTQ, "bits": 3, "group_size": 64}),
    "gptq_v2-ordered": Form(
        pack=gptq(4, 64, ordered=True, second=True),
        fields={**_GPTQ, "bits": 4, "group_size": 64, "desc_act": True, "checkpoint_format": "gptq_v2"},
    ),
    "awq": Form(
        pack=awq(32),
        fields={"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    ),
    "mlx": Form(
        pack=mlx(4, 32),
        fields={"bits": 4, "group_size": 32},
        field="quantization",
        chosen=r".*(proj|embed_tokens|lm_head)\.weight",
    ),
    "mlx-3": Form(pack=mlx(3, 32), fields={"bits": 3, "group_size": 32, "mode": "affine"}, field="quantization"),
    "bitsandbytes-nf4": Form(
        pack=nf4(NF4),
        fields={"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "bitsandbytes-int8": Form(pack=int8, fields={"quant_method": "bitsandbytes", "load_in_8bit": True}),
}
"""Each format in its usual form, and the turns that change its layout."""
