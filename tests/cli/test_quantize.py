"""The command ``quantize``, and ``convert --quantize``: what they write, report and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import splitbundle
import splitbundle_converter
from splitbundle import Bundle
from tests.support.command_line import run
from tests.support.paths import TESTS

EXAMPLE = TESTS.parent / "examples" / "license-gpt2"
TEXT = "You may reproduce and distribute copies of the Work or Derivative Works thereof in any medium. " * 3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return splitbundle_converter.convert(EXAMPLE, tmp_path_factory.mktemp("cli") / "license.splitbundle", split=[2, 4])


def test_it_reports_what_changed(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "small.splitbundle"
    text.write_text(TEXT, "utf-8")
    status, out, err = run(capsys, "quantize", bundle.path, "--to", "int4", "-o", output, "--text", text)
    assert status == 0, err
    made = splitbundle.open(output)
    assert made.id in out
    assert "bits a number" in out
    assert "layer-005" in out
    assert "likeliest token" in out
    assert made.manifest.storage.encodings["layers.0.mlp.up.weight"] == "blocks4_32"
    status, out, err = run(
        capsys, "quantize", bundle.path, "--to", "int4", "-o", tmp_path / "two", "--text", text, "--json", "--quiet"
    )
    found = json.loads(out)
    assert status == 0, found
    assert found["bundle_id"] == made.id
    report = found["report"]
    assert report["bytes_after"] == found["bytes"]
    assert report["bytes_before"] > 3 * report["bytes_after"]
    assert 4.5 <= report["bits_per_weight"] < 6
    assert report["text"]["tokens"] > 50
    assert report["text"]["perplexity_after"] > 1
    assert [part["part"] for part in report["parts"]] == list(made.manifest.units)
    assert found["encodings"] == made.manifest.storage.encodings


def test_convert_quantizes_after_its_check(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "small.splitbundle"
    status, _, err = run(capsys, "convert", EXAMPLE, "--split", "2,4", "--quantize", "int8", "-o", output)
    assert status == 0, err
    made = splitbundle.open(output)
    assert set(made.manifest.storage.encodings.values()) == {"rows8"}
    assert made.manifest.model.parent == bundle.fingerprint
    assert made.manifest.model.name == bundle.manifest.model.name
    assert [path.name for path in tmp_path.iterdir()] == ["small.splitbundle"]
    status, _, err = run(capsys, "convert", EXAMPLE, "--quantize", "int8", "-o", output)
    assert (status, "[output.exists]" in err) == (1, True)


def test_verify_also_says_how_far_it_is_from_the_original(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = bundle.quantize(tmp_path / "small.splitbundle", "int8")
    status, out, err = run(capsys, "verify", "--run", made.path)
    assert status == 0, err
    assert "quantization moved it by" in out
    assert "without rounding their other factor" in err
    status, out, _ = run(capsys, "verify", "--run", made.path, "--json", "--quiet")
    found = json.loads(out)
    assert (status, found["proves"]) == (0, "reproduction")
    assert found["distances"][-1]["where"] == "logits"
    assert 0 < found["distances"][-1]["relative"] < 0.1
    status, out, _ = run(capsys, "inspect", made.path)
    assert "quantized    37 matrices: 37 in rows8" in out
    status, out, _ = run(capsys, "plan", made.path, "--json")
    shards = json.loads(out)["shards"]
    plain = [shard["weight_bytes"] for shard in json.loads(run(capsys, "plan", bundle.path, "--json")[1])["shards"]]
    assert all(shard["weight_bytes"] < 0.4 * before for shard, before in zip(shards, plain, strict=True))


def test_a_bundle_is_never_quantized_in_place(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.splitbundle"
    shutil.copytree(bundle.path, own)
    status, _, err = run(capsys, "quantize", own, "-o", own, "--force")
    assert (status, "another directory" in err) == (2, True), err
    assert splitbundle.open(own).id == bundle.id


def test_convert_takes_the_variant_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = "convert", EXAMPLE, "--quantize", "int4", "--no-check", "--variant"
    status, out, err = run(capsys, *given, "matmul_nbits", "-o", tmp_path / "one")
    assert (status, "quantized to int4" in out) == (0, True), err
    assert [shard.graph.variant for shard in splitbundle.open(tmp_path / "one").shards if shard.graph] == [
        "matmul_nbits"
    ]
    status, _, err = run(capsys, *given, "standard", "-o", tmp_path / "two")
    assert (status, "expected matmul_nbits" in err) == (2, True), err


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--to", "int3"], 2, "invalid choice"),
        (["--group", "48"], 2, "invalid choice"),
        (["--calibration", "x.txt"], 2, "--method gptq"),
        (["--text", "absent.txt"], 2, "a file that can be read"),
        (["--text", "x.txt", "--no-report"], 2, "a report"),
        (["--to", "int8", "--method", "gptq"], 2, "rtn or search for int8"),
        (["--keep", "layers.77"], 2, "parts such as head"),
    ],
)
def test_it_refuses(
    bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
    message: str,
) -> None:
    got, _, err = run(capsys, "quantize", bundle.path, "-o", tmp_path / "no.splitbundle", *options)
    assert (got, message in err) == (status, True), err
    assert not (tmp_path / "no.splitbundle").exists()
