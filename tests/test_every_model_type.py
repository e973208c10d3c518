"""Every causal language model of the installed transformers: tested for parity, or refused by its name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import splitbundle_converter
from models import CONFIGURATIONS
from splitbundle import BundleError
from splitbundle_converter.families import FAMILIES
from splitbundle_converter.source import quiet

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TESTED = Counter(family for family, _ in CONFIGURATIONS.values())


def test_every_family_has_its_configurations() -> None:
    """At least three: the default shape, an odd one, and one that switches on what there is to switch on."""
    assert set(TESTED) == set(FAMILIES)
    assert not {family: number for family, number in TESTED.items() if number < 3}
    print(f"{len(FAMILIES)} families with parity, in {sum(TESTED.values())} configurations")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_is_not_supported_is_refused_by_its_name(model_type: str, tmp_path: Path) -> None:
    if model_type in FAMILIES:
        assert TESTED[model_type]
        return
    with quiet():
        try:
            config = AutoConfig.for_model(model_type).to_dict()
        except Exception:  # noqa: BLE001  # whatever its class asks for: it is refused by its name all the same
            config = {}
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(_plain(config) | {"model_type": model_type}))
    save_file({"nothing": torch.zeros(1)}, source / "model.safetensors")
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(source, tmp_path / "x.splitbundle", check=False)
    problem = caught.value.problems[0]
    assert (problem.code, problem.file) == ("source.family", "config.json")
    assert problem.got == repr(model_type)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _plain(config: dict[str, object]) -> dict[str, object]:
    """A configuration's fields, as far as JSON has them. (Two types hold numbers that it hasn't.)"""
    plain = {}
    for name, value in config.items():
        try:
            plain[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue
    return plain
