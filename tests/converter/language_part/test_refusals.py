"""Language parts that are refused, and every class of the installed transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import save_file

import splitbundle_converter
from splitbundle import BundleError
from splitbundle_converter.families.composites import COMPOSITES
from splitbundle_converter.families.table import FAMILIES
from splitbundle_converter.quiet_transformers import quiet
from tests.support.checkpoints import MISSING, said
from tests.support.language_parts import Tensors, convert, make, refused
from tests.support.models import VOCAB, checkpoint
from tests.support.models_composite import make_composite, make_config, save, stored_tensors, text_fields

pytestmark = pytest.mark.usefixtures("one_thread")
UNSUPPORTED: Final = (
    "A model with this value can't be converted yet. Do not change the value: it would describe another model"
)
ONLY: Final = "Other families can't be converted; splitbundle never guesses at one"
LISTED: Final = "one of the families that splitbundle families lists"


def change_text(path: Path, **fields: Any) -> Path:
    """Set fields of the configuration of the language part; ``...`` removes one."""
    config = json.loads((path / "config.json").read_text())
    text = {name: value for name, value in (config["text_config"] | fields).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config | {"text_config": text}))
    return path


# What is refused.


def test_without_part_the_hint_says_what_to_do(tmp_path: Path) -> None:
    source = make(tmp_path, "llava")
    assert str(refused(source, part=None)) == (
        f"[source.family] config.json /model_type: expected {LISTED}, got 'llava'. "
        'This checkpoint\'s language part is llama: convert it with part="language"'
    )
    change_text(source, model_type=...)
    assert str(refused(source, part=None)).endswith('language part is llama: convert it with part="language"')
    change_text(source, model_type="jamba")
    hint = f"{ONLY}. This checkpoint's language part is 'jamba', and can't be converted alone either"
    assert str(refused(source, part=None)).endswith(f"got 'llava'. {hint}")


def test_a_language_model_has_no_parts(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(checkpoint("llama"), tmp_path / "x.splitbundle", part="language")
    assert str(caught.value) == (
        "[usage.part] part: expected a checkpoint that has other parts than a language model, got model_type 'llama', "
        "which is a language model as a whole. Convert it without part="
    )


def test_a_part_that_is_not_known(tmp_path: Path) -> None:
    assert said(refused(make(tmp_path, "llava"), part="vision")) == (
        "[usage.part] part: expected one of language, got 'vision'"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "jamba"},
            f"[source.family] config.json /text_config/model_type: expected one of {', '.join(sorted(FAMILIES))}, got "
            "'jamba'",
        ),
        (
            {"model_type": 3},
            f"[source.family] config.json /text_config/model_type: expected one of {', '.join(sorted(FAMILIES))}, got "
            "3",
        ),
        (
            {"auto_map": {"AutoConfig": "x.Y"}},
            "[source.remote-code] config.json /text_config/auto_map: expected no auto_map in a conversion without "
            "check, got {'AutoConfig': 'x.Y'}. The checkpoint has code of its own, which may compute something else "
            "than transformers' llama. Convert it with the check, which compares the results",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "[source.quantised] config.json /text_config/quantization_config: expected weights that aren't quantized, "
            "or one of the methods fp8, fbgemm_fp8, mxfp4, modelopt, compressed-tensors, gptq, awq, bitsandbytes, mlx, "
            "got {'bits': 4}. Convert the checkpoint that was quantized, or dequantize this one with the library that "
            "made it",
        ),
        (
            {"num_hidden_layers": 10**9},
            "[source.config] config.json /text_config/num_hidden_layers: expected an integer from 1 to 10000, got "
            "1000000000",
        ),
        (
            {"is_causal": False},
            "[source.config] config.json /text_config/is_causal: expected no such field, as masking_utils.py of "
            f"transformers reads it, got False. {UNSUPPORTED}",
        ),
        (
            {"hidden_act": "mish"},
            "[source.config] config.json /text_config/hidden_act: expected one of silu, swish, gelu, gelu_python, "
            "gelu_new, gelu_fast, gelu_pytorch_tanh, gelu_python_tanh, relu, relu2, xielu, got 'mish'. " + UNSUPPORTED,
        ),
    ],
)
def test_a_language_part_that_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert said(refused(change_text(make(tmp_path, "llava"), **fields))) == message


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        (
            "llava",
            {"is_causal": False},
            "[source.config] config.json /is_causal: expected no such field, as masking_utils.py of transformers reads "
            f"it, got False. {UNSUPPORTED}",
        ),
        (
            "llava",
            {"is_encoder_decoder": True},
            "[source.config] config.json /is_encoder_decoder: expected a decoder without an encoder, got True. "
            f"{UNSUPPORTED}",
        ),
        (
            "llava",
            {"text_config": []},
            "[source.config] config.json /text_config: expected an object, got []. Fetch the file again from where the "
            "model was published",
        ),
        (
            "ovis2",
            {"vocab_size": 77},
            f"[source.config] config.json /vocab_size: expected 61, as in text_config, got 77. {UNSUPPORTED}",
        ),
        (
            "llava",
            {"auto_map": {"AutoModel": "x.Y"}},
            "[source.remote-code] config.json /auto_map: expected no auto_map in a conversion without check, got "
            "{'AutoModel': 'x.Y'}. The checkpoint has code of its own, which may compute something else than "
            "transformers' llava. Convert it with the check, which compares the results",
        ),
        (
            "llava",
            {"quantization_config": {"bits": 4}},
            "[source.quantised] config.json /quantization_config: expected weights that aren't quantized, "
            "or one of the methods fp8, fbgemm_fp8, mxfp4, modelopt, compressed-tensors, gptq, awq, bitsandbytes, mlx, "
            "got {'bits': 4}. Convert the checkpoint that was quantized, or dequantize this one with the library that "
            "made it",
        ),
    ],
)
def test_a_field_beside_the_language_part_that_is_refused(
    model_type: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert str(refused(make(tmp_path, model_type, **fields))) == message


@pytest.mark.parametrize("inside", ["text_config", "vision_config"])
def test_counts_that_would_fill_the_memory(inside: str, tmp_path: Path) -> None:
    source = make(tmp_path, "llava")
    config = json.loads((source / "config.json").read_text())
    config[inside]["num_labels"] = 10**15
    (source / "config.json").write_text(json.dumps(config))
    text = f"[source.config] config.json /{inside}/num_labels: expected an integer from 0 to 100000, got 1000000"
    assert str(refused(source)).startswith(text)


def test_attention_to_what_follows_is_refused(tmp_path: Path) -> None:
    """PaliGemma's default is refused: text after a prefix would see the whole prefix."""
    source = change_text(make(tmp_path, "paligemma"), use_bidirectional_attention=None)
    assert str(refused(source)) == (
        "[source.config] config.json /text_config/use_bidirectional_attention: expected None or False, got True. "
        + UNSUPPORTED
    )


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    """The checkpoint's class would ignore this part of the head."""
    source = make(tmp_path, "llava")
    phi = {name: value for name, value in text_fields("phi").items() if name != "head_dim"}
    config = json.loads((source / "config.json").read_text()) | {"text_config": phi}
    (source / "config.json").write_text(json.dumps(config))
    assert str(refused(source)) == (
        "[source.config] config.json /text_config/model_type: expected a type of model whose head has no bias, as that "
        f"of LlavaForConditionalGeneration has none, got 'phi'. {UNSUPPORTED}"
    )


def test_a_type_whose_scale_the_class_reads_otherwise_is_refused(tmp_path: Path) -> None:
    source = change_text(make(tmp_path, "hyperclovax_vision_v2"), model_type="granite")
    assert said(refused(source)) == (
        "[source.family] config.json /text_config/model_type: expected one of hyperclovax, got 'granite'"
    )


def test_a_tower_that_needs_another_library(tmp_path: Path) -> None:
    try:
        import timm  # type: ignore[import-not-found]  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        pytest.skip("it is installed here")
    llava = stored_tensors(make_composite(make_config("llava")))
    source = save(tmp_path / "source", make_config("perception_lm"), llava)
    error = refused(source, check=True)
    assert error.codes == ("backend.missing",)
    assert str(error).startswith("[backend.missing] expected the libraries that PerceptionLMForConditionalGeneration")
    assert str(error).endswith("check=False converts without the original model, and without golden vectors")
    assert convert(source, check=False).manifest.vectors is None


EARLIER: Final = {
    "_name_or_path": "someone/model",
    "add_cross_attention": False,
    "architectures": ["LlamaForCausalLM"],
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "diversity_penalty": 0.0,
    "early_stopping": False,
    "length_penalty": 1.0,
    "num_beams": 1,
    "pruned_heads": {},
    "tie_encoder_decoder": False,
    "torch_dtype": "float16",
    "typical_p": 1.0,
    "use_bfloat16": False,
}


def test_configurations_of_earlier_versions(tmp_path: Path) -> None:
    """Old configurations repeat every option of generation. An option with an effect is refused."""
    fields = {"ignore_index": -100, "vocab_size": VOCAB, "torch_dtype": "float16", "architectures": ["Llava"]}
    source = change_text(make(tmp_path, "llava", **fields), **EARLIER)
    assert convert(source).manifest.vectors is not None
    assert str(refused(change_text(source, add_cross_attention=True))) == (
        "[source.config] config.json /text_config/add_cross_attention: expected a decoder without an encoder, got "
        f"True. {UNSUPPORTED}"
    )


# Tensors.

BASE: Final = "language_model.model."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: {n: t for n, t in tensors.items() if n != f"{BASE}layers.1.mlp.up_proj.weight"},
            "[source.tensor] source: expected the 20 tensors of the language part as text_config describes it below "
            "'language_model.model.', got 19; the first that isn't there is "
            f"language_model.model.layers.1.mlp.up_proj.weight. {MISSING}",
        ),
        (
            lambda tensors: {n: t for n, t in tensors.items() if "embed_tokens" not in n},
            "[source.tensor] source: expected a language part's tensor 'embed_tokens.weight', with any prefix, "
            "got none",
        ),
        (
            lambda tensors: tensors | {n.replace(BASE, "talker."): t.clone() for n, t in tensors.items() if BASE in n},
            "[source.tensor] source: expected one language part with every tensor of it, got several: "
            "language_model.model.embed_tokens.weight, talker.embed_tokens.weight",
        ),
        (
            lambda tensors: tensors | {"lm_head.weight": tensors["language_model.lm_head.weight"].clone()},
            "[source.tensor] source: expected one head of the language part, got several: "
            "language_model.lm_head.weight, lm_head.weight",
        ),
        (
            lambda tensors: tensors | {f"{BASE}layers.2.mlp.up_proj.weight": torch.zeros(48, 32)},
            "[source.tensor] model.safetensors /language_model.model.layers.2.mlp.up_proj.weight: expected only the "
            "tensors of a model of 2 layers as its configuration describes it, got an extra tensor F32 [48, 32]. Use "
            "the configuration that was published with these weights",
        ),
        (
            lambda tensors: tensors | {"language_model.lm_head.bias": torch.ones(VOCAB)},
            "[source.tensor] model.safetensors /language_model.lm_head.bias: expected only the tensors of a model of 2 "
            "layers as its configuration describes it, got an extra tensor F32 [61]. Use the configuration that "
            "was published with these weights",
        ),
        (
            lambda tensors: tensors | {f"{BASE}norm.weight": torch.zeros(33)},
            "[source.tensor] model.safetensors /language_model.model.norm.weight: expected shape [32], got [33]. "
            f"{MISSING}",
        ),
    ],
)
def test_tensors_that_are_refused(change: Callable[[Tensors], Tensors], message: str, tmp_path: Path) -> None:
    assert said(refused(make(tmp_path, "llava", change))) == message


def test_a_tower_with_a_language_parts_names_is_no_language_part(tmp_path: Path) -> None:
    """A module with only some of the names is not taken for the language part."""

    def change(tensors: Tensors) -> Tensors:
        other = {n.replace(BASE, "tower."): t.clone() for n, t in tensors.items() if BASE in n and ".1." not in n}
        return tensors | other

    bundle = convert(make(tmp_path, "llava", change))
    modules = {item["module"]: item["tensors"] for item in bundle.manifest.extensions["part"]["left_out"]}
    assert modules["tower"] == 11


def test_another_class_than_the_tables_is_a_parity_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check uses the checkpoint's own class. If it scaled its logits, conversion would fail."""
    import transformers

    real = transformers.LlavaForConditionalGeneration

    class Scaling(real):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.001
            return output

    source = make(tmp_path, "llava")
    monkeypatch.setattr(transformers, "LlavaForConditionalGeneration", Scaling)
    assert refused(source, check=True).codes[0] == "parity"


# Every class of the installed transformers.


def test_every_class_with_a_known_language_part_is_in_the_table_or_refused_by_its_name(tmp_path: Path) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known, others = [], []
    for model_type in CONFIG_MAPPING:
        with quiet():
            try:
                text = getattr(CONFIG_MAPPING[model_type](), "text_config", None)
            except Exception:  # noqa: BLE001  # whatever its class asks for: it has no default language part
                continue
        if getattr(text, "model_type", None) in FAMILIES:
            (known if model_type in COMPOSITES else others).append(model_type)
            if model_type in COMPOSITES:
                assert COMPOSITES[model_type].text_type == text.model_type
                continue
            fields = {"model_type": model_type, "text_config": {"model_type": text.model_type}}
            source = tmp_path / model_type / "source"
            source.mkdir(parents=True)
            (source / "config.json").write_text(json.dumps(fields))
            save_file({"nothing": torch.zeros(1)}, source / "model.safetensors")
            for part in (None, "language"):
                problem = refused(source, part=part).problems[0]
                assert (problem.code, problem.got) == ("source.family", repr(model_type))
    assert set(known) == set(COMPOSITES)
    print(f"{len(known)} composite classes with parity; refused by name: {', '.join(others)}")
