"""Every causal language model of the installed transformers: tested for parity, or refused by its name."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import splitbundle_converter
from splitbundle import BundleError
from splitbundle_converter.families.table import FAMILIES
from splitbundle_converter.quiet_transformers import quiet
from tests.support import small_models
from tests.support.models import CONFIGURATIONS, TOLERANCE, original_logits, relative, token_rows
from tests.support.tiers import USUAL, thinned

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
TESTED = Counter(family for family, _ in CONFIGURATIONS.values())


def test_every_family_has_its_configurations() -> None:
    """Each family has at least three: the default shape, an odd one, and one with every feature on."""
    assert set(TESTED) == set(FAMILIES)
    assert not {family: number for family, number in TESTED.items() if number < 3}
    print(f"{len(FAMILIES)} families with parity, in {sum(TESTED.values())} configurations")


UNBUILT: Final = frozenset(
    {
        # transformers itself makes no model of the default configuration, or it needs a library that isn't here.
        *("cohere_compass_text", "dbrx", "gemma3n", "gemma4_assistant", "musicgen", "musicgen_melody"),
        # Lists and widths that would have to fit the smaller ones, of families that are refused by their name.
        *("dots3_note", "dots3_note_text", "gemma3n_text", "qwen4_exp", "qwen4_exp_text"),
        *("reformer", "zamba", "zamba2"),
    }
)
"""Model types whose small model needs more than the names of fields."""


@pytest.mark.parametrize("model_type", thinned(MODEL_TYPES, {CONFIGURATIONS[name][0] for name in USUAL}))
def test_a_small_model_converts_with_parity_or_is_refused(
    model_type: str, tmp_path: Path, count_as: Callable[[str], None]
) -> None:
    """The default shape as transformers' own class has it, cut down, and random weights: nothing converts and differs,
    in either backend.

    The configurations of ``models.py`` are written by those who wrote the families; these come from transformers alone.
    """
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = small_models.small_model(model_type)
        except Exception:
            # Whatever a class raises for a configuration that doesn't suit it; the test below refuses its name.
            if model_type not in UNBUILT:
                raise
            count_as("refused by name (the configuration alone)")
            return
        assert model_type not in UNBUILT, "a small model of it can be made: it is to be held like the others"
        model.save_pretrained(tmp_path / "source")
    saved = json.loads((tmp_path / "source" / "config.json").read_text())["model_type"]
    try:
        # Cuts that leave a bottom without a layer, and at which every default depth can be cut.
        made = splitbundle_converter.convert(
            tmp_path / "source", tmp_path / "x.splitbundle", split=(0, 1), check=False, onnx=True
        )
    except BundleError as error:
        (problem,) = error.problems
        assert (problem.code, problem.file, problem.got) == ("source.family", "config.json", repr(saved))
        assert model_type not in FAMILIES
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        count_as("refused by name (a real model)")
        return
    assert saved in FAMILIES
    rows = token_rows(12, 12)
    expected = torch.stack([original_logits(model, row) for row in rows])
    assert expected.abs().max() > 0.1
    pipeline, ids = made.pipeline(), torch.tensor(rows)
    session = pipeline.session(2, 12)
    pieces = torch.cat([pipeline(piece, session=session) for piece in ids.split((7, 1, 3, 1), dim=1)], dim=1)
    graphs = made.pipeline(backend="onnxruntime", threads=1)
    arrays, session = torch.from_numpy(graphs(ids.numpy())), graphs.session(2, 12)
    stepped = [graphs(piece.numpy(), session=session) for piece in ids.split((7, 1, 3, 1), dim=1)]
    worst = max(
        relative(pipeline(ids), expected),
        relative(pieces, expected),
        relative(arrays, expected),
        relative(torch.cat([torch.from_numpy(piece) for piece in stepped], dim=1), expected),
    )
    print(f"{model_type}: {worst:.3g}")
    assert worst <= TOLERANCE
    count_as("converted with parity")


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
    """Return the fields of a configuration that JSON can hold. (Two types have numbers that it can't.)"""
    plain = {}
    for name, value in config.items():
        try:
            plain[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue
    return plain
