"""The formulas give the numbers that the formats' own libraries compute, equal to the bit.

``vectors.safetensors`` has what the libraries quantized and read back; ``make_vectors.py`` made it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from splitbundle_converter.checkpoint.weight_files import SourceTensor
from splitbundle_converter.quantized.methods import METHODS
from splitbundle_converter.quantized.packed_weights import Quantization

VECTORS: Final = Path(__file__).with_name("vectors.safetensors")
NAMES: Final = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
INTEGERS: Final = {torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8", torch.int8: "I8", torch.uint32: "U32"}


@contextmanager
def vectors() -> Iterator[tuple[dict[str, Any], dict[str, dict[str, Tensor]]]]:
    with safe_open(VECTORS, "pt") as opened:
        about = {name: json.loads(text) for name, text in opened.metadata().items()}
        parts: dict[str, dict[str, Tensor]] = {}
        for name in opened.keys():  # noqa: SIM118  # it has keys() but is not iterable
            case, _, part = name.partition("/")
            parts.setdefault(case, {})[part] = opened.get_tensor(name)
        yield about, parts


with vectors() as read:
    ABOUT, PARTS = read


def quantization(method: str, fields: dict[str, Any], parts: dict[str, Tensor], target: str) -> Quantization:
    """Return what a checkpoint with these parts of one weight ``x.weight`` says."""
    tensors = {
        name: SourceTensor(
            file="f", stored=name, path=Path("f"), dtype=(NAMES | INTEGERS)[part.dtype], shape=tuple(part.shape)
        )
        for name, part in parts.items()
    }
    return Quantization(
        method=method,
        fields=fields,
        file="config.json",
        pointer="/quantization_config",
        tensors=tensors,
        get=parts.__getitem__,
        target=target,
    )


def plain(method: str, fields: dict[str, Any], parts: dict[str, Tensor], target: str = "BF16") -> Tensor:
    """Return the only weight, as the reader of the method computes it."""
    found = METHODS[method].read(quantization(method, fields, parts, target))
    (weight,) = found.values()
    result = torch.cat(list(weight.pieces(parts.__getitem__)))
    assert (tuple(result.shape), NAMES[result.dtype]) == (weight.shape, weight.dtype)
    assert set(weight.parts) == set(parts)
    return result


def fields_of(case: str) -> tuple[str, dict[str, Any]]:
    """Return the method of a case, and the fields of a configuration."""
    about, kind = ABOUT[case], case.split("-")[0]
    if kind == "compressed":
        group = {"targets": ["Linear"], "weights": about["weights"]}
        return "compressed-tensors", {"format": about["format"], "config_groups": {"group_0": group}}
    if kind == "modelopt":
        algorithms = {"modelopt-fp8": "FP8", "modelopt-nvfp4": "NVFP4"}
        return "modelopt", {"quant_algo": algorithms.get(case, "FP8_PB_WO")}
    return kind, about


@pytest.mark.parametrize("case", [case for case in PARTS if case != "modelopt-fp8-blocks"])
def test_a_weight_of_a_library(case: str) -> None:
    method, fields = fields_of(case)
    parts = {f"x.{name}": part for name, part in PARTS[case].items() if name != "result"}
    expected = PARTS[case]["result"]
    assert torch.equal(plain(method, fields, parts, NAMES[expected.dtype]), expected)


def test_blocks_of_modelopt(monkeypatch: pytest.MonkeyPatch) -> None:
    # ModelOpt's blocks are 128 wide; those of the vectors are 16 wide, so that they stay small.
    monkeypatch.setattr("splitbundle_converter.quantized.floats._MODELOPT", {"FP8_PB_WO": (16, 16)})
    parts = {f"x.{name}": part for name, part in PARTS["modelopt-fp8-blocks"].items() if name != "result"}
    assert torch.equal(plain("modelopt", {"quant_algo": "FP8_PB_WO"}, parts), PARTS["modelopt-fp8-blocks"]["result"])


def test_every_library_is_named_with_its_version() -> None:
    for case, about in ABOUT.items():
        method, _ = fields_of(case)
        assert METHODS[method].compared == about["library"]
    assert [name for name, method in METHODS.items() if method.compared is None] == ["fbgemm_fp8"]


SCALES: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "float32": lambda scales: scales,
    "bfloat16": lambda scales: scales.to(torch.bfloat16),
    "exponents": lambda scales: (scales * 255).to(torch.uint8) // 4 + 90,
}


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (192, 130), (64, 64)])
@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
def test_blocks_of_fp8_are_those_of_transformers(kind: str, rows: int, columns: int, target: str) -> None:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scales = SCALES[kind](torch.rand(-(-rows // 128), -(-columns // 128), generator=generator))
    dtype = {name: dtype for dtype, name in NAMES.items()}[target]
    # transformers takes the number of rows by the number of scales for the size of a block: the last one is filled up.
    whole = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128).to(torch.float8_e4m3fn)
    whole[:rows, :columns] = codes
    expected = Fp8Dequantize(None)._dequantize_one(whole, scales, dtype)[:rows, :columns]
    parts = {"x.weight": codes, "x.weight_scale_inv": scales}
    assert torch.equal(plain("fp8", {"weight_block_size": [128, 128]}, parts, target), expected)


def test_stacked_experts_of_fp8() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(3, 40, 24, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 3, 2, generator=generator)
    got = plain("fp8", {"weight_block_size": [16, 16]}, {"e.up_proj": codes, "e.up_proj_scale_inv": scales})
    for own, scale, result in zip(codes, scales, got, strict=True):
        parts = {"x.weight": own, "x.weight_scale_inv": scale}
        assert torch.equal(plain("fp8", {"weight_block_size": [16, 16]}, parts), result)


@pytest.mark.parametrize("target", ["BF16", "F32"])
def test_experts_of_mxfp4_are_those_of_transformers(target: str) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 7, 2, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(60, 180, (3, 7, 2), generator=generator).to(torch.uint8)
    dtype = {name: dtype for dtype, name in NAMES.items()}[target]
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    parts = {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales}
    assert torch.equal(plain("mxfp4", {}, parts, target), expected)
