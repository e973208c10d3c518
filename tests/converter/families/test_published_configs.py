"""Configurations as they are published, one file each: read with the right facts, or refused for what they lack.

``published/README.md`` says what is in a file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from splitbundle import BundleError
from splitbundle.format.architecture.decoder import Architecture, LayerKind
from splitbundle.format.architecture.positions import Unpositioned
from splitbundle.format.architecture.rotary import Rotary
from splitbundle.format.architecture.sizes import count
from splitbundle_converter.checkpoint.source import Configuration
from splitbundle_converter.checkpoint.weight_files import SourceTensor
from splitbundle_converter.families.configuration import build, parse, read_configuration
from splitbundle_converter.quiet_transformers import quiet
from splitbundle_converter.translation.translate import PROJECTION, translate

PUBLISHED: Final = {
    path.stem.replace("__", "/", 1): json.loads(path.read_text("utf-8"))
    for path in sorted((Path(__file__).parent / "published").glob("*.json"))
}
DENSE: Final = [name for name, data in PUBLISHED.items() if "refused" not in data["expected"]]
REFUSED: Final = [name for name, data in PUBLISHED.items() if "refused" in data["expected"]]


def rotary(kinds: list[LayerKind]) -> list[Rotary]:
    """Return the rotary positions of the layers that have some."""
    return [position for kind in kinds if isinstance(position := kind.attention.position, Rotary)]


def facts(architecture: Architecture) -> dict[str, Any]:
    """Return the facts that the files state, under the names that they have there."""
    kinds = [architecture.kind_of(layer) for layer in range(len(architecture.layers))]
    kind, attention = kinds[0], kinds[0].attention
    turned = rotary(kinds)
    windows = {each.attention.window for each in kinds} - {None}
    bases = {
        "windowed" if each.attention.window else "full": position.base for each in kinds for position in rotary([each])
    }
    return {
        "layers": len(kinds),
        "hidden_size": architecture.hidden_size,
        "vocab_size": architecture.vocab_size,
        "embedding_size": architecture.embedding.token_size,
        "embedding_multiplier": architecture.embedding.multiplier,
        "embedding_norm": architecture.embedding.norm is not None,
        "heads": attention.heads,
        "kv_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "attention_scale": attention.scale,
        "attention_logit_cap": attention.logit_cap,
        "qkv_bias": attention.qkv_bias,
        "output_bias": attention.output_bias,
        "query_key_norm": attention.query_key_norm.width if attention.query_key_norm else None,
        "intermediate_size": kind.mlp.intermediate_size,
        "activation": kind.mlp.activation,
        "gated": kind.mlp.gated,
        "mlp_bias": kind.mlp.bias,
        "norm": kind.norm.kind,
        "norm_eps": kind.norm.eps,
        "norm_affine": kind.norm.affine,
        "placement": kind.placement,
        "residual_multiplier": kind.residual_multiplier,
        "positions": architecture.embedding.position.kind
        if not isinstance(architecture.embedding.position, Unpositioned)
        else attention.position.kind,
        "rotary_base": turned[0].base if turned else None,
        "rotary_bases": bases,
        "rotary_dim": turned[0].dim if turned else None,
        "rotary_layout": turned[0].layout if turned else None,
        "scaling": turned[0].scaling.kind if turned else None,
        "scaling_factor": getattr(turned[0].scaling, "factor", None) if turned else None,
        "unpositioned_layers": [i for i, each in enumerate(kinds) if isinstance(each.attention.position, Unpositioned)],
        "window": next(iter(windows), None),
        "windowed_layers": [i for i, each in enumerate(kinds) if each.attention.window is not None],
        "tied": architecture.head.tied,
        "head_bias": architecture.head.bias,
        "logit_multiplier": architecture.head.multiplier,
        "logit_cap": architecture.head.logit_cap,
        "published_parameters": count(architecture.tensors()),
    }


def without_values(found: Configuration) -> tuple[dict[str, SourceTensor], int]:
    """Return the tensors that transformers' own class has for a configuration, and its number of parameters."""
    config = build(found, inert=False)  # some name a padding token that their vocabulary lacks
    original: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with quiet(), torch.device("meta"):
        model = original(config)
    parameters = dict(model.named_parameters())  # a tied head is one of them under one name
    buffers = {name: value for name, value in model.named_buffers() if name in model.state_dict()}
    tensors = {
        name: SourceTensor(file="model", stored=name, path=Path("model"), dtype="F32", shape=tuple(tensor.shape))
        for name, tensor in (parameters | buffers).items()
    }
    return tensors, sum(parameter.numel() for parameter in parameters.values())


@pytest.mark.parametrize("name", DENSE)
def test_a_published_configuration_gives_the_right_facts(name: str, tally: Callable[[str, int], None]) -> None:
    """The tensors that the facts imply are those that transformers' own class has, with the same shapes."""
    found = Configuration(raw=PUBLISHED[name]["config"], file="config.json")
    judged = read_configuration(found)
    got = facts(judged.architecture)
    expected = PUBLISHED[name]["expected"]
    assert {field: got[field] for field in expected} == expected
    tensors, parameters = without_values(found)
    assert count(judged.architecture.tensors()) == parameters
    if not judged.family.constants:  # they are compared by value, and there are no values here
        heads = [row.source for row in judged.family.names(judged.architecture) if row.tensors == (PROJECTION,)]
        tensors = {heads[0] if key == "lm_head.weight" else key: tensor for key, tensor in tensors.items()}
        source: Any = SimpleNamespace(
            tensors=tensors,
            name=name,
            promised={},
            directory=SimpleNamespace(has=lambda file: False),
            configuration=lambda: found,
            reader=nullcontext,
        )
        assert set(translate(source, judged.family, judged.architecture).origins) == set(judged.architecture.tensors())
    tally("published configurations read, with their facts asserted", 1)


@pytest.mark.parametrize("name", DENSE)
def test_the_fields_that_transformers_does_not_get_are_those_that_it_does_not_use(name: str) -> None:
    """The fields are found in the source text of transformers. Here its classes get all of them, and parse the same."""
    raw = PUBLISHED[name]["config"]
    config, error = parse({key: value for key, value in raw.items() if key != "auto_map"})
    assert error is None
    got, parsed = build(Configuration(raw=raw, file="config.json")).to_dict(), config.to_dict()
    assert {key: parsed[key] for key in got} == got
    assert parsed.keys() - got.keys() <= raw.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_configuration_is_refused_for_what_it_lacks(name: str, tally: Callable[[str, int], None]) -> None:
    expected = PUBLISHED[name]["expected"]
    with pytest.raises(BundleError) as caught:
        read_configuration(Configuration(raw=PUBLISHED[name]["config"], file="config.json"))
    (problem,) = caught.value.problems
    assert (problem.code, problem.pointer) == (expected["refused"], expected["pointer"])
    assert expected["lacks"] in str(problem)
    tally(f"published configurations refused with {expected['refused']}", 1)


def test_there_are_many_of_many_families() -> None:
    assert len(PUBLISHED) >= 150
    assert all(data["repository"] == name for name, data in PUBLISHED.items())
    families = Counter(PUBLISHED[name]["config"]["model_type"] for name in DENSE)
    assert len(families) >= 35
