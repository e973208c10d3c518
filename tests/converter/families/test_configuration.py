"""The configurations that the converter refuses, and the messages; code of a checkpoint never runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import transformers

from splitbundle_converter.checkpoint.source import Configuration
from splitbundle_converter.families import configuration, facts
from tests.support.checkpoints import accepted, change_config, refused, said
from tests.support.yardsticks import at_most, seconds

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("model_type", ["bert", "jamba", "nosuch", "", None, 3, ["llama"], ...])
def test_a_family_that_is_not_in_the_table(source: Callable[[str], Path], output: Path, model_type: Any) -> None:
    """The type is refused whether transformers knows it or not. A missing field counts as null."""
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
        ("num_local_experts", 8, "mixtures of experts like this one"),
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
    change_config(path, model_type="jamba", **{field: value})
    assert str(refused(path, output)) == (
        "[source.family] config.json /model_type: expected one of the families that splitbundle families lists, got "
        f"'jamba'. It has {field} {value!r}, and {what} can't be converted yet"
    )


ACTIVATIONS: Final = f"one of {', '.join(facts.ACTIVATIONS)}"
UNSUPPORTED: Final = (
    "A model with this value can't be converted yet. Do not change the value: it would describe another model"
)
ROPE: Final[dict[str, Any]] = {"rope_type": "default", "rope_theta": 10000.0}
ROPE_TYPES: Final = "one of default, linear, dynamic, yarn, longrope, llama3, proportional"


@pytest.mark.parametrize(
    ("name", "fields", "pointer", "expected", "got", "hint"),
    [
        (
            "llama",
            {"sliding_window": 5},
            "/sliding_window",
            "no such field, as modeling_utils.py of transformers reads it",
            "5",
            UNSUPPORTED,
        ),
        (
            "llama",
            {"is_causal": False},
            "/is_causal",
            "no such field, as masking_utils.py of transformers reads it",
            "False",
            UNSUPPORTED,
        ),
        (
            "llama",
            {"rope_interleaved": True},
            "/rope_interleaved",
            "False",
            "True",
            UNSUPPORTED,
        ),
        (
            "qwen2",
            {"dual_chunk_attention_config": {"chunk_size": 262144}},
            "/dual_chunk_attention_config",
            "attention that isn't cut into chunks for long texts",
            "{'chunk_size': 262144}",
            UNSUPPORTED,
        ),
        (
            "gemma",
            {"final_logit_softcapping": 30.0},
            "/final_logit_softcapping",
            "no cap on scores and logits",
            "30.0",
            UNSUPPORTED,
        ),
        (
            "gpt2",
            {"is_encoder_decoder": True},
            "/is_encoder_decoder",
            "a decoder without an encoder",
            "True",
            UNSUPPORTED,
        ),
        (
            "gpt2",
            {"pruned_heads": {"0": [1]}},
            "/pruned_heads",
            "no heads that were removed",
            "{'0': [1]}",
            UNSUPPORTED,
        ),
        (
            "nemotron",
            {"num_query_groups": 3},
            "/num_query_groups",
            "2, as it is the number of key heads",
            "3",
            UNSUPPORTED,
        ),
        ("nemotron", {"kv_channels": 9}, "/kv_channels", "12, as it is the size of a head", "9", UNSUPPORTED),
        ("llama", {"n_layers": 7}, "/n_layers", "4, as it is the number of layers", "7", UNSUPPORTED),
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
    change_config(path, hidden_act="mish", is_causal=False, use_bidirectional_attention=True)
    pointers = [problem.pointer for problem in refused(path, output).problems]
    assert sorted(map(str, pointers)) == ["/hidden_act", "/is_causal", "/use_bidirectional_attention"]


@pytest.mark.parametrize(
    ("name", "field"), [("gpt2", "n_layer"), *((name, "num_hidden_layers") for name in ("qwen2", "gemma", "llama"))]
)
@pytest.mark.parametrize("count", [0, -1, 10_001, 10**9])
def test_layer_counts(source: Callable[[str], Path], output: Path, name: str, field: str, count: int) -> None:
    """The refusal comes at once, before a list of that many items is made."""
    path = source(name)

    def refuse(count: int) -> str:
        change_config(path, **{field: count}, layer_types=...)
        return said(refused(path, output))

    refuse(0)  # imports what a first refusal needs
    with at_most(20, lambda: seconds(lambda: refuse(0))):  # a list of 10**9 items would take thousands of times that
        text = refuse(count)
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
    """The message passes on the text of any kind of error, and names the field without which there is none."""
    path = source("llama")
    change_config(path, **{field: value})
    error = refused(path, output)
    assert error.codes == ("source.config",)
    own = field not in ("num_attention_heads", "head_dim") or error.problems[0].pointer is not None
    place = f"config.json /{field}" if own else "config.json"
    start = f"[source.config] {place}: expected a configuration that transformers reads, got "
    assert str(error).startswith(start)
    assert str(error).endswith(configuration.UNREADABLE)


def test_layer_types_that_do_not_fit(source: Callable[[str], Path], output: Path) -> None:
    path = source("qwen2-mixed")
    change_config(path, layer_types=["full_attention"] * 3 + ["chunked_attention"])
    assert str(refused(path, output)) == (
        "[source.config] config.json /layer_types: expected full_attention or sliding_attention for each layer, "
        f"got ['full_attention', 'full_attention', 'full_attention', 'chunked_attention']. {UNSUPPORTED}"
    )


def test_a_type_that_the_installed_transformers_does_not_have(
    source: Callable[[str], Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitbundle_converter.families.table import FAMILIES

    monkeypatch.setitem(FAMILIES, "of_tomorrow", FAMILIES["llama"])
    path = source("llama")
    change_config(path, model_type="of_tomorrow")
    assert str(refused(path, output)) == (
        "[source.family] config.json /model_type: expected a type that transformers knows, got 'of_tomorrow'. "
        f"pip install --upgrade transformers; this is {transformers.__version__}"
    )


CODE: Final = {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}


def test_code_of_a_checkpoint_never_runs(source: Callable[[str], Path], output: Path) -> None:
    """transformers' own class computes the golden vectors, so the code beside the weights has no part in them."""
    path = source("llama")
    mark = output.parent.parent / "ran"
    (path / "modeling.py").write_text(f"open({str(mark)!r}, 'w')")
    change_config(path, auto_map=CODE)
    assert str(refused(path, output)) == (
        "[source.remote-code] config.json /auto_map: expected no auto_map in a conversion without check, "
        f"got {CODE}. The checkpoint has code of its own, which may compute something else than transformers' llama. "
        "Convert it with the check, which compares the results"
    )
    accepted(path, output)
    assert not mark.exists()


def test_code_of_a_type_that_transformers_lacks(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    change_config(path, auto_map=CODE, model_type="chatglm")
    assert str(refused(path, output, check=True)) == (
        f"[source.remote-code] config.json /auto_map: expected no auto_map, got {CODE}. "
        "splitbundle never runs code of a checkpoint, and transformers has no class for this model_type"
    )


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"frobnicate": 1, "odd name ": [None, {"a": 1e308}], "": {"b": []}, "to_dict": 3, "__class__": "x"}),
        ("llama", {"sliding_window": None, "cross_attention_hidden_size": None, "num_experts": None}),
        ("llama", {"quantization_config": None, "compression_config": {}, "final_logit_softcapping": None}),
        ("llama", {"layer_types": ["full_attention"] * 4, "is_causal": True}),
        ("llama", {"unk_token_id": 0, "_model_name_or_path": "x", "rope_interleaved": False}),
        ("llama", {"max_sequence_length": 128, "pad_token_id": 0, "return_dict": False, "use_cache": None}),
        ("llama", {"pad_token_id": 61, "attention_dropout": 0.5, "problem_type": "regression", "num_labels": 1}),
        ("llama", {"n_layers": 4, "n_heads": 6, "num_layers": None, "d_model": "large"}),
        ("gpt2", {"rotary_dim": 4, "chunk_size_feed_forward": 2, "output_past": True, "pruned_heads": {}}),
        ("gpt2", {"embd_pdrop": 0.5, "summary_type": "mean", "output_attentions": True, "initializer_range": 0.5}),
        ("nemotron", {"kv_channels": 12, "num_query_groups": 2, "hidden_dropout": 0.0}),
        ("starcoder2", {"attention_softmax_in_fp32": True, "scale_attn_weights": True, "mlp_type": None}),
        ("gptj", {"rotary": None}),
        ("llama", {"rope_interleaved": None, "attention_bias": None, "mlp_bias": None, "tie_word_embeddings": None}),
        ("llama", {"self": 1, "config": "x", "quantization_config": {}, "quantization_bits": 0}),
        ("falcon", {"alibi": None}),
        ("gpt_neox", {"attention_dropout_prob": 0, "hidden_dropout_prob": 0}),
    ],
)
def test_fields_that_change_nothing(
    source: Callable[[str], Path], output: Path, name: str, fields: dict[str, Any]
) -> None:
    """The bundle computes what the original computes, and has the fingerprint of a bundle without the fields."""
    path = source(name)
    plain = accepted(path, output).fingerprint
    change_config(path, **fields)
    assert accepted(path, output, force=True).fingerprint == plain


def test_unused_fields_are_named_once_and_kept(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    deep: Any = []
    for _ in range(60):
        deep = [deep]
    odd = {f"odd_{i}": i for i in range(12)}
    change_config(path, frobnicate={"a": [1, None]}, large="x" * 5000, deep=deep, torch_dtype="float32", **odd)
    notes: list[str] = []
    made = accepted(path, output, notes=notes.append, tokenizer=False)
    assert notes == [
        "config.json has 15 fields that transformers does not use for the logits: frobnicate, large, deep, "
        f"{', '.join(list(odd)[:9])} and 3 more. The bundle's manifest keeps them as a description."
    ]
    kept = made.manifest.extensions["configuration"]["not_used"]
    assert kept == {
        "frobnicate": {"a": [1, None]},
        "large": "(a value of 5002 bytes)",
        "deep": "(a value of 122 bytes)",
        **odd,
    }


def test_a_field_that_is_read_under_a_computed_name(
    source: Callable[[str], Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source text does not show such a read. The check sees the original class ask for it."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def asking(self: Any, *arguments: Any, **named: Any) -> Any:
        getattr(self.config, "_".join(["secret", "scale"]), None)
        return forward(self, *arguments, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", asking)
    path = source("llama")
    change_config(path, secret_scale=2.0)
    assert str(refused(path, output, check=True)) == (
        "[source.config] config.json /secret_scale: expected no such field, as the original class asked for it while "
        f"it computed, got 2.0. {UNSUPPORTED}"
    )
    assert not hasattr(transformers.PreTrainedConfig, "__getattr__")


def test_an_error_of_the_original_class_names_the_field(
    source: Callable[[str], Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    built = LlamaAttention.__init__

    def failing(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        if config.rms_norm_eps > 0.5:
            raise ArithmeticError("no such norm")
        built(self, config, *arguments, **named)

    monkeypatch.setattr(LlamaAttention, "__init__", failing)
    path = source("llama")
    change_config(path, rms_norm_eps=0.75)
    assert str(refused(path, output, check=True)) == (
        "[source.config] config.json /rms_norm_eps: expected a configuration with which transformers' llama builds and "
        "runs, got 0.75, with which it raises ArithmeticError: no such norm. Compare the field with the published "
        "configuration of the model"
    )


def test_an_error_that_no_field_causes(
    source: Callable[[str], Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    def failing(self: Any, *arguments: Any, **named: Any) -> Any:
        raise KeyError("nothing")

    monkeypatch.setattr(LlamaForCausalLM, "forward", failing)
    assert str(refused(source("llama"), output, check=True)) == (
        "[source.config] config.json: expected a configuration with which transformers' llama builds and runs, got "
        "KeyError: 'nothing'. check=False converts without the original model, and without golden vectors"
    )


def test_a_quantised_checkpoint(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    change_config(path, quantization_config={"quant_method": "quark"})
    assert str(refused(path, output)) == (
        "[source.quantised] config.json /quantization_config: expected weights that aren't quantized, or one of the "
        "methods fp8, fbgemm_fp8, mxfp4, modelopt, compressed-tensors, gptq, awq, bitsandbytes, mlx, got 'quark'. "
        "Convert the checkpoint that was quantized, or dequantize this one with the library that made it"
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            b"[]",
            "[source.config] config.json: expected an object, got []",
        ),
        (
            b"{",
            "[json.syntax] config.json byte 1: expected one JSON document (RFC 8259), "
            "got Expecting property name enclosed in double quotes",
        ),
        (
            b'{"model_type": "llama", "model_type": "gpt2"}',
            "[json.duplicate-key] config.json: expected every key once in an object, got 'model_type' twice",
        ),
        (
            b'{"rms_norm_eps": 1e999}',
            "[json.number] config.json: expected a number that a 64-bit float can hold, got '1e999'",
        ),
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
    assert said(refused(path, output)) == text


@pytest.mark.parametrize("value", ["attacker/evil@main:fn", "kernels-community/evil", "flash_attention_2"])
@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
def test_no_field_of_a_checkpoint_chooses_the_code_that_computes(
    source: Callable[[str], Path], output: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """transformers would fetch and run code of the hub under such a name, with the library ``kernels``."""
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
    """With peft installed, transformers would apply the adapter, to the weights of another base."""
    path = source("llama")
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "attacker/evil"}))
    assert str(refused(path, output)) == (
        "[source.config] adapter_config.json: expected weights without an adapter beside them, got an adapter's "
        "configuration. Merge it into the model, or remove it"
    )


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
    """The numbers are refused before transformers makes that many items, which would never end."""
    path = source(name)
    change_config(path, **fields)
    assert str(refused(path, output)).startswith(f"[source.config] config.json {text}")


def test_as_many_labels_as_anyone_has(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    change_config(path, num_labels=100_000)
    accepted(path, output)
