"""GGUF files convert: their tensors are those that transformers makes of them, equal to the bit."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any, Final

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import splitbundle_converter
from splitbundle.errors import MissingExtra
from tests.support.checkpoints import accepted, refused

HEADS: Final = {"attn_q.": 4, "attn_k.": 2}
SIZES: Final[dict[str, Any]] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS["attn_q."],
    "num_key_value_heads": HEADS["attn_k."],
    "vocab_size": 320,
    "max_position_embeddings": 128,
}


def write(path: Path, family: str, kind: Type, tied: bool = False, factors: Any = None, **more: Any) -> Path:
    """Write a GGUF file of a random model, as llama.cpp's converter names and orders its tensors."""
    fields = SIZES if family != "qwen3" else {**SIZES, "head_dim": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields, tie_word_embeddings=tied))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1
    config = model.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(96)
    writer.add_feed_forward_length(160)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    if family == "qwen3":
        writer.add_key_length(32)
        writer.add_value_length(32)
    for name, value in more.items():
        writer.add_uint32(name.replace("__", "."), value)
    names = gguf.get_tensor_name_map(next(n for n, text in gguf.MODEL_ARCH_NAMES.items() if text == family), 2)
    for name, tensor in model.state_dict().items():
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None or (tied and name == "lm_head.weight"):
            continue
        values = tensor.detach().numpy()
        heads = next((count for part, count in HEADS.items() if part in own), None)
        if family == "llama" and heads is not None:
            values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        stored = kind if values.ndim == 2 else Type.F32
        writer.add_tensor(own, gguf.quants.quantize(numpy.ascontiguousarray(values), stored), raw_dtype=stored)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert config.model_type == family
    return path


@pytest.mark.parametrize(
    ("family", "kind", "tied"),
    [
        ("llama", Type.Q4_0, False),
        ("llama", Type.Q4_1, True),
        ("qwen2", Type.Q8_0, True),
        ("qwen3", Type.F16, False),
        ("qwen3", Type.BF16, True),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_the_tensors_are_those_of_transformers(
    tmp_path: Path, output: Path, family: str, kind: Type, tied: bool
) -> None:
    path = write(tmp_path / "model.gguf", family, kind, tied)
    made = accepted(path, output, split=[1], dtype="float32")
    splitbundle_converter.export(made, tmp_path / "exported")
    mine = load_file(tmp_path / "exported/model.safetensors")
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not report["missing_keys"]
    assert loaded.config.rope_parameters["rope_theta"] == 50000.0
    original: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=loaded.config, dtype=torch.float32
    )
    theirs = original.state_dict()
    assert mine.keys() == theirs.keys() - ({"lm_head.weight"} if tied else set())
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    about = made.manifest.extensions.get("quantization", {})
    assert about.get("method") == (None if kind in (Type.F16, Type.BF16) else "gguf")


def test_blocks_become_bfloat16_and_other_tensors_keep_their_dtype(tmp_path: Path, output: Path) -> None:
    storage = accepted(write(tmp_path / "model.gguf", "llama", Type.Q4_0), output, onnx=True).manifest.storage
    assert storage.dtype == "bfloat16"
    assert set(storage.exceptions.values()) == {"float32"}
    assert all("norm" in name for name in storage.exceptions)


def test_a_directory_with_one_file_and_the_models_own_configuration(tmp_path: Path, output: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", Type.Q8_0, llama__rope__scaling__factor=4)
    config = AutoConfig.for_model("llama", **SIZES, rope_parameters={"rope_type": "default", "rope_theta": 50000.0})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert accepted(tmp_path, output).manifest.model.name == "model"
    (tmp_path / "config.json").unlink()
    error = refused(path, output, force=True)
    assert "/llama.rope.scaling.factor: expected no such field" in str(error)
    assert "config.json beside the file" in str(error)


def test_the_factors_of_rotary_positions_are_compared(tmp_path: Path, output: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 50000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = AutoConfig.for_model("llama", **SIZES, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 50000.0 ** -(torch.arange(0, 24, 2).float() / 24)
    path = write(tmp_path / "model.gguf", "llama", Type.Q8_0, factors=(plain / scaled).numpy())
    assert "no factors of rotary positions" in str(refused(path, output))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    accepted(path, output)
    config.rope_parameters["factor"] = 4.0
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert "Take the config.json of this very model" in str(refused(path, output, force=True))


def test_a_file_that_is_not_there_and_one_of_two(tmp_path: Path, output: Path) -> None:
    error = refused(tmp_path / "model.gguf", output)
    assert error.codes[0] == "source.missing"
    assert "expected a GGUF file, got nothing there" in str(error)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    assert "Name one of the GGUF files in place of the directory" in str(refused(tmp_path, output))


def field(name: str, kind: int, value: bytes) -> bytes:
    """Return a GGUF file that has one field, and nothing else."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(name)) + name.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (field("a", 9, struct.pack("<IQ", 0, 2**40)), "arrays of 1099511627776 values"),
        (field("a", 9, struct.pack("<IQ", 9, 1)), "an array of type 9"),
        (field("a", 9, struct.pack("<IQ", 4, 1000)), "an end within the header"),
        (field("a", 8, struct.pack("<Q", 2**62)), "a text of"),
        (field("a", 99, b""), "a value of type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "1152921504606846976 tensors and 0 fields"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQQIQ", 3, 1, 0, 0, 9, 0), "a tensor of 9 dimensions"),
        (field("general.architecture", 9, struct.pack("<IQ", 4, 0)), "one of the architectures"),
    ],
)
def test_a_crafted_header(tmp_path: Path, output: Path, data: bytes, words: str) -> None:
    (tmp_path / "model.gguf").write_bytes(data)
    assert words in str(refused(tmp_path / "model.gguf", output))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:40], "expected a GGUF file"),
        (lambda data: data[:-3000], "expected a GGUF file"),
        (lambda data: b"GGUF" + b"\xff" * 60, "expected a GGUF file"),
        (lambda data: b"", "expected a GGUF file"),
        (lambda data: data.replace(b"llama", b"mamba"), "one of the architectures llama, qwen2, qwen3"),
        (lambda data: data.replace(b"blk.1.attn_v", b"blk.1.attn_w"), "model.layers.1.self_attn.v_proj.weight"),
    ],
)
def test_a_damaged_file(tmp_path: Path, output: Path, damage: Any, words: str) -> None:
    path = write(tmp_path / "model.gguf", "llama", Type.Q8_0)
    path.write_bytes(damage(path.read_bytes()))
    assert words in str(refused(path, output))


def test_without_the_library(tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r'pip install "splitbundle\[gguf\]"'):
        splitbundle_converter.convert(tmp_path / "model.gguf", output)
