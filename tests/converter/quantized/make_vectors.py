"""Make ``vectors.safetensors``: weights that the libraries of the formats quantized, and what they read back.

The libraries are no part of the test environment: some need a compiler or a GPU to install. So their answers are kept,
with their versions. This program needs, on ``PYTHONPATH`` (``pip install --no-deps --target``): compressed-tensors,
bitsandbytes, mlx, mlx-cpu and what they import; and unpacked in one directory: gptqmodel-*/, autoawq-*/ (source
distributions), modelopt-*/ (the wheel of nvidia-modelopt). Of the last three, single functions are run, as they stand.

Usage: ``python -m tests.converter.quantized.make_vectors DIRECTORY``.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor

VECTORS = Path(__file__).with_name("vectors.safetensors")
Case = tuple[dict[str, Any], dict[str, Tensor]]


def functions(path: Path, *names: str, within: str | None = None, **given: Any) -> dict[str, Any]:
    """Return functions and constants of a module by name, without what the module imports."""
    tree = ast.parse(path.read_text())
    body: Sequence[ast.stmt] = tree.body
    kept: list[ast.stmt] = []
    if within is not None:
        kept += [node for node in body if isinstance(node, ast.FunctionDef) and node.name in names]
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == within).body
    for node in body:
        targets = [node.name] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.Assign):
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if set(targets) & set(names):
            kept.append(node)
    for node in kept:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = []
    module = ModuleType(path.stem)
    vars(module).update(given, torch=torch, t=torch, Optional=Any)
    tree = ast.Module([*ast.parse("from __future__ import annotations").body, *kept], [])
    exec(compile(tree, str(path), "exec"), vars(module))
    return vars(module)


def found(directory: Path, pattern: str, file: str) -> tuple[Path, str]:
    """Return the path of a library's file, and the library with its version."""
    (root,) = directory.glob(pattern)
    (path,) = root.rglob(file)
    return path, root.name.replace("-", " ").replace("modelopt", "nvidia-modelopt")


def weights(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * 0.1).to(dtype)


def compressed(name: str, rows: int, columns: int, dtype: torch.dtype, **named: Any) -> Case:
    """Compress a weight with compressed-tensors, and decompress it."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(**named)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    weight = weights(rows, columns, rows, dtype)
    weight[0, : columns // 2] *= 7  # scales that differ, and zero points that aren't 0
    weight += 0.03
    state: dict[str, Tensor] = {"weight": weight}
    if args.strategy == "block":
        height, width = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
        parts = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width))
        least, most = parts.amin((1, 3)), parts.amax((1, 3))
    elif args.strategy == "tensor":
        least, most = weight.min().reshape(1), weight.max().reshape(1)
    else:
        size = args.group_size if args.group_size and args.group_size > 0 else columns
        parts = weight.unflatten(1, (-1, size))
        least, most = parts.amin(2), parts.amax(2)
    more = {}
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = more["global_scale"] = generate_gparam(weight.min(), weight.max()).reshape(1)
    scale, zero = calculate_qparams(least, most, args, **more)
    state |= {"weight_scale": scale if args.strategy == "tensor_group" else scale.to(dtype)}
    if not args.symmetric:
        state["weight_zero_point"] = zero.to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(name)
    stored = compressor.compress(state, scheme)
    result = compressor.decompress(dict(stored), scheme)["weight"]
    assert not torch.equal(result, weight)
    about = {"library": f"compressed-tensors {version('compressed-tensors')}", "format": name, "weights": named}
    return about, stored | {"result": result}


def bitsandbytes_four_bit(kind: str, rows: int, columns: int, dtype: torch.dtype, nested: bool, block: int) -> Case:
    # The portable code of the library. Its code for one kind of processor (version 0.50.2) begins a block at each row,
    # although the library quantizes blocks that run through the rows.
    from bitsandbytes import functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
    from bitsandbytes.backends.utils import _get_4bit_code

    codes, state = functional.quantize_4bit(
        weights(rows, columns, rows, dtype), blocksize=block, compress_statistics=nested, quant_type=kind
    )
    parts = {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    code = _get_4bit_code(kind, "cpu")
    result = _dequantize_4bit_compute(codes.reshape(-1), absmax, code, block, (rows, columns), dtype)
    if columns % block == 0:
        assert torch.equal(result, functional.dequantize_4bit(codes, state))
    return {"library": f"bitsandbytes {version('bitsandbytes')}"}, {"weight": codes, **parts, "result": result}


def bitsandbytes_eight_bit(rows: int, columns: int) -> Case:
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(weights(rows, columns, rows, torch.float16))
    result = functional.int8_vectorwise_dequant(codes, scales)
    return {"library": f"bitsandbytes {version('bitsandbytes')}"}, {"weight": codes, "SCB": scales, "result": result}


def mlx_affine(bits: int, group: int, rows: int, columns: int, dtype: str) -> Case:
    import mlx.core as mx

    def tensor(array: Any) -> Tensor:
        if array.dtype == mx.bfloat16:
            return torch.from_numpy(numpy.array(array.view(mx.uint16))).view(torch.bfloat16)
        return torch.from_numpy(numpy.array(array))

    plain = mx.array(weights(rows, columns, rows).numpy()).astype(getattr(mx, dtype))
    codes, scales, offsets = mx.quantize(plain, group_size=group, bits=bits)
    result = mx.dequantize(codes, scales, offsets, group_size=group, bits=bits)
    stored = {"weight": tensor(codes), "scales": tensor(scales), "biases": tensor(offsets), "result": tensor(result)}
    return {"library": f"mlx {version('mlx')}", "bits": bits, "group_size": group}, stored


def gptq(path: Path, library: str, bits: int, group: int, rows: int, columns: int, act_order: bool, form: str) -> Case:
    """Pack codes and zero points with gptqmodel's ``pack_original``, and read them with its ``dequantize_weight``."""
    names = ("_torch_shift_factor", "_torch_right_shift", "_torch_left_shift", "dequantize_weight")
    names = (*names, "_dequantize_from_codes", "pack_original", "_init_wf_unsqueeze_buffers", "_wf_device")
    library_code = functions(
        path,
        *names,
        within="PackableQuantLinear",
        np=numpy,
        nn=torch.nn,
        math=__import__("math"),
        _ConvNd=torch.nn.Conv2d,
        transformers=__import__("transformers.pytorch_utils"),
        THREADPOOLCTL=SimpleNamespace(threadpool_limits=lambda count: torch.no_grad()),
        DEVICE=None,
    )

    class Layer(torch.nn.Module):
        planar = False
        enable_wf_unsqueeze = True
        pack_dtype_bits, pack_dtype, pack_np_dtype, pack_np_math_dtype = 32, torch.int32, numpy.int32, numpy.uint32

    for name in names[3:]:
        setattr(Layer, name, library_code[name])
    layer: Any = Layer()
    layer.bits, layer.maxq, layer.pack_factor = bits, 2**bits - 1, 32 // bits
    layer.in_features, layer.out_features = columns, rows
    layer.dequant_dtype = torch.int16 if bits == 8 else torch.int8
    index = torch.arange(columns, dtype=torch.int32) // group
    if act_order:
        index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(1))]
    count = -(-columns // group)
    generator = torch.Generator().manual_seed(bits)
    scales = torch.rand(rows, count, generator=generator) * 0.02 + 0.001
    zeros = torch.randint(1 if form == "gptq" else 0, 2**bits, (rows, count), generator=generator).float()
    linear = torch.nn.Linear(columns, rows, bias=False)
    linear.weight.data = weights(rows, columns, rows)
    layer.pack_original(linear, scales, zeros, index)
    layer._init_wf_unsqueeze_buffers()
    result = layer.dequantize_weight().T.contiguous()
    stored = {name: getattr(layer, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    if form == "gptq":  # as the library's _shift_gptq_qzeros: each zero point is stored less one
        less = zeros.T.contiguous() - 1
        layer.pack_original(linear, scales, less.T.contiguous(), index)
        stored["qzeros"] = layer.qzeros
    return {"library": library, "bits": bits, "group_size": group, "checkpoint_format": form}, stored | {
        "result": result
    }


def awq(path: Path, library: str, group: int, rows: int, columns: int) -> Case:
    """Random codes, which autoawq's ``dequantize_gemm`` reads."""
    names = ("AWQ_REVERSE_ORDER", "unpack_awq", "reverse_awq_order", "dequantize_gemm")
    code = functions(path, *names)
    generator = torch.Generator().manual_seed(rows)

    def words(count: int) -> Tensor:
        return torch.randint(-(2**31), 2**31, (count, rows // 8), generator=generator).to(torch.int32)

    stored = {"qweight": words(columns), "qzeros": words(columns // group)}
    stored["scales"] = (torch.rand(columns // group, rows, generator=generator) * 0.02).half()
    result = code["dequantize_gemm"](stored["qweight"], stored["qzeros"], stored["scales"], 4, group)
    return {"library": library, "bits": 4, "group_size": group}, stored | {"result": result.T.contiguous()}


def modelopt_fp8(path: Path, library: str, rows: int, columns: int, block: int | None) -> Case:
    names = ("dequantize",)
    pad = lambda tensor, sizes: torch.nn.functional.pad(  # noqa: E731
        tensor.float(), (0, -tensor.shape[1] % sizes[-1], 0, -tensor.shape[0] % sizes[-2])
    ).to(tensor.dtype)
    code = functions(path, *names, within="FP8QTensor", reduce_block_padding=pad)
    weight = weights(rows, columns, rows, torch.bfloat16)
    if block is None:
        scale = weight.abs().max().float() / 448
        codes = (weight.float() / scale).to(torch.float8_e4m3fn)
        more = {}
    else:
        whole = torch.nn.functional.pad(weight, (0, -columns % block, 0, -rows % block)).float()
        scale = whole.unflatten(0, (-1, block)).unflatten(2, (-1, block)).abs().amax((1, 3)) / 448
        every = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :columns]
        codes = (weight.float() / every).to(torch.float8_e4m3fn)
        more = {"block_sizes": {-1: block, -2: block}}
    self = SimpleNamespace(metadata={"shape": weight.shape, "dtype": torch.bfloat16}, _quantized_data=codes)
    result = code["dequantize"](self, torch.bfloat16, scale=scale, **more)
    return {"library": library}, {"weight": codes, "weight_scale": scale, "result": result}


def modelopt_nvfp4(path: Path, library: str, rows: int, columns: int) -> Case:
    code = functions(path, "dequantize", "get_e2m1_values", "e2m1_values", within="NVFP4QTensor")
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 256, (rows, columns // 2), generator=generator).to(torch.uint8)
    scale = (torch.rand(rows, columns // 16, generator=generator) * 400).to(torch.float8_e4m3fn)
    whole = torch.rand((), generator=generator) * 1e-4
    table = functions(path, "e2m1_values")["e2m1_values"]
    self = SimpleNamespace(
        metadata={"shape": torch.Size((rows, columns))}, _quantized_data=codes, get_e2m1_values=lambda device: table
    )
    result = code["dequantize"](self, torch.bfloat16, scale=scale, double_scale=whole, block_sizes={-1: 16})
    return {"library": library}, {"weight": codes, "weight_scale": scale, "weight_scale_2": whole, "result": result}


def cases(directory: Path) -> dict[str, Case]:
    half, brain = torch.float16, torch.bfloat16
    gptq_path = found(directory, "gptqmodel-*/", "nn_modules/qlinear/__init__.py")
    awq_path = found(directory, "autoawq-*/", "packing_utils.py")
    fp8_path, nvfp4_path = (found(directory, "modelopt-*/", f"{name}_tensor.py") for name in ("fp8", "nvfp4"))
    packed, fp8, group = "pack-quantized", "float-quantized", {"strategy": "group", "group_size": 32}
    made = {
        "compressed-int4": compressed(packed, 5, 96, brain, num_bits=4, type="int", **group),
        "compressed-int4-zeros": compressed(packed, 11, 64, half, num_bits=4, type="int", symmetric=False, **group),
        "compressed-int4-rows": compressed(packed, 7, 37, brain, num_bits=4, type="int", strategy="channel"),
        "compressed-int3-zeros": compressed(packed, 9, 96, brain, num_bits=3, type="int", symmetric=False, **group),
        "compressed-int8": compressed(packed, 6, 50, brain, num_bits=8, type="int", strategy="channel"),
        "compressed-int8-plain": compressed("int-quantized", 5, 33, brain, num_bits=8, type="int", strategy="channel"),
        "compressed-int8-plain-zeros": compressed(
            "int-quantized", 5, 33, half, num_bits=8, type="int", strategy="channel", symmetric=False
        ),
        "compressed-fp8-rows": compressed(fp8, 5, 33, brain, num_bits=8, type="float", strategy="channel"),
        "compressed-fp8-tensor": compressed(fp8, 5, 33, half, num_bits=8, type="float", strategy="tensor"),
        "compressed-fp8-blocks": compressed(
            "naive-quantized", 21, 35, brain, num_bits=8, type="float", strategy="block", block_structure=[16, 16]
        ),
        "compressed-nvfp4": compressed(
            "nvfp4-pack-quantized", 5, 48, brain, num_bits=4, type="float", strategy="tensor_group", group_size=16
        ),
        "compressed-mxfp4": compressed(
            "mxfp4-pack-quantized", 5, 64, brain, num_bits=4, type="float", strategy="group", group_size=32
        ),
        "bitsandbytes-nf4": bitsandbytes_four_bit("nf4", 5, 51, brain, False, 64),
        "bitsandbytes-nf4-nested": bitsandbytes_four_bit("nf4", 300, 64, brain, True, 64),
        "bitsandbytes-fp4": bitsandbytes_four_bit("fp4", 9, 128, torch.float32, False, 128),
        "bitsandbytes-fp4-nested": bitsandbytes_four_bit("fp4", 9, 64, half, True, 128),
        "bitsandbytes-int8": bitsandbytes_eight_bit(5, 51),
        "awq": awq(*awq_path, 32, 24, 96),
        "modelopt-fp8": modelopt_fp8(*fp8_path, 5, 33, None),
        "modelopt-fp8-blocks": modelopt_fp8(*fp8_path, 21, 35, 16),
        "modelopt-nvfp4": modelopt_nvfp4(*nvfp4_path, 5, 48),
    }
    for bits in (2, 3, 4, 8):
        made[f"gptq-{bits}"] = gptq(*gptq_path, bits, 32, 32, 96, False, "gptq")
    made["gptq-order"] = gptq(*gptq_path, 4, 32, 40, 80, True, "gptq_v2")  # 80 = 2.5 groups
    for bits in (2, 3, 4, 5, 6, 8):
        made[f"mlx-{bits}"] = mlx_affine(bits, 32, 7, 96, "float16" if bits % 2 else "bfloat16")
    return made


def main() -> None:
    tensors, about = {}, {}
    for name, (facts, parts) in cases(Path(sys.argv[1])).items():
        about[name] = json.dumps(facts)
        tensors |= {f"{name}/{part}": tensor.detach().clone().contiguous() for part, tensor in parts.items()}
    save_file(tensors, VECTORS, about)


if __name__ == "__main__":
    main()
