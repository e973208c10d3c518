"""The guide "add a dense family" is right: its row, in a table without that family, converts a checkpoint of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import splitbundle_converter
from splitbundle import BundleError
from splitbundle_converter.families import llama
from splitbundle_converter.families.table import FAMILIES
from tests.support.paths import ROOT

GUIDE: Final = ROOT / "docs" / "contributing" / "dense-family.md"
SIZES: Final = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def test_the_row_of_the_guide_adds_the_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)[0]
    row = eval(compile(code, str(GUIDE), "eval"), vars(llama))
    assert f'"{row.model_type}"' in code
    torch.manual_seed(0)
    config = AutoConfig.for_model(row.model_type, **SIZES, attention_bias=True, attention_out_bias=True, mlp_bias=True)
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they are zero in a new model, which would hide a row that lacks them
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "source")

    monkeypatch.delitem(FAMILIES, row.model_type)
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(tmp_path / "source", tmp_path / "x.splitbundle", split=[1])
    assert caught.value.codes == ("source.family",)

    monkeypatch.setitem(FAMILIES, row.model_type, row)
    bundle = splitbundle_converter.convert(tmp_path / "source", tmp_path / "x.splitbundle", split=[1])
    assert bundle.manifest.model.family == row.model_type
    assert bundle.manifest.vectors is not None  # it was compared with the original model
    kind = next(iter(bundle.architecture.layer_kinds.values()))
    assert (kind.attention.qkv_bias, kind.attention.output_bias, kind.mlp.bias) == (True, True, True)
