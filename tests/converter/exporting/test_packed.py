"""A quantized bundle as compressed-tensors: bit for bit, and as plain numbers that the original class computes with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import splitbundle_converter
from splitbundle import Bundle
from splitbundle_converter.translation.restore import source_tensors
from tests.support import models


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    root = tmp_path_factory.mktemp("packed")
    LlamaForCausalLM(config).save_pretrained(root / "source")
    return splitbundle_converter.convert(root / "source", root / "plain.splitbundle", split=[1])


@pytest.fixture(scope="module", params=["int8", "int4", "int4-64"])
def quantized(request: pytest.FixtureRequest, plain: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    to, _, group = request.param.partition("-")
    path = tmp_path_factory.mktemp("quantized") / "small.splitbundle"
    return plain.quantize(path, to, group=int(group or 32), method="rtn")


def test_packed_weights_come_back_bit_for_bit(quantized: Bundle, tmp_path: Path) -> None:
    packed = splitbundle_converter.export(quantized, tmp_path / "packed")
    again = splitbundle_converter.convert(
        packed, tmp_path / "again.splitbundle", dtype="float32", notes=lambda text: None
    )
    expected, got = dict(source_tensors(quantized)), dict(source_tensors(again))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_configuration_names_each_module_once(quantized: Bundle, tmp_path: Path) -> None:
    packed = splitbundle_converter.export(quantized, tmp_path / "packed")
    found = json.loads((packed / "config.json").read_text("utf-8"))["quantization_config"]
    tensors = load_file(packed / "model.safetensors")
    modules = {name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")}
    assert len(modules) == 14
    assert found["ignore"] == ["lm_head", "model.embed_tokens"]
    groups = list(found["config_groups"].values())
    assert groups[0]["targets"] == ["Linear"]
    named = [module for group in groups[1:] for module in group["targets"]]
    # 80 columns are no multiple of 32, so the matrices after the gate are stored in 8 bits.
    if quantized.manifest.storage.encodings["layers.0.mlp.up.weight"] == "rows8":
        assert (groups[0]["weights"]["num_bits"], named) == (8, [])
    else:
        assert sorted(named) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
        assert groups[1]["weights"] == groups[0]["weights"] | {"num_bits": 8, "strategy": "channel", "group_size": None}
    assert tensors["model.layers.0.self_attn.q_proj.weight_shape"].tolist() == [64, 64]


def test_plain_numbers_are_those_of_the_original_class(quantized: Bundle, tmp_path: Path) -> None:
    path = splitbundle_converter.export(quantized, tmp_path / "plain", dequantize=True)
    assert "quantization_config" not in json.loads((path / "config.json").read_text("utf-8"))
    model = models.load_original(path)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, got = model(ids).logits, quantized.pipeline(dtype="float32", kernels="torch")(ids)
    assert models.relative(got, expected) < 1e-5


def test_what_the_format_does_not_hold_is_plain_and_said(tmp_path: Path) -> None:
    from tests.support.paths import TESTS

    bundle = splitbundle_converter.convert(TESTS.parent / "examples" / "license-gpt2", tmp_path / "gpt2.splitbundle")
    small = bundle.quantize(tmp_path / "small.splitbundle", "int8")
    notes: list[str] = []
    path = splitbundle_converter.export(small, tmp_path / "exported", notes=notes.append)
    assert any("quantized tensors are written as plain numbers" in note for note in notes)
    assert "quantization_config" not in json.loads((path / "config.json").read_text("utf-8"))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        expected = models.load_original(path)(ids).logits
        got = small.pipeline(dtype="float32", kernels="torch")(ids)
    assert models.relative(got, expected) < 1e-5
