"""The conformance kit over this project's own readers: all give the same verdict, soon and in little memory."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conformance import adapters, process, run
from conformance.case import Case
from conformance.cases import cases, number_cases, wire_cases
from tests.support.paths import TESTS

HERE = TESTS / "conformance"
READERS = ("torch", "onnxruntime", "command")
CASES = {case.name: case for case in cases()}
GROUPS = sorted({name.partition("/")[0] for name in CASES})
NOT_EVERYWHERE = re.compile(r"directory/.*(device|socket|pipe|link|sparse).*")
"""Cases that a file system, or a user without privileges, may not be able to make."""

pytestmark = pytest.mark.usefixtures("one_thread")


def asked(name: str) -> run.Ask:
    return lambda step, directory, limited: adapters.ADAPTERS[name](step, str(directory))


def test_names_are_unique_and_every_case_that_is_refused_has_a_code() -> None:
    assert len(CASES) == len(list(cases()))
    assert len(CASES) > 700
    text = (HERE.parents[1] / "spec" / "v1" / "bundle.md").read_text("utf-8")
    steps = dict(re.findall(r"^\| `([a-z.-]+)` \| `([a-z]+)` \|", text, flags=re.MULTILINE))
    for case in CASES.values():
        assert case.code is None or case.code in steps, case.name


def test_every_case_names_rules_that_there_are() -> None:
    rules = set()
    for path in (HERE.parents[1] / "spec" / "v1").glob("*.md"):
        rules |= set(re.findall(r"\*\*\[(SB-[A-Z]-\d{3})\]", path.read_text("utf-8")))
    every = [*CASES.values(), *wire_cases(), *number_cases()]
    assert len({case.name for case in every}) == len(every)
    for case in every:
        assert case.rules, case.name
        assert set(case.rules) <= rules, case.name


def test_a_reader_that_refuses_everything_fails_every_case_to_accept(tmp_path: Path) -> None:
    problem = {"code": "json.syntax", "file": "manifest.json", "pointer": None}
    for case in CASES.values():
        if case.code is None:
            results = run.judge(case, tmp_path, lambda *_: {"verdict": "refused", "problems": [problem]})
            assert all(result["wrong"] or result["skipped"] for result in results), case.name


@pytest.mark.rule("SB-X-002", "SB-X-005", "SB-X-008")
def test_frames_are_as_the_kit_expects(tmp_path: Path, tally: Callable[[str, int], None]) -> None:
    results = [each for case in wire_cases() for each in run.judge(case, tmp_path, asked("torch"))]
    assert [(r["name"], r["wrong"]) for r in results if r["wrong"]] == []
    assert len(results) > 150
    tally("frames of the conformance kit as expected", len(results))


def test_wrong_answers_to_steps_of_the_wire_are_found(tmp_path: Path) -> None:
    """An answer of another frame, or of another payload."""
    header = {"verdict": "accepted", "header": {"op": "nothing"}, "numbers": "00", "payload": "00"}
    for case in wire_cases():
        (result,) = run.judge(case, tmp_path, lambda *_: header)
        assert result["wrong"], case.name


@pytest.mark.rule(
    *("SB-B-002", "SB-B-003", "SB-B-004", "SB-B-006", "SB-B-008", "SB-B-009", "SB-B-014", "SB-C-001", "SB-C-025"),
    *("SB-C-026", "SB-C-027", "SB-C-028", "SB-C-029", "SB-C-031", "SB-C-036", "SB-C-039", "SB-C-040", "SB-C-042"),
)
def test_numbers_are_those_of_the_original_models(tmp_path: Path, tally: Callable[[str, int], None]) -> None:
    every = list(number_cases())
    results = [each for case in every for each in run.judge(case, tmp_path, asked("torch"))]
    assert [(r["name"], r["wrong"]) for r in results if r["wrong"]] == []
    assert len(results) > 30
    tally("models of the conformance kit with the original's numbers", len(results))


@pytest.mark.parametrize("off", ["number", "missing", "nan", "code", "cases"])
def test_a_wrong_number_is_found(off: str, tmp_path: Path) -> None:
    case = next(case for case in number_cases() if case.name == "numbers/learned")

    def spoilt(step: str, directory: Path, limited: bool) -> Any:
        answer = asked("torch")(step, directory, limited)
        first = answer["cases"][0][0]
        if off == "number":
            first["logits"][1][2][3] += 1e-3
        elif off == "missing":
            first["hidden"][0][2].pop()
        elif off == "nan":
            first["logits"][0][0][0] = float("nan")
        elif off == "code":
            answer["cases"][-1][-1]["code"] = "internal"
        else:
            answer["cases"].pop()
        return answer

    (result,) = run.judge(case, tmp_path, spoilt)
    assert result["wrong"]


def test_cases_that_failed_are_asked_again_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = [sys.executable, "-c", 'print(\'{"verdict": "accepted"}\')']
    options = ["--only", "manifest-json-bom", "--only", "accept/manifest-model-unknown-field", "--json"]
    assert run.main([*options, *answer]) == run.FAILED
    (tmp_path / "before.json").write_text(capsys.readouterr().out)
    assert run.main(["--failed", str(tmp_path / "before.json"), "--json", *answer]) == run.FAILED
    again = json.loads(capsys.readouterr().out)["results"]
    assert [result["name"] for result in again] == ["reject/manifest-json-bom"]
    with pytest.raises(SystemExit) as raised:
        run.main(["--failed", str(tmp_path / "none.json"), *answer])
    assert raised.value.code == run.USAGE


def test_a_long_run_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter(range(0, 1000, 11))
    monkeypatch.setattr(run.time, "monotonic", lambda: float(next(clock)))
    progress = run.Progress(2)
    progress.show([{"wrong": None}])
    progress.show([{"wrong": None}, {"wrong": "x"}])
    progress.end()
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == ["1 of 2 cases, 0 not as expected", "2 of 2 cases, 1 not as expected"]


@pytest.mark.rule(
    "SB-D-001",
    "SB-D-004",
    "SB-D-005",
    "SB-D-006",
    "SB-D-007",
    "SB-D-008",
    "SB-D-010",
    "SB-E-002",
    "SB-M-053",
    "SB-W-002",
    "SB-W-003",
    "SB-W-004",
    "SB-W-005",
    "SB-W-006",
    "SB-W-007",
    "SB-W-008",
    "SB-W-009",
    "SB-W-010",
    "SB-W-011",
    "SB-T-003",
    "SB-T-004",
    "SB-T-005",
    "SB-T-006",
    "SB-T-007",
    "SB-T-008",
    "SB-T-009",
    "SB-J-011",
    "SB-M-096",
    "SB-O-018",
    "SB-O-022",
)
@pytest.mark.parametrize(
    ("group", "readers"),
    [
        *((group, "those that differ") for group in GROUPS if group != "large"),
        *(pytest.param(group, "all", marks=pytest.mark.long) for group in GROUPS if group != "large"),
    ],
)
def test_every_reader_says_what_the_kit_expects(
    group: str, readers: str, tmp_path: Path, tally: Callable[[str, int], None]
) -> None:
    results = []
    for case in CASES.values():
        if case.name.startswith(f"{group}/") and not case.limited:
            results += judged(case, tmp_path, every=readers == "all")
    assert [(r["name"], r["step"], r["wrong"]) for r in results if r["wrong"]] == []
    assert [r["name"] for r in results if r["skipped"] and not NOT_EVERYWHERE.fullmatch(r["name"])] == []
    assert len(results) >= 8
    tally("verdicts of the conformance kit as expected", sum(not r["skipped"] for r in results))


FIRST = frozenset({(case.name.partition("/")[0], case.code, case.file): case.name for case in CASES.values()}.values())
"""A case for each code and file of a group. The command reports all refusals alike."""


def judged(case: Case, parent: Path, *, every: bool) -> list[dict[str, Any]]:
    """The verdicts of each reader, and of the schemas where they apply, on a case. No reader changes it.

    Without ``every``, the command judges the cases of ``FIRST`` alone, and onnxruntime only loads: until then, the
    runtime has one reader.
    """

    def asked_all(step: str, directory: Path, limited: bool) -> Any:
        names = [
            name
            for name in READERS
            if every or name == "torch" or (step == "stage" if name == "onnxruntime" else case.name in FIRST)
        ]
        verdicts = [asked(name)(step, directory, limited) for name in names]
        return next((verdict for verdict in verdicts if run.wrong(case, verdict)), verdicts[0])

    return run.judge(case, parent, asked_all) + run.judge(case, parent, asked("schemas"), schema=True)


TIMES = 20
"""The limit for judging a limited case, as a multiple of parsing the largest document."""
CHILD = """
import json, resource, sys, time
sys.path[:0], times = json.loads(sys.argv[1]), float(sys.argv[2])
from conformance.adapters import ADAPTERS
from tests.support.yardsticks import parsing
import splitbundle.cli.main
resource.setrlimit(resource.RLIMIT_AS, (256 * 2**20, 256 * 2**20))
known = parsing(2**24)
for line in sys.stdin:
    reader, step, path = json.loads(line)
    start = time.process_time()
    verdict = ADAPTERS[reader](step, path)
    spent = time.process_time() - start
    if spent > times * known:  # the machine may be slower by now
        known = parsing(2**24)
    print(json.dumps([verdict, spent / known]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux")
@pytest.mark.rule("SB-J-005", "SB-J-006", "SB-J-010", "SB-A-006", "SB-M-004", "SB-M-085", "SB-M-053")
def test_large_cases_are_refused_soon_and_in_little_memory(tmp_path: Path, tally: Callable[[str, int], None]) -> None:
    """The child has 256 MiB of address space for everything, including Python and the reader's code."""
    limited = [case for case in CASES.values() if case.limited]
    assert len(limited) > 20
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps([str(HERE.parent), *sys.path]), str(TIMES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    count = 0
    for case in limited:
        root = run.make(case, tmp_path)
        if root is None:
            assert NOT_EVERYWHERE.fullmatch(case.name)
            continue
        for step in set(case.steps) - {"stage"}:  # loading imports a backend, which needs more memory than that
            for reader in ("torch", "command") if case.name in FIRST else ("torch",):
                child.stdin.write(json.dumps([reader, step, str(root)]) + "\n")
                child.stdin.flush()
                verdict, times = json.loads(child.stdout.readline())
                assert run.wrong(case, verdict) is None, (case.name, reader, step)
                assert times < TIMES, (case.name, reader, step, times)
                count += 1
    child.stdin.close()
    assert child.wait(600) == 0
    tally("of them soon and within 256 MiB", count)


def test_loading_refuses_large_cases_too(tmp_path: Path) -> None:
    """The readers take turns: each refuses what it opens, before it loads anything."""
    large = [case for case in CASES.values() if case.limited and "stage" in case.steps]
    for case, reader in zip(large, itertools.cycle(READERS)):
        results = run.judge(replace(case, steps=("stage",)), tmp_path, asked(reader))
        assert [result["wrong"] for result in results] == [None], (case.name, reader)


FAKES = {
    "crash": ("import sys; sys.exit('Segmentation fault')", "exit status 1: Segmentation fault"),
    "kill": ("import os; os.kill(os.getpid(), 9)", "exit status -9: "),
    "hang": ("import time; time.sleep(600)", "no verdict after 1 s"),
    "silent": ("", "no JSON document on stdout: b''"),
    "vague": ("print('{}')", "expected a verdict, got {}"),
    "agreeable": ('print(\'{"verdict": "accepted"}\')', "expected json.syntax, got accepted"),
    "other": (
        'print(\'{"verdict": "refused", "problems": [{"code": "internal", "file": "x"}]}\')',
        "expected json.syntax of manifest.json at None, got internal x",
    ),
    "text": (
        'print(\'{"verdict": "refused", "problems": ["x"]}\')',
        "expected a verdict, got {'verdict': 'refused', 'problems': ['x']}",
    ),
    "list": ('print(\'{"verdict": ["accepted"]}\')', "expected a verdict, got {'verdict': ['accepted']}"),
    "surrogate": (
        'print(\'{"verdict": "refused", "problems": [{"code": "\\\\ud800\\\\n"}]}\')',
        r"expected json.syntax of manifest.json at None, got \ud800\n",
    ),
    "nested": ("print('[' * 100000)", f"no JSON document on stdout: {b'[' * 80!r}"),
    "endless": ("print('1' * 2**21)", f"no JSON document on stdout: {b'1' * 80!r}"),
}


@pytest.mark.parametrize("name", FAKES)
def test_an_adapter_that_fails_is_said_to(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = FAKES[name]
    arguments = ["--only", "manifest-json-truncated", "--timeout", "1" if name == "hang" else "600"]
    assert run.main([*arguments, "--json", sys.executable, "-c", code]) == run.FAILED
    said = json.loads(capsys.readouterr().out)
    assert [(r["name"], r["wrong"]) for r in said["results"]] == [("reject/manifest-json-truncated", text)]


def test_a_program_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "manifest-json-truncated", "no-such-program"]) == run.FAILED
    assert "no-such-program can't be run: No such file or directory" in capsys.readouterr().out


@pytest.mark.parametrize("options", [("--jobs", "0"), ("--jobs", "x"), ("--timeout", "0"), ("--timeout", "nan")])
def test_options_that_make_no_sense(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        run.main([*options, "true"])
    assert raised.value.code == run.USAGE
    assert f"argument {options[0]}: invalid" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("nope", "open", "x"), ("torch", "nope", "x"), ("torch",)])
def test_adapters_say_how_they_are_called(words: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, HERE / "adapters.py", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == run.USAGE
    assert done.stderr.startswith("usage: adapters.py")


REFUSES = """
import sys
print('{"verdict": "refused", "problems": [{"code": "json.number", "file": "manifest.json", "pointer": null}]}')
"""
TAKES = {
    "nothing": ("", None),
    "processor": ("import time\nwhile time.process_time() < 0.4: pass", "s"),
    "waiting": ("import time; time.sleep(0.4)", None),
    "memory": ("held = bytearray(300 * 2**20)", "MiB"),
    "less memory": ("held = bytearray(200 * 2**20)", None),
}


@pytest.mark.skipif(not process.MEASURES, reason="this system doesn't say what a process took")
@pytest.mark.parametrize("name", TAKES)
def test_limited_cases_are_limited(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outside adapter that takes more for limited cases than for the small bundle."""
    monkeypatch.setattr(run, "TRIES", 2)
    doing, unit = TAKES[name]
    if name in ("processor", "waiting"):  # at least 0.4 s, against none for the small bundle: on any machine
        monkeypatch.setattr(run.Adapter, "usual", lambda self, step: (0.0, 2**40))
    large = "import os, sys\nif os.path.getsize(sys.argv[2] + '/manifest.json') > 2**20:\n    "
    code = REFUSES + large + doing.replace("\n", "\n    ") + "\n" if doing else REFUSES
    limit = "0.2" if name == "processor" else "600"
    arguments = ["--only", "large/integer-negative", "--limit", limit, "--json", sys.executable, "-c", code]
    status = run.main(arguments)
    (result,) = json.loads(capsys.readouterr().out)["results"]
    if unit is None:
        assert (status, result["wrong"]) == (run.OK, None)
    else:
        assert status == run.FAILED
        taken = "s of the processor" if unit == "s" else unit
        assert re.fullmatch(rf"took [\d.]+ {taken}, and for the small bundle [\d.]+ {unit}", result["wrong"])


@pytest.mark.skipif(not process.MEASURES, reason="needs groups of processes")
@pytest.mark.parametrize("ends", [True, False])
def test_what_an_adapter_started_ends_with_it(ends: bool, tmp_path: Path) -> None:
    """Whether the adapter ends by itself or is killed. The child would also hold stdout open."""
    child = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'id')!r}).write_text(str(os.getpid())); "
    code = (
        "import pathlib, subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, '-c', {child + 'time.sleep(600)'!r}])\n"
        f"while not pathlib.Path({str(tmp_path / 'id')!r}).exists() or not open({str(tmp_path / 'id')!r}).read(): "
        "time.sleep(0.01)\n"
        "print('1', flush=True)\n"
    )
    command = [sys.executable, "-c", code + ("" if ends else "time.sleep(600)")]
    if ends:
        assert process.ask(command, 600).document == 1
    else:
        for seconds in (1, 10, 100):  # until it is long enough for two starts of Python
            with pytest.raises(process.Trouble, match=f"no verdict after {seconds} s"):
                process.ask(command, seconds)
            if (tmp_path / "id").exists() and (tmp_path / "id").read_text():
                break
    identity = int((tmp_path / "id").read_text())
    for _ in range(6000):  # the process that adopts it may reap it a little later
        try:
            state = Path(f"/proc/{identity}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            state = "gone"
        if state in "Zgone":
            break
        time.sleep(0.01)
    assert state in "Zgone"


def test_each_step_has_a_directory_of_its_own(tmp_path: Path) -> None:
    """An adapter that changes its directory changes no other verdict."""
    case = next(case for case in CASES.values() if case.name == "header/overlap")
    assert len(case.steps) > 1
    seen = []

    def spoil(step: str, directory: Path, limited: bool) -> dict[str, str]:
        seen.append(sorted(path.name for path in directory.iterdir()))
        (directory / "manifest.json").unlink()
        (directory / "new").touch()
        return {"verdict": "accepted"}

    run.judge(case, tmp_path, spoil)
    assert len(seen) == len(case.steps)
    assert all(names == seen[0] and "manifest.json" in names and "new" not in names for names in seen)


@pytest.mark.parametrize("name", adapters.ADAPTERS)
def test_the_kit_is_one_command(name: str) -> None:
    """Run it as another implementation would: one process a verdict."""
    chosen = ["--only", "manifest-json-bom", "--only", "directory/pipe-layer"]
    options = ["--schema"] if name == "schemas" else []
    command = [sys.executable, HERE / "run.py", *chosen, *options, sys.executable, HERE / "adapters.py", name]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"{1 if name == 'schemas' else 3} verdicts, 0 not as expected"


def test_the_readme_names_what_there_is() -> None:
    """The README's table of hostile inputs names only cases that exist."""
    text = (HERE / "README.md").read_text("utf-8")
    table = text.partition("\n## Hostile inputs\n")[2]
    named = set(re.findall(r"`((?:accept|reject|large|directory|header|tokenizer|graph|genai)/[a-z0-9.*-]+)`", table))
    assert len(named) > 100
    patterns = {name: re.compile(re.escape(name).replace(r"\*", ".*")) for name in named}
    assert {name for name, pattern in patterns.items() if not any(map(pattern.fullmatch, CASES))} == set()
    tests = "".join(path.read_text("utf-8") for path in HERE.parent.rglob("test_*.py"))
    functions = set(re.findall(r"`(test_[a-z0-9_]+)`", table))
    assert {name for name in functions if f"def {name}(" not in tests} == set()
    for adapter in adapters.ADAPTERS:
        assert f"`{adapter}`" in text
