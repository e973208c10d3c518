"""Every declared field of every family, with another plausible value: it converts with parity, or it is refused.

The values come from the defaults: a number is doubled or halved, a flag is turned, a name becomes another one. What the
checkpoint stores stays as it is, so a size that changes the shapes is refused by its tensors.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from transformers import CONFIG_MAPPING

import splitbundle_converter
from splitbundle import BundleError
from splitbundle_converter.families.evidence import evidence
from splitbundle_converter.families.inert_fields import is_inert
from splitbundle_converter.families.table import FAMILIES
from tests.support.models import CONFIGURATIONS, ONE_PER_FAMILY, bundle, checkpoint
from tests.support.tiers import FEW, thinned

pytestmark = pytest.mark.usefixtures("one_thread")

OF_FAMILY: Final = {CONFIGURATIONS[name][0]: name for name in ONE_PER_FAMILY}
"""A family -> its configuration with the most options."""
_TEXTS: Final = {
    "silu": "gelu",
    "gelu": "relu",
    "gelu_new": "relu",
    "gelu_pytorch_tanh": "silu",
    "relu": "silu",
    "relu2": "relu",
    "xielu": "silu",
}
ACTIVE: Final = {("xglm", "pad_token_id")}
"""A field that acts in this family alone: transformers replaces the position of this id by zeros."""
ALLOWED: Final = {"source.config", "source.tensor", "source.family"}
"""The codes of the refusals. An error of another kind ends the test."""


def others(name: str, value: Any) -> Iterator[Any]:
    """Yield other plausible values of a field."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value * 2, max(1, value // 2)) if value else (1,)
    elif isinstance(value, float):
        yield from (value * 2, value / 2) if value else (0.5,)
    elif isinstance(value, str):
        yield _TEXTS.get(value, "other")
    elif value is None:
        yield 2 if "bias" not in name and "use" not in name else True
    elif isinstance(value, list) and len(value) > 1:
        yield value[::-1]
    elif isinstance(value, dict) and "rope_theta" in value:
        yield value | {"rope_theta": value["rope_theta"] * 2}
        yield value | {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.long
def test_another_value_of_every_declared_field(
    family: str, tmp_path: Path, tally: Callable[[str, int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(checkpoint(OF_FAMILY[family]), tmp_path / "source"))
    raw = json.loads((source / "config.json").read_text())
    written = CONFIG_MAPPING[family].from_dict(dict(raw)).to_dict()
    outcomes: dict[str, Counter[str]] = {}
    for name in sorted(evidence(family).defaults):
        if name in ("model_type", "transformers_version"):
            continue
        for value in others(name, written.get(name)):
            (source / "config.json").write_text(json.dumps(raw | {name: value}))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    splitbundle_converter.convert(source, tmp_path / "x.splitbundle", tokenizer=False, force=True)
                    outcome = "converted with parity"
                except BundleError as error:
                    if not set(error.codes) <= ALLOWED:
                        raise
                    outcome = "refused"
            if is_inert(name) and (family, name) not in ACTIVE:
                assert outcome == "converted with parity", (name, value)
            outcomes.setdefault(name, Counter())[outcome] += 1
            tally(f"other values of declared fields {outcome}", 1)
    with capsys.disabled():
        for outcome in ("converted with parity", "refused"):
            print(f"\n{family} {outcome}: {', '.join(name for name, each in outcomes.items() if each[outcome])}")


def odd_fields(seed: int) -> dict[str, Any]:
    """Return thirty fields that no class knows, with odd names and values."""
    generator = random.Random(seed)
    values: list[Any] = [
        *(0, -1, 2**53 - 1, 1e308, -0.0, True, False, "", "x" * 300, "\u0000", "é🙂", [], {}, [[[]]], [None]),
        *({"": {"a": [1]}}, {"rope_theta": 3}, ["full_attention"], {"__class__": "x"}, "gelu", 1.5, [0] * 100),
    ]
    names = [
        *("", " ", "a.b", "a/b", "~1", "é", "to_dict", "__class__", "__init__", "keys", "hidden size", "NUM_LAYERS"),
        *("heads", "dim", "mlp_ratio", "layer_norm", "scale", "_private", "get_text_config", "save_pretrained"),
        *(f"odd_{generator.randrange(10**6)}" for _ in range(10)),
    ]
    return {name: generator.choice(values) for name in names}


@pytest.mark.parametrize("name", thinned(OF_FAMILY.values(), FEW))
def test_thirty_unknown_fields_change_nothing(name: str, tmp_path: Path) -> None:
    fields = odd_fields(len(name))
    assert len(fields) == 30
    source = Path(shutil.copytree(checkpoint(name), tmp_path / "source"))
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | raw))
    notes: list[str] = []
    made = splitbundle_converter.convert(
        source, tmp_path / "x.splitbundle", split=range(5), check=False, tokenizer=False, notes=notes.append
    )
    assert made.fingerprint == bundle(name).fingerprint
    assert set(fields) <= set(made.manifest.extensions["configuration"]["not_used"])
    assert len(notes) == 1
