"""The front door: any order of options, pipes, the end of the context, wrong values, partial bundles, interruptions."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import splitbundle
import splitbundle_converter
from splitbundle import BundleError
from splitbundle.backends import registry
from splitbundle.cli import words
from tests.support.command_line import run
from tests.support.paths import ROOT

CHECKPOINT = ROOT / "examples" / "license-gpt2"
PROMPT = "Licensed under the Apache License"
NEXT = ", Ver\n"
"""What follows the prompt in four tokens."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The license model as three shards, with golden vectors and graphs."""
    output = tmp_path_factory.mktemp("door") / "license.splitbundle"
    return str(splitbundle_converter.convert(CHECKPOINT, output, split=[2, 4], onnx=True).path)


@pytest.fixture
def copy(bundle: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy.splitbundle"))


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))


@pytest.mark.parametrize(
    "arguments",
    [
        ["B", "P", "-n", "4"],
        ["B", "-n", "4", "P"],
        ["-n", "4", "B", "P"],
        ["-n4", "B", "P"],
        ["--max-new-tokens=4", "B", "P"],
        ["B", "-n", "4", "--quiet", "P"],
        ["-q", "B", "P", "-n", "4"],
        ["B", "--backend", "torch", "P", "-n", "4", "--dtype", "float32"],
        ["--seed", "1", "B", "--temperature", "0", "P", "-n", "4"],
        ["B", "-n", "4", "--", "P"],
        ["-n", "4", "--", "B", "P"],
        ["B", "P", "-n", "4", "--"],
        ["B", "--threads", "1", "P", "-n", "4", "--kernels", "torch"],
        ["B", "-n", "4", "P", "--strict"],
    ],
)
def test_options_stand_anywhere(bundle: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    given = [{"B": bundle, "P": PROMPT}.get(argument, argument) for argument in arguments]
    status, out, err = run(capsys, "generate", *given)
    assert (status, out) == (0, NEXT), err


@pytest.mark.parametrize("prompt", ["--json", "-n", "-x y", "--"])
def test_a_prompt_that_looks_like_an_option(bundle: str, prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "generate", "-n", "1", "--json", "--", bundle, prompt)
    assert status == 0, err
    tokens = splitbundle.open(bundle)
    from splitbundle.text.huggingface import TextTokenizer

    assert json.loads(out.splitlines()[-1])["prompt_ids"] == TextTokenizer(tokens).encode(prompt)


def test_messages_show_what_was_typed_after_the_dashes(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "generate", "-n", "4", "--", bundle, "a", "-b", "c")
    assert status == 2
    assert err.splitlines()[-1].endswith("unrecognized arguments: -b c")
    assert run(capsys, "completion", "--", "bash")[0] == 0
    assert "invalid choice: '-x'" in run(capsys, "completion", "--", "-x")[2]


def test_a_closed_standard_input(
    bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    status, _, err = run(capsys, "generate", bundle)
    assert (status, "[usage.prompt]" in err) == (2, True)


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (["convert", CHECKPOINT, "--split", "99"], "--split"),
        (["convert", CHECKPOINT, "--split", "2", "--names", "a"], "--names"),
        (["convert", CHECKPOINT, "--part", "vision"], "--part"),
        (["convert", CHECKPOINT, "--threads", "99999999"], "--threads"),
        (["kernels", "--threads", "2000"], "--threads"),
    ],
)
def test_other_commands_name_their_flags(
    command: list[object], flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["-o", tmp_path / "x.splitbundle"] if command[0] == "convert" else []
    status, _, err = run(capsys, *command, *output)
    assert status == 2
    assert f"{flag}: expected" in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_damaged_shard_of_a_partial_bundle_is_not_whole(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "layer-003.safetensors").unlink()
    path = copy / "layer-000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "These shards are whole: top; --shard top checks one." in run(capsys, "verify", copy)[2]


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
@pytest.mark.parametrize("dash", [[], ["-"]])
def test_the_last_line_end_of_a_pipe_is_no_part_of_the_prompt(
    bundle: str, end: str, dash: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, f"{PROMPT}{end}".encode())
    assert run(capsys, "generate", bundle, *dash, "-n", "4")[:2] == (0, NEXT)


def test_only_one_line_end_is_dropped(
    bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, b"a\n\n")
    _, out, _ = run(capsys, "generate", bundle, "-n", "1", "--json")
    pipe(monkeypatch, b"a\n")
    assert (
        json.loads(out.splitlines()[-1])["prompt_ids"]
        != json.loads(run(capsys, "generate", bundle, "-n", "1", "--json")[1].splitlines()[-1])["prompt_ids"]
    )


@pytest.mark.parametrize("data", [b"", b"\n", b"\xff\xfe"])
def test_a_pipe_without_a_prompt(
    bundle: str, data: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, data)
    status, out, err = run(capsys, "generate", bundle)
    assert (status, out) == (2, "")
    assert "usage.prompt" in err


def test_the_text_ends_at_the_models_context(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    ids = ",".join(["44"] * 250)
    status, out, err = run(capsys, "generate", bundle, "--ids", ids, "-n", "300", "--json")
    document = json.loads(out.splitlines()[-1])
    assert (status, len(document["ids"]), document["ended_by"]) == (0, 7, "context")
    assert "it has reached the model's context of 256 tokens" in err
    status, out, _ = run(capsys, "generate", bundle, "--ids", ids, "-n", "7", "--json")
    assert (status, json.loads(out.splitlines()[-1])["ended_by"]) == (0, "length")


def test_a_prompt_beyond_the_context(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "generate", bundle, "--ids", ",".join(["44"] * 257))
    assert (status, out) == (2, "")
    assert "at most 256 tokens, the model's context, got 257. Shorten it" in err


def test_going_on_beyond_the_context(tmp_path: Path, bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Rotary positions have no end. Learned ones do."""
    from tests.support.models import make_model

    make_model("llama", max_position_embeddings=8).save_pretrained(tmp_path / "source")
    rotary = splitbundle_converter.convert(tmp_path / "source", tmp_path / "x.splitbundle", check=False).path
    status, out, err = run(capsys, "generate", rotary, "--ids", "1,2,3,4,5,6", "-n", "9", "--json")
    assert (status, len(json.loads(out.splitlines()[-1])["ids"])) == (0, 3), err
    status, out, err = run(capsys, "generate", rotary, "--ids", "1,2,3,4,5,6", "-n", "9", "--json", "--beyond-context")
    assert (status, len(json.loads(out.splitlines()[-1])["ids"])) == (0, 9), err
    status, _, err = run(capsys, "generate", bundle, "--ids", "1", "--beyond-context")
    assert status == 2
    assert "--beyond-context: expected a model whose positions have no limit, got one of 256 positions" in err


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "inf"], "--temperature"),
        (["--temperature", "warm"], "--temperature"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.5"], "--top-p"),
        (["--top-k", "0"], "--top-k"),
        (["-n", "-3"], "--max-new-tokens"),
        (["--threads", "0"], "--threads"),
        (["--threads", "99999"], "--threads"),
        (["--kernels", "mkl"], "--kernels"),
        (["--dtype", "float8"], "--dtype"),
        (["--device", "nowhere"], "--device"),
        (["--backend", "jax"], "--backend"),
        (["--backend", "onnxruntime", "--device", "cpu"], "--device"),
        (["--backend", "onnxruntime", "--dtype", "bfloat16"], "--dtype"),
        (["--seed", "x"], "--seed"),
        (["--ids", "1,x"], "--ids"),
    ],
)
def test_a_wrong_value_names_its_flag(
    bundle: str, arguments: list[str], flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = [] if "--ids" in arguments else [PROMPT]
    status, out, err = run(capsys, "generate", bundle, *prompt, *arguments)
    assert (status, out) == (2, ""), err
    assert flag in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["generate"], 2),
        (["generate", "B", "one", "two"], 2),
        (["generate", "B", "--no-such-option"], 2),
        (["genrate", "B", "x"], 2),
        (["--json"], 2),
        (["verify", "B", "--shard", "middle"], 2),
        (["inspect", "no/such.splitbundle"], 1),
        (["verify", "no/such.splitbundle"], 1),
        (["generate", "no/such.splitbundle", "x"], 1),
        (["inspect", "B", "extra"], 2),
    ],
)
def test_wrong_calls(bundle: str, arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    given = [bundle if argument == "B" else argument for argument in arguments]
    found, _, err = run(capsys, *given)
    assert (found, bool(err)) == (status, True)
    assert "Traceback" not in err


def test_a_hint_names_commands_here_and_calls_in_python(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none.splitbundle"
    assert "splitbundle convert SOURCE -o NAME.splitbundle makes one" in run(capsys, "inspect", missing)[2]
    with pytest.raises(BundleError, match=r"splitbundle_converter.convert\(SOURCE"):
        splitbundle.open(missing)
    assert "--force replaces it" in run(capsys, "convert", CHECKPOINT, "-o", bundle)[2]
    with pytest.raises(BundleError, match="force=True replaces it"):
        splitbundle_converter.convert(CHECKPOINT, bundle)


def hints() -> list[str]:
    """Return the texts of the packages that are hints, or may be: those with an option or a call in them."""
    found = []
    for root in (ROOT / "runtime", ROOT / "converter"):
        for path in root.rglob("*.py"):
            if path.parent.name == "cli" or path.name.endswith(("commands.py", "_command.py", "__main__.py")):
                continue
            tree = ast.parse(path.read_text("utf-8"))
            documents = {
                ast.get_docstring(node, clean=False)
                for node in ast.walk(tree)
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            }
            bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            found += [
                node.value
                for node in ast.walk(tree)
                if isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node.value not in documents
                and id(node) not in bare
            ]
    return found


def test_no_text_of_the_packages_names_an_option() -> None:
    """A hint names calls, and the command translates it."""
    options = re.compile(r"(?<![-\w])--[a-z][a-z-]+")
    foreign = {"--upgrade", "--shard", "--plain-http"}  # of pip, and of whole commands that are shown
    assert {flag for text in hints() for flag in options.findall(text)} <= foreign


def test_every_call_in_a_hint_has_its_words_in_the_command() -> None:
    names = "force|check|tokenizer|allow_pickle|part|variant|genai|verify|insecure|tls"
    call = re.compile(rf"\b(?:{names})=(?:True|False|\"[a-z]+\")?")
    for text in hints():
        for found in call.findall(text):
            assert found in words.COMMANDS or any(found.startswith(known) for known in words.COMMANDS), text


def test_a_pipeline_takes_the_backend_that_is_installed(bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = splitbundle.open(bundle)
    assert opened.pipeline().first.backend == opened.stage("trunk").backend == "torch"
    monkeypatch.setattr(registry, "_is_installed", lambda library: library == "onnxruntime")
    assert opened.pipeline().first.backend == opened.stage("trunk").backend == "onnxruntime"
    assert opened.run_vectors()[0].between == ("onnxruntime", "original")


def test_a_partial_bundle_is_said_to_be_one(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "layer-003.safetensors").unlink()
    status, out, err = run(capsys, "verify", copy)
    assert (status, out) == (3, "")
    assert "The bundle is partial. These shards are whole: bottom, top; --shard bottom checks one." in err
    with pytest.raises(BundleError, match="These shards are whole: bottom, top; shard='bottom' checks one"):
        splitbundle.open(copy).verify()
    status, out, err = run(capsys, "verify", copy, "--shard", "bottom", "--json")
    document = json.loads(out)
    assert (status, document["partial"], document["whole_shards"]) == (0, True, ["bottom", "top"])
    assert "The bundle is partial. These shards have all their files: bottom, top." in err


@pytest.mark.rule("SB-D-006")
def test_exact_reports_empty_directories(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "empty" / "inner").mkdir(parents=True)
    assert splitbundle.open(copy).verify().unlisted == ("empty/inner/",)
    status, _, err = run(capsys, "verify", copy, "--exact")
    assert status == 3
    assert "[file.unlisted] empty/inner/: expected only what the manifest lists" in err
    (copy / "empty" / "inner").rmdir()
    assert splitbundle.open(copy).verify().unlisted == ("empty/",)
    (copy / "empty").rmdir()
    for path in (copy / "tokenizer").iterdir():
        path.unlink()
    with pytest.raises(BundleError) as caught:  # a directory for listed files may be empty in a partial bundle
        splitbundle.open(copy).verify(exact=True)
    assert set(caught.value.codes) == {"file.missing"}


def test_a_bundle_that_is_being_replaced(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = splitbundle.open(copy)
    unpatched = os.open

    def replaced(path: object, *arguments: int, **named: object) -> int:
        if str(path).endswith("embedding.safetensors"):
            os.unlink(path)  # type: ignore[arg-type]
        return unpatched(path, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", replaced)
    with pytest.raises(BundleError) as caught:
        opened.stage("bottom")
    (problem,) = caught.value.problems
    assert (problem.code, problem.hint) == ("file.unreadable", "A writer is replacing the bundle: open it again")


@pytest.mark.parametrize("how", ["replaced", "removed", "damaged"])
def test_a_bundle_that_is_replaced_after_opening(how: str, copy: Path) -> None:
    """The bundle is no longer the opened one: that is said, and not that a file of it is missing or differs."""
    bundle = splitbundle.open(copy)
    if how == "damaged":
        (copy / bundle.files_of(bundle.shards[0])[0]).write_bytes(b"x")
    else:
        shutil.rmtree(copy)
    if how == "replaced":
        shutil.copytree(ROOT / "tests" / "golden" / "v1.0" / "llama.splitbundle", copy)
    calls: tuple[Callable[[], object], ...] = (
        lambda: bundle.stage(bundle.shards[0].name),
        bundle.pipeline,
        bundle.verify,
        bundle.run_vectors,
    )
    for call in calls:
        with pytest.raises(BundleError) as caught:
            call()
        told = [problem for problem in caught.value.problems if "since it was opened: open it again" in str(problem)]
        assert len(told) == (0 if how == "damaged" else 1), caught.value
        assert not told or (len(caught.value.problems) == 1 and told[0].file == "manifest.json")


@pytest.mark.parametrize("options", [[], ["--allow-pickle"]])
@pytest.mark.parametrize(("text", "code"), [('{"model_type": "gpt2",', "[json."), ("[1]", "[source.config]")])
def test_a_malformed_configuration_without_weights(
    text: str, code: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(text)
    status, _, err = run(capsys, "convert", tmp_path / "source", "-o", tmp_path / "x.splitbundle", *options)
    assert status == 1
    assert [code in err, "[source.missing]" in err] == [True, True], err


@pytest.mark.parametrize("path", ["./none", "/no/such/model", "~/none", "a/b/c", "HERE/none"])
def test_a_path_that_does_not_exist_is_no_failure_of_the_network(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "HERE").mkdir()
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "convert", path)
    assert status == 1
    assert err.startswith(f"splitbundle: [source.missing] {path}: ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh", "fish"])
def test_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "completion", shell)
    assert status == 0
    assert all(word in out for word in ("generate", "convert", "beyond-context", "allow-pickle"))
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=out, text=True, check=True)


def test_completion_without_its_library(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, err = run(capsys, "completion", "bash")
    assert status == 4
    assert 'pip install "splitbundle[completion]"' in err


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
@pytest.mark.parametrize("json_", [[], ["--json"]])
@pytest.mark.parametrize("module", ["splitbundle.cli.main", "torch", "splitbundle.cli.console"])
def test_an_interruption_while_modules_are_imported(bundle: str, module: str, json_: list[str]) -> None:
    """The process sends itself the signal at the moment at which it looks for a module."""
    program = f"""
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.argv = ["splitbundle", "generate", {bundle!r}, "--ids", "44", *{json_!r}]
runpy.run_module("splitbundle", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr == "splitbundle: [interrupted] expected to finish, got an interruption\n"
    if json_:
        assert json.loads(done.stdout)["problems"][0]["code"] == "interrupted"


def test_the_command_lets_threads_sleep_unless_told_otherwise() -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "SPLITBUNDLE_KERNELS")
    unset = {name: value for name, value in os.environ.items() if name not in names}
    for arguments, more, expected in (
        ([], {}, "PASSIVE 20000 True"),
        ([], {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None False"),
        ([], {"GOMP_SPINCOUNT": "9"}, "None 9 False"),
        # Another number of threads could change the last bits, so it stays, and threads that wait sleep at once.
        (["--kernels=torch"], {}, "PASSIVE None False"),
        (["serve-stage", "bundle"], {}, "PASSIVE None False"),
        ([], {"SPLITBUNDLE_KERNELS": "torch"}, "PASSIVE None False"),
    ):
        program = f"""
import os, sys
import splitbundle.__main__ as command, splitbundle.cli.main as main
from splitbundle.giving_way import gives_way
names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
main.main = lambda: print(*map(os.environ.get, names), gives_way())
sys.argv = ["splitbundle", *{arguments!r}]
command.run()
"""
        done = subprocess.run([sys.executable, "-c", program], env=unset | more, capture_output=True, text=True)
        assert done.stdout.strip() == expected, (arguments, more, done.stderr)


def test_the_library_leaves_the_environment_alone(bundle: str) -> None:
    program = f"""
import os, torch
before, threads = dict(os.environ), torch.get_num_threads()
import splitbundle
pipeline = splitbundle.open({bundle!r}).pipeline(threads=1)
list(pipeline.generate(torch.tensor([[44, 308]]), max_new_tokens=2))
from splitbundle.cli.main import main
main(["generate", {bundle!r}, "--ids", "44", "-n", "2", "--threads", "1"])
assert dict(os.environ) == before
assert torch.get_num_threads() == threads
"""
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)


def test_every_command_that_computes_takes_threads(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from splitbundle.backends import registry

    seen: list[object] = []
    run_golden = registry.run_golden

    def counted(bundle: Any, shard: Any, backend: Any, threads: Any, progress: Any) -> Any:
        seen.append(threads)
        return run_golden(bundle, shard, backend, threads, progress)

    monkeypatch.setattr(registry, "run_golden", counted)
    before = torch.get_num_threads()
    commands = (
        ("convert", CHECKPOINT, "-o", tmp_path / "a.splitbundle"),
        ("resplit", bundle, "--split", "1", "-o", tmp_path / "b.splitbundle"),
        ("add-onnx", bundle, "-o", tmp_path / "c.splitbundle"),
        ("verify", "--run", bundle),
        ("generate", bundle, "--ids", "44", "-n", "2"),
    )
    for command in commands:
        status, _, err = run(capsys, *command, "--threads", before + 3)
        assert status == 0, err
        assert torch.get_num_threads() == before
    assert seen == [before + 3] * 4


def test_the_kernels_of_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, _ = run(capsys, "kernels", "--threads", "1")
    assert status == 0
    name, _, value = out.strip().removeprefix("export ").partition("=")
    assert name == "SPLITBUNDLE_KERNELS"
    monkeypatch.setenv(name, value)
    assert run(capsys, "kernels")[1] == out
    document = json.loads(run(capsys, "kernels", "--json")[1])
    assert document["kernels"] == value
    monkeypatch.delenv(name)
    assert document["pinned_by"] == "SPLITBUNDLE_KERNELS"
    assert json.loads(run(capsys, "kernels", "--json")[1])["pinned_by"] is None
    notes = run(capsys, "kernels")[2].splitlines()
    assert any("measured, in GB of weights a second: " in line or "by a rule" in line for line in notes)
    status, out, err = run(capsys, "kernels", "--kernels", "torch")
    assert all(line.endswith(" torch    pinned by --kernels") for line in err.splitlines())
    assert set(re.findall(r"=(\w+)", out.partition("SPLITBUNDLE_KERNELS=")[2])) == {"torch"}
    monkeypatch.setenv(name, "torch")
    assert all(line.endswith("pinned by SPLITBUNDLE_KERNELS") for line in run(capsys, "kernels")[2].splitlines())
    assert json.loads(run(capsys, "kernels", "--kernels", "auto", "--json")[1])["pinned_by"] is None
    monkeypatch.setenv(name, "nonsense")
    status, _, err = run(capsys, "kernels")
    assert (status, "SPLITBUNDLE_KERNELS" in err) == (1, True)


FULL = Path("/dev/full")


def command(*arguments: object, out: Any = subprocess.PIPE, **variables: str) -> tuple[int, str]:
    """Run the command in a process with this stdout. Return its status and its stderr."""
    line = [sys.executable, "-m", "splitbundle", *map(str, arguments)]
    done = subprocess.run(line, stdout=out, stderr=subprocess.PIPE, text=True, timeout=600, env=os.environ | variables)
    return done.returncode, done.stderr


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 1),
        (["--version"], 1),
        (["inspect", "B"], 1),
        (["--json", "inspect", "B"], 1),
        (["generate", "B", PROMPT, "-n", "2"], 1),
        (["inspect", "no/such.splitbundle", "--json"], 1),
        (["--json", "nonsense"], 2),
    ],
)
def test_output_that_cannot_be_written(bundle: str, arguments: list[str], status: int, unbuffered: str) -> None:
    with FULL.open("w") as out:
        given = [bundle if argument == "B" else argument for argument in arguments]
        found, err = command(*given, out=out, PYTHONUNBUFFERED=unbuffered)
    assert found == status
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    if status == 1 and "no/such.splitbundle" not in arguments:
        assert err.endswith("[system] stdout: expected to write the output, got OSError: [Errno 28] " + FULL_MESSAGE)


FULL_MESSAGE = f"{os.strerror(28)}\n"


@pytest.mark.skipif(os.name == "nt", reason="pipes differ")
@pytest.mark.parametrize(
    "arguments", [["--help"], ["inspect", "B"], ["inspect", "B", "--json"], ["completion", "bash"]]
)
def test_a_pipe_that_its_reader_has_closed(bundle: str, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        found, err = command(*[bundle if argument == "B" else argument for argument in arguments], out=writing)
    finally:
        os.close(writing)
    assert (found, err) == (1, "")


@pytest.mark.parametrize(
    "arguments", [["--json", "inspect", "B"], ["-q", "--json", "inspect", "B"], ["--debug", "inspect", "--json", "B"]]
)
def test_options_of_every_command_stand_before_it_too(
    bundle: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *[bundle if argument == "B" else argument for argument in arguments])
    assert (status, out) == run(capsys, "inspect", bundle, "--json")[:2], err
    assert json.loads(out)["ok"]


def test_an_option_of_one_command_does_not_stand_before_it(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "--strict", "inspect", bundle)
    assert status == 2
    assert f"the command's name comes before its options: splitbundle inspect --strict {bundle}\n" in err
    assert run(capsys, "--strict", "x")[0] == 2


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
@pytest.mark.parametrize("json_", [[], ["--json"]])
@pytest.mark.parametrize("second", ["in the clean-up", "in the report", "after the end"])
def test_a_second_interruption_ends_the_command_at_once(bundle: str, second: str, json_: list[str]) -> None:
    """The process sends itself the first signal as the command begins, and the second at the named place."""
    program = f"""
import os, signal, sys
from splitbundle import __main__
from splitbundle.cli import console, main

def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000): pass

def works(args, console):
    try:
        interrupt()
    finally:
        if {second!r} == "in the clean-up":
            interrupt()
            os._exit(7)

commands = main._commands

def broken(arguments):
    (found,) = [each for each in commands(arguments) if each.name == "inspect"]
    return [console.Command(name="inspect", help="", configure=found.configure, run=works)]

main._commands = broken
if {second!r} == "in the report":
    main.in_command = interrupt
sys.argv = ["splitbundle", "inspect", {bundle!r}, *{json_!r}]
status = __main__.run()
if {second!r} == "after the end":
    interrupt()
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    if second != "in the report":  # there the command may be in the middle of a line
        assert done.stderr == "splitbundle: [interrupted] expected to finish, got an interruption\n"
        assert [json.loads(line)["problems"][0]["code"] for line in done.stdout.splitlines()] == ["interrupted"] * len(
            json_
        )


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish isn't installed")
def test_fish_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script.fish").write_text(run(capsys, "completion", "fish")[1], "utf-8")
    (tmp_path / "some.splitbundle").mkdir()
    (tmp_path / "file.txt").touch()

    def completions(line: str) -> list[str]:
        program = f"source script.fish; complete -C '{line}'"
        done = subprocess.run(
            ["fish", "-c", program],
            cwd=tmp_path,
            env=os.environ | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        return [each.partition("\t")[0] for each in done.stdout.splitlines()]

    assert completions("splitbundle gen") == ["generate"]
    assert completions("splitbundle generate --backend ") == ["torch", "onnxruntime"]
    assert "--max-new-tokens" in completions("splitbundle generate x --")
    assert completions("splitbundle inspect ") == ["some.splitbundle/"]
