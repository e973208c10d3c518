"""Export to Hugging Face: the source's tensors to the bit, and the source's logits from ``from_pretrained``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import splitbundle
import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.cli.main import main
from splitbundle.training import save_lora
from tests.support.checkpoints import WEIGHTS
from tests.support.graph_cases import relist
from tests.support.models import CONFIGURATIONS, checkpoint, original_logits, token_rows
from tests.support.paths import ROOT
from tests.support.tiers import FEW, crossed

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLE = ROOT / "examples" / "license-gpt2"


def loaded(path: Path) -> Any:
    """Load a checkpoint with transformers, as a user does: in the dtype that it states."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The trained example as a bundle."""
    return splitbundle_converter.convert(EXAMPLE, tmp_path_factory.mktemp("made") / "b.splitbundle", split=[2, 4])


@pytest.mark.parametrize(
    ("dtype", "name"),
    crossed(["float32", "bfloat16"], CONFIGURATIONS, kept=lambda dtype, name: name in FEW and dtype == "float32"),
)
def test_every_tensor_and_every_logit_comes_back(name: str, dtype: str, tmp_path: Path) -> None:
    source = checkpoint(name, dtype)
    made = splitbundle_converter.convert(source, tmp_path / "b.splitbundle", split=(1,), check=False)
    back = splitbundle_converter.export(made, tmp_path / "back", notes=unexpected)
    expected = load_file(source / WEIGHTS)
    got = load_file(back / WEIGHTS)
    assert got.keys() == expected.keys()
    assert all(same_bits(got[key], tensor) for key, tensor in expected.items())
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (back / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    (ids,) = token_rows(9)
    assert same_bits(original_logits(loaded(back), ids), original_logits(loaded(source), ids))


def unexpected(note: str) -> None:
    raise AssertionError(note)


def test_the_example_goes_there_and_back(bundle: Bundle, tmp_path: Path) -> None:
    """All files come back, and the second bundle has the first one's fingerprint."""
    from transformers import AutoTokenizer, GenerationConfig

    back = splitbundle_converter.export(bundle, tmp_path / "back", notes=unexpected)
    files = {path.name for path in EXAMPLE.iterdir()}
    assert {path.name for path in back.iterdir()} == files | {"README.md"}
    for name in files - {WEIGHTS}:
        assert (back / name).read_bytes() == (EXAMPLE / name).read_bytes(), name
    again = splitbundle_converter.convert(back, tmp_path / "again.splitbundle", split=[3])
    assert again.fingerprint == bundle.fingerprint
    tokenizer = AutoTokenizer.from_pretrained(back)
    prompt = tokenizer("The licensor grants", return_tensors="pt").input_ids
    own = GenerationConfig.from_pretrained(back)
    expected = loaded(EXAMPLE).generate(prompt, max_new_tokens=12, do_sample=False, generation_config=own)
    assert torch.equal(loaded(back).generate(prompt, max_new_tokens=12, do_sample=False), expected)


def test_several_files_with_an_index(bundle: Bundle, tmp_path: Path) -> None:
    back = splitbundle_converter.export(bundle, tmp_path / "back", max_shard_size=800_000)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    found: dict[str, Tensor] = {}
    for name in files:
        with safe_open(back / name, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        own = load_file(back / name)
        assert dict.fromkeys(own, name) == {key: file for key, file in index["weight_map"].items() if file == name}
        assert len(own) == 1 or sum(tensor.nbytes for tensor in own.values()) <= 800_000
        found |= own
    expected = load_file(EXAMPLE / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[key], tensor) for key, tensor in expected.items())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in expected.values())}
    (ids,) = token_rows(9)
    assert same_bits(original_logits(loaded(back), ids), original_logits(loaded(EXAMPLE), ids))


def test_another_dtype_is_stated(bundle: Bundle, tmp_path: Path) -> None:
    """A cast bundle, and one that was converted with a dtype, load in the dtype of their weights."""
    cast = bundle.save_as(tmp_path / "cast", bundle.stage("trunk"), dtype="bfloat16", vectors=False)
    made = splitbundle_converter.convert(EXAMPLE, tmp_path / "made", dtype="bfloat16", check=False)
    for number, one in enumerate((cast, made)):
        back = splitbundle_converter.export(one, tmp_path / f"back{number}")
        source = json.loads((EXAMPLE / "config.json").read_text())
        named = [field for field in ("dtype", "torch_dtype") if field in source]
        assert json.loads((back / "config.json").read_text()) == source | dict.fromkeys(named, "bfloat16")
        assert loaded(back).dtype == torch.bfloat16


def test_a_trained_bundle_exports_what_was_trained(bundle: Bundle, tmp_path: Path) -> None:
    stage = bundle.stage("trunk", trainable=True)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.01)
    trained = bundle.save_as(tmp_path / "trained", stage)
    back = load_file(splitbundle_converter.export(trained, tmp_path / "back") / WEIGHTS)
    source = load_file(EXAMPLE / WEIGHTS)
    changed = {key.split(".h.")[1].split(".")[0] for key in back if not same_bits(back[key], source[key])}
    assert changed == {"2", "3"}
    assert all(torch.equal(back[key], source[key] + 0.01) for key in back if ".h.2." in key or ".h.3." in key)


def test_an_adapter_is_merged(bundle: Bundle, tmp_path: Path) -> None:
    """The result equals what ``merge_lora`` and ``save_as`` make, and what PEFT merges within its rounding."""
    from peft import PeftModel

    pipeline = bundle.pipeline(trainable=True)
    for stage in pipeline.stages:
        stage.add_lora(4, 8.0, ["c_attn", "c_fc"])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in pipeline.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapter = save_lora(tmp_path / "adapter", pipeline)
    back = load_file(splitbundle_converter.export(bundle, tmp_path / "back", adapter=adapter) / WEIGHTS)
    for stage in pipeline.stages:
        stage.merge_lora()
    saved = bundle.save_as(tmp_path / "saved", pipeline, vectors=False)
    expected = load_file(splitbundle_converter.export(saved, tmp_path / "expected") / WEIGHTS)
    assert all(same_bits(back[key], tensor) for key, tensor in expected.items())
    assert not same_bits(
        back["transformer.h.1.attn.c_attn.weight"], load_file(EXAMPLE / WEIGHTS)["transformer.h.1.attn.c_attn.weight"]
    )
    merged = PeftModel.from_pretrained(loaded(EXAMPLE), str(adapter)).merge_and_unload().state_dict()
    for key, tensor in back.items():
        torch.testing.assert_close(tensor, merged[key], rtol=0, atol=1e-6)
    assert "`adapter` is merged" in (tmp_path / "back" / "README.md").read_text()


def test_an_adapter_of_another_model_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    other = splitbundle_converter.convert(checkpoint("gpt2-by-layer"), tmp_path / "other", check=False)
    stage = other.stage("model", trainable=True)
    stage.add_lora(2, 4.0, ["c_attn"])
    adapter = save_lora(tmp_path / "adapter", stage)
    with pytest.raises(BundleError, match=r"\[adapter\.tensor\]"):
        splitbundle_converter.export(bundle, tmp_path / "back", adapter=adapter)
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(
        BundleError, match=r"\[adapter\.tensor\] .* expected at least one layer with an adapter, got none"
    ):
        splitbundle_converter.export(bundle, tmp_path / "back", adapter=adapter)
    assert not (tmp_path / "back").exists()


# What is refused, replaced and left out.


def test_code_does_not_travel(tmp_path: Path) -> None:
    """Fields that select code stay behind, and the export says so."""
    source = Path(shutil.copytree(EXAMPLE, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    code = {
        "auto_map": {"AutoModelForCausalLM": "evil/repository--modeling.Evil"},
        "attn_implementation": "evil/kernel",
    }
    (source / "config.json").write_text(json.dumps(config | code))
    generation = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(generation | {"custom_generate": "evil/repository"}))
    made = splitbundle_converter.convert(source, tmp_path / "b")
    assert json.loads((made.path / "source" / "config.json").read_text()) == config | code
    said: list[str] = []
    back = splitbundle_converter.export(made, tmp_path / "back", notes=said.append)
    assert json.loads((back / "config.json").read_text()) == config
    assert json.loads((back / "generation_config.json").read_text()) == generation
    assert said == [
        "config.json lacks the fields of its source that select code.",
        "source/generation_config.json lacks the fields of its source that select code.",
    ]


def test_the_large_numbers_of_published_files_travel(tmp_path: Path) -> None:
    """Published tokenizer configurations have 10^30 as the longest text, which is no number of strict JSON."""
    source = Path(shutil.copytree(EXAMPLE, tmp_path / "source"))
    config = json.loads((source / "tokenizer_config.json").read_text("utf-8")) | {"model_max_length": 10**30}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    bundle = splitbundle_converter.convert(source, tmp_path / "b.splitbundle", check=False)
    notes: list[str] = []
    back = splitbundle_converter.export(bundle, tmp_path / "back", notes=notes.append)
    assert (notes, json.loads((back / "tokenizer_config.json").read_text("utf-8"))) == ([], config)


def test_a_bundle_without_a_configuration(bundle: Bundle, tmp_path: Path) -> None:
    """A bundle from before says that it has none, and takes one from the user."""
    golden = splitbundle.open(ROOT / "tests" / "conformance" / "bundles" / "tiny.splitbundle")
    said: list[str] = []
    back = splitbundle_converter.export(golden, tmp_path / "back", notes=said.append)
    assert len(said) == 1
    assert said[0].startswith(
        "config.json is left out: the bundle carries no configuration of its source. Copy it from"
    )
    assert not (back / "config.json").exists()
    (tmp_path / "blob").write_text('{"model_type": "llama", "dtype": "float32"}')
    link = tmp_path / "config.json"  # as the hub's cache has it
    link.symlink_to(tmp_path / "blob")
    given = splitbundle_converter.export(golden, tmp_path / "given", config=link, notes=unexpected)
    assert (given / "config.json").read_bytes() == link.read_bytes()
    cast = golden.cast(tmp_path / "cast", "bfloat16", vectors=False)
    splitbundle_converter.export(cast, tmp_path / "narrow", config=link, notes=said.append)
    assert said[1:] == ["config.json says 'float32', in which the weights, stored as bfloat16, will be loaded."]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "expected a file with a configuration, got nothing there. Check the path"),
        ('{"model_type": "llama"}', "/model_type: expected 'gpt2', got 'llama'. Give the config.json that was"),
        ("[]", "expected an object, got []"),
    ],
)
def test_a_wrong_configuration(bundle: Bundle, tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.export(bundle, tmp_path / "back", config=tmp_path / "config.json")
    assert str(tmp_path / "config.json") in str(caught.value)
    assert said in str(caught.value)


def test_an_adapter_that_is_not_finite(bundle: Bundle, tmp_path: Path) -> None:
    stage = bundle.stage("trunk", trainable=True)
    stage.add_lora(2, 4.0, ["c_attn"])
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    adapter = save_lora(tmp_path / "adapter", stage)
    with pytest.raises(
        BundleError, match=r"\[adapter\.tensor\].*expected finite numbers where it is merged into layers\.2"
    ):
        splitbundle_converter.export(bundle, tmp_path / "back", adapter=adapter)
    assert not (tmp_path / "back").exists()


def test_only_an_export_is_replaced(bundle: Bundle, tmp_path: Path) -> None:
    target = Path(shutil.copytree(EXAMPLE, tmp_path / "mine"))
    for force in (False, True):
        with pytest.raises(BundleError, match=r"\[output\.exists\]"):
            splitbundle_converter.export(bundle, target, force=force)
    assert {path.name for path in target.iterdir()} == {path.name for path in EXAMPLE.iterdir()}
    back = splitbundle_converter.export(bundle, tmp_path / "back", max_shard_size=800_000)
    splitbundle_converter.export(bundle, back, force=True)
    assert [path.name for path in back.glob("*.safetensors")] == [WEIGHTS]
    (back / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"\[output\.exists\]"):
        splitbundle_converter.export(bundle, back, force=True)


def test_damage_is_not_exported(bundle: Bundle, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(bundle.path, tmp_path / "damaged"))
    data = bytearray((damaged / "layer-003.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "layer-003.safetensors").write_bytes(data)
    with pytest.raises(BundleError, match=r"\[file\.digest\] layer-003\.safetensors"):
        splitbundle_converter.export(damaged, tmp_path / "back")
    (damaged / "layer-003.safetensors").unlink()
    with pytest.raises(BundleError, match=r"\[file\.missing\] layer-003\.safetensors"):
        splitbundle_converter.export(damaged, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_no_file_of_a_bundle_takes_the_place_of_another(bundle: Bundle, tmp_path: Path) -> None:
    """A bundle may list any path in tokenizer/. Only a checkpoint's own names leave it."""
    made = Path(shutil.copytree(bundle.path, tmp_path / "made"))
    for name in ("model.safetensors.json", "config.json", "modeling_evil.py"):
        relist(made, f"tokenizer/{name}", b"{}")
    said: list[str] = []
    back = splitbundle_converter.export(made, tmp_path / "back", notes=said.append)
    assert len(said) == 3
    assert {path.name for path in back.iterdir()} == {path.name for path in EXAMPLE.iterdir()} | {"README.md"}
    assert (back / "config.json").read_bytes() == (EXAMPLE / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"to": "onnx"}, "[usage.export] to: expected one of hf, gguf, got 'onnx'"),
        ({"max_shard_size": 0}, "[usage.size] max_shard_size: expected a number of bytes from 1, got 0"),
        ({"max_shard_size": True}, "[usage.size] max_shard_size: expected a number of bytes from 1, got True"),
    ],
)
def test_wrong_calls(bundle: Bundle, tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.export(bundle, tmp_path / "back", **arguments)
    assert str(caught.value).startswith(said)


def test_the_command(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(bundle.path), "-o", str(tmp_path / "back"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == {path.name: path.stat().st_size for path in (tmp_path / "back").iterdir()}
    assert (told["ok"], told["notes"]) == (True, [])
    assert main(["export", str(bundle.path), "-o", str(tmp_path / "back")]) == 1
    assert "--force replaces it" in capsys.readouterr().err


_BARE = """
import sys
for name in ("transformers", "safetensors", "numpy", "huggingface_hub", "tokenizers", "jsonschema", "onnx"):
    sys.modules[name] = None
from splitbundle.cli.main import main
status = main(sys.argv[1:])
sys.exit(status)
"""


def test_it_needs_torch_alone(bundle: Bundle, tmp_path: Path) -> None:
    """No model zoo, no numpy, and no original is needed."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("runtime", "converter", "schemas"))
    run = subprocess.run(
        [sys.executable, "-c", _BARE, "export", str(bundle.path), "-o", str(tmp_path / "back")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert run.returncode == 0, run.stderr
    expected = load_file(EXAMPLE / WEIGHTS)
    assert all(same_bits(tensor, expected[key]) for key, tensor in load_file(tmp_path / "back" / WEIGHTS).items())


def test_chat_templates_and_defaults_are_those_of_the_bundle(tmp_path: Path) -> None:
    source = Path(shutil.copytree(EXAMPLE, tmp_path / "source"))
    config = {"chat_template": "{{ messages }}", "model_max_length": 10**30}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    made = splitbundle_converter.convert(source, tmp_path / "b.splitbundle", check=False)
    same = splitbundle_converter.export(made, tmp_path / "same", notes=unexpected)
    assert (same / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert not (same / "chat_template.jinja").exists()

    document = json.loads((made.path / "text.json").read_text())
    document["templates"] = [{"name": "default", "template": "{# ü #}"}, {"name": "tool_use", "template": "{{ 1 }}"}]
    document["defaults"] |= {"sample": True, "temperature": 0.5, "top_k": None}
    relist(made.path, "text.json", json.dumps(document).encode())
    notes: list[str] = []
    back = splitbundle_converter.export(made.path, tmp_path / "back", notes=notes.append)
    assert [note[:22] for note in notes] == ["The chat templates are", "The defaults of genera"]
    assert json.loads((back / "tokenizer_config.json").read_text()) == {"model_max_length": 10**30}
    assert (back / "chat_template.jinja").read_text("utf-8") == "{# ü #}"
    assert (back / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ 1 }}"
    own = json.loads((EXAMPLE / "generation_config.json").read_text())
    expected = {name: value for name, value in own.items() if name != "top_k"} | {"do_sample": True, "temperature": 0.5}
    assert json.loads((back / "generation_config.json").read_text()) == expected
    again = splitbundle_converter.convert(back, tmp_path / "again.splitbundle", check=False)
    fields = ("templates", "defaults")
    assert [json.loads((again.path / "text.json").read_text())[field] for field in fields] == [
        document[field] for field in fields
    ]
