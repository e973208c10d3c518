"""LoRA on the stages of a bundle, and PEFT on the source model: one adapter, the same logits, both ways."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from splitbundle import BundleError
from splitbundle.backends.torch.stage import Stage
from splitbundle.format.architecture.experts import Experts
from splitbundle.training import label_count, load_lora, merge_adapters, next_labels, save_lora, token_loss
from tests.support.models import LAYERS, ONE_PER_FAMILY, bundle, checkpoint, load_original, token_rows

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
SHORT = ("gpt2-by-layer", "llama-llama3", "falcon-new", "bloom-nine-heads-untied")
CUTS = ((0, 1), (1, 3), (3, LAYERS))


OTHER_MODULES: Final = ("exaone-biased", "sarvam_moe-groups", "dbrx-clipped")
"""Families whose classes rename the modules of their checkpoints. An adapter has the checkpoint's names."""


def families() -> list[Any]:
    names = [*SHORT, *(name for name in ONE_PER_FAMILY if name not in SHORT and name not in OTHER_MODULES)]
    return [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in names]


def has_experts(name: str) -> bool:
    return any(isinstance(kind.mlp, Experts) for kind in bundle(name).architecture.layer_kinds.values())


def stages_of(name: str) -> list[Stage]:
    return [bundle(name).stage(layers=layers, trainable=True) for layers in CUTS]


def logits(stages: list[Stage], ids: Tensor) -> Tensor:
    x = ids
    for stage in stages:
        x = stage(x)
    return x


def assert_near(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("name", families())
def test_trained_over_three_stages_and_loaded_by_peft(
    name: str, tmp_path: Path, tally: Callable[[str, int], None]
) -> None:
    stages, ids = stages_of(name), torch.tensor(token_rows(9, 9))
    for stage in stages:
        dense = [] if has_experts(name) else ["mlp.down"]
        stage.add_lora(3, 6, ["attention.query", "attention.value", "attention.output", *dense])
    own = [parameter for stage in stages for parameter in stage.parameters() if parameter.requires_grad]
    optimizer, labels = torch.optim.AdamW(own, lr=1e-2), next_labels(ids)
    for _ in range(3):
        token_loss(logits(stages, ids), labels, label_count(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for stage in stages:
        save_lora(tmp_path / stage.name, stage)
    whole = merge_adapters([tmp_path / stage.name for stage in stages], tmp_path / "all")
    with torch.no_grad():
        expected = logits([stage.eval() for stage in stages], ids)
        plain = logits(stages_of(name), ids)
        model = peft.PeftModel.from_pretrained(load_original(checkpoint(name)), whole).eval()
        assert_near(model(input_ids=ids).logits, expected)
        assert (expected - plain).abs().max() > 1e-3
        for stage in stages:
            stage.merge_lora()
        assert_near(logits(stages, ids), expected)
    tally("adapters from stages to PEFT", 1)


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("rslora", [False, True])
def test_trained_by_peft_and_loaded_onto_stages(name: str, rslora: bool, tmp_path: Path) -> None:
    ids, original = torch.tensor(token_rows(9, 9)), load_original(checkpoint(name))
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"] if has_experts(name) else "all-linear",
        use_rslora=rslora,
        task_type="CAUSAL_LM",
        rank_pattern={r".*\.1\..*": 2},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(original, config).eval()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.save_pretrained(tmp_path)
    stages = stages_of(name)
    load_lora(tmp_path, stages)
    with torch.no_grad():
        assert_near(logits([stage.eval() for stage in stages], ids), model(input_ids=ids).logits)


def test_a_head_with_an_adapter(tmp_path: Path) -> None:
    """PEFT stores the head itself, too. It must be the one that the stage has."""
    ids, original = torch.tensor(token_rows(9)), load_original(checkpoint("llama"))
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(original, config).eval()
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(tmp_path / "a")
    stages = stages_of("llama")
    assert "head.projection" in load_lora(tmp_path / "a", stages)
    with torch.no_grad():
        assert_near(logits([stage.eval() for stage in stages], ids), model(input_ids=ids).logits)
        original.get_output_embeddings().base_layer.weight.add_(1)
    model.save_pretrained(tmp_path / "b")
    if "base_layer" in str(list(splitbundle_keys(tmp_path / "b"))):
        with pytest.raises(BundleError, match=r"lm_head.base_layer.weight: expected the weight that"):
            load_lora(tmp_path / "b", stages_of("llama"))


def splitbundle_keys(path: Path) -> list[str]:
    from splitbundle.backends.torch.training.safetensors_file import read_safetensors

    return list(read_safetensors(path, "adapter_model.safetensors"))


def test_an_adapter_of_a_deeper_model_is_refused(tmp_path: Path) -> None:
    """An adapter for four layers is refused by a model of two. Nothing of it is loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import splitbundle_converter

    stages = stages_of("llama")
    for stage in stages:
        stage.add_lora(2, 4, ["query"])
    save_lora(tmp_path / "a", stages)
    config = AutoConfig.from_pretrained(checkpoint("llama"))
    config.num_hidden_layers = 2
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "two")
    small = splitbundle_converter.convert(tmp_path / "two", tmp_path / "two.splitbundle", check=False)
    stage = small.stage(trainable=True, layers=(0, 2))
    with pytest.raises(BundleError, match=r"layers.2.self_attn.q_proj: .* which has 2 layers") as caught:
        load_lora(tmp_path / "a", stage)
    assert len(caught.value.problems) == 2
    assert not any("lora" in key for key, _ in stage.named_parameters())
