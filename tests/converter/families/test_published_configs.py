"""Configurations as they are published: with the fields of their time, unknown ones and old names among them.

``published/ORG__NAME.json`` has one configuration, the repository that it describes, and what must become of it: the
facts of a dense model, or the refusal of another one. ``seen_in`` names a public copy of the file or of its fields, or
is null if the file was written from knowledge of the model. The facts come from the configuration and from the model's
paper, card or code, and never from this converter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from safetensors.torch import save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.core_model_loading import revert_weight_conversion  # experts are joined when they are loaded

from splitbundle.errors import BundleError
from splitbundle.format.architecture.attention import Attention
from splitbundle.format.architecture.decoder import Architecture, LayerKind
from splitbundle.format.architecture.experts import Experts
from splitbundle.format.architecture.positions import Unpositioned
from splitbundle.format.architecture.rotary import LongRope, Rotary, Unscaled
from splitbundle.format.architecture.sizes import count
from splitbundle.records import as_dict
from splitbundle_converter.checkpoint.source import Checkpoint, Configuration
from splitbundle_converter.checkpoint.weight_files import SourceTensor
from splitbundle_converter.families.configuration import build, parse, read_configuration
from splitbundle_converter.quantized import methods
from splitbundle_converter.quiet_transformers import quiet
from splitbundle_converter.translation.translate import PROJECTION, translate

PUBLISHED: Final = {
    path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parent / "published").glob("*.json"))
}
DENSE: Final = [name for name, each in PUBLISHED.items() if "refused" not in each["expected"]]
OTHERS: Final = [name for name, each in PUBLISHED.items() if "refused" in each["expected"]]
FEWEST: Final = 150
"""The number of published configurations that the project promises to test."""


def plain(name: str) -> dict[str, Any]:
    """Return a published configuration as it is without a known quantization of the weights."""
    raw: dict[str, Any] = PUBLISHED[name]["config"]
    directory: Any = SimpleNamespace(has=lambda file: False)
    known = methods.find(directory, Configuration(raw=raw, file="config.json"))
    return raw if known is None else methods.without_fields(raw)


def read(tmp_path: Path, name: str) -> Architecture:
    """Return the architecture of a published configuration, without weights."""
    (tmp_path / "config.json").write_text(json.dumps(plain(name)))
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors")
    return read_configuration(Checkpoint(tmp_path, name="published").configuration()).architecture


def facts(architecture: Architecture) -> dict[str, Any]:
    """Return the facts of an architecture in the compact form of the files, without the number of parameters.

    A fact that differs between layers is a list with an item for each layer.
    """
    kinds = [architecture.kind_of(layer) for layer in range(len(architecture.layers))]
    attentions = [kind.attention for kind in kinds]
    kind, attention, head, embedding = kinds[0], attentions[0], architecture.head, architecture.embedding
    return {
        "layers": len(kinds),
        "hidden_size": architecture.hidden_size,
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": kind.mlp.intermediate_size,
        "vocab_size": architecture.vocab_size,
        "activation": kind.mlp.activation,
        "gated": kind.mlp.gated,
        "norm": kind.norm.kind,
        "norm_eps": kind.norm.eps,
        "norm_weight_offset": kind.norm.weight_offset,
        "placement": kind.placement,
        "tied": head.tied,
        "position": position(architecture, attentions),
        "windows": windows(attentions),
        "qkv_bias": attention.qkv_bias,
        "output_bias": one_or_all([each.output_bias for each in attentions]),
        "mlp_bias": kind.mlp.bias,
        "query_key_norm": None if attention.query_key_norm is None else attention.query_key_norm.width,
        "embedding_multiplier": embedding.multiplier,
        "embedding_norm": embedding.norm is not None,
        "residual_multiplier": kind.residual_multiplier,
        "logit_multiplier": head.multiplier,
        "logit_cap": head.logit_cap,
        "attention_logit_cap": attention.logit_cap,
        "attention_scale": one_or_all([each.scale for each in attentions]),
        "clip": attention.clip,
        "head_bias": head.bias,
        **experts(kinds),
    }


def experts(kinds: list[LayerKind]) -> dict[str, Any]:
    """Return the facts of mixtures of experts, if there are any. All layers that have one have the same here."""
    sparse = [kind.mlp for kind in kinds if isinstance(kind.mlp, Experts)]
    if not sparse:
        return {}
    one, router = sparse[0], sparse[0].router
    assert all(each == one for each in sparse)
    return {
        "experts": {
            "count": one.count,
            "per_token": one.per_token,
            "intermediate_size": one.intermediate_size,
            "shared": None if one.shared is None else as_dict(one.shared),
            "function": router.function,
            "normalised": router.normalised,
            "scale": router.scale,
            "correction": router.correction,
            "groups": None if router.groups is None else as_dict(router.groups),
            "dense_layers": [layer for layer, kind in enumerate(kinds) if not isinstance(kind.mlp, Experts)],
        }
    }


def one_or_all(values: list[Any]) -> Any:
    """Return the value that all layers share, or the values of all layers."""
    return values[0] if all(value == values[0] for value in values) else values


def windows(attentions: list[Attention]) -> dict[str, Any] | None:
    """Return the window and the layers that have it, or None if no layer has one. No model here has two windows."""
    layers = [layer for layer, each in enumerate(attentions) if each.window is not None]
    if not layers:
        return None
    (window,) = {each.window for each in attentions} - {None}
    return {"window": window, "layers": "all" if len(layers) == len(attentions) else layers}


def position(architecture: Architecture, attentions: list[Attention]) -> Any:
    """Return the position of the embedding, or that of attention: one object, or one for each group of layers."""
    if not isinstance(architecture.embedding.position, Unpositioned):
        return as_dict(architecture.embedding.position)
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for layer, each in enumerate(attentions):
        own = attention_position(each)
        known = next((layers for other, layers in groups if other == own), None)
        if known is None:
            groups.append((own, [layer]))
        else:
            known.append(layer)
    return groups[0][0] if len(groups) == 1 else [{"layers": layers, **own} for own, layers in groups]


def attention_position(attention: Attention) -> dict[str, Any]:
    """Return the position of an attention. A list of LongRoPE's divisors becomes its length."""
    if isinstance(attention.position, Unpositioned):
        return {"kind": None}
    own: dict[str, Any] = as_dict(attention.position)
    if isinstance(attention.position, Rotary):
        scaling = attention.position.scaling
        if isinstance(scaling, Unscaled):
            own["scaling"] = None
        elif isinstance(scaling, LongRope):
            own["scaling"] |= {
                "short_factors": len(scaling.short_factors),
                "long_factors": len(scaling.long_factors),
            }
    return own


def approximately(value: Any) -> Any:
    """Return a value whose numbers with a fraction are compared to the last digits but one."""
    if isinstance(value, dict):
        return {key: approximately(each) for key, each in value.items()}
    if isinstance(value, list):
        return [approximately(each) for each in value]
    return pytest.approx(value, rel=1e-12) if isinstance(value, float) else value


def test_there_are_enough() -> None:
    assert len(PUBLISHED) >= FEWEST
    for name, each in PUBLISHED.items():
        assert name == each["repository"].replace("/", "__")
        assert list(each) == ["repository", "seen_in", "config", "expected"]


@pytest.mark.parametrize("name", DENSE)
def test_the_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    """The numbers are the parameters of transformers' own classes. The cards of most models state the same numbers."""
    assert count(read(tmp_path, name).tensors()) == PUBLISHED[name]["expected"]["parameters"]


@pytest.mark.parametrize("name", DENSE)
def test_what_the_fields_become(name: str, tmp_path: Path, tally: Callable[[str, int], None]) -> None:
    expected = {key: value for key, value in PUBLISHED[name]["expected"].items() if key != "parameters"}
    assert facts(read(tmp_path, name)) == approximately(expected)
    tally("published configurations read, with the right facts", 1)


@pytest.mark.parametrize("name", DENSE)
def test_the_tensors_are_those_of_the_original_class(name: str) -> None:
    """The names and the shapes that the facts imply, without values."""
    found = Configuration(raw=plain(name), file="config.json")
    judged = read_configuration(found)
    if judged.family.constants:
        pytest.skip("constants are compared by value")
    config = build(found, inert=False)  # some name a padding token that their vocabulary lacks
    original: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with quiet(), torch.device("meta"):
        model = original(config)
    saved = model.state_dict()
    buffers = {key: value for key, value in model.named_buffers() if key in saved}
    # A tied head is one of the parameters under one name. Some classes save the head under another name than they use.
    heads = [row.source for row in judged.family.names(judged.architecture) if row.tensors == (PROJECTION,)]
    tensors = {
        heads[0] if key == "lm_head.weight" else key: SourceTensor(
            file="model", stored=key, path=Path("model"), dtype="F32", shape=tuple(tensor.shape)
        )
        for key, tensor in revert_weight_conversion(model, dict(model.named_parameters()) | buffers).items()
    }
    source: Any = SimpleNamespace(
        tensors=tensors,
        name=name,
        promised={},
        directory=SimpleNamespace(has=lambda file: False),
        quantization=None,
        configuration=lambda: found,
        reader=nullcontext,
    )
    assert set(translate(source, judged.family, judged.architecture).origins) == set(judged.architecture.tensors())


@pytest.mark.parametrize("name", DENSE)
def test_the_fields_that_transformers_does_not_get_are_those_that_it_does_not_use(name: str) -> None:
    """The fields are found in the source text of transformers. Here its classes get all of them, and parse the same."""
    raw = plain(name)
    config, error = parse({key: value for key, value in raw.items() if key != "auto_map"})
    assert error is None
    got, parsed = build(Configuration(raw=raw, file="config.json")).to_dict(), config.to_dict()
    assert {key: parsed[key] for key in got} == got
    assert parsed.keys() - got.keys() <= raw.keys()


@pytest.mark.parametrize("name", OTHERS)
def test_a_refusal_names_what_a_model_lacks(name: str, tmp_path: Path, tally: Callable[[str, int], None]) -> None:
    expected = PUBLISHED[name]["expected"]
    with pytest.raises(BundleError) as refused:
        read(tmp_path, name)
    assert [(problem.code, problem.pointer) for problem in refused.value.problems] == [
        (expected["refused"], expected["pointer"])
    ]
    assert expected["lacks"] in str(refused.value)
    tally(f"published configurations refused: {expected['lacks']}", 1)
