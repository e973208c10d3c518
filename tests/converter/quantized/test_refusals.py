"""Quantized checkpoints that can't be read in one way are refused, with the method, the tensor or the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from splitbundle.errors import BundleError
from splitbundle_converter.quantized.packed_weights import is_named, patterns_of
from tests.converter.quantized.test_formulas import quantization
from tests.converter.quantized.test_quantized_checkpoints import checkpoint
from tests.support.checkpoints import accepted, change_config, refused
from tests.support.quantized_models import FORMS, WEIGHTS

Q = "model.layers.1.self_attn.q_proj"
E = "model.layers.0.mlp.experts.down_proj"
Tensors = dict[str, Tensor]


def changed(path: Path, form: str, change: Callable[[Tensors], Any] | None = None, **fields: Any) -> Path:
    """Save a quantized checkpoint, and change its tensors and the fields of its method."""
    checkpoint(path, form)
    if change is not None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS)
    change_config(path, **{FORMS[form].field: {**FORMS[form].fields, **fields}})
    return path


def extra(name: str, tensor: Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: tensor})


def without(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def with_tensor(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


@pytest.mark.parametrize(
    ("form", "change", "fields", "code", "words"),
    [
        ("fp8", None, {"quant_method": "quark"}, "source.quantised", "got 'quark'"),
        ("fp8", None, {"weight_block_size": [64]}, "source.quantised", "/weight_block_size: expected null, or two"),
        ("fp8", None, {"weight_block_size": [128, 128]}, "source.tensor", "shape [1, 2], for blocks of 128 x 128"),
        ("fp8", without(f"{Q}.weight_scale_inv"), {}, "source.tensor", f"'{Q}.weight_scale_inv' for the quantized"),
        (
            "mxfp4",
            with_tensor("model.layers.0.mlp.experts.down_proj_scales", lambda t: t[:-1]),
            {},
            "source.tensor",
            "down_proj_scales: expected shape",
        ),
        ("compressed-int4", None, {"format": "marlin-24"}, "source.quantised", "'marlin-24'"),
        ("compressed-int4", None, {"config_groups": {}}, "source.quantised", "/config_groups"),
        ("compressed-int4", None, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "source.quantised", "dense"),
        ("compressed-int4", None, {"ignore": [f"re:.*{Q}"]}, "source.tensor", "as ignore names the module"),
        ("compressed-int4", with_tensor(f"{Q}.weight_shape", lambda t: t + 1), {}, "source.tensor", "weight_packed"),
        ("compressed-int4-ordered", with_tensor(f"{Q}.weight_g_idx", lambda t: t + 1), {}, "source.tensor", "groups"),
        ("compressed-int4-zeros", without(f"{Q}.weight_zero_point"), {}, "source.tensor", "weight_zero_point"),
        ("gptq", None, {"checkpoint_format": "marlin"}, "source.quantised", "gptq or gptq_v2"),
        ("gptq", None, {"bits": 8}, "source.tensor", "for 8 bits of 160 inputs"),
        ("gptq", with_tensor(f"{Q}.g_idx", lambda t: t + 7), {}, "source.tensor", "numbers of groups from 0 to 2"),
        ("gptq", with_tensor(f"{Q}.qzeros", lambda t: t * 0 - 1), {}, "source.tensor", "which every reader"),
        ("awq", None, {"version": "gemv"}, "source.quantised", "expected gemm, got 'gemv'"),
        ("awq", None, {"bits": 3}, "source.quantised", "expected 4, got 3"),
        ("awq", None, {"group_size": 128}, "source.tensor", "128 of a group divide"),
        ("mlx", None, {"mode": "mxfp4"}, "source.quantised", "expected affine, got 'mxfp4'"),
        ("mlx", None, {"bits": 7}, "source.quantised", "2, 3, 4, 5, 6 or 8"),
        ("mlx", without(f"{Q}.biases"), {}, "source.tensor", f"{Q}.biases"),
        ("bitsandbytes-nf4", without(f"{Q}.weight.quant_map"), {}, "source.tensor", "quant_map"),
        (
            "bitsandbytes-nf4",
            with_tensor(f"{Q}.weight.quant_map", lambda t: t / 2),
            {},
            "source.tensor",
            "numbers of nf4",
        ),
        ("bitsandbytes-nf4", with_tensor(f"{Q}.weight.absmax", lambda t: t[1:]), {}, "source.tensor", "absmax"),
        ("bitsandbytes-int8", with_tensor(f"{Q}.weight_format", lambda t: t + 1), {}, "source.tensor", "0, for rows"),
        ("modelopt-nvfp4", None, {"quant_algo": "NVFP4_AWQ"}, "source.quantised", "'NVFP4_AWQ'"),
        ("modelopt-nvfp4", without(f"{Q}.weight_scale_2"), {}, "source.tensor", "weight_scale_2"),
        ("fp8", with_tensor(f"{Q}.weight", lambda t: t.float().to(torch.float8_e5m2)), {}, "source.tensor", "F8_E5M2"),
        ("fp8", with_tensor(f"{Q}.weight", lambda t: t[:0]), {}, "source.tensor", "sizes from 1, got shape [0, 96]"),
        ("fp8", with_tensor(f"{Q}.weight", lambda t: t[0]), {}, "source.tensor", "2 or 3 dimensions"),
        ("mxfp4", with_tensor(f"{E}_blocks", lambda t: t[0]), {}, "source.tensor", "4 dimensions"),
        (
            "compressed-int4",
            None,
            {"transform_config": {"config_groups": {"R1": {}}}},
            "source.quantised",
            "/transform_",
        ),
        ("compressed-int4", None, {"ignore": ["re:((("]}, "source.quantised", "/ignore: expected regular expressions"),
        ("compressed-int4", None, {"ignore": ["re:^(([a-z._])+)+!$"]}, "source.quantised", "at most three repetitions"),
        ("compressed-int4", None, {"ignore": ["re:.*.*.*.*x"]}, "source.quantised", "at most three repetitions"),
        ("compressed-int4", None, {"ignore": 7}, "source.quantised", "/ignore: expected a list of names"),
        ("compressed-int4", with_tensor(f"{Q}.weight_shape", lambda t: t * 0), {}, "source.tensor", "sizes from 1"),
        (
            "compressed-int8",
            extra(f"{Q}.weight_zero_point", torch.ones(96, 1).to(torch.int8)),
            {},
            "source.tensor",
            "0,",
        ),
        ("compressed-nvfp4", with_tensor(f"{Q}.weight_packed", lambda t: t[0]), {}, "source.tensor", "2 dimensions"),
        ("gptq", with_tensor(f"{Q}.qweight", lambda t: t[0]), {}, "source.tensor", "2 dimensions"),
        ("gptq", with_tensor(f"{Q}.scales", lambda t: t[0]), {}, "source.tensor", "2 dimensions"),
        ("gptq", with_tensor(f"{Q}.g_idx", lambda t: t[None]), {}, "source.tensor", "1 dimensions"),
        ("gptq", extra(f"{Q}.bias", torch.ones(96)), {}, "source.tensor", "an extra tensor F32 [96]"),
        ("awq", with_tensor(f"{Q}.qweight", lambda t: t[0]), {}, "source.tensor", "2 dimensions"),
        ("mlx", None, {Q: {"bits": 4.0, "group_size": 32}}, "source.quantised", "whole numbers for bits"),
        ("mlx", with_tensor(f"{Q}.weight", lambda t: t[0, 0]), {}, "source.tensor", "2 or 3 dimensions"),
        ("modelopt-nvfp4", with_tensor(f"{Q}.weight", lambda t: t[0]), {}, "source.tensor", "2 dimensions"),
        ("modelopt-nvfp4", extra(f"{Q}.pre_quant_scale", torch.ones(96)), {}, "source.tensor", "no scales of inputs"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, output: Path, form: str, change: Any, fields: dict[str, Any], code: str, words: str
) -> None:
    error = refused(changed(tmp_path / "source", form, change, **fields), output)
    assert error.codes[0] == code
    assert words in str(error)


@pytest.mark.parametrize(
    "raw", ["[]", "{", '{"quant_type": "nf4"}', '{"shape": [1, 2], "quant_type": "nf4", "x": 1e999}']
)
def test_a_hostile_state_of_bitsandbytes(tmp_path: Path, output: Path, raw: str) -> None:
    data = torch.tensor(list(raw.encode()), dtype=torch.uint8)
    name = f"{Q}.weight.quant_state.bitsandbytes__nf4"
    path = changed(tmp_path / "source", "bitsandbytes-nf4", with_tensor(name, lambda _: data))
    assert isinstance(refused(path, output), BundleError)


def test_weights_in_two_formats(tmp_path: Path, output: Path) -> None:
    path = changed(tmp_path / "source", "gptq", lambda tensors: tensors.update({f"{Q}.scale_inv": torch.ones(1)}))
    assert "extra tensor" in str(refused(path, output))
    path = changed(
        tmp_path / "other", "gptq", lambda tensors: tensors.update({f"{Q}.weight_packed": torch.ones(1, 1).int()})
    )
    error = refused(path, output)
    assert error.codes[0] == "source.quantised"
    assert "weights quantized as gptq, or plain ones" in str(error)


def test_a_plain_weight_beside_its_codes(tmp_path: Path, output: Path) -> None:
    path = changed(tmp_path / "source", "gptq", lambda tensors: tensors.update({f"{Q}.weight": torch.ones(96, 96)}))
    assert f"/{Q}.weight: expected a plain weight, or a quantized one" in str(refused(path, output))


def test_two_descriptions_that_differ(tmp_path: Path, output: Path) -> None:
    path = changed(tmp_path / "source", "gptq")
    change_config(path, compression_config={"quant_method": "compressed-tensors"})
    assert "one description of the quantized weights" in str(refused(path, output))


def test_mlx_writes_its_description_twice(tmp_path: Path, output: Path) -> None:
    path = changed(tmp_path / "source", "mlx")
    change_config(path, quantization_config=FORMS["mlx"].fields)
    accepted(path, output)


def test_a_module_of_mlx_has_bits_of_its_own(tmp_path: Path, output: Path) -> None:
    path = changed(tmp_path / "source", "mlx", bits=8, **{Q: {"group_size": 32, "bits": 4}})
    assert "shape [300, 1]" in str(refused(path, output))  # all others have 4 bits too
    fields = json.loads((path / "config.json").read_text())["quantization"]
    for name in load_file(path / WEIGHTS):
        if name.endswith(".scales"):
            fields[name.removesuffix(".scales")] = {"group_size": 32, "bits": 4}
    change_config(path, quantization=fields)
    accepted(path, output)


def test_the_file_of_modelopt_is_enough(tmp_path: Path, output: Path) -> None:
    path = changed(tmp_path / "source", "modelopt-fp8")
    raw = json.loads((path / "config.json").read_text())
    del raw["quantization_config"]
    (path / "config.json").write_text(json.dumps(raw))
    (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": null}}')
    assert accepted(path, output).manifest.extensions["quantization"]["method"] == "modelopt"


def test_scales_of_inputs_are_left_out(tmp_path: Path, output: Path) -> None:
    extra = {f"{Q}.input_scale": torch.ones(1), f"{Q.replace('q_proj', 'k_proj')}.k_scale": torch.ones(1)}
    path = changed(tmp_path / "source", "fp8-tensor", lambda tensors: tensors.update(extra))
    notes: list[str] = []
    accepted(path, output, notes=notes.append)
    assert "The source also rounds the inputs of its products while it runs." in " ".join(notes)


def test_a_note_says_what_compressed_tensors_rounds(tmp_path: Path, output: Path) -> None:
    group = FORMS["compressed-int8"].fields["config_groups"]["group_0"]
    groups = {"group_0": {**group, "input_activations": {"num_bits": 8, "dynamic": True}}}
    path = changed(tmp_path / "source", "compressed-int8", config_groups=groups, kv_cache_scheme={"num_bits": 8})
    notes: list[str] = []
    accepted(path, output, notes=notes.append)
    assert "also rounds the inputs of its products and keys and values while it runs" in " ".join(notes)


def test_scales_under_their_older_name(tmp_path: Path, output: Path) -> None:
    """transformers knows only ``weight_scale_inv``, and leaves other codes as they are."""

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name.removesuffix("_inv")] = tensors.pop(name)

    path = changed(tmp_path / "source", "fp8-tensor", rename)
    notes: list[str] = []
    accepted(path, output, notes=notes.append)
    assert any("splitbundle's reader" in note for note in notes)


@pytest.mark.parametrize(
    ("form", "name", "tensor"),
    [
        ("gptq", f"{Q}.bias", torch.zeros(96)),
        ("compressed-int8", f"{Q}.weight_zero_point", torch.zeros(96, 1).to(torch.int8)),
    ],
)
def test_zeros_that_change_nothing(tmp_path: Path, output: Path, form: str, name: str, tensor: Tensor) -> None:
    accepted(changed(tmp_path / "source", form, extra(name, tensor)), output)


def test_published_expressions_are_quick() -> None:
    patterns = ["re:.*lm_head", "re:.*mlp.gate$", "re:visual.*", r"re:.*experts\.[0-9]+\.(gate|up|down)_proj.*"]
    about = quantization("compressed-tensors", {}, {}, "BF16")
    assert is_named("model.layers.0.mlp.experts.12.up_proj", patterns_of(about, "ignore", patterns))
    assert not is_named("model.layers.0.mlp.gate_proj", patterns_of(about, "ignore", patterns))
