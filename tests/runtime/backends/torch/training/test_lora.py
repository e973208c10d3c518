"""LoRA on stages, without PEFT: targets, merging, and directories of adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import splitbundle
from splitbundle import BundleError
from splitbundle.backends.torch.stage import Stage
from splitbundle.training import load_lora, merge_adapters, save_lora

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[5, 3, 9, 1]])


def adapted(bundle: splitbundle.Bundle, *targets: str, rank: int = 3, **options: Any) -> list[Stage]:
    """Return the stages of all shards with adapters that change something."""
    stages = [bundle.stage(shard.name, trainable=True) for shard in bundle.shards]
    generator = torch.Generator().manual_seed(0)
    for stage in stages:
        if stage.layer_range[0] == stage.layer_range[1]:
            continue  # the embedding alone
        stage.add_lora(rank, 2 * rank, targets or ("attention.query", "mlp.up"), **options)
        for name, parameter in stage.named_parameters():
            if name.endswith("lora_b"):
                with torch.no_grad():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        stage.eval()
    return stages


def run(stages: list[Stage]) -> Tensor:
    x = IDS
    with torch.no_grad():
        for stage in stages:
            x = stage(x)
    return x


def near(one: Tensor, other: Tensor, in_16_bits: float = 2**-6) -> bool:
    scale = float(other.abs().max())
    return bool((one - other).abs().max() <= (1e-5 if one.dtype == torch.float32 else in_16_bits) * scale)


# Targets.


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (["query"], ["attention.query"]),
        (["attention.value"], ["attention.value"]),
        (["c_attn"], ["attention.query", "attention.key", "attention.value"]),
        (["attn.c_proj", "mlp.down"], ["attention.output", "mlp.down"]),
        (["c_proj"], ["attention.output", "mlp.down"]),
        (["transformer.h.1.mlp.c_fc"], ["mlp.up"]),
        (["layers.1.mlp.up", "mlp.up"], ["mlp.up"]),
    ],
)
def test_targets(targets: list[str], layers: list[str], gpt2: splitbundle.Bundle) -> None:
    """Canonical names and the source's names, whole or their ends, as PEFT reads them."""
    stage = gpt2.stage("trunk", trainable=True)
    expected = [f"layers.1.{layer}" for layer in layers]
    if targets == ["transformer.h.1.mlp.c_fc"]:
        with pytest.raises(BundleError, match=r"\[input.value\] targets"):  # its name in the manifest has {layer}
            stage.add_lora(2, 4, targets)
        return
    assert stage.add_lora(2, 4, targets) == expected
    trains = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    assert trains == {f"{layer}.{kind}" for layer in expected for kind in ("lora_a", "lora_b")}


def test_a_new_adapter_changes_nothing(golden: splitbundle.Bundle) -> None:
    plain = golden.pipeline(kernels="torch")
    stages = [golden.stage(shard.name, trainable=True) for shard in golden.shards]
    for stage in stages:
        if stage.layer_range[0] == stage.layer_range[1]:
            with pytest.raises(BundleError, match=r"linear layers of '(bottom|top)', "):
                stage.add_lora(4, 8, ["attention.query"])
            continue
        stage.add_lora(4, 8, ["attention.query", "attention.output", "mlp.down"])
    with torch.no_grad():
        assert torch.equal(run(stages), plain(IDS))


def test_wrong_adapters(gpt2: splitbundle.Bundle) -> None:
    stage = gpt2.stage("trunk", trainable=True)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((0, 1, ["query"]), {}, "rank"),
        ((1.5, 1, ["query"]), {}, "rank"),
        ((1, 0, ["query"]), {}, "alpha"),
        ((1, float("inf"), ["query"]), {}, "alpha"),
        ((1, True, ["query"]), {}, "alpha"),
        ((1, 1, "query"), {}, "targets"),
        ((1, 1, []), {}, "targets"),
        ((1, 1, ["q_proj"]), {}, "targets"),
        ((1, 1, ["uery"]), {}, "targets"),
        ((1, 1, ["query", "norm"]), {}, "targets"),
        ((1, 1, [3]), {}, "targets"),
        ((1, 1, ["query"]), {"dropout": 1.0}, "dropout"),
        ((1, 1, ["query"]), {"dropout": "x"}, "dropout"),
    ]
    for arguments, options, what in cases:
        with pytest.raises(BundleError, match=rf"\[input.value\] {what}: "):
            stage.add_lora(*arguments, **options)
    stage.add_lora(1, 1, ["query"])
    with pytest.raises(BundleError, match=r"targets: expected layers without an adapter"):
        stage.add_lora(1, 1, ["attention.query"])
    stage.add_lora(1, 1, ["value"])
    assert len([name for name, p in stage.named_parameters() if p.requires_grad]) == 4


# Merging.


@pytest.mark.parametrize("rslora", [False, True])
def test_merging(rslora: bool, golden: splitbundle.Bundle, tmp_path: Path) -> None:
    stages = adapted(golden, "query", "key", "attention.output", "mlp.up", "mlp.down", rslora=rslora)
    before = run(stages)
    assert not near(before, golden.pipeline()(IDS).detach())
    with pytest.raises(BundleError, match=r"Merge adapters into their layers first: stage.merge_lora"):
        golden.save_as(tmp_path / "new.splitbundle", stages)
    merged = [stage.merge_lora() for stage in stages]
    assert all(
        len(names) == 5 * (stage.layer_range[1] - stage.layer_range[0])
        for names, stage in zip(merged, stages, strict=True)
    )
    assert near(run(stages), before, 2**-4)  # in 16 bits, the sum is rounded
    assert all("lora" not in name for stage in stages for name in stage.state_dict())
    assert stages[0].merge_lora() == []
    made = golden.save_as(tmp_path / "new.splitbundle", stages)
    with torch.no_grad():
        assert near(made.pipeline()(IDS), before, 2**-4)


# Directories of adapters.


def test_shards_alone_and_together(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    stages = adapted(gpt2, "c_attn", "mlp.down", "mlp.up", rank=2)
    expected = run(stages)
    for stage in stages:
        save_lora(tmp_path / stage.name, stage, base_model="gpt2")
    whole = merge_adapters([tmp_path / stage.name for stage in stages], tmp_path / "all")
    assert sorted(path.name for path in whole.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    at_once = save_lora(tmp_path / "once", stages, base_model="gpt2")
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (whole, at_once)]
    assert configs[0] == configs[1]
    assert configs[0]["rank_pattern"] == {f"transformer.h.{i}.attn.c_attn": 6 for i in range(3)}
    assert configs[0]["alpha_pattern"] == {f"transformer.h.{i}.attn.c_attn": 12 for i in range(3)}
    assert (configs[0]["r"], configs[0]["lora_alpha"], configs[0]["fan_in_fan_out"]) == (2, 4, True)
    again = [gpt2.stage(shard.name, trainable=True) for shard in gpt2.shards]
    assert len(load_lora(whole, again)) == 3 * 5
    assert near(run([stage.eval() for stage in again]), expected)
    trunk = gpt2.stage("trunk", trainable=True)
    assert load_lora(whole, trunk) == [
        f"layers.1.{n}" for n in ("attention.query", "attention.key", "attention.value", "mlp.up", "mlp.down")
    ]
    assert {name.rpartition(".")[2] for name, p in trunk.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}
    fixed = gpt2.stage("trunk")
    load_lora(whole, fixed, trainable=False)
    assert not any(parameter.requires_grad for parameter in fixed.parameters())
    hidden = torch.ones(1, 2, 48)
    with torch.no_grad():
        assert near(fixed(hidden), trunk.eval()(hidden))


def test_a_shared_a_keeps_its_rank(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    """PEFT's adapter of c_attn has one A for queries, keys and values. It goes back with the same rank."""
    stages = adapted(gpt2, "c_attn", rank=2)
    for stage in stages:
        for layer in stage.layers.values():
            for name in ("key", "value"):
                getattr(layer.attention, name).lora_a.data.copy_(layer.attention.query.lora_a)
    config = json.loads((save_lora(tmp_path / "a", stages) / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {})
    again = [gpt2.stage(shard.name) for shard in gpt2.shards]
    load_lora(tmp_path / "a", again)
    assert near(run(again), run(stages))


def test_prefixes_and_replacing(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    stages = adapted(gpt2, "mlp.up")
    path = save_lora(tmp_path / "a", stages, prefix="outer.")
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["target_modules"][0] == "outer.transformer.h.0.mlp.c_fc"
    assert len(load_lora(path, gpt2.stage("trunk"))) == 1
    with pytest.raises(BundleError, match=r"\[output.exists\]"):
        save_lora(path, stages)
    save_lora(path, stages, force=True)
    (path / "more").write_text("mine")
    with pytest.raises(BundleError, match=r"\[output.exists\] .*one of the same kind"):
        save_lora(path, stages, force=True)


def test_adapters_that_do_not_fit(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a", adapted(gpt2, "c_attn", "mlp.up"))
    config, weights = path / "adapter_config.json", path / "adapter_model.safetensors"
    good = config.read_bytes(), weights.read_bytes()
    parsed = json.loads(good[0])

    def refused(code: str, text: str) -> None:
        stage = gpt2.stage("trunk")
        with pytest.raises(BundleError) as caught:
            load_lora(path, stage)
        assert caught.value.codes[0] == code, caught.value
        assert text in str(caught.value)
        assert not any("lora" in name for name, _ in stage.named_parameters())

    for changed, code, text in (
        ({"peft_type": "IA3"}, "adapter.config", "IA3"),
        ({"use_dora": True}, "adapter.config", "use_dora"),
        ({"a_future_field": 1}, "adapter.config", "a_future_field"),
        ({"init_lora_weights": "pissa"}, "adapter.config", "pissa"),
        ({"init_lora_weights": [1]}, "adapter.config", "init_lora_weights"),
        ({"alora_invocation_tokens": [9]}, "adapter.config", "alora_invocation_tokens"),
        ({"alpha_pattern": {r"h\\.[0-3]\\.attn": 50}}, "adapter.config", "alpha_pattern"),
        ({"alpha_pattern": [1]}, "adapter.config", "alpha_pattern"),
        ({"alpha_pattern": {"c_attn": "x"}}, "adapter.config", "lora_alpha"),
        ({"lora_dropout": "x"}, "adapter.config", "lora_dropout"),
        ({"lora_dropout": 1.5}, "adapter.config", "lora_dropout"),
        ({"use_rslora": "no"}, "adapter.config", "use_rslora"),
        ({"bias": "all"}, "adapter.config", "bias"),
        ({"modules_to_save": ["lm_head"]}, "adapter.config", "modules_to_save"),
        ({"lora_alpha": 0}, "adapter.config", "lora_alpha"),
        ({"lora_alpha": "4"}, "adapter.config", "lora_alpha"),
    ):
        config.write_text(json.dumps(parsed | changed))
        refused(code, text)
    config.write_bytes(good[0])
    for old, new, code, text in (
        (
            b"h.2.mlp.c_fc",
            b"h.3.mlp.c_fc",
            "adapter.tensor",
            "transformer.h.3.mlp.c_fc: expected a linear layer of the model, which has 3 layers",
        ),
        (b"h.0.mlp.c_fc", b"h.0.mlp.c_xy", "adapter.tensor", "transformer.h.0.mlp.c_xy"),
        (b"lora_B.weight", b"lora_C.weight", "adapter.tensor", "lora_C.weight"),
        (b"base_model.model.", b"base_model.mold.l", "adapter.tensor", "base_model.mold"),
    ):
        data = good[1].replace(old, new)
        assert data != good[1]
        weights.write_bytes(data)
        refused(code, text)
    for data in (b"", good[1][:4], good[1][:-1], good[1] + b"\0", b"\xff" * 16, good[1].replace(b'"F32"', b'"F16"', 1)):
        weights.write_bytes(data)
        with pytest.raises(BundleError, match=r"\[(weights|json|file|field)\."):
            load_lora(path, gpt2.stage("trunk"))
    for broken in (tmp_path / "none", tmp_path):
        with pytest.raises(BundleError, match=r"\[file.missing\] .*expected a directory with adapter_config.json"):
            load_lora(broken, gpt2.stage("trunk"))


def test_nothing_is_added_if_one_stage_has_adapters(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a", adapted(gpt2, "mlp.up"))
    bottom, trunk, top = (gpt2.stage(shard.name) for shard in gpt2.shards)
    top.add_lora(1, 1, ["mlp.down"])
    with pytest.raises(BundleError, match=r"stages: expected stages without adapters, got 'top' with one"):
        load_lora(path, [bottom, trunk, top])
    assert not any("lora" in name for stage in (bottom, trunk) for name in stage.state_dict())
    before = {name for name, p in trunk.named_parameters() if p.requires_grad}
    with pytest.raises(BundleError, match=r"rank: expected at most"):
        trunk.add_lora(10**9, 1, ["mlp.up"])
    assert before == {name for name, p in trunk.named_parameters() if p.requires_grad}


def test_names_of_alpha_patterns(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    path = save_lora(tmp_path / "a", adapted(gpt2, "mlp.up", rank=2))
    config = path / "adapter_config.json"
    parsed = json.loads(config.read_text())
    for pattern, expected in (
        ({"h.1.mlp.c_fc": 7}, 7.0),
        ({r"^transformer\.h\.1\.mlp\.c_fc": 8}, 8.0),
        ({"^h.1.mlp.c_fc": 9}, 4.0),
        ({"1.mlp.c_fc": 5, "c_fc": 6}, 5.0),
    ):
        config.write_text(json.dumps(parsed | {"alpha_pattern": pattern}))
        stage = gpt2.stage("trunk")
        load_lora(path, stage)
        assert stage.layers["1"].mlp.up.alpha == expected, pattern


def test_directories_that_do_not_fit_each_other(gpt2: splitbundle.Bundle, tmp_path: Path) -> None:
    bottom, trunk, _ = adapted(gpt2)
    save_lora(tmp_path / "bottom", bottom)
    save_lora(tmp_path / "again", bottom)
    save_lora(tmp_path / "other", trunk, base_model="another")
    for paths, text in (
        (["bottom", "again"], "each layer in one directory"),
        (["bottom", "other"], "the same base_model_name_or_path"),
        ([], "directories with adapters"),
    ):
        with pytest.raises(BundleError, match=rf"\[input.value\] paths: expected {text}"):
            merge_adapters([tmp_path / path for path in paths], tmp_path / "all")
    with pytest.raises(BundleError, match=r"\[input.value\] stages: expected stages with adapters"):
        save_lora(tmp_path / "x", gpt2.stage("trunk"))
    with pytest.raises(BundleError, match=r"paths: expected a list of directories"):
        merge_adapters(str(tmp_path / "bottom"), tmp_path / "all")
    mixed = adapted(gpt2, rslora=True)[0], trunk
    with pytest.raises(BundleError, match=r"stages: expected one kind of scaling"):
        save_lora(tmp_path / "x", mixed)
    assert not (tmp_path / "all").exists()
