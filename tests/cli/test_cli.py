"""The command line: its stdout, its stderr, and its exit status."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import splitbundle
import splitbundle_converter
from splitbundle.cli import console, main
from splitbundle.version import __version__
from tests.support.paths import ROOT

CHECKPOINT = ROOT / "examples" / "license-gpt2"
IDS = "44,308,68,455,270,618,325"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The license model as three shards, with golden vectors."""
    output = tmp_path_factory.mktemp("cli") / "license.splitbundle"
    return splitbundle_converter.convert(CHECKPOINT, output, split=[2, 4]).path


def call(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a separate process."""
    return subprocess.run(
        [sys.executable, "-m", "splitbundle", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **variables},
    )


def here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, where its imports cost nothing. A test of each command has ``call``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main.main([str(argument) for argument in arguments])
        except SystemExit as left:
            status = int(left.code or 0)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def test_version_help_and_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"splitbundle {__version__}, bundle format 1.0\n"
    with pytest.raises(SystemExit):
        main.main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("convert", "resplit", "inspect", "verify", "generate"))
    assert main.main([]) == 2
    for wrong in (["nonsense"], ["convert"], ["convert", "x", "--split", "2,a"], ["generate", "x", "-n", "0"]):
        with pytest.raises(SystemExit) as left:
            main.main(wrong)
        assert left.value.code == 2, wrong


def test_both_names_are_one_command(bundle: Path) -> None:
    by_name = subprocess.run(
        [Path(sys.executable).with_name("splitbundle"), "inspect", bundle], capture_output=True, text=True, timeout=600
    )
    assert by_name.returncode == 0
    assert by_name.stdout == call("inspect", bundle).stdout


def test_inspect(bundle: Path) -> None:
    done = call("inspect", bundle)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "license-gpt2: gpt2, 757,248 parameters in float32"
    assert "bottom [0, 2) embedding 309,696 1,251,072 -" in lines
    assert "top [4, 6) head 309,888 1,255,936 -" in lines
    assert "at layer 4 hidden (batch, sequence, 96), past (batch), count (batch)" in lines
    document = json.loads(here("inspect", "--json", bundle).stdout)
    assert document["fingerprint"] == splitbundle.open(bundle).fingerprint
    assert [shard["layers"] for shard in document["shards"]] == [[0, 2], [2, 4], [4, 6]]


def test_what_a_terminal_would_obey_is_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of files, and texts of a manifest, come from strangers."""
    bundle = splitbundle_converter.convert(CHECKPOINT, tmp_path / "x.splitbundle", check=False)
    (bundle.path / "a\rforged\x1b[K").write_text("")
    assert main.main(["verify", str(bundle.path)]) == 0
    assert main.main(["verify", "--exact", str(bundle.path)]) == 3
    out, err = capsys.readouterr()
    assert r"a\rforged\x1b[K" in err
    assert not set("\r\x1b") & set(out + err)
    text = (bundle.path / "manifest.json").read_text("utf-8")
    (bundle.path / "manifest.json").write_text(
        text.replace('"name": "license-gpt2"', '"name": "\\u001b[2Jx"', 1), "utf-8"
    )
    assert main.main(["inspect", str(bundle.path)]) == 0
    assert r"\x1b[2Jx" in capsys.readouterr().out


def test_an_id_that_is_none_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("foo", "0" * 64, "sha256:" + "A" * 64):
        with pytest.raises(SystemExit) as caught:
            main.main(["verify", str(tmp_path), "--id", wrong])
        assert caught.value.code == 2


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may look everywhere")
def test_a_directory_that_cannot_be_looked_into(tmp_path: Path) -> None:
    bundle = splitbundle_converter.convert(CHECKPOINT, tmp_path / "x.splitbundle", check=False)
    (bundle.path / "x").mkdir(mode=0)
    assert main.main(["verify", "--exact", str(bundle.path)]) == 3


def test_directories_deeper_than_paths_are_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = splitbundle_converter.convert(CHECKPOINT, tmp_path / "x.splitbundle", check=False)
    here = os.open(bundle.path, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d" * 20, dir_fd=here)
        inner = os.open("d" * 20, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    assert main.main(["verify", "--exact", str(bundle.path)]) == 3
    err = capsys.readouterr().err
    assert "[file.unreadable]" in err
    assert len(err) < 2000


def test_verify(bundle: Path, tmp_path: Path) -> None:
    done = call("verify", "--run", bundle)
    assert done.returncode == 0
    assert "16 files" in done.stdout
    assert "logits" in done.stdout
    document = json.loads(here("verify", "--run", "--shard", "trunk", "--json", bundle).stdout)
    assert [place["where"] for place in document["differences"]] == ["hidden.4"]
    assert document["differences"][0]["relative"] <= 1e-5
    copy = splitbundle_converter.resplit(bundle, tmp_path / "copy.splitbundle").path
    (copy / "layer-003.safetensors").write_bytes(b"nothing")
    done = here("verify", copy)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        "splitbundle: [file.size] layer-003.safetensors: expected 451456 bytes, got 7 bytes. "
        "The file isn't the one that the manifest lists: fetch or convert it again\n"
    )
    document = json.loads(here("verify", "--json", copy).stdout)
    assert document["ok"] is False
    assert document["problems"][0]["file"] == "layer-003.safetensors"
    assert here("verify", copy, "--shard", "middle").returncode == 2
    assert here("verify", tmp_path / "none.splitbundle").returncode == 1


def test_golden_vectors_that_differ_fail(bundle: Path, tmp_path: Path) -> None:
    """A bundle whose files are all as listed, but whose weights differ from the original's."""
    import shutil

    copy = Path(shutil.copytree(bundle, tmp_path / "copy.splitbundle"))
    opened = splitbundle.open(copy)
    text = (copy / "architecture.json").read_text()
    wrong = text.replace('"gelu_tanh"', '"gelu"').encode()
    relist(copy, "architecture.json", wrong, opened)
    assert here("verify", copy).returncode == 0
    done = here("verify", "--run", copy)
    assert done.returncode == 3
    assert (
        "[parity] vectors.safetensors logits: expected a difference to the original model of at most 1e-05"
        in done.stderr
    )


def relist(root: Path, path: str, data: bytes, bundle: splitbundle.Bundle) -> None:
    """Change a file, and every entry that lists it."""
    from dataclasses import replace

    from splitbundle.format import names
    from splitbundle.format.architecture.parser import parse_architecture
    from splitbundle.format.manifest import document
    from splitbundle.writing import documents

    files = {**bundle.manifest.files, path: documents.write_file(root, path, data)}
    files.pop(names.CARD)
    model = replace(
        bundle.manifest.model,
        architecture=document.identity(data),
        fingerprint=document.fingerprint(files, bundle.manifest.weight_files()),
    )
    documents.write_documents(root, replace(bundle.manifest, files=files, model=model), parse_architecture(data))


def test_generate(bundle: Path) -> None:
    done = here("generate", bundle, "Licensed under the Apache License", "-n", 12)
    assert done.returncode == 0
    assert re.fullmatch(r"12 tokens, \d+\.\d tokens/s after the first\n", done.stderr)
    assert done.stdout == ', Version 2.0 (the "\n'
    assert here("generate", bundle, "Licensed", "-n", 2, "--quiet").stderr == ""
    done = here("generate", bundle, "--ids", IDS, "-n", 4)
    assert done.stdout == "12,221,54,268\n"
    document = json.loads(here("generate", bundle, "--ids", IDS, "-n", 4, "--json").stdout.splitlines()[-1])
    assert document.pop("tokens_per_second") > 0
    assert document == {
        "ok": True,
        "prompt_ids": [int(i) for i in IDS.split(",")],
        "ids": [12, 221, 54, 268],
        "ended_by": "length",
        "stopped_by": None,
    }
    piped = subprocess.run(
        [sys.executable, "-m", "splitbundle", "generate", str(bundle), "-n", "4"],
        input="Licensed under the Apache License",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert piped.stdout == ", Ver\n"
    assert here("generate", bundle, "text", "--ids", "1").returncode == 2
    assert here("generate", bundle, "--ids", "640").returncode == 2
    assert here("generate", bundle, "--ids", "9" * 30).returncode == 2
    bad = subprocess.run(
        [sys.executable, "-m", "splitbundle", "generate", bundle], input=b"\xff\xfe", capture_output=True
    )
    assert bad.returncode == 2
    assert b"Traceback" not in bad.stderr


def test_json_is_one_document_also_for_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = here("convert", CHECKPOINT, "--split", "x", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["problems"][0]["code"] == "usage.arguments"
    done = here("convert", CHECKPOINT, "-o", Path(__file__) / "x", "--json")
    assert (done.returncode, json.loads(done.stdout)["problems"][0]["code"]) == (1, "output.failed")
    assert json.loads(done.stdout)["problems"][0]["got"].endswith("is a file")


def test_a_locale_that_cannot_show_a_name(bundle: Path, tmp_path: Path) -> None:
    done = call("resplit", bundle, "-o", tmp_path / "é.splitbundle", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout.count("\\xe9.splitbundle")) == (0, 1)


def test_a_bundle_is_cut_again_from_inside_of_it(bundle: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(bundle, tmp_path / "copy.splitbundle")
    done = subprocess.run(
        [sys.executable, "-m", "splitbundle", "resplit", ".", "--split", "1", "--force"], cwd=copy, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert splitbundle.open(copy).manifest.cuts == (1,)


def test_a_shard_is_verified_by_its_own_files(bundle: Path, tmp_path: Path) -> None:
    import shutil

    part = tmp_path / "part.splitbundle"
    part.mkdir()
    for name in ("manifest.json", "architecture.json", "layer-002.safetensors", "layer-003.safetensors"):
        shutil.copy(bundle / name, part)
    assert here("verify", part, "--shard", "trunk").returncode == 0
    assert here("verify", part).returncode == 0
    assert here("verify", part, "--whole").returncode == 3
    (part / "layer-003.safetensors").unlink()
    assert here("verify", part).returncode == 3


def test_a_control_token_in_a_prompt_stays_text(bundle: Path) -> None:
    document = json.loads(here("generate", bundle, "<|endoftext|>", "-n", 1, "--json").stdout.splitlines()[-1])
    assert 0 not in document["prompt_ids"]
    assert len(document["prompt_ids"]) > 1


def test_generation_stops_at_a_stop_id(bundle: Path) -> None:
    assert splitbundle.open(bundle).manifest.text.stop_ids == (0,)
    document = json.loads(
        here("generate", bundle, "limitations under the License.", "-n", 60, "--json").stdout.splitlines()[-1]
    )
    assert document["text"] == "\n"  # the license's last line ends, and the text ends with it


def test_convert_and_its_refusals(tmp_path: Path) -> None:
    output = tmp_path / "x.splitbundle"
    done = call("convert", CHECKPOINT, "--split", "1,2,5", "-o", output, "--no-check", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == str(output)
    assert [shard.name for shard in splitbundle.open(output).shards] == ["bottom", "trunk-1", "trunk-2", "top"]
    before = splitbundle.open(output).id
    done = here("convert", CHECKPOINT, "-o", output, "--no-check")
    assert done.returncode == 1
    assert done.stderr == (
        f"splitbundle: [output.exists] {output}: expected nothing there, got an existing file or directory. "
        "--force replaces it once the new one is complete\n"
    )
    done = here("convert", CHECKPOINT, "-o", output, "--no-check", "--force", "--split", "7")
    assert done.returncode == 2
    assert "expected rising layer numbers from 0 to 6, the model's number of layers, got 7" in done.stderr
    assert splitbundle.open(output).id == before
    assert here("convert", CHECKPOINT, "-o", output, "--no-check", "--force").returncode == 0
    assert splitbundle.open(output).id != before
    assert here("resplit", output, "--split", "3", "--names", "a,b", "--force").returncode == 0
    assert [shard.name for shard in splitbundle.open(output).shards] == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.splitbundle"]


def test_a_missing_library_says_how_to_get_it(tmp_path: Path) -> None:
    bar = (
        "import sys; sys.modules['transformers'] = None; from splitbundle.cli.main import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    output = tmp_path / "x.splitbundle"
    done = subprocess.run(
        [sys.executable, "-c", bar, "convert", str(CHECKPOINT), "-o", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 4
    assert 'Install it: pip install "splitbundle[convert]"' in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
@pytest.mark.parametrize(
    "body",
    [
        "raise OSError('libtorch_cpu.so: cannot open shared object file: No such file or directory')",
        "raise ImportError('DLL load failed while importing _C')",
        "import no_such_library_of_torch",
    ],
)
def test_a_library_that_is_installed_and_broken_is_named(bundle: Path, tmp_path: Path, body: str, backend: str) -> None:
    (tmp_path / backend).mkdir()
    (tmp_path / backend / "__init__.py").write_text(f"def load():\n    {body}\nload()\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = call("generate", bundle, "--ids", IDS, "--backend", backend, "--json", PYTHONPATH=path)
    (problem,) = json.loads(done.stdout)["problems"]
    assert (done.returncode, problem["code"]) == (4, "backend.broken"), done.stderr
    assert problem["expected"] == f"the library {backend}, which is installed, to load"
    assert problem["hint"].startswith(f'python -c "import {backend}" shows the whole error.')
    if backend == "torch":
        done = call("convert", CHECKPOINT, "-o", tmp_path / "x.splitbundle", PYTHONPATH=path)
        assert (done.returncode, "[backend.broken] expected the library torch" in done.stderr) == (4, True), done.stderr


def test_the_network_has_a_status_of_its_own(tmp_path: Path) -> None:
    done = call("convert", "someone/some-model", "-o", tmp_path / "x", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 5
    assert "[network] someone/some-model: expected the model from the hub" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_an_interruption_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "splitbundle", "convert", str(CHECKPOINT), "-o", str(tmp_path / "x.splitbundle")],
        stderr=subprocess.PIPE,
        text=True,
    )
    began = time.monotonic()
    while not list(tmp_path.glob(".x.splitbundle.tmp-*")) and time.monotonic() - began < 600:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_debug_alone_shows_a_traceback(tmp_path: Path) -> None:
    assert "Traceback" not in call("inspect", tmp_path).stderr
    assert "Traceback" in call("inspect", "--debug", tmp_path).stderr


def test_progress_waits_a_second_and_tells_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    err = io.StringIO()
    shown = console.Console(as_json=False, quiet=False, out=io.StringIO(), err=err)
    shown.progress("reading", 1, 10)
    assert err.getvalue() == ""
    now = 2.0
    shown.progress("reading", 2, 10)
    now = 3.0
    shown.progress("reading", 3, 10)
    now = 13.0
    shown.progress("reading", 5, 10)
    assert err.getvalue() == "reading\nreading  50 %\n"
