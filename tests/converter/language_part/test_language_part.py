"""The language part of checkpoints that have others: what it computes, what is left out, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import splitbundle
import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.cli import main
from splitbundle_converter.composites import COMPOSITES
from splitbundle_converter.families import FAMILIES
from splitbundle_converter.source import quiet
from tests.support.models import TOLERANCE, VOCAB, checkpoint, relative
from tests.support.models_composite import (
    LAYERS,
    language_parameters,
    make_composite,
    make_config,
    save,
    stored_tensors,
    text_fields,
)
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, Tensor]
UNSUPPORTED: Final = "A model with this value can't be converted yet; with another value it would be another model"
ONLY: Final = "Other families can't be converted; splitbundle never guesses at one"
LISTED: Final = "one of the families that splitbundle families lists"
CUTS: Final = ((1,), (0, LAYERS))
IDS: Final = torch.randint(VOCAB, (2, 13), generator=torch.Generator().manual_seed(3))


def convert(source: Path, name: str = "b", **named: Any) -> Bundle:
    """The bundle of a checkpoint's language part, held against the original."""
    output = source.parent / f"{name}.splitbundle"
    return splitbundle_converter.convert(source, output, **({"part": "language"} | named))


def refused(source: Path, **named: Any) -> BundleError:
    """The error that a conversion ends with. It leaves nothing behind."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(BundleError) as caught:
        convert(source, **({"check": False} | named))
    assert sorted(source.parent.iterdir()) == before
    return caught.value


def expected_of(model: Any, ids: Tensor = IDS) -> Tensor:
    """What the whole model makes of text. (A class that needs an image holds a language model that doesn't.)"""
    whole = COMPOSITES[model.config.model_type].whole
    with torch.no_grad():
        logits: Tensor = (model.language_model if whole else model)(input_ids=ids).logits
    return logits


def check_parity(bundle: Bundle, model: Any, what: str) -> None:
    """One call, and decoding with a cache: a prefill, single tokens, and a piece."""
    expected, pipeline = expected_of(model), bundle.pipeline()
    session = pipeline.session(len(IDS), IDS.shape[1])
    pieces = [pipeline(piece, session=session) for piece in IDS.split([4, 1, 1, 5, 1, 1], dim=1)]
    for how, got in (("prefill", pipeline(IDS)), ("decoding", torch.cat(pieces, dim=1))):
        difference = relative(got, expected)
        assert difference <= TOLERANCE, f"{what}, {how}: {difference:.3g}"


def make(tmp_path: Path, model_type: str, change: Callable[[Tensors], Tensors] | None = None, **changes: Any) -> Path:
    """A checkpoint of the type, with changes to its tensors and its config.json."""
    config = make_config(model_type)
    tensors = stored_tensors(make_composite(config))
    return save(tmp_path / "source", config, tensors if change is None else change(tensors), **changes)


def change_text(path: Path, **fields: Any) -> Path:
    """Sets fields of the language part's configuration; ``...`` removes one."""
    config = json.loads((path / "config.json").read_text())
    text = {name: value for name, value in (config["text_config"] | fields).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config | {"text_config": text}))
    return path


# What it computes.


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_the_language_part_computes_what_the_whole_model_does(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every row of the table, with its default type of language part and the names that transformers saves."""
    if model_type == "perception_lm":
        without_tower(monkeypatch)
    model = make_composite(make_config(model_type), seed=sorted(COMPOSITES).index(model_type))
    tensors = stored_tensors(model)
    source = save(tmp_path / "source", model.config, tensors)
    for cuts in CUTS:
        bundle = convert(source, f"b{len(cuts)}", split=cuts)
        check_parity(bundle, model, f"{model_type}, cuts {cuts}")
    bundle.verify(exact=True)
    assert bundle.manifest.model.family == COMPOSITES[model_type].text_type
    part = bundle.manifest.extensions["part"]
    assert (part["name"], part["of"], part["class"]) == ("language", model_type, type(model).__name__)
    restored = dict(splitbundle_converter.source_tensors(bundle))
    for name, tensor in restored.items():
        assert torch.equal(tensor, tensors[name]), name
    left = tensors.keys() - restored.keys()
    assert sum(item["tensors"] for item in part["left_out"]) == len(left)
    assert len(restored) >= len({id(tensor) for tensor in language_parameters(model).values()})


def without_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Perception LM's tower needs a library that isn't among the tests'; it has no say in text."""
    from transformers.models.perception_lm import modeling_perception_lm

    real = modeling_perception_lm.AutoModel

    class Towerless:
        @staticmethod
        def from_config(config: Any) -> Any:
            return torch.nn.Identity() if config.model_type == "timm_wrapper" else real.from_config(config)

    monkeypatch.setattr(modeling_perception_lm, "AutoModel", Towerless)


_CLIP: Final = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
_SIGLIP: Final = {name: value for name, value in _CLIP.items() if name != "projection_dim"} | {
    "model_type": "siglip_vision_model"
}
_AUDIO: Final = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "num_mel_bins": 8,
    "max_source_positions": 10,
}
_SAVED: Final[dict[str, dict[str, Any]]] = {
    "llava": {"vision_config": _CLIP},
    "llava_next": {"vision_config": _CLIP},
    "llava_onevision": {"vision_config": _SIGLIP},
    "video_llava": {"vision_config": _CLIP},
    "vipllava": {"vision_config": _CLIP, "vision_feature_layer": [-1, -2, -1, -2, 1]},
    "paligemma": {"vision_config": _SIGLIP, "projection_dim": 32},
    "gemma3": {"vision_config": _SIGLIP, "mm_tokens_per_image": 4},
    "aya_vision": {"vision_config": _SIGLIP},
    "idefics3": {"vision_config": _SIGLIP | {"model_type": "idefics3_vision"}},
    "smolvlm": {"vision_config": _SIGLIP | {"model_type": "smolvlm_vision"}},
    "qwen2_audio": {"audio_config": _AUDIO | {"model_type": "qwen2_audio_encoder"}},
    "fuyu": {"patch_size": 2},
}


@pytest.mark.parametrize("model_type", _SAVED)
def test_checkpoints_as_transformers_saves_and_loads_them(model_type: str, tmp_path: Path) -> None:
    """Saved whole, converted, and compared with the whole model loaded again."""
    import transformers

    config = make_config(model_type, **_SAVED[model_type])
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(5)
        original = getattr(transformers, COMPOSITES[model_type].class_name)
        made = original(config).float()
        with torch.no_grad():
            for parameter in language_parameters(made).values():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        made.save_pretrained(tmp_path / "source")
        model = original.from_pretrained(tmp_path / "source", dtype=torch.float32, attn_implementation="eager").eval()
    for cuts in CUTS:
        check_parity(convert(tmp_path / "source", f"b{len(cuts)}", split=cuts), model, f"{model_type}, cuts {cuts}")


@pytest.mark.parametrize(
    "text_type", ["mistral", "qwen2", "qwen3", "phi3", "granite", "gpt_neox", "olmo2", "starcoder2"]
)
def test_other_types_of_language_part(text_type: str, tmp_path: Path) -> None:
    """A llava of another family's model, granite's and gpt-neox's with heads of their own kind among them."""
    absent = {"gpt_neox": ("num_key_value_heads", "head_dim"), "phi3": ("head_dim",), "starcoder2": ("head_dim",)}
    fields = {name: value for name, value in text_fields(text_type).items() if name not in absent.get(text_type, ())}
    fields |= {"logits_scaling": 8.0} if text_type == "granite" else {}
    model = make_composite(make_config("llava", fields))
    source = save(tmp_path / "source", model.config, stored_tensors(model))
    bundle = convert(source, split=(1,))
    check_parity(bundle, model, text_type)
    assert bundle.manifest.extensions["part"]["not_applied"] == (
        {"multiplier": 0.125} if text_type == "granite" else {}
    )


LAYOUTS: Final = {
    "nested": ("language_model.model.", "language_model.lm_head.weight"),
    "beside": ("model.language_model.", "lm_head.weight"),
    "within": ("model.language_model.", "model.language_model.lm_head.weight"),
    "bare": ("language_model.", "lm_head.weight"),
    "deep": ("x.y.language_model.model.", "x.y.language_model.lm_head.weight"),
}


def renamed(base: str, head: str) -> Callable[[Tensors], Tensors]:
    """A change from the names that transformers saves to others."""

    def change(tensors: Tensors) -> Tensors:
        named = {name.replace("language_model.model.", base, 1): tensor for name, tensor in tensors.items()}
        return {name.replace("language_model.lm_head.weight", head, 1): tensor for name, tensor in named.items()}

    return change


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_names(layout: str, tmp_path: Path) -> None:
    """Older and newer ones: the language part is where every tensor of it is."""
    base, head = LAYOUTS[layout]
    model = make_composite(make_config("llava"))
    tensors = renamed(base, head)(stored_tensors(model))
    bundle = convert(save(tmp_path / "source", model.config, tensors), split=(1,))
    check_parity(bundle, model, layout)
    restored = dict(splitbundle_converter.source_tensors(bundle))
    assert restored.keys() == {name for name in tensors if name.startswith(base) or name == head}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in restored.items())


def test_a_module_whose_name_begins_as_the_language_parts_is_left_out(tmp_path: Path) -> None:
    """``model.language_model.`` ends as the prefix ``model.`` does, and that doesn't make it one."""
    change = renamed(*LAYOUTS["beside"])
    adapter = {"model.language_adapter.weight": torch.zeros(3)}
    source = make(tmp_path, "llava", lambda tensors: change(tensors) | adapter)
    part = convert(source, check=False).manifest.extensions["part"]
    assert {"module": "model.language_adapter", "tensors": 1, "parameters": 3} in part["left_out"]


def test_16_bits(tmp_path: Path) -> None:
    source = make(tmp_path, "llava", lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert convert(source).manifest.storage.dtype == "bfloat16"
    assert convert(source, "f32", dtype="float32").manifest.storage.dtype == "float32"


# What is left out.


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: Tensors) -> Tensors:
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith("language_model.")}
        other = {"vision_tower.a.weight": torch.zeros(30, 40), "vision_tower.a.bias": torch.zeros(30)}
        return kept | other | {"image_newline": torch.zeros(7), "model.projector.x.weight": torch.zeros(2, 1)}

    source = make(tmp_path, "aya_vision", change)
    output = tmp_path / "x.splitbundle"
    assert main(["convert", str(source), "-o", str(output), "--part", "language", "--split", "1"]) == 0
    told = capsys.readouterr()
    lines = [line.strip() for line in told.out.splitlines() if line.startswith("  left out")]
    assert lines == [
        "left out    image_newline: 1 tensor, 7 parameters",
        "left out    model.projector: 1 tensor, 2 parameters",
        "left out    vision_tower: 2 tensors, 1,230 parameters",
        "left out    the head's multiplier (0.0625), which AyaVisionForConditionalGeneration doesn't apply either",
    ]
    assert main(["inspect", str(output)]) == 0
    assert "part         language of aya_vision; without image_newline, model.projector, vision_tower" in (
        capsys.readouterr().out
    )
    part = {
        "name": "language",
        "of": "aya_vision",
        "class": "AyaVisionForConditionalGeneration",
        "left_out": [
            {"module": "image_newline", "tensors": 1, "parameters": 7},
            {"module": "model.projector", "tensors": 1, "parameters": 2},
            {"module": "vision_tower", "tensors": 2, "parameters": 1230},
        ],
        "not_applied": {"multiplier": 0.0625},
    }
    assert splitbundle.open(output).manifest.extensions == {"part": part}
    assert main(["convert", str(source), "-o", str(output), "--part", "language", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["part"] == part
    # Cutting again says it still.
    again = splitbundle_converter.resplit(output, tmp_path / "again.splitbundle", split=[0])
    assert again.manifest.extensions == {"part": part}


# Which tie counts.


@pytest.mark.parametrize("in_text", [False, True])
@pytest.mark.parametrize("at_top", [False, True])
@pytest.mark.parametrize("model_type", ["mistral3", "llava"])
def test_the_tie_of_the_class_that_has_the_head_counts(
    model_type: str, at_top: bool, in_text: bool, tmp_path: Path
) -> None:
    """Not that of the language part. (Some classes take it over from there, Llava's among them.)"""
    text = text_fields(COMPOSITES[model_type].text_type) | {"tie_word_embeddings": in_text}
    model = make_composite(make_config(model_type, text, tie_word_embeddings=at_top))
    tied = at_top or (in_text and model_type == "llava")
    tensors = stored_tensors(model)
    if tied:
        del tensors["language_model.lm_head.weight"]
    source = save(tmp_path / "source", model.config, tensors, tie_word_embeddings=at_top)
    bundle = convert(source)
    assert bundle.architecture.head.tied is tied
    check_parity(bundle, model, f"{at_top}, {in_text}")


def test_where_nothing_is_said_the_tensors_say(tmp_path: Path) -> None:
    """transformers ties by a class's default, but not what is stored twice with different values."""
    config = make_config("mistral3", tie_word_embeddings=False)
    model = make_composite(config)
    source = save(tmp_path / "source", config, stored_tensors(model), tie_word_embeddings=...)
    bundle = convert(source)
    assert not bundle.architecture.head.tied
    check_parity(bundle, model, "untied")
    change = load_file(source / "model.safetensors")
    change["language_model.lm_head.weight"] = change["language_model.model.embed_tokens.weight"].clone()
    save_file(change, source / "model.safetensors", {"format": "pt"})
    assert convert(source, "tied").architecture.head.tied
    error = refused(source_with(source, tie_word_embeddings=True, **{"language_model.lm_head.weight": 0.5}))
    assert "expected the values of language_model.model.embed_tokens.weight, as tie_word_embeddings is true" in str(
        error
    )


def source_with(source: Path, tie_word_embeddings: bool, **scales: float) -> Path:
    """Sets the tie, and scales tensors."""
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": tie_word_embeddings}
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: tensor * scales.get(name, 1.0) for name, tensor in tensors.items()},
        source / "model.safetensors",
        {"format": "pt"},
    )
    return source


def test_a_head_that_is_nowhere(tmp_path: Path) -> None:
    source = make(tmp_path, "llava", lambda tensors: {n: t for n, t in tensors.items() if "lm_head" not in n})
    assert str(refused(source)) == (
        "[source.tensor] source: expected the language part's lm_head.weight, as tie_word_embeddings isn't true, got "
        "none. The checkpoint isn't whole, or its head is the embedding: then tie_word_embeddings has to be true, at "
        "the top level of config.json where the class has the head"
    )


# What is refused.


def test_without_part_the_hint_says_what_to_do(tmp_path: Path) -> None:
    source = make(tmp_path, "llava")
    assert str(refused(source, part=None)) == (
        f"[source.family] config.json /model_type: expected {LISTED}, got 'llava'. "
        "This checkpoint's language part is llama: convert it with --part language"
    )
    change_text(source, model_type=...)
    assert str(refused(source, part=None)).endswith("language part is llama: convert it with --part language")
    change_text(source, model_type="mixtral")
    hint = f"{ONLY}. This checkpoint's language part is 'mixtral', and can't be converted alone either"
    assert str(refused(source, part=None)).endswith(f"got 'llava'. {hint}")


def test_a_language_model_has_no_parts(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(checkpoint("llama"), tmp_path / "x.splitbundle", part="language")
    assert str(caught.value) == (
        "[usage.part] part: expected a checkpoint that has other parts than a language model, got model_type 'llama', "
        "which is one as a whole. Convert it without --part"
    )


def test_a_part_that_is_not_known(tmp_path: Path) -> None:
    assert str(refused(make(tmp_path, "llava"), part="vision")) == (
        "[usage.part] part: expected one of language, got 'vision'"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "mixtral"},
            f"[source.family] config.json /text_config/model_type: expected one of {', '.join(sorted(FAMILIES))}, got "
            "'mixtral'",
        ),
        (
            {"model_type": 3},
            f"[source.family] config.json /text_config/model_type: expected one of {', '.join(sorted(FAMILIES))}, got "
            "3",
        ),
        (
            {"auto_map": {"AutoConfig": "x.Y"}},
            "[source.remote-code] config.json /text_config/auto_map: expected no auto_map, got {'AutoConfig': 'x.Y'}. "
            "splitbundle never runs code of a checkpoint. transformers computes llama itself: if these are its "
            "weights, remove auto_map",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "[source.quantised] config.json /text_config/quantization_config: expected weights that aren't quantised, "
            "got {'bits': 4}. Convert the checkpoint that was quantised",
        ),
        (
            {"num_hidden_layers": 10**9},
            "[source.config] config.json /text_config/num_hidden_layers: expected an integer from 1 to 10000, got "
            "1000000000",
        ),
        (
            {"frobnicate": 1},
            "[source.config] config.json /text_config/frobnicate: expected a field that this family is known to have, "
            "got 1. Remove it if it changes nothing",
        ),
        (
            {"hidden_act": "mish"},
            "[source.config] config.json /text_config/hidden_act: expected one of silu, swish, gelu, gelu_python, "
            "gelu_new, gelu_fast, gelu_pytorch_tanh, gelu_python_tanh, relu, relu2, xielu, got 'mish'. " + UNSUPPORTED,
        ),
    ],
)
def test_a_language_part_that_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert str(refused(change_text(make(tmp_path, "llava"), **fields))) == message


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        (
            "llava",
            {"frobnicate": 1},
            "[source.config] config.json /frobnicate: expected a field that this family is known to have, got 1. "
            "Remove it if it changes nothing",
        ),
        (
            "llava",
            {"is_encoder_decoder": True},
            f"[source.config] config.json /is_encoder_decoder: expected its default, False, got True. {UNSUPPORTED}",
        ),
        (
            "llava",
            {"text_config": []},
            "[source.config] config.json /text_config: expected an object, got []",
        ),
        (
            "ovis2",
            {"vocab_size": 77},
            f"[source.config] config.json /vocab_size: expected 61, as in text_config, got 77. {UNSUPPORTED}",
        ),
        (
            "llava",
            {"auto_map": {"AutoModel": "x.Y"}},
            "[source.remote-code] config.json /auto_map: expected no auto_map, got {'AutoModel': 'x.Y'}. "
            "splitbundle never runs code of a checkpoint",
        ),
        (
            "llava",
            {"quantization_config": {"bits": 4}},
            "[source.quantised] config.json /quantization_config: expected weights that aren't quantised, "
            "got {'bits': 4}. Convert the checkpoint that was quantised",
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
    """PaliGemma's own default: text that comes after a prefix would see all of it."""
    source = change_text(make(tmp_path, "paligemma"), use_bidirectional_attention=None)
    assert str(refused(source)) == (
        "[source.config] config.json /text_config/use_bidirectional_attention: expected None or False, got True. "
        + UNSUPPORTED
    )


def test_a_head_with_a_bias_is_refused(tmp_path: Path) -> None:
    """Which the class of the checkpoint would leave out."""
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
    assert str(refused(source)) == (
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
    assert str(error).endswith("--no-check converts without the original model, and without golden vectors")
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
    """They have every option of generation in each nested configuration; one that says something is refused."""
    fields = {"ignore_index": -100, "vocab_size": VOCAB, "torch_dtype": "float16", "architectures": ["Llava"]}
    source = change_text(make(tmp_path, "llava", **fields), **EARLIER)
    assert convert(source).manifest.vectors is not None
    assert str(refused(change_text(source, add_cross_attention=True))) == (
        "[source.config] config.json /text_config/add_cross_attention: expected a field that this family is known "
        "to have, got True. Remove it if it changes nothing"
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
            "language_model.model.layers.1.mlp.up_proj.weight. The checkpoint isn't whole, or its configuration is "
            "another model's",
        ),
        (
            lambda tensors: {n: t for n, t in tensors.items() if "embed_tokens" not in n},
            "[source.tensor] source: expected a language part's tensor 'embed_tokens.weight', whatever stands before "
            "it, got none",
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
            "tensors of a model of 2 layers as its configuration describes it, got an extra tensor F32 [48, 32]. Check "
            "the configuration's number of layers and its features; remove the tensor if it is no part of the model",
        ),
        (
            lambda tensors: tensors | {"language_model.lm_head.bias": torch.zeros(VOCAB)},
            "[source.tensor] model.safetensors /language_model.lm_head.bias: expected only the tensors of a model of 2 "
            "layers as its configuration describes it, got an extra tensor F32 [61]. Check the configuration's number "
            "of layers and its features; remove the tensor if it is no part of the model",
        ),
        (
            lambda tensors: tensors | {f"{BASE}norm.weight": torch.zeros(33)},
            "[source.tensor] model.safetensors /language_model.model.norm.weight: expected shape [32], got [33]. The "
            "checkpoint isn't whole, or its configuration is another model's",
        ),
    ],
)
def test_tensors_that_are_refused(change: Callable[[Tensors], Tensors], message: str, tmp_path: Path) -> None:
    assert str(refused(make(tmp_path, "llava", change))) == message


def test_a_tower_with_a_language_parts_names_is_no_language_part(tmp_path: Path) -> None:
    """Another module with some of the names, or with more layers missing: a prefix is right only as a whole."""

    def change(tensors: Tensors) -> Tensors:
        other = {n.replace(BASE, "tower."): t.clone() for n, t in tensors.items() if BASE in n and ".1." not in n}
        return tensors | other

    bundle = convert(make(tmp_path, "llava", change))
    modules = {item["module"]: item["tensors"] for item in bundle.manifest.extensions["part"]["left_out"]}
    assert modules["tower"] == 11


def test_another_class_than_the_tables_is_a_parity_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is of the checkpoint's own class: were it to scale its logits one day, conversion would fail."""
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


def test_the_readme_lists_the_table() -> None:
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"The types that are known: {', '.join(COMPOSITES)}." in text
