"""A bundle under onnxruntime-genai: what it computes, what of it is in memory, and the files that it needs for that."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import splitbundle
import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.cli.main import main
from splitbundle.format.genai import GENAI
from tests.support.graph_cases import relist
from tests.support.models import LAYERS, TOLERANCE, checkpoint, scratch, token_rows
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
STOP: Final = 60
"""The id that ends a text, and also pads."""
EVERYWHERE: Final = tuple(range(LAYERS + 1))


@pytest.fixture(scope="module")
def genai() -> Any:
    return pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai isn't installed")


@cache
def source(name: str, dtype: str) -> Path:
    """Return the checkpoint of a named model with the id that ends a text."""
    directory = scratch() / f"{name}-{dtype}-that-stops"
    shutil.copytree(checkpoint(name, dtype), directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP}), "utf-8")
    return directory


@cache
def bundle(name: str, split: tuple[int, ...], dtype: str) -> Bundle:
    """Convert a named model with the files for onnxruntime-genai."""
    output = scratch() / f"{name}-{'-'.join(map(str, split))}-{dtype}-genai.splitbundle"
    return splitbundle_converter.convert(source(name, dtype), output, split=split, check=False, genai=True)


def generator(genai: Any, whole: Bundle, **options: Any) -> Any:
    model = genai.Model(str(whole.path))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(**{"max_length": 40} | options)
    return genai.Generator(model, parameters)


def ids(*rows: list[int]) -> numpy.ndarray:
    return numpy.array(rows, numpy.int32)


class Rows:
    """Return the tokens that torch computes for the rows of genai, each row alone."""

    def __init__(self, whole: Bundle, rows: list[list[int]]) -> None:
        self.rows, self.pipeline = rows, whole.pipeline(dtype="float32")

    def check(self, logits: numpy.ndarray) -> None:
        """*Shape:* (batch, 1, vocab), of each row's last token."""
        assert logits.shape[:2] == (len(self.rows), 1)
        for row, got in zip(self.rows, logits[:, 0], strict=True):
            with torch.no_grad():
                expected = self.pipeline(torch.tensor([row]), logits="last")[0, -1].numpy()
            assert numpy.abs(got - expected).max() <= TOLERANCE * numpy.abs(expected).max()

    def extend(self, tokens: Any) -> None:
        """Set the next token of each row."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.append(int(token))


# What it computes.


@pytest.mark.parametrize(
    ("name", "split", "dtype"),
    [
        ("llama-llama3", (1, 3), "float32"),
        ("gpt2", EVERYWHERE, "float32"),
        ("qwen2-mixed", (0, LAYERS), "float32"),
        ("gemma2-capped-biased", (), "float32"),
        ("mpt", (2,), "float32"),
        ("llama-llama3", (2,), "bfloat16"),
    ],
)
def test_rows_of_different_lengths(genai: Any, name: str, split: tuple[int, ...], dtype: str) -> None:
    """genai pads on the right, and the padding stays. Each row computes the same as alone."""
    whole = bundle(name, split, dtype)
    rows = [list(row) for row in token_rows(9, 5, 1, seed=11)]
    expected = Rows(whole, rows)
    running = generator(genai, whole, batch_size=3)
    running.append_tokens(ids(*(row + [STOP] * (9 - len(row)) for row in rows)))
    for _ in range(5):
        expected.check(running.get_logits())
        running.generate_next_token()
        expected.extend(running.get_next_tokens())


def test_a_prompt_in_pieces(genai: Any) -> None:
    whole = bundle("llama-llama3", (1, 3), "float32")
    (row,) = token_rows(14, seed=12)
    running = generator(genai, whole)
    for start, stop in ((0, 6), (6, 7), (7, 14)):
        running.append_tokens(ids(list(row[start:stop])))
        Rows(whole, [list(row[:stop])]).check(running.get_logits())


def test_text(genai: Any, tmp_path: Path) -> None:
    """The trained example continues a text to its stop id, with the tokenizer in its place."""
    example = ROOT / "examples" / "license-gpt2"
    whole = splitbundle_converter.convert(example, tmp_path / "b", split=[2, 4], check=False, genai=True)
    model = genai.Model(str(whole.path))
    tokenizer, running = genai.Tokenizer(model), genai.Generator(model, genai.GeneratorParams(model))
    prompt = tokenizer.encode("Licensed under the Apache License")
    running.append_tokens(prompt)
    got = []
    while not running.is_done() and len(got) < 40:
        running.generate_next_token()
        got.append(int(running.get_next_tokens()[0]))
    assert tokenizer.decode(numpy.array(got)).startswith(", Version 2.0 (the")
    generated = whole.pipeline().generate(torch.tensor(prompt[None].astype(numpy.int64)), max_new_tokens=40)
    assert got == [int(token[0]) for token in generated]


@pytest.mark.parametrize("options", [{"past_present_share_buffer": False}, {"num_beams": 2}])
def test_caches_of_its_own_making_are_refused(genai: Any, options: dict[str, Any]) -> None:
    """Without shared buffers the caches have no room for new tokens. That is an error, not a wrong number."""
    running = generator(genai, bundle("llama-llama3", (1, 3), "float32"), **options)
    with pytest.raises(RuntimeError, match=r"TensorScatter: update sequence_length \(1\) exceeds max_sequence_length"):
        running.append_tokens(ids([5]))


def test_weights_stay_in_their_files(genai: Any, tmp_path: Path) -> None:
    """A model of 80 MB in three shards takes a quarter of that privately, libraries' own memory included."""
    config = AutoConfig.for_model(
        "llama", vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, eos_token_id=STOP
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "source")
    whole = splitbundle_converter.convert(
        tmp_path / "source", tmp_path / "b", split=[1, 3], dtype="float32", check=False, genai=True
    )
    weights = sum(file.size for path, file in whole.manifest.files.items() if path.endswith(".safetensors"))
    before = private_memory()
    running = generator(genai, whole)
    running.append_tokens(ids([5, 6, 7]))
    running.generate_next_token()
    assert weights > 80e6
    assert private_memory() - before < weights / 4


def private_memory() -> int:
    """Return the private bytes of this process."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    if found is None:
        pytest.skip("the system doesn't say how much memory is private")
    return int(found[1]) * 1024


# The files.


def test_what_is_written() -> None:
    whole = bundle("gpt2", (1, 3), "float32")
    assert whole.verify(exact=True).unlisted == ()
    config = json.loads((whole.path / GENAI[0]).read_bytes())
    stages = {name: stage for each in config["model"]["decoder"]["pipeline"] for name, stage in each.items()}
    assert list(stages) == ["genai.inputs", "bottom", "trunk", "top", "genai.logits"]
    assert {stage["filename"] for stage in stages.values()} <= whole.manifest.files.keys()
    assert (config["model"]["eos_token_id"], config["model"]["context_length"]) == ([STOP], 48)
    assert config["search"]["max_length"] == 48
    assert sum(whole.manifest.files[path].size for path in GENAI) < 10_000


@pytest.mark.rule("SB-O-016")
def test_cutting_again_writes_them_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files of genai name the graphs of the shards, so shards keep these names."""

    def stages(whole: Bundle) -> list[str] | None:
        if not whole.manifest.files.keys() & set(GENAI):
            assert not any((whole.path / path).exists() for path in GENAI)
            return None
        config = json.loads((whole.path / GENAI[0]).read_bytes())
        return [stage["filename"] for each in config["model"]["decoder"]["pipeline"] for stage in each.values()][1:-1]

    plain = splitbundle_converter.convert(source("llama-llama3", "float32"), tmp_path / "plain", check=False)
    assert main(["add-onnx", "--genai", "--quiet", str(plain.path)]) == 0
    whole = splitbundle_converter.add_onnx(plain.path, tmp_path / "again")
    assert whole.fingerprint == plain.fingerprint
    assert stages(whole) == ["model.onnx"]
    assert stages(splitbundle_converter.resplit(whole, tmp_path / "a", split=[2])) == ["bottom.onnx", "top.onnx"]
    assert stages(splitbundle_converter.resplit(whole, tmp_path / "b", split=[2], onnx=False)) is None
    assert stages(splitbundle_converter.resplit(whole, tmp_path / "c", split=[2], genai=False)) is None
    assert capsys.readouterr().err == ""


def _garbage(whole: Bundle) -> tuple[str, bytes]:
    return GENAI[1], b"anything at all"


def _weights_outside(whole: Bundle) -> tuple[str, bytes]:
    model = onnx.ModelProto.FromString((whole.path / GENAI[2]).read_bytes())
    constant = model.graph.initializer[0]
    constant.ClearField("raw_data")
    constant.data_location = onnx.TensorProto.EXTERNAL
    constant.external_data.add(key="location", value="/etc/passwd")
    return GENAI[2], model.SerializeToString()


def _config(change: Callable[[Any], object]) -> Callable[[Bundle], tuple[str, bytes]]:
    def make(whole: Bundle) -> tuple[str, bytes]:
        config = json.loads((whole.path / GENAI[0]).read_bytes())
        change(config)
        return GENAI[0], json.dumps(config).encode()

    return make


@pytest.mark.rule("SB-O-018")
@pytest.mark.parametrize(
    ("code", "pointer", "make"),
    [
        ("graph.syntax", None, _garbage),
        ("graph.weights", None, _weights_outside),
        ("json.syntax", None, lambda whole: (GENAI[0], b"{")),
        (
            "genai.config",
            "/model/decoder/session_options/custom_ops_library",
            _config(lambda c: c["model"]["decoder"]["session_options"].update(custom_ops_library="evil.so")),
        ),
        (
            "genai.config",
            "/model/decoder/pipeline/1/bottom/filename",
            _config(lambda c: c["model"]["decoder"]["pipeline"][1]["bottom"].update(filename="other.onnx")),
        ),
        ("genai.config", "/model/type", _config(lambda c: c["model"].update(type="gpt2"))),
        ("genai.config", "/engine", _config(lambda c: c.update(engine={}))),
        ("genai.config", "/search/x", _config(lambda c: c["search"].update(x="text"))),
        ("genai.config", "/model/vocab_size", _config(lambda c: c["model"].update(vocab_size=True))),
    ],
)
def test_verifying_judges_them(
    tmp_path: Path, code: str, pointer: str | None, make: Callable[[Bundle], tuple[str, bytes]]
) -> None:
    """genai loads every file that these documents name, libraries too."""
    whole = bundle("gpt2", (1, 3), "float32")
    root = Path(shutil.copytree(whole.path, tmp_path / "x.splitbundle"))
    file, data = make(whole)
    relist(root, file, data)
    with pytest.raises(BundleError) as caught:
        splitbundle.open(root).verify()
    (problem,) = caught.value.problems
    assert (problem.code, problem.file, problem.pointer) == (code, file, pointer)


def test_searching_is_the_owners(tmp_path: Path) -> None:
    whole = bundle("gpt2", (1, 3), "float32")
    root = Path(shutil.copytree(whole.path, tmp_path / "x.splitbundle"))
    relist(root, *_config(lambda c: c["search"].update(max_length=20, do_sample=True, temperature=0.5))(whole))
    splitbundle.open(root).verify()


def test_a_model_that_never_stops_is_refused(tmp_path: Path) -> None:
    directory = shutil.copytree(source("gpt2", "float32"), tmp_path / "source")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": None}), "utf-8")
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert(directory, tmp_path / "b", check=False, genai=True)
    (problem,) = caught.value.problems
    assert (problem.code, problem.pointer, problem.got) == ("usage.genai", "/text/stop_ids", "none")
    assert not (tmp_path / "b").exists()
