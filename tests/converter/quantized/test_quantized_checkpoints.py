"""Checkpoints with quantized weights convert with the check, run in both backends, and export as plain ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import splitbundle
import splitbundle_converter
import splitbundle_schemas
from splitbundle_converter.quantized import formulas
from splitbundle_converter.quantized.methods import METHODS
from tests.support.checkpoints import accepted
from tests.support.quantized_models import FORMS, WEIGHTS, quantize

SIZES: Final[dict[str, Any]] = {
    "hidden_size": 96,
    "intermediate_size": 160,  # 2.5 blocks of 64
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
EXPERTS: Final = {"moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}
FAMILY: Final = {"fp8": "qwen3", "mxfp4": "gpt_oss", "mlx": "qwen2", "mlx-3": "qwen2", "bitsandbytes-nf4": "gemma2"}
"""The family of a form's checkpoint; llama by default."""
MORE: Final[dict[str, dict[str, Any]]] = {
    "qwen3": {"head_dim": 24},
    "qwen3_moe": {"head_dim": 24, **EXPERTS},
    "gpt_oss": {"head_dim": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    "gemma2": {"head_dim": 24},
}
BOTH_BACKENDS: Final = ("fp8", "mxfp4", "compressed-int4", "gptq", "awq", "mlx")


def checkpoint(path: Path, form: str, family: str | None = None, **sizes: int) -> dict[str, Tensor]:
    """Save a checkpoint in a form. Return the plain numbers of its tensors."""
    family = family or FAMILY.get(form, "llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**SIZES, **MORE.get(family, {}), **sizes})
        config.tie_word_embeddings = False
        model = AutoModelForCausalLM.from_config(config)
    dtype = torch.float16 if form.startswith(("gptq", "awq")) else torch.bfloat16
    model.to(dtype).save_pretrained(path)
    return quantize(path, FORMS[form])


def exported(bundle: splitbundle.Bundle, path: Path) -> dict[str, Tensor]:
    """Export a bundle. Return its tensors, after transformers has loaded it."""
    splitbundle_converter.export(bundle, path)
    config = json.loads((path / "config.json").read_text())
    assert not {"quantization_config", "quantization"} & config.keys()
    model, report = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert str(model.dtype) == f"torch.{bundle.manifest.storage.dtype}"
    return load_file(path / WEIGHTS)


@pytest.mark.parametrize("form", FORMS)
def test_a_quantized_checkpoint_converts_and_exports(tmp_path: Path, output: Path, form: str) -> None:
    plain = checkpoint(tmp_path / "source", form)
    onnx = form in BOTH_BACKENDS
    notes: list[str] = []
    made = accepted(tmp_path / "source", output, split=[1], onnx=onnx, notes=notes.append)
    back = exported(made, tmp_path / "exported")
    assert back.keys() == plain.keys()
    for name, tensor in plain.items():
        assert torch.equal(back[name], tensor), name
    method = FORMS[form].fields.get("quant_method", "mlx")
    jsonschema.validate(made.manifest.extensions, splitbundle_schemas.load("extensions"))
    about = made.manifest.extensions["quantization"]
    assert about["method"] == method
    assert about["formula"] == METHODS[method].formula
    assert any(f"are quantized ({method})" in note for note in notes)


def test_experts_of_fp8_convert(tmp_path: Path, output: Path) -> None:
    plain = checkpoint(tmp_path / "source", "fp8", "qwen3_moe")
    made = accepted(tmp_path / "source", output, split=[1], onnx=True)
    back = exported(made, tmp_path / "exported")
    assert all(torch.equal(back[name], tensor) for name, tensor in plain.items())


def test_another_dtype_is_rounded_once(tmp_path: Path, output: Path) -> None:
    checkpoint(tmp_path / "source", "fp8")
    made = accepted(tmp_path / "source", output, dtype="float32")
    stored = load_file(tmp_path / "source" / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"
    scales = stored[f"{name}_scale_inv"].repeat_interleave(64, 0)[:160].repeat_interleave(64, 1)[:, :96]
    back = exported(made, tmp_path / "exported")
    assert torch.equal(back[name], stored[name].float() * scales)


@pytest.mark.parametrize("dtype", ["keep", "float32", "float16"])
@pytest.mark.parametrize("form", ["fp8-tensor", "mxfp4"])
def test_the_check_loads_with_transformers_where_it_can(tmp_path: Path, output: Path, form: str, dtype: str) -> None:
    checkpoint(tmp_path / "source", form)
    notes: list[str] = []
    accepted(tmp_path / "source", output, dtype=dtype, notes=notes.append)
    assert "The check loads the quantized weights with transformers' own reader." in notes


@pytest.mark.parametrize("form", ["fp8-tensor", "mxfp4"])
def test_the_check_finds_other_numbers_than_those_of_transformers(
    tmp_path: Path, output: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "source", form)
    right = formulas.scale_numbers
    monkeypatch.setattr(formulas, "scale_numbers", lambda scales: right(scales) * 1.01)
    with pytest.raises(splitbundle.ParityError):
        splitbundle_converter.convert(tmp_path / "source", output)


@pytest.mark.parametrize("form", ["fp8", "mxfp4", "gptq"])
def test_the_check_by_layer(tmp_path: Path, output: Path, form: str) -> None:
    checkpoint(tmp_path / "source", form)
    notes: list[str] = []
    accepted(tmp_path / "source", output, check="layers", notes=notes.append)
    assert any("splitbundle's reader of these weights" in note for note in notes)


def test_the_check_says_whose_numbers_it_uses(tmp_path: Path, output: Path) -> None:
    checkpoint(tmp_path / "source", "fp8")  # its blocks don't divide the rows, which transformers doesn't read
    notes: list[str] = []
    accepted(tmp_path / "source", output, notes=notes.append)
    assert any("which is tested against transformers, equal to the bit" in note for note in notes)
