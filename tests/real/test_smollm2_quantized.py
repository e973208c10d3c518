"""SmolLM2-135M-Instruct with weights in 8 and 4 bits: what rounding costs, and its shards in two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import splitbundle_converter
from splitbundle import Bundle
from splitbundle.backends.torch.quantization_report import measure
from tests.support.paths import ROOT

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("one_thread")]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def plain(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("plain") / "plain.splitbundle"
    return splitbundle_converter.convert(smollm2, path, split=[10, 20], check="none", notes=lambda text: None)


@pytest.fixture(scope="module")
def int4(plain: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return plain.quantize(tmp_path_factory.mktemp("int4") / "int4.splitbundle", "int4", vectors=False)


def text_ids(bundle: Bundle, tokens: int) -> list[int]:
    return bundle.tokenizer().encode((ROOT / "spec/v1/decoder.md").read_text("utf-8")[:9000])[:tokens]


def test_what_rounding_costs(plain: Bundle, int4: Bundle, tmp_path: Path) -> None:
    ids = text_ids(plain, 1000)
    int8 = plain.quantize(tmp_path / "int8.splitbundle", "int8", vectors=False)
    reports = [measure(plain, made, token_ids=ids) for made in (int8, int4)]
    assert [round(report.bits_per_weight, 1) for report in reports] == [8.0, 5.2]
    texts = [report.text for report in reports]
    assert texts[0] is not None
    assert texts[1] is not None
    assert texts[0].divergence < 0.01 < texts[1].divergence < 0.5
    assert abs(texts[0].perplexity_after / texts[0].perplexity_before - 1) < 0.02


def test_calibrating_is_nearer_than_searching(plain: Bundle, int4: Bundle, tmp_path: Path) -> None:
    guides = " ".join(path.read_text("utf-8") for path in sorted((ROOT / "docs/guides").glob("*.md")))
    ids = plain.tokenizer().encode(guides[:20_000])[:4096]
    rows = [ids[start : start + 512] for start in range(0, len(ids), 512)]
    calibrated = plain.quantize(tmp_path / "gptq.splitbundle", "int4", method="gptq", calibration=rows, vectors=False)
    text = text_ids(plain, 1000)
    near, far = (measure(plain, made, token_ids=text).text for made in (calibrated, int4))
    assert near is not None
    assert far is not None
    assert near.divergence < 0.7 * far.divergence


def test_shards_in_two_processes_give_the_text_of_one(int4: Bundle, tmp_path: Path) -> None:
    for shards, name in ((("bottom", "top"), "ends"), (("trunk",), "trunk")):
        named = [part for shard in shards for part in ("--shard", shard)]
        command = ["-m", "splitbundle", "extract", str(int4.path), *named, "-o", str(tmp_path / f"{name}.splitbundle")]
        subprocess.run([sys.executable, *command, *(["--text"] if name == "ends" else [])], check=True)
    examples = ROOT / "examples/text"
    command = [str(examples / "pipe_client.py"), str(tmp_path / "ends.splitbundle"), PROMPT]
    trunk = [sys.executable, str(examples / "pipe_trunk.py"), str(tmp_path / "trunk.splitbundle")]
    done = subprocess.run([sys.executable, *command, *trunk], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        whole = "".join(int4.pipeline(threads=1).stream_text(PROMPT, max_new_tokens=40, defaults=False))
    assert len(whole) > 40
    assert done.stdout.strip("\n") == whole.strip("\n")


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_both_backends_reproduce_the_golden_vectors(smollm2: Path, tmp_path: Path, to: str) -> None:
    made = splitbundle_converter.convert(
        smollm2, tmp_path / f"{to}.splitbundle", split=[15], onnx=True, quantize=to, notes=lambda text: None
    )
    found = made.run_vectors(backend="all", threads=1)
    assert {difference.between[0] for difference in found} == {"torch", "onnxruntime"}
    assert all(difference.relative <= difference.tolerance for difference in found)
