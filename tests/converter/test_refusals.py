"""What the converter refuses, and in which words; and that what it accepts comes back to the bit."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import splitbundle
import splitbundle_converter
from splitbundle import Bundle, BundleError, ParityError, strict_json
from splitbundle.bundle import VECTORS
from splitbundle.files import MAX_TEXT_BYTES
from splitbundle.torch_weights import map_tensors
from splitbundle_converter import configuration, conversion, decoder_facts
from splitbundle_converter.families import FAMILIES
from splitbundle_converter.source import Configuration
from splitbundle_converter.translate import Translation, translate
from tests.support.models import CONFIGURATIONS, LAYERS, ONE_PER_FAMILY, bundle, checkpoint, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
PIECES: Final = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MISSING: Final = "The checkpoint isn't whole, or its configuration is another model's"
QUERY: Final = "model.layers.1.self_attn.q_proj.weight"

Tensors = dict[str, Tensor]


@pytest.fixture
def source(tmp_path: Path) -> Callable[[str], Path]:
    """Copies a named checkpoint, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoint(name), tmp_path / "source"))

    return copy


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where nothing else is, so that a test sees whatever is left there."""
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "b.splitbundle"


def refused(path: str | Path, output: Path, **named: Any) -> BundleError:
    """The error that a conversion ends with. It leaves nothing behind, under whichever name."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(path, output, **({"check": False} | named))
    assert sorted(output.parent.iterdir()) == before
    return caught.value


def accepted(path: Path, output: Path, **named: Any) -> Bundle:
    """The bundle, which has been held against the original."""
    return splitbundle_converter.convert(path, output, **named)


def change_config(path: Path, **fields: Any) -> None:
    """Sets fields of config.json; ``...`` removes one."""
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in (config | fields).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))


def change_tensors(path: Path, change: Callable[[Tensors], Tensors | None]) -> None:
    """Writes what ``change`` makes of the tensors (or returns of them)."""
    tensors = load_file(path / WEIGHTS)
    changed = change(tensors)
    tensors = tensors if changed is None else changed
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS, {"format": "pt"})


def replaced(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    """A change of one tensor."""

    def change(tensors: Tensors) -> None:
        tensors[name] = value(tensors[name])

    return change


def without(*names: str) -> Callable[[Tensors], None]:
    """A change that drops tensors."""

    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def digests(root: Path) -> dict[str, str]:
    """Path -> sha256, of every file."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# The configuration.


@pytest.mark.parametrize("model_type", ["bert", "mixtral", "nosuch", "", None, 3, ["llama"], ...])
def test_a_family_that_is_not_in_the_table(source: Callable[[str], Path], output: Path, model_type: Any) -> None:
    """Whether transformers knows it or not; a field that isn't there counts as null."""
    path = source("llama")
    change_config(path, model_type=model_type)
    got = None if model_type is ... else model_type
    assert str(refused(path, output)) == (
        "[source.family] config.json /model_type: expected one of the families that splitbundle families lists, got "
        f"{got!r}. Other families can't be converted; splitbundle never guesses at one"
    )


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("num_local_experts", 8, "mixtures of experts"),
        ("kv_lora_rank", 512, "latent attention"),
        ("state_size", 16, "recurrent layers"),
        ("num_kv_shared_layers", 10, "layers that share keys and values, or have inputs of their own"),
        ("is_encoder_decoder", True, "encoders"),
    ],
)
def test_why_a_family_is_not_in_the_table(
    source: Callable[[str], Path], output: Path, field: str, value: Any, what: str
) -> None:
    path = source("llama")
    change_config(path, model_type="mixtral", **{field: value})
    assert str(refused(path, output)) == (
        "[source.family] config.json /model_type: expected one of the families that splitbundle families lists, got "
        f"'mixtral'. It has {field} {value!r}, and {what} can't be converted yet"
    )


ACTIVATIONS: Final = f"one of {', '.join(decoder_facts.ACTIVATIONS)}"
KNOWN: Final = "a field that this family is known to have"
UNSUPPORTED: Final = "A model with this value can't be converted yet; with another value it would be another model"
USELESS: Final = "Remove it if it changes nothing"
ROPE: Final[dict[str, Any]] = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_TYPES: Final = "one of default, linear, dynamic, yarn, longrope, llama3, proportional"


@pytest.mark.parametrize(
    ("name", "fields", "pointer", "expected", "got", "hint"),
    [
        ("llama", {"frobnicate": 1}, "/frobnicate", KNOWN, "1", USELESS),
        ("llama", {"sliding_window": 5}, "/sliding_window", KNOWN, "5", USELESS),
        ("gpt2", {"rotary_dim": 4}, "/rotary_dim", KNOWN, "4", USELESS),
        ("gemma", {"final_logit_softcapping": 30.0}, "/final_logit_softcapping", KNOWN, "30.0", USELESS),
        ("gpt2", {"is_encoder_decoder": True}, "/is_encoder_decoder", "its default, False", "True", UNSUPPORTED),
        ("gpt2", {"chunk_size_feed_forward": 2}, "/chunk_size_feed_forward", "its default, 0", "2", UNSUPPORTED),
        ("gpt2", {"add_cross_attention": True}, "/add_cross_attention", "False", "True", UNSUPPORTED),
        (
            "gemma",
            {"use_bidirectional_attention": True},
            "/use_bidirectional_attention",
            "None or False",
            "True",
            UNSUPPORTED,
        ),
        (
            "gemma",
            {"hidden_activation": "gelu"},
            "/hidden_activation",
            "None or 'gelu_pytorch_tanh'",
            "'gelu'",
            UNSUPPORTED,
        ),
        ("llama", {"hidden_act": "quick_gelu"}, "/hidden_act", ACTIVATIONS, "'quick_gelu'", None),
        ("gpt2", {"activation_function": "mish"}, "/activation_function", ACTIVATIONS, "'mish'", None),
        (
            "llama",
            {
                "rope_parameters": ROPE | {"rope_type": "axial", "factor": 4.0, "original_max_position_embeddings": 16},
            },
            "/rope_parameters/rope_type",
            ROPE_TYPES,
            "'axial'",
            None,
        ),
        (
            "qwen2",
            {"rope_parameters": ROPE | {"rope_type": "axial", "factor": 2.0}},
            "/rope_parameters/rope_type",
            ROPE_TYPES,
            "'axial'",
            None,
        ),
        (
            "llama",
            {"rope_parameters": ..., "rope_scaling": {"type": "axial", "factor": 2.0}},
            "/rope_parameters/rope_type",
            ROPE_TYPES,
            "'axial'",
            None,
        ),
        (
            "llama",
            {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
            "/rope_parameters/partial_rotary_factor",
            "1.0 or None",
            "0.5",
            UNSUPPORTED,
        ),
        (
            "llama",
            {"partial_rotary_factor": 0.5},
            "/rope_parameters/partial_rotary_factor",
            "1.0 or None",
            "0.5",
            UNSUPPORTED,
        ),
        (
            "mistral-full",
            {"rope_parameters": ROPE | {"mscale": 1.0}},
            "/rope_parameters/mscale",
            "no such parameter with rope_type default",
            "1.0",
            None,
        ),
        (
            "llama",
            {"rope_parameters": ROPE | {"rope_theta": 0.0}},
            "/rope_parameters/rope_theta",
            "a number above 0",
            "0.0",
            None,
        ),
        (
            "llama-llama3",
            {
                "rope_parameters": ROPE
                | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}
                | {"original_max_position_embeddings": 16}
            },
            "/rope_parameters/high_freq_factor",
            "more than low_freq_factor (4.0)",
            "1.0",
            None,
        ),
        (
            "llama",
            {"num_key_value_heads": 4},
            "/num_key_value_heads",
            "a divisor of num_attention_heads (6)",
            "4",
            None,
        ),
        (
            "llama",
            {"num_key_value_heads": 0},
            "/num_key_value_heads",
            "an integer from 1 to 2147483647",
            "0",
            None,
        ),
        ("gpt2", {"n_head": 4}, "/n_embd", "a multiple of n_head (4)", "35", None),
        ("llama", {"vocab_size": 10**12}, "/vocab_size", "an integer from 1 to 2147483647", "1000000000000", None),
        ("llama", {"rms_norm_eps": 0.0}, "/rms_norm_eps", "a number above 0", "0.0", None),
    ],
)
def test_fields_that_cannot_be_converted(
    source: Callable[[str], Path],
    output: Path,
    name: str,
    fields: dict[str, Any],
    pointer: str,
    expected: str,
    got: str,
    hint: str | None,
) -> None:
    path = source(name)
    change_config(path, **fields)
    text = f"[source.config] config.json {pointer}: expected {expected}, got {got}"
    assert str(refused(path, output)) == f"{text}. {hint or UNSUPPORTED}"


def test_all_problems_of_a_configuration_at_once(source: Callable[[str], Path], output: Path) -> None:
    path = source("gemma")
    change_config(path, hidden_act="mish", frobnicate=None, use_bidirectional_attention=True)
    pointers = [problem.pointer for problem in refused(path, output).problems]
    assert sorted(map(str, pointers)) == ["/frobnicate", "/hidden_act", "/use_bidirectional_attention"]


@pytest.mark.parametrize(
    ("name", "field"), [("gpt2", "n_layer"), *((name, "num_hidden_layers") for name in ("qwen2", "gemma", "llama"))]
)
@pytest.mark.parametrize("count", [0, -1, 10_001, 10**9])
def test_layer_counts(source: Callable[[str], Path], output: Path, name: str, field: str, count: int) -> None:
    """In no time, too: no list is made of as many items as a stranger's number says."""
    path = source(name)
    change_config(path, **{field: count}, layer_types=...)
    start = time.perf_counter()
    text = str(refused(path, output))
    assert time.perf_counter() - start < 2
    assert text == f"[source.config] config.json /{field}: expected an integer from 1 to 10000, got {count}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 1.5),
        ("num_hidden_layers", "12"),
        ("num_hidden_layers", True),
        ("num_hidden_layers", None),
        ("num_attention_heads", 0),
        ("num_attention_heads", 5),
        ("attention_bias", "yes"),
        ("hidden_act", 3),
        ("rope_parameters", 3),
        ("head_dim", 7),
    ],
)
def test_fields_that_transformers_itself_refuses(
    source: Callable[[str], Path], output: Path, field: str, value: Any
) -> None:
    """Its words are passed on, whatever kind of error they come in."""
    path = source("llama")
    change_config(path, **{field: value})
    error = refused(path, output)
    assert error.codes == ("source.config",)
    assert str(error).startswith("[source.config] config.json: expected a configuration that transformers reads, got ")


def test_layer_types_that_do_not_fit(source: Callable[[str], Path], output: Path) -> None:
    path = source("qwen2-mixed")
    change_config(path, layer_types=["full_attention"] * 3 + ["chunked_attention"])
    assert str(refused(path, output)) == (
        "[source.config] config.json /layer_types: expected full_attention or sliding_attention for each layer, "
        f"got ['full_attention', 'full_attention', 'full_attention', 'chunked_attention']. {UNSUPPORTED}"
    )


def test_code_of_a_checkpoint_never_runs(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    mark = output.parent.parent / "ran"
    (path / "modeling.py").write_text(f"open({str(mark)!r}, 'w')")
    change_config(path, auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"})
    assert str(refused(path, output)) == (
        "[source.remote-code] config.json /auto_map: expected no auto_map, "
        "got {'AutoConfig': 'modeling.C', 'AutoModelForCausalLM': 'modeling.M'}. "
        "splitbundle never runs code of a checkpoint. transformers computes llama itself: if these are its weights, "
        "remove auto_map"
    )
    assert not mark.exists()


def test_a_quantised_checkpoint(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    change_config(path, quantization_config={"quant_method": "gptq"})
    assert str(refused(path, output)) == (
        "[source.quantised] config.json /quantization_config: expected weights that aren't quantised, "
        "got {'quant_method': 'gptq'}. Convert the checkpoint that was quantised"
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"[]", "[source.config] config.json: expected an object, got []"),
        (
            b"{",
            "[json.syntax] config.json byte 1: expected one JSON document (RFC 8259), "
            "got Expecting property name enclosed in double quotes",
        ),
        (
            b'{"model_type": "llama", "model_type": "gpt2"}',
            "[json.duplicate-key] config.json: expected every key once in an object, got 'model_type' twice",
        ),
        (b'{"rms_norm_eps": NaN}', "[json.number] config.json: expected a JSON number, got NaN"),
        (None, "[source.missing] config.json: expected a file config.json in source, got none"),
    ],
)
def test_a_configuration_that_is_no_json(
    source: Callable[[str], Path], output: Path, data: bytes | None, text: str
) -> None:
    path = source("llama")
    if data is None:
        (path / "config.json").unlink()
    else:
        (path / "config.json").write_bytes(data)
    assert str(refused(path, output)) == text


@pytest.mark.parametrize("value", ["attacker/evil@main:fn", "kernels-community/evil", "flash_attention_2"])
@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
def test_no_field_of_a_checkpoint_chooses_the_code_that_computes(
    source: Callable[[str], Path], output: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """transformers takes such a name for code of the hub, and has the library ``kernels`` fetch and run it."""
    asked: list[str] = []

    def get_kernel(repository: str, *arguments: object, **named: object) -> object:
        asked.append(repository)
        raise ValueError("no code is fetched in a test")

    from transformers import modeling_utils
    from transformers.integrations import hub_kernels

    for module in (modeling_utils, hub_kernels):
        monkeypatch.setattr(module, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
    path = source("llama")
    change_config(path, **{name: value}, _experts_implementation="attacker/evil")
    if value != "flash_attention_2":
        with pytest.raises(ValueError, match="no code is fetched in a test"):
            transformers.AutoModelForCausalLM.from_pretrained(path)
        assert asked.pop() == value.partition("@")[0]
    accepted(path, output)
    assert not asked


def test_nested_configurations_choose_no_code_either() -> None:
    evil = {"_attn_implementation": "attacker/evil", "attn_implementation": {"": "attacker/evil"}}
    nested = {"model_type": "llama", "num_hidden_layers": 3, **evil}
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 3, **evil}
    raw = {"model_type": "llava", "text_config": nested, "vision_config": vision, **evil}
    built = configuration.build(Configuration(raw=raw, file="config.json"))
    each = (built, built.text_config, built.vision_config)
    assert [config._attn_implementation for config in each] == [None] * 3
    assert built.text_config.num_hidden_layers == built.vision_config.num_hidden_layers == 3
    assert raw["vision_config"]["_attn_implementation"] == "attacker/evil"


def test_an_adapter_beside_the_weights(source: Callable[[str], Path], output: Path) -> None:
    """transformers would apply it, and to the weights of the base that it names, where peft is installed."""
    path = source("llama")
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "attacker/evil"}))
    assert str(refused(path, output)) == (
        "[source.config] adapter_config.json: expected weights without an adapter beside them, got an adapter's "
        "configuration. Merge it into the model, or remove it"
    )


# Tensors.


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda tensors: tensors.update({"model.extra": torch.zeros(3, dtype=torch.bfloat16)}),
            f"{WEIGHTS} /model.extra: expected only the tensors of a model of 4 layers as its configuration "
            "describes it, got an extra tensor BF16 [3]",
        ),
        (
            # Biases that the configuration denies: leaving them out would be silently wrong.
            lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(36)}),
            f"{WEIGHTS} /model.layers.0.self_attn.q_proj.bias: expected only the tensors of a model of 4 layers as "
            "its configuration describes it, got an extra tensor F32 [36]",
        ),
        (
            without("model.norm.weight"),
            f"source: expected a tensor 'model.norm.weight' of shape [36], got none. {MISSING}",
        ),
        (without(QUERY), f"source: expected a tensor '{QUERY}' of shape [36, 36], got none. {MISSING}"),
        (replaced(QUERY, lambda x: x[:5]), f"{WEIGHTS} /{QUERY}: expected shape [36, 36], got [5, 36]"),
        (
            replaced("model.layers.2.mlp.up_proj.weight", lambda x: x.T),
            f"{WEIGHTS} /model.layers.2.mlp.up_proj.weight: expected shape [51, 36], got [36, 51]",
        ),
        (
            replaced(QUERY, lambda x: x.double()),
            f"{WEIGHTS} /{QUERY}: expected dtype F32, F16 or BF16, got F64",
        ),
        (
            replaced(QUERY, lambda x: x.to(torch.int8)),
            f"{WEIGHTS} /{QUERY}: expected dtype F32, F16 or BF16, got I8",
        ),
        (
            replaced(QUERY, lambda x: x.to(torch.float8_e4m3fn)),
            f"{WEIGHTS} /{QUERY}: expected dtype F32, F16 or BF16, got F8_E4M3",
        ),
    ],
)
def test_tensors_that_do_not_match(
    source: Callable[[str], Path], output: Path, change: Callable[[Tensors], None], text: str
) -> None:
    path = source("llama")
    change_tensors(path, change)
    hints = {
        "expected only": "Check the configuration's number of layers and its features; "
        "remove the tensor if it is no part of the model",
        "expected dtype": "Save it as one of these",
        "expected shape": "The checkpoint isn't whole, or its configuration is another model's",
    }
    hint = next((f". {hint}" for sign, hint in hints.items() if sign in text), "")
    assert str(refused(path, output)) == f"[source.tensor] {text}{hint}"


def test_a_transposed_layout_is_told_apart(source: Callable[[str], Path], output: Path) -> None:
    """GPT-2's matrices are stored [in, out], and a message names the source's own shape."""
    path = source("gpt2")
    change_tensors(path, replaced("transformer.h.1.attn.c_attn.weight", lambda x: x.T))
    assert str(refused(path, output)) == (
        f"[source.tensor] {WEIGHTS} /transformer.h.1.attn.c_attn.weight: expected shape [35, 105], got [105, 35]. "
        "The checkpoint isn't whole, or its configuration is another model's"
    )


@pytest.mark.parametrize("count", [LAYERS - 1, LAYERS + 1])
def test_a_checkpoint_of_another_depth(source: Callable[[str], Path], output: Path, count: int) -> None:
    """No layer is dropped and none invented: each tensor too many or too few is named."""
    path = source("llama")
    change_config(path, num_hidden_layers=count)
    error = refused(path, output)
    assert error.codes == ("source.tensor",) * 9
    layer = min(count, LAYERS - 1) if count < LAYERS else LAYERS
    assert all(f"model.layers.{layer}." in str(problem) for problem in error.problems)


def test_values_that_float16_cannot_hold(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    change_tensors(path, replaced(QUERY, lambda x: torch.full_like(x, 70_000.0)))
    text = str(refused(path, output, dtype="float16"))
    assert text == (
        f"[input.overflow] model.safetensors /{QUERY}: expected values that float16 can hold, got 70000. "
        "bfloat16 holds larger ones"
    )
    accepted(path, output, dtype="bfloat16", check=False)


# Files.


def test_a_pickle(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / WEIGHTS).unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n.")
    assert str(refused(path, output)) == (
        f"[source.pickle] pytorch_model.bin: expected weights in {WEIGHTS} or {INDEX}, "
        "got a pickle, which can run code. Save the model as safetensors where you trust it: "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(..., safe_serialization=True). "
        "Or --allow-pickle: it reads names and tensors alone, and refuses what asks for more, in a process of its own"
    )


def test_no_weights(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / WEIGHTS).unlink()
    text = f"[source.missing] {WEIGHTS}: expected {WEIGHTS} or {INDEX} in source, got neither"
    assert str(refused(path, output)) == text
    (path / "adapter_config.json").write_text("{}")
    assert str(refused(path, output)) == f"{text}. This is an adapter: merge it into its base model, and save that"


def test_weights_of_a_wrapped_model(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    save_file({f"module.{name}": tensor for name, tensor in load_file(path / WEIGHTS).items()}, path / WEIGHTS)
    assert str(refused(path, output)) == (
        "[source.tensor] source: expected the names that the model's tensors have, got names that all begin with "
        "'module.', as DistributedDataParallel makes them. Save the state dict of the model inside: "
        "wrapper.module.state_dict(), or model._orig_mod.state_dict()"
    )


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
    """A checkpoint of two files and an index; ``change`` may edit the map and what the files hold."""
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
            f"[source.tensor] {INDEX}: expected 'lm_head.weight' in {PIECES[0]}, got none",
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
    assert str(refused(path, output)) == text


def test_an_index_that_lies_of_everything_is_not_quoted_without_end(
    source: Callable[[str], Path], output: Path
) -> None:
    path = source("llama")
    in_pieces(path, lambda weight_map, *_: weight_map.update({f"x{i}": PIECES[0] for i in range(300)}))
    assert refused(path, output).codes == ("source.tensor",) * 100


def test_a_single_file_comes_before_an_index(source: Callable[[str], Path], output: Path) -> None:
    """As in transformers, which the check holds the bundle against: the index isn't even read."""
    path = source("llama")
    single = (path / WEIGHTS).read_bytes()
    in_pieces(path, lambda weight_map, first, second: first.update({"lm_head.weight": first["lm_head.weight"] + 1}))
    (path / WEIGHTS).write_bytes(single)
    assert accepted(path, output).fingerprint == bundle("llama").fingerprint
    (path / INDEX).write_text("nothing that could be read")
    accepted(path, output, force=True, check=False)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_a_checkpoint_in_pieces_is_the_same_model(source: Callable[[str], Path], output: Path, name: str) -> None:
    path = source(name)
    in_pieces(path)
    assert accepted(path, output).fingerprint == bundle(name).fingerprint


# Tied weights, base models, buffers.


def test_a_tied_head_that_is_stored_and_differs(source: Callable[[str], Path], output: Path) -> None:
    path = source("gpt2")
    table = "transformer.wte.weight"
    change_tensors(path, lambda tensors: tensors.update({"lm_head.weight": tensors[table] + 1e-6}))
    assert str(refused(path, output)) == (
        f"[source.tensor] {WEIGHTS} /lm_head.weight: expected the values of {table}, as tie_word_embeddings is true, "
        "got other values. Set tie_word_embeddings to false, or drop the tensor"
    )


def test_a_tied_head_that_is_stored_and_equal(source: Callable[[str], Path], output: Path) -> None:
    """It is stored once, and comes back twice."""
    path = source("gpt2")
    change_tensors(path, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"].clone()}))
    made = accepted(path, output)
    assert made.fingerprint == bundle("gpt2").fingerprint
    back = dict(splitbundle_converter.source_tensors(made))
    assert torch.equal(back["lm_head.weight"], back["transformer.wte.weight"])
    assert set(back) == set(load_file(path / WEIGHTS))


@pytest.mark.parametrize(("name", "prefix"), [("gpt2", "transformer."), ("gemma", "model.")])
def test_a_base_model_saved_alone(source: Callable[[str], Path], output: Path, name: str, prefix: str) -> None:
    """Its names lack the prefix; a tied head needs nothing more. The names come back as they were."""
    path = source(name)
    change_tensors(path, lambda tensors: {key.removeprefix(prefix): tensor for key, tensor in tensors.items()})
    made = accepted(path, output)
    assert made.fingerprint == bundle(name).fingerprint
    assert {key for key, _ in splitbundle_converter.source_tensors(made)} == set(load_file(path / WEIGHTS))


def save_as(auto: str, name: str, path: Path) -> Path:
    """The named model's base in a class of ``auto``, as transformers saves it; its head, if it has one, is new."""
    config = make_model(name, pad_token_id=0, num_labels=3).config
    getattr(transformers, auto).from_config(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("name", "head", "saved"),
    [
        ("llama", "'lm_head.weight'", "LlamaModel"),
        ("gpt_neox", "'embed_out.weight'", "GPTNeoXModel"),
        ("phi", "'lm_head.weight', 'lm_head.bias'", "PhiModel"),
        ("gptj-tied", "'lm_head.bias'", "GPTJModel"),
        ("gpt2-unscaled-untied", "'lm_head.weight'", "GPT2Model"),
    ],
)
def test_a_base_model_saved_without_its_head(output: Path, name: str, head: str, saved: str) -> None:
    path = save_as("AutoModel", name, output.parent.parent / "source")
    assert str(refused(path, output)) == (
        f"[source.tensor] source: expected the head of a causal language model: {head}, "
        f"got none, a base model that was saved without its head, {saved}. Only causal language models can be "
        "converted: save it with AutoModelForCausalLM, from a checkpoint that has the head"
    )


def test_a_tied_base_model_needs_no_head(output: Path) -> None:
    path = save_as("AutoModel", "gpt2", output.parent.parent / "source")
    accepted(path, output, split=(2,))


@pytest.mark.parametrize(
    ("auto", "name", "tensor", "saved"),
    [
        ("AutoModelForSequenceClassification", "llama", "score.weight", "LlamaForSequenceClassification"),
        ("AutoModelForSequenceClassification", "gpt2", "score.weight", "GPT2ForSequenceClassification"),
        ("AutoModelForTokenClassification", "gpt_neox", "classifier.weight", "GPTNeoXForTokenClassification"),
        # Here transformers puts another prefix before the base model.
        ("AutoModelForQuestionAnswering", "qwen2", "qa_outputs.weight", "Qwen2ForQuestionAnswering"),
    ],
)
def test_a_head_for_another_task(output: Path, auto: str, name: str, tensor: str, saved: str) -> None:
    """Also of a family whose own head is tied and stores nothing."""
    path = save_as(auto, name, output.parent.parent / "source")
    expected = (
        f"[source.tensor] {WEIGHTS} /{tensor}: expected the head of a causal language model, got a head for another "
        f"task, {saved}. Only causal language models can be converted: convert the one that this was trained from"
    )
    assert str(refused(path, output)) == expected
    for architectures in (None, [], ["A", "B"], [1], "A", ...):
        change_config(path, architectures=architectures)
        assert str(refused(path, output)) == expected.replace(f", {saved}", "")


def test_a_head_that_is_there_and_incomplete(source: Callable[[str], Path], output: Path) -> None:
    """It isn't another task's: each tensor is named."""
    path = source("phi")
    change_tensors(path, without("lm_head.bias"))
    missing = f"[source.tensor] source: expected a tensor 'lm_head.bias' of shape [61], got none. {MISSING}"
    assert str(refused(path, output)) == missing
    change_tensors(path, lambda tensors: tensors.update({"score.weight": torch.zeros(2, 48)}))
    assert [problem.pointer for problem in refused(path, output).problems] == [None, "/score.weight"]
    change_tensors(path, without("lm_head.weight", "score.weight"))
    assert [problem.expected for problem in refused(path, output).problems] == [
        "a tensor 'lm_head.weight' of shape [61, 48]",
        "a tensor 'lm_head.bias' of shape [61]",
    ]


def test_buffers_of_old_checkpoints_are_dropped(source: Callable[[str], Path], output: Path) -> None:
    """GPT-2's masks, by name: and only of layers that there are."""
    path = source("gpt2")
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 48, 48).tril() for i in range(LAYERS)}
    masks["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    change_tensors(path, lambda tensors: tensors.update(masks))
    assert accepted(path, output).fingerprint == bundle("gpt2").fingerprint
    change_tensors(path, lambda tensors: tensors.update({"transformer.h.4.attn.bias": torch.ones(1)}))
    shutil.rmtree(output)
    assert str(refused(path, output)) == (
        f"[source.tensor] {WEIGHTS} /transformer.h.4.attn.bias: expected only the tensors of a model of 4 layers as "
        "its configuration describes it, got an extra tensor F32 [1]. "
        "Check the configuration's number of layers and its features; remove the tensor if it is no part of the model"
    )


def test_rotary_buffers_are_dropped(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    change_tensors(
        path,
        lambda tensors: tensors.update(
            {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(3) for i in range(LAYERS)}
        ),
    )
    assert accepted(path, output).fingerprint == bundle("llama").fingerprint


# Arguments.


@pytest.mark.parametrize("cuts", [(2, 1), (5,), (-1,), (1, 1), (0, 2, 9), (1.5,), ("1",), (True,)])
def test_cuts(output: Path, cuts: tuple[int, ...]) -> None:
    assert str(refused(checkpoint("llama"), output, split=cuts)) == (
        "[usage.cut] split: expected rising layer numbers from 0 to 4, the model's number of layers, "
        f"got {','.join(map(str, cuts))}. A cut is the number of the layer that the shard after it begins with"
    )


@pytest.mark.parametrize("size", [0, -1, 1.5, "1"])
def test_a_size_of_files_that_is_none(output: Path, size: Any) -> None:
    text = str(refused(checkpoint("llama"), output, max_file_size=size))
    assert text.startswith("[usage.size] max_file_size: expected a number of bytes from 1, got")


def test_a_checkpoint_of_another_model_does_not_flood(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    change_config(path, num_hidden_layers=2000)
    assert len(refused(path, output).problems) == 100


@pytest.mark.parametrize(
    "names",
    [
        ("a",),
        ("a", "b", "c"),
        ("a", "a"),
        ("A", "b"),
        ("a", ""),
        ("a", "../x"),
        ("a", "-b"),
        ("a", "b.c"),
        ("a", "con"),
    ],
)
def test_names(output: Path, names: tuple[str, ...]) -> None:
    text = str(refused(checkpoint("llama"), output, split=(2,), names=names))
    assert text.startswith("[usage.names] names: expected 2 different names, one for each shard, each 1 to 64 of")
    assert text.endswith(f", got {', '.join(names)}")


def test_a_dtype_that_does_not_exist(output: Path) -> None:
    text = "[usage.dtype] dtype: expected one of keep, float32, float16, bfloat16, got 'int8'"
    assert str(refused(checkpoint("llama"), output, dtype="int8")) == text


def test_a_source_that_does_not_exist(output: Path) -> None:
    expected = "expected a checkpoint directory or a hub id"
    assert str(refused("/no/such/place", output)) == f"[source.missing] /no/such/place: {expected}, got neither"
    assert str(refused("two words", output)) == f"[source.missing] two words: {expected}, got neither"
    file = checkpoint("llama") / "config.json"
    assert str(refused(file, output)) == f"[source.missing] {file}: {expected}, got a file"


def test_a_hub_id_without_a_network(tmp_path: Path, output: Path) -> None:
    """In another process, as the hub's library reads HF_HUB_OFFLINE when it is imported."""
    program = f"""
import splitbundle, splitbundle_converter
try:
    splitbundle_converter.convert("some-owner/some-model", {str(output)!r})
except splitbundle.BundleError as error:
    print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, timeout=120
    )
    assert done.stdout.startswith("[network] some-owner/some-model: expected the model from the hub, got ")
    assert done.stdout.endswith(". There is no such directory here, and the hub can't be reached\n")
    assert not list(output.parent.iterdir())


# The destination.


def test_a_destination_that_exists(output: Path) -> None:
    made = accepted(checkpoint("llama"), output, check=False)
    before = digests(output)
    hint = "--force replaces it once the new one is complete"
    expected = f"[output.exists] {output}: expected nothing there, got an existing file or directory. {hint}"
    assert str(refused(checkpoint("gpt2"), output)) == expected
    assert digests(output) == before
    other = accepted(checkpoint("gpt2"), output, check=False, force=True)
    assert other.fingerprint != made.fingerprint
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_text("a file"),
        lambda path: (path / "mine").mkdir(parents=True),
        # Other things have a manifest.json too: a browser's extension, say.
        lambda path: (path.mkdir(), (path / "manifest.json").write_text('{"manifest_version": 3}')),
    ],
)
def test_what_is_no_bundle_is_not_replaced(output: Path, make: Callable[[Path], Any]) -> None:
    make(output)
    assert str(refused(checkpoint("llama"), output, force=True)) == (
        f"[output.exists] {output}: expected a bundle, to be replaced, got something else. "
        "Remove it yourself: --force won't"
    )


# A conversion that is wrong.


def query_and_key_exchanged(*arguments: Any) -> Translation:
    """A table with a mistake in it: the kind that nothing but the original model can show."""
    right = translate(*arguments)
    pair = ("layers.2.attention.query.weight", "layers.2.attention.key.weight")
    exchanged = dict(zip(pair, (right.origins[name] for name in reversed(pair)), strict=True))
    return replace(right, origins=right.origins | exchanged)


@pytest.mark.rule("SB-G-003", "SB-D-009")
def test_a_wrong_translation_does_not_get_out(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chained shards are held against the original: the error says where they part, and nothing is left."""
    monkeypatch.setattr(conversion, "translate", query_and_key_exchanged)
    error = refused(checkpoint("gpt2"), output, split=(1, 3), check=True)
    assert isinstance(error, ParityError)
    # Before the mistake all is well; from the first boundary after layer 2 nothing is.
    assert [problem.argument for problem in error.problems] == ["hidden.3", "logits"]
    assert set(error.codes) == {"parity"}
    text = str(error).splitlines()[0]
    assert text.startswith(
        "[parity] vectors.safetensors hidden.3: expected a difference to the original model of at most 1e-05 of "
    )
    # Without the check it does, which is what the check is for.
    accepted(checkpoint("gpt2"), output, check=False)


@pytest.mark.rule("SB-D-009")
def test_a_wrong_translation_does_not_replace_a_bundle(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = accepted(checkpoint("gpt2"), output, split=(1,))
    before = digests(output)
    monkeypatch.setattr(conversion, "translate", query_and_key_exchanged)
    assert isinstance(refused(checkpoint("gpt2"), output, check=True, force=True), ParityError)
    assert digests(output) == before
    assert splitbundle.open(output).id == made.id
    made.verify(exact=True)


@pytest.mark.rule("SB-G-003")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_fail_the_check(source: Callable[[str], Path], output: Path, value: float) -> None:
    """A NaN is equal to nothing, so it must not pass for being within a tolerance."""
    path = source("llama")
    change_tensors(path, replaced(QUERY, lambda x: torch.full_like(x, value)))
    assert isinstance(refused(path, output, check=True), ParityError)


@pytest.mark.rule("SB-G-003")
def test_one_token_that_is_no_number_fails_the_check(source: Callable[[str], Path], output: Path) -> None:
    """The first case alone meets it, and what the others compute must not make it forgotten."""
    path = source("llama")
    golden = map_tensors(accepted(path, output), VECTORS)
    shutil.rmtree(output)
    (token,) = golden["case.0.ids"].tolist()
    assert not any((golden[f"case.{case}.ids"] == token).any() for case in (1, 2))

    def spoil(table: Tensor) -> Tensor:
        table[token] = float("nan")
        return table

    change_tensors(path, replaced("model.embed_tokens.weight", spoil))
    error = refused(path, output, split=(2,), check=True)
    assert [problem.argument for problem in error.problems] == ["hidden.2", "logits"]


# There and back, and twice the same.


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_round_trip_is_exact(name: str, dtype: str, output: Path) -> None:
    """Names, shapes, dtypes and bits, of every configuration."""
    path = checkpoint(name, dtype)
    made = accepted(path, output, split=(1, 2), check=False)
    back = dict(splitbundle_converter.source_tensors(made))
    # What is dropped by name holds nothing that was learned.
    constants = FAMILIES[CONFIGURATIONS[name][0]].constants
    dropped = {pattern.replace("{layer}", str(i)) for pattern in constants for i in range(LAYERS)}
    tensors = {key: tensor for key, tensor in load_file(path / WEIGHTS).items() if key not in dropped}
    assert set(back) == set(tensors)
    for key, tensor in tensors.items():
        assert back[key].dtype == tensor.dtype
        assert back[key].shape == tensor.shape
        assert torch.equal(back[key].contiguous().view(torch.uint8), tensor.view(torch.uint8)), key


def test_a_constant_of_another_value(source: Callable[[str], Path], output: Path) -> None:
    """xIELU's are buffers that a checkpoint has, and transformers takes them from there."""
    path = source("apertus")
    change_tensors(path, replaced("model.layers.2.mlp.act_fn.beta", lambda x: x + 0.25))
    assert str(refused(path, output)) == (
        f"[source.tensor] {WEIGHTS} /model.layers.2.mlp.act_fn.beta: expected 0.5, as the decoder has it, got 0.75. "
        "A model with another value of this constant can't be converted yet"
    )


@pytest.mark.parametrize(("value", "got"), [(0.505, "0.505"), (0.508, "0.508"), (float("nan"), "nan")])
def test_a_constant_that_is_nearly_the_decoders(
    source: Callable[[str], Path], output: Path, value: float, got: str
) -> None:
    path = source("apertus")
    change_tensors(path, replaced("model.layers.2.mlp.act_fn.beta", lambda x: torch.full_like(x, value)))
    text = str(refused(path, output))
    assert f"/model.layers.2.mlp.act_fn.beta: expected 0.5, as the decoder has it, got {got}. " in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_constant_as_each_dtype_keeps_it(source: Callable[[str], Path], output: Path, dtype: torch.dtype) -> None:
    path = source("apertus")
    change_tensors(path, replaced("model.layers.2.mlp.act_fn.eps", lambda x: torch.full_like(x, -1e-6).to(dtype)))
    accepted(path, output, check=False)


# Small files.


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_file_that_is_too_large_is_not_read(source: Callable[[str], Path], output: Path, name: str) -> None:
    """Of 3 GiB, without a byte of them on the disk."""
    path = source("llama")
    with (path / name).open("wb") as file:
        file.truncate(3 * 2**30)
    tracemalloc.start()
    text = str(refused(path, output))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    most = strict_json.MAX_BYTES if name == "config.json" else MAX_TEXT_BYTES
    assert text.startswith(f"[source.unreadable] {name}: expected a file of at most {most} bytes, got 3221225472 bytes")
    assert peak < 2 * most + 2**26


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_a_pipe_is_no_configuration(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")
    assert str(refused(path, output)) == (
        "[source.unreadable] config.json: expected a regular file, got a pipe, a socket or a device"
    )


def test_a_file_may_be_a_link(source: Callable[[str], Path], output: Path) -> None:
    """As in the hub's cache."""
    path = source("llama")
    (path / "config.json").rename(path / "blob")
    (path / "config.json").symlink_to("blob")
    accepted(path, output, check=False)


LINK = "expected a file of the checkpoint, got a link that leads out of it. If it is meant, copy the file itself there"


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "generation_config.json", "README.md"],
)
def test_a_link_that_leads_out_of_the_checkpoint(source: Callable[[str], Path], output: Path, name: str) -> None:
    path = source("llama")
    secret = path.parent / "secret"
    secret.write_text("a secret")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(secret)
    assert str(refused(path, output)) == f"[source.unreadable] {name}: {LINK}"
    (path / name).unlink()
    (path / name).symlink_to("../source/../secret")
    assert str(refused(path, output)) == f"[source.unreadable] {name}: {LINK}"
    (path / name).unlink()
    (path / name).symlink_to("nowhere")
    if name != "README.md":  # only its licence would be read
        assert str(refused(path, output)).startswith(f"[source.missing] {name}: expected a file {name} in source, got ")


def test_the_index_of_weights_is_no_link_out_either(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / WEIGHTS).rename(path / PIECES[0])
    (path.parent / "index").write_text(json.dumps({"weight_map": {}}))
    (path / INDEX).symlink_to(path.parent / "index")
    assert str(refused(path, output)) == f"[source.unreadable] {INDEX}: {LINK}"


def test_weights_may_be_a_link_to_anywhere(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / WEIGHTS).rename(path.parent / "elsewhere")
    (path / WEIGHTS).symlink_to(path.parent / "elsewhere")
    accepted(path, output)
    (path.parent / "elsewhere").write_text("a secret that is no weights")
    assert refused(path, output.with_name("other.splitbundle")).codes == ("source.safetensors",)


def test_the_hubs_cache_has_links_to_its_blobs(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    cache = path.parent / "models--x--y"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    path.rename(cache / "blobs")
    for blob in (cache / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    accepted(snapshot, output, check=False)
    # No other directory beside one that is called so.
    cache.rename(path.parent / "mine")
    assert str(refused(path.parent / "mine" / "snapshots" / "0123", output.with_name("c"))).endswith(LINK)


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "generation_config.json"])
@pytest.mark.parametrize("kind", ["a directory", "a pipe, a socket or a device"])
def test_what_is_no_file_is_not_passed_over(source: Callable[[str], Path], output: Path, name: str, kind: str) -> None:
    path = source("llama")
    (path / name).unlink(missing_ok=True)
    if kind == "a directory":
        (path / name).mkdir()
    elif hasattr(os, "mkfifo"):
        os.mkfifo(path / name)
    else:
        pytest.skip("no pipes with a name")
    assert str(refused(path, output)) == f"[source.unreadable] {name}: expected a regular file, got {kind}"


def test_a_generation_config_that_is_no_object(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / "generation_config.json").write_text("[1]")
    for check in (False, True):
        assert str(refused(path, output, check=check)) == (
            "[source.config] generation_config.json: expected an object, got [1]"
        )
    # What it says otherwise has no say in the golden vectors.
    (path / "generation_config.json").write_text('{"max_length": "x", "cache_implementation": {}}')
    accepted(path, output)


# Sources that change.


def changed(name: str) -> str:
    return (
        f"[source.changed] {name}: expected one file from the first byte that was read of it to the last, got another, "
        "or other bytes in it. Convert it when nobody writes it any more"
    )


def overwritten(file: Path) -> None:
    """One bit of it, with the times that it had."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with file.open("r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchanged(file: Path) -> None:
    shutil.copy2(file, file.with_name("copy"))
    file.with_name("copy").replace(file)


def removed(file: Path) -> None:
    file.rename(file.with_name("moved"))


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
@pytest.mark.parametrize("change", [overwritten, exchanged, removed])
def test_a_source_that_changes_while_it_is_converted(
    source: Callable[[str], Path], output: Path, name: str, change: Callable[[Path], None]
) -> None:
    path = source("llama")
    done = False

    def progress(what: str, at: int, total: int) -> None:
        nonlocal done
        if what == "converting" and at == total and not done:
            done = True
            change(path / name)

    assert str(refused(path, output, progress=progress)) == changed(name)
    assert done


@pytest.mark.parametrize("change", [lambda file: file.write_bytes(b"x" * 100), removed], ids=["truncated", "removed"])
def test_a_source_that_changes_before_it_is_checked(
    source: Callable[[str], Path], output: Path, change: Callable[[Path], None]
) -> None:
    path = source("llama")

    def progress(what: str, at: int, total: int) -> None:
        if what == "running the original model" and at == 0:
            change(path / WEIGHTS)

    assert str(refused(path, output, progress=progress, check=True)) == changed(WEIGHTS)


# Headers.


def test_a_header_that_names_a_tensor_twice(source: Callable[[str], Path], output: Path) -> None:
    """The library takes the last of them."""
    path = source("llama")
    data = (path / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    again = b"{" + f'"{QUERY}":{json.dumps(header[QUERY])},'.encode()
    twice = data[8 : 8 + size].replace(b"{", again, 1)
    (path / WEIGHTS).write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + size :])
    assert load_file(path / WEIGHTS).keys() == header.keys() - {"__metadata__"}
    assert str(refused(path, output)) == (
        f"[json.duplicate-key] {WEIGHTS}: expected every key once in an object, got '{QUERY}' twice"
    )


def test_a_header_that_is_too_large(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    with (path / WEIGHTS).open("wb") as file:
        file.write((2**30).to_bytes(8, "little") + b"{")
        file.truncate(2**31)
    assert str(refused(path, output)) == (
        f"[json.size] {WEIGHTS}: expected at most {2**24} bytes, got {2**24 + 1} bytes"
    )


# Counts.


@pytest.mark.parametrize(
    ("name", "fields", "text"),
    [
        ("llama", {"num_labels": 10**15}, "/num_labels: expected an integer from 0 to 100000, got 1000000000000000"),
        ("llama", {"_num_labels": -1}, "/_num_labels: expected an integer from 0 to 100000, got -1"),
        *(
            (
                "gpt_neo",
                {"attention_types": types},
                "/attention_types: expected lists of kinds that are repeated to at most 10000 layers, got [",
            )
            for types in (
                [[["global", "local"], 10**15]],
                [[["global"] * 10001, 1]],
                [[[], 10**15]],
                [["local", 10**15]],
                [[["global"], 10000], [["local"], 1]],
                [[["global"], -1], [["local"], 10001]],
            )
        ),
    ],
)
def test_counts_that_would_fill_the_memory(
    source: Callable[[str], Path], output: Path, name: str, fields: dict[str, Any], text: str
) -> None:
    """They are refused before transformers makes so many items of them: it would never end."""
    path = source(name)
    change_config(path, **fields)
    assert str(refused(path, output)).startswith(f"[source.config] config.json {text}")


def test_as_many_labels_as_anyone_has(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    change_config(path, num_labels=100_000)
    accepted(path, output)


def test_mixed_dtypes_are_kept(source: Callable[[str], Path], output: Path) -> None:
    """Norms in float32 beside matrices in bfloat16, as some checkpoints have them."""
    path = Path(shutil.copytree(checkpoint("llama", "bfloat16"), output.parent.parent / "source"))
    change_tensors(path, lambda tensors: {k: t.float() if "norm" in k else t for k, t in tensors.items()})
    made = accepted(path, output, split=(2,))
    assert made.manifest.storage.dtype == "bfloat16"
    norms = 2 * LAYERS + 1
    assert list(made.manifest.storage.exceptions.values()) == ["float32"] * norms
    back = dict(splitbundle_converter.source_tensors(made))
    for key, tensor in load_file(path / WEIGHTS).items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor)


@pytest.mark.rule("SB-I-004")
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_the_same_input_makes_the_same_bundle(name: str, output: Path) -> None:
    """Every file, but for the vectors and what holds their digest: threads change the last bits of what is computed."""
    computed = {"vectors.safetensors", "manifest.json", "SHA256SUMS"}
    for check, left_out in ((False, set()), (True, computed)):
        made = []
        for i in range(2):
            torch.set_num_threads(1 + i)
            path = output.with_name(f"{i}-{check}.splitbundle")
            made.append(accepted(checkpoint(name), path, split=(1, 3), check=check))
        one, two = ({k: v for k, v in digests(b.path).items() if k not in left_out} for b in made)
        assert one == two
        assert len(one) >= LAYERS + 3
        assert made[0].fingerprint == made[1].fingerprint == bundle(name).fingerprint


def test_a_unit_in_parts_computes_the_same(output: Path) -> None:
    """A layer above the largest file size is divided between tensors, and comes back whole."""
    made = accepted(checkpoint("llama"), output, split=(2,), max_file_size=12_000)
    assert made.manifest.units["layer-000"][0] == "layer-000-part-001.safetensors"
    assert all(len(files) > 1 for unit, files in made.manifest.units.items() if unit.startswith("layer"))
    made.verify(exact=True)
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(made.pipeline()(ids), bundle("llama").pipeline()(ids))


def test_every_pair_of_cuts_has_the_fingerprint_of_the_model(output: Path) -> None:
    for cuts in itertools.combinations(range(LAYERS + 1), 2):
        path = output.with_name(f"{cuts[0]}-{cuts[1]}.splitbundle")
        assert accepted(checkpoint("llama"), path, split=cuts, check=False).fingerprint == bundle("llama").fingerprint
