"""The command ``diff``, and the words of ``inspect`` for partial and changed bundles."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import splitbundle
import splitbundle_converter
from splitbundle.cli.comparison import LONGEST, shown
from splitbundle.cli.main import main
from tests.support.command_line import run
from tests.support.graph_cases import relist
from tests.support.paths import ROOT, TESTS

CHECKPOINT = ROOT / "examples" / "license-gpt2"
GPT2 = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The license model: as it is, cut otherwise, trained, with NaN, in bfloat16, and partial."""
    root = tmp_path_factory.mktemp("diff")
    whole = splitbundle_converter.convert(CHECKPOINT, root / "license", split=[2, 4])
    splitbundle_converter.resplit(whole.path, root / "halves", split=[3])
    stage = whole.stage("trunk")
    with torch.no_grad():
        for parameter in stage.layers["3"].parameters():
            parameter.add_(0.5)
    whole.save_as(root / "trained", stage)
    with torch.no_grad():
        stage.layers["3"].mlp.up.bias[0] = float("nan")
    whole.save_as(root / "nan", stage, vectors=False)
    short = whole.save_as(root / "short", stage, dtype="bfloat16", vectors=False)
    short.save_as(root / "long", short.stage("trunk"), dtype="float32", vectors=False)
    shutil.copytree(root / "trained", root / "partial")
    for name in ("layer-003.safetensors", "SHA256SUMS"):
        (root / "partial" / name).unlink()
    return root


def lines(text: str) -> list[str]:
    """Return lines with single spaces between the words."""
    return [" ".join(line.split()) for line in text.splitlines()]


def strict(text: str) -> dict[str, object]:
    """Parse JSON, and refuse NaN and Infinity, which are none."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(constant)

    document: dict[str, object] = json.loads(text, parse_constant=refuse)
    return document


def test_the_same_bundle(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "diff", bundles / "license", bundles / "license")
    assert (status, err) == (0, "")
    found = lines(out)
    assert found[0] == "A and B are the same bundle"
    assert found[-1] == "no difference in model, cuts, facts, weights, tokenizer, vectors, files"
    assert len(found) == 6


def test_other_cuts(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "diff", bundles / "license", bundles / "halves")
    found = lines(out)
    assert status == 3
    assert found[0] == "A and B are the same model, with other cuts"
    assert "A trunk [2, 4) - -" in found
    assert "B top [3, 6) head -" in found
    assert found[-1] == "no difference in model, facts, weights, tokenizer, vectors"
    assert run(capsys, "diff", bundles / "license", bundles / "halves", "--only", "weights,facts")[0] == 0


def test_a_trained_bundle(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "diff", bundles / "license", bundles / "trained")
    found = lines(out)
    assert status == 3
    assert found[0] == "B is a changed copy of A"
    assert any(line.startswith("layer 3 16 of 16 0.5 ") for line in found)
    assert [line.split()[1] for line in found if line.startswith("layer ")] == ["3"]
    assert any(line.startswith("A the original model 1, 7, 24 ") for line in found)
    assert any(line.startswith("B this bundle itself 1, 7, 24 ") for line in found)
    assert found[-1] == "no difference in cuts, facts, tokenizer"
    back = lines(run(capsys, "diff", bundles / "trained", bundles / "license")[1])
    assert back[0] == "A is a changed copy of B"


def test_a_line_for_each_tensor(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "diff", bundles / "trained", bundles / "nan", "--only", "weights", "--tensors")[1]
    rows = [line for line in lines(out) if line.startswith("layers.")]
    assert rows == ["layers.3.mlp.up.bias 1 of 384 0 0 NaN or infinite: 1"]


def test_json(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "diff", "--json", bundles / "license", bundles / "nan", "--only", "weights,vectors")
    document = strict(out)
    assert (status, document["ok"], document["differs"]) == (3, True, True)
    assert document["relation"] == "b_changed_from_a"
    assert document["cuts"] is None
    listed = splitbundle.open(bundles / "license").manifest.files["vectors.safetensors"].sha256
    vectors = {"lengths": [1, 7, 24], "origin": "original", "sha256": listed}
    assert document["vectors"] == {"differs": True, "a": vectors, "b": None}
    (unit,) = document["weights"]["units"]  # type: ignore[index]
    assert (unit["unit"], unit["layer"], unit["not_compared"], unit["tensors"]) == ("layer-003", 3, None, 16)
    values = {change["name"]: change["values"] for change in unit["changes"]}
    assert len(values) == 16
    bias = values["layers.3.mlp.up.bias"]
    assert (bias["count"], bias["differing"], bias["not_finite"]) == (384, 384, 1)
    assert bias["largest"] == pytest.approx(0.5)


def test_the_same_values_in_another_dtype(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "diff", bundles / "short", bundles / "long", "--only", "weights")
    found = lines(out)
    assert status == 3
    assert "weights: the same values in another dtype" in found
    assert "layers 0 to 5 0 of 16 the same values" in found


def test_another_model(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "diff", bundles / "license", GPT2)
    found = lines(out)
    assert (status, found[0]) == (3, "A and B are different models")
    assert "/layers 6 × full 3 × full" in found
    assert "/layer_kinds/full/mlp/intermediate_size 384 72" in found
    assert "layers 0 to 2 16 of 16 16 of other shapes" in found
    assert "layers 3 to 5 16 of 16 only in A" in found


def test_a_partial_bundle(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file is said, and is no difference. Its values can't be compared, if its digest differs."""
    status, out, _ = run(capsys, "diff", bundles / "trained", bundles / "partial", "--verify")
    assert status == 0
    assert "B is partial: 1 listed files aren't here; whole shards: bottom, top" in lines(out)
    status, out, _ = run(capsys, "diff", bundles / "license", bundles / "partial", "--only", "weights")
    assert status == 3
    assert "layer 3 ? a file isn't here" in lines(out)


def test_verify_looks_behind_the_digests(bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("license", "partial"):
        copy = Path(shutil.copytree(bundles / name, tmp_path / name))
        path = copy / "layer-000.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        assert run(capsys, "diff", bundles / name, copy)[0] == 0
        status, out, err = run(capsys, "diff", bundles / name, copy, "--verify", "--json")
        assert (status, strict(out)["ok"]) == (3, False)
        assert err.startswith(f"splitbundle: [file.digest] {copy}/layer-000.safetensors:")
        assert err.count("\n") == 1


def test_without_torch(bundles: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from splitbundle.cli.main import main\n"
        "sys.exit(main(['diff', *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", code, str(bundles / "license"), str(bundles / "trained")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 3
    assert "layer 3 ? other digests" in lines(done.stdout)
    assert done.stderr == (
        'torch compares the values of weights, and it isn\'t installed: pip install "splitbundle[torch]"\n'
    )
    command[-1:] = [str(bundles / "halves"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr, strict(done.stdout)["relation"]) == (3, "", "same_model")


def test_wrong_calls(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "diff", bundles / "license", bundles / "halves", "--only", "cuts,size")
    assert (status, err.split(":")[1].strip()) == (2, "[usage.arguments] --only")
    assert run(capsys, "diff", bundles / "license", bundles / "none")[0] == 1
    with pytest.raises(SystemExit) as left:
        main(["diff", str(bundles / "license")])
    assert left.value.code == 2


def test_what_a_terminal_would_obey_is_escaped(
    bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(bundles / "license", tmp_path / "copy"))
    text = (copy / "manifest.json").read_text("utf-8")
    text = text.replace('"name": "license-gpt2"', '"name": "\\u001b[2Jx"', 1)
    (copy / "manifest.json").write_text(text, "utf-8")
    status, out, _ = run(capsys, "diff", bundles / "license", copy)
    assert (status, "\x1b" in out) == (3, False)
    assert r"\x1b[2Jx" in out


def test_values_are_shown_on_one_line() -> None:
    assert shown(["full"] * 3 + ["window"]) == "3 × full, window"
    assert shown([]) == "[]"
    assert shown(None) == "null"
    assert len(shown({"a": list(range(100))})) == LONGEST


def test_inspect_says_whether_a_bundle_is_whole_and_trained(bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parent = splitbundle.open(bundles / "license").fingerprint
    found = lines(run(capsys, "inspect", bundles / "license")[1])
    assert "files all 16 are here" in found
    assert "vectors sequences of 1, 7, 24 tokens, of the original model" in found
    assert not any(line.startswith("parent") for line in found)
    found = lines(run(capsys, "inspect", bundles / "partial")[1])
    assert "files partial: 1 of 16 files are absent; whole shards: bottom, top" in found
    assert "vectors sequences of 1, 7, 24 tokens, of this bundle itself" in found
    assert f"parent a changed copy of {parent}" in found
    for name, expected in (
        ("license", (False, ["bottom", "trunk", "top"], "original", None)),
        ("partial", (True, ["bottom", "top"], "self", parent)),
        ("nan", (False, ["bottom", "trunk", "top"], None, parent)),
    ):
        document = strict(run(capsys, "inspect", bundles / name, "--json")[1])
        assert tuple(document[key] for key in ("partial", "whole_shards", "vectors_origin", "parent")) == expected


def test_it_names_the_text_that_differs(bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = []
    for name, template, temperature, text in (
        ("a", "{{ 1 }}\n{{ 2 }}", 0.5, "a/b"),
        ("b", "{{ 1 }}\n{{ 3 }}", 0.7, "other"),
    ):
        path = Path(shutil.copytree(bundles / "license", tmp_path / name))
        document = json.loads((path / "text.json").read_text())
        document["templates"] = [{"name": "default", "template": template}, {"name": name, "template": ""}]
        document["defaults"]["temperature"] = temperature
        document["cases"] = [{"text": text, "ids": [1], "control_ids": [1], "decoded": text}]
        relist(path, "text.json", json.dumps(document).encode())
        places.append(path)
    status, out, _ = run(capsys, "diff", *places, "--only", "tokenizer")
    assert status == 3
    found = lines(out)
    begin = found.index("in text.json A B")
    assert [line.partition(' {"text"')[0] for line in found[begin + 1 : begin + 7]] == [
        'templates default "line 2: {{ 2 }}" "line 2: {{ 3 }}"',
        'templates a "" -',
        'templates b - ""',
        "defaults temperature 0.5 0.7",
        "cases 'a/b'",
        "cases 'other' -",
    ]
    (places[0] / "text.json").unlink()  # a partial bundle: then only the digest tells
    status, out, _ = run(capsys, "diff", *places, "--only", "tokenizer", "--json")
    texts = strict(out)["tokenizer"]
    assert (status, texts["texts"], texts["files"][0]["path"]) == (3, [], "text.json")  # type: ignore[index]
