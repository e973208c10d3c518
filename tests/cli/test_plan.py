"""The command ``plan``, sizes as arguments, and cuts by size in ``convert`` and ``resplit``."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from pathlib import Path

import pytest

import splitbundle
import splitbundle_converter
from splitbundle.cli.arguments import size, sizes
from splitbundle.cli.plan import resplit_command
from tests.support.command_line import run
from tests.support.paths import ROOT

CHECKPOINT = ROOT / "examples" / "license-gpt2"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The license model as three shards."""
    output = tmp_path_factory.mktemp("a place with spaces") / "license.splitbundle"
    return splitbundle_converter.convert(CHECKPOINT, output, split=[2, 4], check=False).path


def lines(out: str) -> list[str]:
    return [" ".join(line.split()) for line in out.splitlines()]


def test_the_present_shards(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "plan", bundle)
    assert (status, err) == (0, "")
    assert "context 256 tokens a row, the model's context" in lines(out)
    assert "bottom [0, 2) embedding 1,251,072 309,696 638,976 1,536 384 1,632,000" in lines(out)
    assert "top [4, 6) head 1,255,936 309,888 761,856 1,536 0 1,632,768" in lines(out)
    assert "resplit" not in out
    status, out, _ = run(capsys, "plan", bundle, "--context", "8", "--batch", "2", "--dtype", "bfloat16", "--json")
    document = json.loads(out)
    assert status == 0
    assert document == {
        "ok": True,
        "bundle_id": splitbundle.open(bundle).id,
        **json.loads(json.dumps(splitbundle.open(bundle).plan(context=8, batch=2, dtype="bfloat16").as_json())),
        "command": None,
    }
    assert document["shards"][0]["memory_bytes"] == 309_696 * 2 + 8 * 2 * 768


@pytest.mark.parametrize(
    ("option", "arguments"),
    [
        (["--equal", "4"], {"equal": 4}),
        (["--max-shard-size", "1.26MB"], {"max_shard_size": 1_260_000}),
        (["--machines", "2MB, 1.5MiB,4MB"], {"machines": (2_000_000, 1_572_864, 4_000_000)}),
        (["--equal", "1"], {"equal": 1}),
    ],
)
def test_the_printed_command_makes_the_proposed_shards(
    option: list[str],
    arguments: dict[str, int],
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Path(shutil.copytree(bundle, tmp_path / "a b" / "license.splitbundle"))
    status, out, err = run(capsys, "plan", own, *option)
    assert (status, err) == (0, "")
    plan = splitbundle.open(own).plan(**arguments)  # type: ignore[arg-type]
    assert plan.proposed is not None
    program, *command = shlex.split(out.splitlines()[-1])
    assert program == "splitbundle"
    assert run(capsys, *command, "--no-check")[0] == 0
    made = splitbundle.open(command[-1])
    assert made.path.name == f"license-{len(plan.proposed)}.splitbundle"
    assert made.manifest.cuts == plan.cuts
    assert [shard.bytes for shard in made.shards] == [shard.costs.bytes for shard in plan.proposed]
    proposed = lines(out.partition("\nproposed\n")[2])[1:-2]
    for shard, line in zip(plan.proposed, proposed, strict=True):
        assert line.startswith(f"{shard.name} [{shard.costs.layers[0]}, {shard.costs.layers[1]})")
        end = "" if shard.use_percent is None else f" {shard.capacity_bytes:,} {shard.use_percent} %"
        assert line.endswith(f" {shard.memory_bytes:,}{end}")


def test_the_command_is_quoted_for_a_shell() -> None:
    assert resplit_command("x/a b.splitbundle", (1, 5)) == (
        "splitbundle resplit 'x/a b.splitbundle' --split 1,5 -o 'x/a b-3.splitbundle'"
    )
    assert resplit_command("plain", ()) == "splitbundle resplit plain -o plain-1.splitbundle"


def test_a_partial_bundle_is_planned(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("manifest.json", "architecture.json"):
        shutil.copy(bundle / name, tmp_path / name)
    whole, partial = (run(capsys, "plan", path, "--equal", "2", "--json")[1] for path in (bundle, tmp_path))
    assert json.loads(whole)["proposed"] == json.loads(partial)["proposed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--equal", "0"], "--equal: expected a number from 1"),
        (["--equal", "9"], "--equal: expected 1 to 8 shards"),
        (["--max-shard-size", "1KB"], "--max-shard-size: expected at least 451,456 bytes"),
        (["--max-shard-size", "1 potato"], "--max-shard-size: expected a size from 1 byte"),
        (["--machines", "1KB,1KB"], "--machines: expected more memory"),
        (["--machines", "1GB,,1GB"], "--machines: expected a size from 1 byte"),
        (["--machines", ",".join(["1GB"] * 9)], "--machines: expected 1 to 8 machines"),
        (["--context", "300"], "--context: expected 1 to 256, the positions of the model"),
        (["--batch", "0"], "--batch: expected a number from 1"),
        (["--dtype", "int8"], "--dtype: invalid choice"),
        (["--equal", "2", "--machines", "1GB"], "--machines: not allowed with argument --equal"),
        (["--equal", "2", "--max-shard-size", "1GB"], "--max-shard-size: not allowed with argument --equal"),
        (["--max-shard-size", "1GB", "--machines", "1GB"], "--machines: not allowed with argument --max-shard-size"),
    ],
)
def test_wrong_values_name_their_option(
    arguments: list[str], message: str, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, "plan", bundle, *arguments)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_bundle_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "plan", tmp_path / "none", "--json")
    assert (status, json.loads(out)["problems"][0]["code"]) == (1, "file.missing")


@pytest.mark.parametrize("command", ["convert", "resplit"])
def test_cuts_by_size_when_a_bundle_is_written(
    command: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = CHECKPOINT if command == "convert" else bundle
    more = ["--no-check", "-o"]
    status, out, err = run(capsys, command, source, "--equal", "2", "--names", "a,b", *more, tmp_path / "equal")
    assert (status, "a [0, 3), b [3, 6)" in out) == (0, True), err
    status, out, err = run(capsys, command, source, "--max-shard-size", "1260K", *more, tmp_path / "sized")
    assert (status, "bottom [0, 2), trunk [2, 4), top [4, 6)" in out) == (0, True), err
    for options, message in (
        (["--equal", "9"], "--equal: expected 1 to 8 shards"),
        (["--max-shard-size", "1KB"], "--max-shard-size: expected at least 451,456 bytes"),
        (["--equal", "2", "--split", "3"], "--split: not allowed with argument --equal"),
        (["--max-shard-size", "1G", "--equal", "3"], "--equal: not allowed with argument --max-shard-size"),
    ):
        status, _, err = run(capsys, command, source, *options, *more, tmp_path / "refused")
        assert (status, message in err.splitlines()[-1]) == (2, True), err
    assert not (tmp_path / "refused").exists()


def test_the_size_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = []
    for text in ("200000", "200KB", "0.2mb"):
        output = tmp_path / text
        assert run(capsys, "convert", CHECKPOINT, "--no-check", "--max-file-size", text, "-o", output)[0] == 0
        made.append(splitbundle.open(output).id)
    assert len(set(made)) == 1
    assert "layer-000-part-002.safetensors" in splitbundle.open(output).manifest.files


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1024", 1024),
        ("7b", 7),
        ("500MB", 500 * 10**6),
        ("8GB", 8 * 10**9),
        ("8gb", 8 * 10**9),
        ("8GiB", 8 * 2**30),
        ("8gib", 8 * 2**30),
        ("8G", 8 * 2**30),
        ("3k", 3 * 2**10),
        ("2KB", 2000),
        ("2KiB", 2048),
        ("1.5TB", 1_500_000_000_000),
        ("0.1GB", 100_000_000),
        ("1PiB", 2**50),
        (" 1MB ", 10**6),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected
    assert sizes(f"{text},1") == (expected, 1)


@pytest.mark.parametrize(
    "text",
    ["", "GB", "0", "0GB", "-1", "1e9", "1,5GB", "8XB", "8 GB", "8bi", "8iB", "٣GB", "1.GB", ".5GB", "0x10", "nan"],
)
def test_texts_that_are_no_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size from 1 byte, as 8GB, 8GiB, 500MB or 1024"):
        size(text)
