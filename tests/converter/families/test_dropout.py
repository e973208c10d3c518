"""What is dropped where in training: each family's own class, and a stage with the rates of its configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import splitbundle
from splitbundle import BundleError
from splitbundle.format.manifest.document import DROPOUT
from splitbundle_converter.families import dropout
from splitbundle_converter.families.table import FAMILIES
from tests.support.models import CONFIGURATIONS, ONE_PER_FAMILY, bundle, checkpoint, token_rows
from tests.support.paths import TESTS
from tests.support.tiers import thinned

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
ATTENTION, OTHER = "attention", "hidden"


class Recorder:
    """The rates of every dropout, in order. Nothing is dropped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[float, str]] = []
        attend = functional.scaled_dot_product_attention

        def drop(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
            if training and p:
                self.seen.append((round(p, 6), ATTENTION if x.ndim > 3 or x.shape[-1] == x.shape[-2] else OTHER))
            return x

        def sdpa(*given: Tensor, **options: Any) -> Tensor:
            p = options.pop("dropout_p", 0.0)
            if p:
                self.seen.append((round(p, 6), ATTENTION))
            return attend(*given, **options)

        monkeypatch.setattr(functional, "dropout", drop)
        monkeypatch.setattr(functional, "scaled_dot_product_attention", sdpa)


def set_rates(config: Any, model_type: str) -> dict[str, float]:
    """Set different rates in the fields that the table names, and return what the table makes of them."""
    fields = dropout._FIELDS.get(model_type, dropout._ATTENTION)
    assert fields is not None
    values = config.to_dict()
    for i, field in enumerate(dict.fromkeys(field for field in fields if field)):
        outer, _, name = field.rpartition(".")
        (vars(getattr(config, outer)) if outer else vars(config))[name] = 0.11 + 0.01 * i
        (values[outer] if outer else values)[name] = 0.11 + 0.01 * i
    for name in ("layerdrop", "activation_dropout"):  # these drop layers, and channels inside of the MLP
        if hasattr(config, name):
            setattr(config, name, 0.0)
    found = dropout.rates(model_type, values)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "name", thinned(ONE_PER_FAMILY, [name for name in ONE_PER_FAMILY if CONFIGURATIONS[name][0] in dropout._FIELDS])
)
def test_the_same_is_dropped_as_by_the_family_s_own_class(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type = CONFIGURATIONS[name][0]
    config = AutoConfig.from_pretrained(checkpoint(name))
    if model_type == "falcon":
        assert dropout.rates(model_type, config.to_dict()) is None
        return
    rates = set_rates(config, model_type)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).train()
    stage = bundle(name).pipeline(trainable=True, dropout=rates)
    ids, recorder = torch.tensor(token_rows(5, 5)), Recorder(monkeypatch)
    with torch.no_grad():
        model(input_ids=ids)
        expected, recorder.seen = recorder.seen, []
        stage(ids)
    assert bool(expected) == (model_type not in ("ernie4_5", "ernie4_5_moe"))
    assert recorder.seen == expected


def test_every_row_of_the_table_is_a_family() -> None:
    assert set(dropout._FIELDS) <= set(FAMILIES)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (0.0, 0.0, 0.0, 0.0)),
        ({"embd_pdrop": 0.1, "attn_pdrop": 0, "resid_pdrop": 0.25}, (0.1, 0.0, 0.25, 0.25)),
        ({"embd_pdrop": 1.0}, None),
        ({"embd_pdrop": "0.1"}, None),
        ({"embd_pdrop": True}, None),
        ({"embd_pdrop": None}, None),
    ],
)
def test_rates(values: dict[str, Any], expected: tuple[float, ...] | None) -> None:
    assert dropout.rates("gpt2", values) == (None if expected is None else dict(zip(DROPOUT, expected, strict=True)))


def test_the_rates_of_the_source() -> None:
    whole = bundle("gpt2")
    assert whole.manifest.model.dropout == dict.fromkeys(DROPOUT, 0.1)
    layer = whole.stage(layers=(1, 2), trainable=True, dropout="source").layers["1"]
    assert (layer.dropout, layer.attention.dropout) == ((0.1, 0.1), 0.1)
    old = splitbundle.open(TESTS / "conformance" / "bundles" / "tiny.splitbundle")
    with pytest.raises(BundleError, match=r"dropout: expected rates for some of embedding, .* as this bundle has none"):
        old.stage("top", trainable=True, dropout="source")
