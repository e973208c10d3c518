"""The weight files of a checkpoint: which are read, and which are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import (
    INDEX,
    MISSING,
    PIECES,
    QUERY,
    WEIGHTS,
    Tensors,
    accepted,
    change_config,
    refused,
    said,
)
from tests.support.models import ONE_PER_FAMILY, bundle
from tests.support.tiers import FEW, FEW_EXPERTS, thinned

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_pickle(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / WEIGHTS).unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
    assert str(refused(path, output)) == (
        f"[source.pickle] pytorch_model.bin: expected weights in {WEIGHTS} or {INDEX}, "
        "got a pickle, which can run code. Save the model as safetensors where you trust it: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True). Or "
        "allow_pickle=True: it reads names and tensors alone, and refuses what asks for more, in a process of its own"
    )


def test_no_weights(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / WEIGHTS).unlink()
    text = f"[source.missing] {WEIGHTS}: expected {WEIGHTS} or {INDEX} in source, got neither"
    assert said(refused(path, output)) == text
    (path / "adapter_config.json").write_text("{}")
    adapter = "This is an adapter: merge it into its base model, and save that"
    assert said(refused(path, output)) == f"{text}, but adapter_config.json. {adapter}"


@pytest.mark.parametrize(("file", "whose"), [("safetensors", "Mistral"), ("00.pth", "Meta")])
def test_the_layout_of_another_program(source: Callable[[str], Path], output: Path, file: str, whose: str) -> None:
    path = source("llama")
    (path / WEIGHTS).rename(path / f"consolidated.{file}")
    (path / "config.json").rename(path / "params.json")
    assert str(refused(path, output)) == (
        f"[source.missing] {WEIGHTS}: expected {WEIGHTS} or {INDEX} in source, got neither, but consolidated.{file}. "
        f"consolidated*.{file.rpartition('.')[2]} is the layout of {whose}'s own programs, with params.json. Convert "
        "the same model in the layout of transformers: config.json with model.safetensors, or its index"
    )


MERGE = "Merge the adapter and save the result: model.merge_and_unload().save_pretrained(...)"
GATHER = (
    "Save the full state dict of the model inside: get_model_state_dict of torch.distributed.checkpoint.state_dict, "
    "with full_state_dict=True"
)
INSIDE = "Save the state dict of the model inside: "
COMPILED = "Save the state dict of the model that was compiled, and not that of the compiled one"


@pytest.mark.parametrize(
    ("old", "new", "got", "hint"),
    [
        *(
            ("^", mark, f"names that all begin with {mark!r}, as {wrapper} makes them", hint)
            for mark, wrapper, hint in (
                ("module.", "DistributedDataParallel", f"{INSIDE}wrapper.module.state_dict()"),
                ("base_model.model.", "PEFT", MERGE),
                ("_fsdp_wrapped_module.", "FullyShardedDataParallel", GATHER),
                ("_orig_mod.", "torch.compile", COMPILED),
            )
        ),
        *(
            (r"layers\.3\.", f"layers.3.{mark}", f"'model.layers.3.{mark}{first}', a name that {wrapper} makes", hint)
            for mark, wrapper, hint, first in (
                ("_fsdp_wrapped_module.", "FullyShardedDataParallel", GATHER, "input_layernorm.weight"),
                ("_checkpoint_wrapped_module.", "activation checkpointing", GATHER, "input_layernorm.weight"),
                (
                    *("_orig_mod.", "torch.compile"),
                    *(COMPILED, "input_layernorm.weight"),
                ),
            )
        ),
        (
            r"q_proj\.",
            "q_proj.base_layer.",
            "'model.layers.0.self_attn.q_proj.base_layer.weight', a name that PEFT makes",
            MERGE,
        ),
    ],
)
def test_weights_of_a_wrapped_model(
    source: Callable[[str], Path], output: Path, old: str, new: str, got: str, hint: str
) -> None:
    path = source("llama")
    tensors = {re.sub(old, new, name): tensor for name, tensor in load_file(path / WEIGHTS).items()}
    save_file(tensors, path / WEIGHTS)
    assert str(refused(path, output)) == (
        f"[source.tensor] source: expected the names that the model's tensors have, got {got}. {hint}"
    )


UNSAID = "Fetch the configuration again from where these weights were published: it has to say how they are quantized"


@pytest.mark.parametrize(
    ("end", "dtype", "what"),
    [
        (".scales", torch.float16, "MLX"),
        (".qweight", torch.int32, "GPTQ or AWQ"),
        (".weight_packed", torch.int32, "compressed-tensors"),
        (".weight_scale_inv", torch.float32, "FP8"),
        (".weight_scale", torch.bfloat16, "FP8 or INT8"),
        (".weight.absmax", torch.float32, "bitsandbytes"),
        ("_blocks", torch.uint8, "MXFP4"),
    ],
)
def test_quantized_weights_of_which_the_configuration_says_nothing(
    source: Callable[[str], Path], output: Path, end: str, dtype: torch.dtype, what: str
) -> None:
    path = source("llama")
    name = f"model.layers.1.self_attn.q_proj{end}"
    save_file(load_file(path / WEIGHTS) | {name: torch.zeros(2, 2, dtype=dtype)}, path / WEIGHTS)
    assert str(refused(path, output)) == (
        f"[source.quantised] {WEIGHTS} /{name}: expected weights that aren't quantized, got a tensor of {what}, "
        f"'{name}'. {UNSAID}"
    )


def test_a_checkpoint_of_modelopt(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": null}}')
    assert str(refused(path, output)) == (
        "[source.quantised] hf_quant_config.json /quantization: expected weights that are quantized with modelopt, as "
        "the configuration says, got none. If the weights were dequantized, remove the field from the configuration. "
        "Else fetch weights and configuration again, from one place"
    )
    # Here only the cache was to be quantized.
    (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": null, "kv_cache_quant_algo": "FP8"}}')
    accepted(path, output)


def test_a_git_lfs_pointer(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 42\n")
    text = f"[source.lfs-pointer] {WEIGHTS}: expected weights, got a Git LFS pointer. Fetch the weights: git lfs pull"
    assert str(refused(path, output)) == text


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-5], lambda data: data[:100], lambda data: b"", lambda data: b"{}" * 40]
)
def test_a_file_that_is_not_safetensors(
    source: Callable[[str], Path], output: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = source("llama")
    (path / WEIGHTS).write_bytes(damage((path / WEIGHTS).read_bytes()))
    text = str(refused(path, output))
    assert text.startswith(f"[source.safetensors] {WEIGHTS}: expected a safetensors file, got SafetensorError: ")


def in_pieces(path: Path, change: Callable[[dict[str, str], Tensors, Tensors], Any] = lambda *_: None) -> None:
    """Return a checkpoint of two files and an index. ``change`` may edit the map and the files."""
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in names[i::2]} for i in range(2)]
    weight_map = {name: PIECES[i] for i, part in enumerate(parts) for name in part}
    change(weight_map, *parts)
    for file, part in zip(PIECES, parts, strict=True):
        save_file(part, path / file, {"format": "pt"})
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        *(
            (
                lambda weight_map, first, second, file=file: weight_map.update({"lm_head.weight": file}),
                f"[source.index] {INDEX} /weight_map/lm_head.weight: "
                f"expected the name of a .safetensors file beside the index, got {file!r}",
            )
            for file in ("../x.safetensors", "/etc/passwd", "a/b.safetensors", ".x.safetensors", "x.bin", "", 3)
        ),
        (
            lambda weight_map, first, second: weight_map.update({"lm_head.weight": "model-00003.safetensors"}),
            f"[source.missing] model-00003.safetensors: expected a file that {INDEX} names, got none",
        ),
        (
            # Sorted by name, lm_head.weight is first: in the first file.
            lambda weight_map, first, second: second.update({"lm_head.weight": first["lm_head.weight"]}),
            f"[source.tensor] {INDEX}: expected one entry for 'lm_head.weight', got it is in {PIECES[1]} too",
        ),
        (
            lambda weight_map, first, second: weight_map.pop("lm_head.weight"),
            f"[source.tensor] {INDEX}: expected one entry for 'lm_head.weight', got none; it is in {PIECES[0]}",
        ),
        (
            lambda weight_map, first, second: first.pop("lm_head.weight"),
            f"[source.tensor] {INDEX}: expected 'lm_head.weight' in {PIECES[0]}, got none. {MISSING}",
        ),
        (
            lambda weight_map, first, second: weight_map.clear(),
            f"[source.index] {INDEX} /weight_map: expected an object weight_map, got {{}}",
        ),
    ],
)
def test_indexes_that_lie(source: Callable[[str], Path], output: Path, change: Callable[..., Any], text: str) -> None:
    path = source("llama")
    in_pieces(path, change)
    assert said(refused(path, output)) == text


def test_an_index_that_lies_of_everything_is_not_quoted_without_end(
    source: Callable[[str], Path], output: Path
) -> None:
    path = source("llama")
    in_pieces(path, lambda weight_map, *_: weight_map.update(dict.fromkeys(weight_map, PIECES[1])))
    change_config(path, num_hidden_layers=2000)
    in_pieces_twice = refused(path, output).codes
    assert set(in_pieces_twice) == {"source.tensor"}
    assert len(in_pieces_twice) <= 100


def test_an_index_may_name_tensors_that_nobody_needs(source: Callable[[str], Path], output: Path) -> None:
    """A tied head, and buffers of rotary positions: transformers does not look for them either."""
    path = source("llama-one-kv-biased-tied")
    named = ["lm_head.weight", *(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(4))]
    in_pieces(path, lambda weight_map, *_: weight_map.update(dict.fromkeys(named, PIECES[0])))
    assert accepted(path, output).fingerprint == bundle("llama-one-kv-biased-tied").fingerprint


def test_a_single_file_comes_before_an_index(source: Callable[[str], Path], output: Path) -> None:
    """As in transformers, the single file wins and the index isn't read."""
    path = source("llama")
    single = (path / WEIGHTS).read_bytes()
    in_pieces(path, lambda weight_map, first, second: first.update({"lm_head.weight": first["lm_head.weight"] + 1}))
    (path / WEIGHTS).write_bytes(single)
    assert accepted(path, output).fingerprint == bundle("llama").fingerprint
    (path / INDEX).write_text("nothing that could be read")
    accepted(path, output, force=True, check=False)


@pytest.mark.parametrize("name", thinned(ONE_PER_FAMILY, FEW | FEW_EXPERTS))
def test_a_checkpoint_in_pieces_is_the_same_model(source: Callable[[str], Path], output: Path, name: str) -> None:
    path = source(name)
    in_pieces(path)
    assert accepted(path, output).fingerprint == bundle(name).fingerprint


def test_a_header_that_names_a_tensor_twice(source: Callable[[str], Path], output: Path) -> None:
    """The library would keep the last of two equal names."""
    path = source("llama")
    data = (path / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    again = b"{" + f'"{QUERY}":{json.dumps(header[QUERY])},'.encode()
    twice = data[8 : 8 + size].replace(b"{", again, 1)
    (path / WEIGHTS).write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + size :])
    assert load_file(path / WEIGHTS).keys() == header.keys() - {"__metadata__"}
    assert said(refused(path, output)) == (
        f"[json.duplicate-key] {WEIGHTS}: expected every key once in an object, got '{QUERY}' twice"
    )


def test_a_header_that_is_too_large(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    with (path / WEIGHTS).open("wb") as file:
        file.write((2**30).to_bytes(8, "little") + b"{")
        file.truncate(2**31)
    assert said(refused(path, output)) == (
        f"[json.size] {WEIGHTS}: expected at most {2**24} bytes, got {2**24 + 1} bytes"
    )
