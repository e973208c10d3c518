"""A bundle as a GGUF file: codes bit for bit, numbers as transformers reads them, facts and tokenizer as they were."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import splitbundle_converter
from splitbundle import Bundle
from splitbundle.cli import main
from splitbundle.errors import BundleError, MissingExtra
from splitbundle.training import save_lora
from splitbundle_converter.exporting import gguf_tokenizer
from splitbundle_converter.translation.restore import source_tensors
from tests.support.models import relative

SIZES: Final[dict[str, Any]] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3: Final = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EXAMPLE: Final = Path(__file__).parents[3] / "examples/license-gpt2"
TEXTS: Final = (
    "The Licensor grants You a license, 2026!",
    " two  spaces\n\nlines\t",
    "Größe 日本語 🙂 don't",
    "",
    "x" * 30,
)


def bundle(root: Path, family: str = "llama", dtype: str = "keep", scale: float = 1.0, **fields: Any) -> Bundle:
    """Convert a random model of a family."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **fields}))
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.1 * scale
    model.save_pretrained(root / "source")
    return splitbundle_converter.convert(
        root / "source", root / "plain.splitbundle", split=[1], dtype=dtype, notes=lambda text: None
    )


def exported(made: Bundle, path: Path, **options: Any) -> tuple[Path, list[str]]:
    """Export a bundle as GGUF. Return the file and the notes."""
    notes: list[str] = []
    return splitbundle_converter.export(made, path, to="gguf", notes=notes.append, **options), notes


def types(path: Path) -> dict[str, str]:
    """Return the type of each tensor of a file."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def fields(path: Path) -> dict[str, Any]:
    """Return the metadata of a file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("to", ["int8", "int4", "int4-64", "float32"])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "head_dim": 32}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    ],
    ids=["llama-tied", "llama-biased", "qwen2", "qwen3"],
)
def test_the_numbers_are_those_of_the_bundle(tmp_path: Path, family: str, more: dict[str, Any], to: str) -> None:
    made = bundle(tmp_path, family, **more)
    if to != "float32":
        name, _, group = to.partition("-")
        made = made.quantize(tmp_path / "small.splitbundle", name, group=int(group or 32), method="rtn")
    path, _ = exported(made, tmp_path / "model.gguf")
    kinds = types(path)
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["token_embd.weight"] == {"float32": "F32"}.get(to, "Q8_0")
    assert kinds["blk.1.ffn_up.weight"] == {"float32": "F32", "int8": "Q8_0"}.get(to, "Q4_0")
    assert ("output.weight" in kinds) == (not made.architecture.head.tied)
    # This project's reader finds the same facts and the same numbers, to the bit.
    again = splitbundle_converter.convert(
        path, tmp_path / "again.splitbundle", split=[1], dtype="float32", notes=lambda text: None
    )
    assert again.architecture == made.architecture
    expected, got = dict(source_tensors(made)), dict(source_tensors(again))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    # So does transformers' reader. It takes neither the width of a head nor biases from the metadata.
    config = AutoConfig.from_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, config=config, dtype=torch.float32)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = made.pipeline(dtype="float32", kernels="torch")(ids)
        assert relative(logits, model(ids).logits) < 1e-5


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_plain_numbers_keep_their_dtype(tmp_path: Path, dtype: str, kind: str) -> None:
    made = bundle(tmp_path, dtype=dtype)
    path, notes = exported(made, tmp_path / "model.gguf")
    found = types(path)
    assert {found[name] for name in found if "norm" not in name} == {kind}
    assert fields(path)["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    assert notes == ["The file has no tokenizer, as the bundle has none: llama.cpp takes and gives only token ids."]
    values = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.0.ffn_up.weight"]
    got = torch.from_numpy(gguf.quants.dequantize(values.data, values.tensor_type))
    assert torch.equal(got, dict(source_tensors(made))["model.layers.0.mlp.up_proj.weight"].float())


def test_scaled_rotary_positions_are_stored_as_factors(tmp_path: Path) -> None:
    made = bundle(tmp_path, rope_parameters=LLAMA3)
    (tmp_path / "gguf").mkdir()
    path, _ = exported(made, tmp_path / "gguf/model.gguf")
    assert types(path)["rope_freqs.weight"] == "F32"
    shutil.copy(tmp_path / "source/config.json", tmp_path / "gguf")
    # The reader compares the factors with those that this configuration gives.
    again = splitbundle_converter.convert(
        tmp_path / "gguf", tmp_path / "again.splitbundle", split=[1], notes=lambda text: None
    )
    assert again.architecture == made.architecture
    changed = {**LLAMA3, "factor": 4.0}
    config = json.loads((tmp_path / "gguf/config.json").read_text("utf-8"))
    field = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    (tmp_path / "gguf/config.json").write_text(json.dumps({**config, field: changed}), "utf-8")
    with pytest.raises(BundleError, match="factors of rotary positions"):
        splitbundle_converter.convert(tmp_path / "gguf", tmp_path / "other.splitbundle", split=[1])


@pytest.mark.parametrize(
    ("family", "more", "fact"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "attention/window"),
        ("qwen3", {"rope_parameters": LLAMA3, "head_dim": 16}, "attention/position/scaling"),
        ("granite", {"residual_multiplier": 0.5}, "residual_multiplier"),
        ("gemma", {"head_dim": 16}, "weight_offset"),
        ("olmo", {}, "norm"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, family: str, more: dict[str, Any], fact: str
) -> None:
    made = bundle(tmp_path, family, **more)
    with pytest.raises(BundleError) as caught:
        exported(made, tmp_path / "model.gguf")
    problem = caught.value.problems[0]
    assert (problem.code, problem.file) == ("source.family", "architecture.json")
    assert fact in str(problem.got)
    assert not (tmp_path / "model.gguf").exists()


def test_another_family_with_the_facts_of_llama_is_written(tmp_path: Path) -> None:
    made = bundle(tmp_path, "mistral", sliding_window=None)
    path, _ = exported(made, tmp_path / "model.gguf")
    assert fields(path)["general.architecture"] == "llama"


def test_what_no_block_can_hold_is_plain_and_noted(tmp_path: Path) -> None:
    (tmp_path / "wide").mkdir()
    wide = bundle(tmp_path / "wide", intermediate_size=80).quantize(tmp_path / "wide.splitbundle", "int8")
    path, notes = exported(wide, tmp_path / "wide.gguf")
    assert types(path)["blk.0.ffn_down.weight"] == "F32"
    assert types(path)["blk.0.ffn_up.weight"] == "Q8_0"
    assert notes[0].startswith("Quantized tensors written as plain numbers: 2.")
    (tmp_path / "tiny").mkdir()
    tiny = bundle(tmp_path / "tiny", scale=1e-7).quantize(tmp_path / "tiny.splitbundle", "int8")
    path, notes = exported(tiny, tmp_path / "tiny.gguf")
    assert set(types(path).values()) == {"F32"}
    assert "float16" in notes[0]


def test_plain_weights_are_written_on_demand(tmp_path: Path) -> None:
    made = bundle(tmp_path).quantize(tmp_path / "small.splitbundle", "int4")
    path, _ = exported(made, tmp_path / "plain.gguf", dequantize=True)
    assert set(types(path).values()) == {"F32"}


def test_a_lora_is_merged(tmp_path: Path) -> None:
    made = bundle(tmp_path, tie_word_embeddings=False)
    stages = [made.stage(name) for name in ("bottom", "top")]
    for stage in stages:
        stage.add_lora(rank=2, alpha=4)
        for name, parameter in stage.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    save_lora(tmp_path / "lora", stages)
    path, _ = exported(made, tmp_path / "merged.gguf", adapter=tmp_path / "lora")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert relative(stages[1](stages[0](ids)), model(ids).logits) < 1e-5


def with_tokenizer(root: Path, tokenizer: Tokenizer | None, **config: Any) -> Bundle:
    """Convert a random Llama with a tokenizer: the one of the trained example if none is given."""
    made = bundle(root, vocab_size=1200)
    if tokenizer is None:
        for file in EXAMPLE.glob("*token*"):
            shutil.copy(file, root / "source")
    else:
        tokenizer.save(str(root / "source/tokenizer.json"))
        (root / "source/tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    shutil.rmtree(made.path)
    return splitbundle_converter.convert(root / "source", made.path, split=[1], notes=lambda text: None)


def test_a_byte_level_tokenizer_comes_back(tmp_path: Path) -> None:
    made = with_tokenizer(tmp_path, None)
    path, notes = exported(made, tmp_path / "model.gguf")
    assert notes == []
    found = fields(path)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert len(found["tokenizer.ggml.tokens"]) == 1200
    assert found["tokenizer.ggml.add_bos_token"] is False
    mine, theirs = made.tokenizer(), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        assert mine.encode(text) == theirs.encode(text, add_special_tokens=False), text


def sentencepiece(prepends: bool = True) -> Tokenizer:
    """Return a small tokenizer as SentencePiece's BPE becomes one."""
    words = ("\u2581the", "\u2581license", "\u2581you", "ing", "\u2581grant", "\u2581\u2581", "or", "\u2581and")
    letters = sorted({"\u2581", *"".join(words), *"abcdefghijklmnopqrstuvwxyz,.!T"})
    vocabulary = {token: i for i, token in enumerate(("<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))))}
    merges: list[tuple[str, str]] = []
    for letter in letters:
        vocabulary.setdefault(letter, len(vocabulary))
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Prepend("\u2581")] if prepends else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def test_a_sentencepiece_tokenizer_comes_back(tmp_path: Path) -> None:
    own = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    made = with_tokenizer(tmp_path, sentencepiece(), **own)
    path, notes = exported(made, tmp_path / "model.gguf")
    assert notes == []
    found = fields(path)
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("llama", "default")
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (1, 2)
    kinds = found["tokenizer.ggml.token_type"]
    assert kinds[:4] == [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE]
    assert kinds[-1] == gguf.TokenType.UNUSED
    mine, theirs = made.tokenizer(), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS[:1] + TEXTS[2:]:
        assert mine.encode(text) == theirs.encode(text, add_special_tokens=False), text


def _plain_words() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def _lower() -> Tokenizer:
    tokenizer = _plain_words()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "why"),
    [
        (_plain_words(), "its way to divide a text"),
        (_lower(), "the normalizer Lowercase"),
        (Tokenizer(models.WordLevel({"a": 0}, "a")), "the model WordLevel"),
        (sentencepiece(prepends=False), None),
    ],
    ids=["whitespace", "lowercase", "words", "no-prefix"],
)
def test_a_tokenizer_without_code_in_llama_cpp_is_left_out(tmp_path: Path, tokenizer: Tokenizer, why: str) -> None:
    made = with_tokenizer(tmp_path, tokenizer)
    path, notes = exported(made, tmp_path / "model.gguf")
    found = fields(path)
    if why is None:
        assert (notes, found["tokenizer.ggml.add_space_prefix"]) == ([], False)
        return
    assert notes == [f"The file has no tokenizer: llama.cpp doesn't know the one of the bundle ({why})."]
    assert found["tokenizer.ggml.model"] == "none"
    assert found["llama.vocab_size"] == 1200


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document["model"]["vocab"].update({"x": "7"}),
        lambda document: document["model"]["vocab"].update({"x": -1}),
        lambda document: document["model"]["vocab"].update({"x": True}),
        lambda document: document["model"]["vocab"].update({"x": 1100.5}),
        lambda document: document["model"].update(merges=[]),
        lambda document: document["model"].pop("merges"),
        lambda document: document["added_tokens"].append({"id": 8, "content": 9, "special": True}),
        lambda document: document["model"].update(merges=["a b", 7]),
        lambda document: document["model"].update(merges=[["a", "b", "c"]]),
        lambda document: document.update(model=[]),
        lambda document: document["model"]["vocab"].update({"far": 2**40}),
        lambda document: document["model"]["vocab"].update({"twin": 300}),
        lambda document: document["added_tokens"].append({"id": 1100, "content": "!", "special": False}),
        lambda document: document.update(post_processor={"type": "TemplateProcessing", "single": [1, 2]}),
    ],
    ids=[
        "vocabulary",
        "negative",
        "bool",
        "real",
        "none",
        "missing",
        "added",
        "merge",
        "merges",
        "model",
        "far",
        "twin",
        "text",
        "template",
    ],
)
def test_a_strange_tokenizer_is_left_out(tmp_path: Path, change: Any) -> None:
    made = with_tokenizer(tmp_path, None)
    document = json.loads((made.path / "tokenizer/tokenizer.json").read_text("utf-8"))
    change(document)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    notes: list[str] = []
    files = {"tokenizer.json": json.dumps(document).encode(), "tokenizer_config.json": b"{}"}
    gguf_tokenizer.add_tokenizer(writer, files, 1200, (), notes.append)
    assert len(notes) == 1
    assert notes[0].startswith("The file has no tokenizer: llama.cpp doesn't know the one of the bundle (")
    assert writer.kv_data[0]["tokenizer.ggml.model"].value == "none"
    assert "tokenizer.ggml.tokens" not in writer.kv_data[0]


def test_only_a_gguf_file_is_replaced(tmp_path: Path) -> None:
    made = bundle(tmp_path)
    target = tmp_path / "model.gguf"
    target.write_text("my notes", "utf-8")
    for force in (False, True):
        with pytest.raises(BundleError, match=r"output\.exists"):
            exported(made, target, force=force)
    assert target.read_text("utf-8") == "my notes"
    target.unlink()
    exported(made, target)
    first = target.read_bytes()
    with pytest.raises(BundleError, match=r"output\.exists"):
        exported(made, target)
    exported(made, target, force=True)
    assert target.read_bytes() == first
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.gguf", "plain.splitbundle", "source"]


def test_a_configuration_is_refused(tmp_path: Path) -> None:
    made = bundle(tmp_path)
    with pytest.raises(BundleError, match=r"usage\.export"):
        exported(made, tmp_path / "model.gguf", config=tmp_path / "source/config.json")


def test_the_command_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = bundle(tmp_path)
    target = tmp_path / "model.gguf"
    assert main.main(["export", str(made.path), "--to", "gguf", "-o", str(target), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["files"] == {"model.gguf": target.stat().st_size}
    assert said["path"] == str(target)
    assert len(said["notes"]) == 1


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = bundle(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"splitbundle\[gguf\]"):
        exported(made, tmp_path / "model.gguf")
