"""The language part of a checkpoint: it computes what the whole model does, and the rest is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import splitbundle
import splitbundle_converter
import splitbundle_schemas
from splitbundle import Bundle
from splitbundle.cli.main import main
from splitbundle_converter.families.composites import COMPOSITES
from splitbundle_converter.quiet_transformers import quiet
from tests.support.language_parts import Tensors, convert, make, refused
from tests.support.models import TOLERANCE, VOCAB, relative
from tests.support.models_composite import (
    LAYERS,
    language_parameters,
    make_composite,
    make_config,
    save,
    stored_tensors,
    text_fields,
)

pytestmark = pytest.mark.usefixtures("one_thread")
CUTS: Final = ((1,), (0, LAYERS))
IDS: Final = torch.randint(VOCAB, (2, 13), generator=torch.Generator().manual_seed(3))


def expected_of(model: Any, ids: Tensor = IDS) -> Tensor:
    """Return the logits of the whole model for text. (A class that needs an image holds a language model.)"""
    whole = COMPOSITES[model.config.model_type].whole
    with torch.no_grad():
        logits: Tensor = (model.language_model if whole else model)(input_ids=ids).logits
    return logits


def check_parity(bundle: Bundle, model: Any, what: str) -> None:
    """Compare one call, and decoding with a cache: a prefill, single tokens, and several tokens."""
    expected, pipeline = expected_of(model), bundle.pipeline()
    session = pipeline.session(len(IDS), IDS.shape[1])
    pieces = [pipeline(piece, session=session) for piece in IDS.split([4, 1, 1, 5, 1, 1], dim=1)]
    for how, got in (("prefill", pipeline(IDS)), ("decoding", torch.cat(pieces, dim=1))):
        difference = relative(got, expected)
        assert difference <= TOLERANCE, f"{what}, {how}: {difference:.3g}"


# What it computes.


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_the_language_part_computes_what_the_whole_model_does(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convert every row of the table, with its default language part and the names that transformers saves."""
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
    jsonschema.validate(bundle.manifest.extensions, splitbundle_schemas.load("extensions"))
    assert (part["name"], part["of"], part["class"]) == ("language", model_type, type(model).__name__)
    restored = dict(splitbundle_converter.source_tensors(bundle))
    for name, tensor in restored.items():
        assert torch.equal(tensor, tensors[name]), name
    check_exported(bundle, model, source.parent / "back")
    left = tensors.keys() - restored.keys()
    assert sum(item["tensors"] for item in part["left_out"]) == len(left)
    assert len(restored) >= len({id(tensor) for tensor in language_parameters(model).values()})


def check_exported(bundle: Bundle, model: Any, output: Path) -> None:
    """The part's own class loads an export of it, and gives the logits of the whole model, to the bit."""
    from transformers import AutoModelForCausalLM

    splitbundle_converter.export(bundle, output, notes=unexpected)
    with quiet():
        own, info = AutoModelForCausalLM.from_pretrained(output, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        got = own.eval()(input_ids=IDS).logits
    expected = expected_of(model)
    # PaliGemma counts positions from 1. Rotations by one more step differ in the last bits.
    assert torch.equal(got, expected) if model.config.model_type != "paligemma" else relative(got, expected) < 1e-6


def unexpected(note: str) -> None:
    raise AssertionError(note)


def without_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace Perception LM's tower, which needs a library that tests lack. It doesn't change results for text."""
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
    """Save a whole model, convert it, and compare it with the model that is loaded again."""
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
    """Return a function that renames the tensors that transformers saves."""

    def change(tensors: Tensors) -> Tensors:
        named = {name.replace("language_model.model.", base, 1): tensor for name, tensor in tensors.items()}
        return {name.replace("language_model.lm_head.weight", head, 1): tensor for name, tensor in named.items()}

    return change


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_names(layout: str, tmp_path: Path) -> None:
    """Older and newer names work, as the part is found by its tensors."""
    base, head = LAYOUTS[layout]
    model = make_composite(make_config("llava"))
    tensors = renamed(base, head)(stored_tensors(model))
    bundle = convert(save(tmp_path / "source", model.config, tensors), split=(1,))
    check_parity(bundle, model, layout)
    restored = dict(splitbundle_converter.source_tensors(bundle))
    assert restored.keys() == {name for name in tensors if name.startswith(base) or name == head}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in restored.items())


def test_a_module_whose_name_begins_as_the_language_parts_is_left_out(tmp_path: Path) -> None:
    """The prefix ``model.language_model.`` is not mistaken for ``model.``."""
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
    opened = splitbundle.open(output).manifest
    names = opened.extensions["part"]["own_names"]
    assert {entry.source for entry in opened.source_names} <= names.keys()
    assert all(name.endswith(f".{own}") or name == own for name, own in names.items())
    assert all(own.startswith(("model.", "lm_head.")) for own in names.values())
    part["own_names"] = names
    assert opened.extensions == {"part": part}
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
    """The tie of the checkpoint's class counts, not that of the language part. (Some classes copy it.)"""
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
    """transformers ties by the default of a class, except for two stored tensors with different values."""
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
    """Set the tie in the configuration, and scale some tensors."""
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
