"""LoRA on experts: each expert has an adapter of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from splitbundle import BundleError
from splitbundle.backends.torch.stage import Stage
from splitbundle.training import label_count, load_lora, merge_adapters, next_labels, save_lora, token_loss
from tests.support.models import LAYERS, bundle, checkpoint, load_original, relative, token_rows

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
CUTS = ((0, 1), (1, 3), (3, LAYERS))
NAMES = ("qwen2_moe", "glm4_moe", "kolibri1")
TARGETS = ["attention.query", "mlp.experts.gate", "mlp.experts.down", "mlp.shared.up"]


def stages_of(name: str) -> list[Stage]:
    return [bundle(name).stage(layers=layers, trainable=True) for layers in CUTS]


def logits(stages: list[Stage], ids: Tensor) -> Tensor:
    x = ids
    for stage in stages:
        x = stage(x)
    return x


def trained(name: str, ids: Tensor) -> list[Stage]:
    """Train adapters for a few steps, over three stages."""
    stages = stages_of(name)
    for stage in stages:
        targets = TARGETS if stage.name != "bottom" else TARGETS[:1]
        stage.add_lora(2, 6, [target for target in targets if _has(stage, target)])
    own = [parameter for stage in stages for parameter in stage.parameters() if parameter.requires_grad]
    optimizer, labels = torch.optim.AdamW(own, lr=1e-2), next_labels(ids)
    for _ in range(3):
        token_loss(logits(stages, ids), labels, label_count(labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [stage.eval() for stage in stages]


def _has(stage: Stage, target: str) -> bool:
    return any(name.endswith(f"{target}.weight") for name, _ in stage.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_original_with_the_sums_agrees(name: str, tmp_path: Path) -> None:
    """The weights of the original, each with s · B A of the saved adapters added, give the same logits."""
    ids = torch.tensor(token_rows(9, 9))
    stages = trained(name, ids)
    for i, stage in enumerate(stages):
        save_lora(tmp_path / str(i), stage)
    whole = merge_adapters([tmp_path / str(i) for i in range(3)], tmp_path / "all")
    adapters = load_file(whole / "adapter_model.safetensors")
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((checkpoint(name) / "config.json").read_bytes())
    weights = load_file(checkpoint(name) / "model.safetensors")
    changed = 0
    for key, a in adapters.items():
        if key.endswith(".lora_A.weight"):
            layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weights[f"{layer}.weight"] += 6 / 2 * adapters[key.replace("lora_A", "lora_B")] @ a
            changed += ".experts." in layer
    assert changed > 8
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        expected = load_original(source)(input_ids=ids).logits
        assert relative(logits(stages, ids), expected) <= 1e-5
        again = stages_of(name)
        loaded = load_lora(whole, again)
        assert any(path.endswith("mlp.experts.gate") for path in loaded)
        assert relative(logits([stage.eval() for stage in again], ids), expected) <= 1e-5
        for stage in stages:
            stage.merge_lora()
        assert relative(logits(stages, ids), expected) <= 1e-5
        assert relative(logits(stages_of(name), ids), expected) > 1e-3


def test_an_expert_without_its_adapter_is_refused(tmp_path: Path) -> None:
    stages = trained("qwen2_moe", torch.tensor(token_rows(9, 9)))
    save_lora(tmp_path / "a", stages)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    gone = [key for key in tensors if ".experts.3.gate_proj." in key and ".layers.2." in key]
    assert len(gone) == 2
    save_file({key: own for key, own in tensors.items() if key not in gone}, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(BundleError, match=r"\[adapter.tensor\].* expected 12 of them"):
        load_lora(tmp_path / "a", stages_of("qwen2_moe"))


def test_a_source_with_joined_experts_keeps_no_adapters(tmp_path: Path) -> None:
    """One matrix of the source is two of ours, for all experts: PEFT has no form for such adapters."""
    stage = bundle("gpt_oss").stage(layers=(1, 3), trainable=True)
    stage.add_lora(2, 6, ["mlp.experts.gate"])
    with pytest.raises(BundleError, match="merge_lora folds"):
        save_lora(tmp_path / "a", stage)
    x = torch.randn(1, 3, 36, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = stage(x)
        for name, parameter in stage.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
        adapted = stage(x)
        stage.merge_lora()
        assert relative(stage(x), adapted) <= 1e-5
    assert relative(plain, adapted) > 1e-3
