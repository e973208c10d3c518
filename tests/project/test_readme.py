"""The code of README.md, the tutorials and the guides runs, and prints what the pages say; paths in them exist.

Each page runs in a directory of its own, its blocks in their order. One process runs all pages, as importing the
libraries takes longer than the pages do:

- In a ``console`` block, ``$ splitbundle …`` runs the command line, which goes on in the next line after a backslash.
  The lines below a command are what it prints, where ``…`` stands for any text; on a line of its own it stands for any
  lines. A command must succeed; ``diff`` may find differences.
- A ``python`` block runs with the names of the page's blocks before it. After ``<!-- file: NAME -->`` it is saved under
  this name instead, for later blocks to run.
- ``<!-- starts with: NAME … -->`` anywhere in a page copies a checkpoint or a bundle of ``PREPARED`` there first.
- After ``<!-- serves: PORT -->``, the command of a ``console`` block is a server. It runs in a process of its own until
  the page ends, and the block shows its first line. The page gets a free port in place of this one.
- ``<!-- needs: MODULE -->`` before a block skips it where the module isn't installed.
- ``<!-- not run: REASON -->`` before a block leaves it out.

With the path of another environment's Python in ``SPLITBUNDLE_DOCS_PYTHON``, the pages run there: of a built wheel.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import pytest

from splitbundle.cli.commands import COMMANDS
from splitbundle_converter.commands import ADD_ONNX, CONVERT, RESPLIT
from splitbundle_converter.families import summary
from splitbundle_converter.families.table import FAMILIES
from tests.support.pages import fences
from tests.support.paths import ROOT

DOCS: Final = ROOT / "docs"
README: Final = ROOT / "README.md"
PAGES: Final = sorted(
    page.relative_to(ROOT).as_posix() for page in (README, *DOCS.glob("tutorial/*.md"), *DOCS.glob("guides/*.md"))
)
"""The pages whose code runs."""
LINKED: Final = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (
        *(ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "tests/conformance/README.md")),
        *(page for page in DOCS.rglob("*.md") if page.parent.name != "generated"),
    )
)
"""The pages whose paths and codes are looked at."""
PREPARED: Final = {
    "license-gpt2": "example license-gpt2 -o license-gpt2",
    "license.splitbundle": "convert license-gpt2 --split 2,4 -o license.splitbundle",
    "license-onnx.splitbundle": "add-onnx license.splitbundle -o license-onnx.splitbundle",
}
"""A bundle or checkpoint that a page may start with -> the command that makes it."""
ATTRIBUTES: Final = {"pipeline.state", "pipeline.replicas", "session.reorder"}
"""What pages write in backticks that looks like a code, and is none."""
_RUNNER: Final = """
import contextlib, io, json, os, runpy, shlex, subprocess, sys, traceback

def run(directory, blocks):
    servers = []
    try:
        return run_blocks(directory, blocks, servers)
    finally:
        for server in servers:
            server.terminate()
            server.communicate()

def run_blocks(directory, blocks, servers):
    os.chdir(directory)
    names, printed = {"__name__": "__main__"}, []
    for kind, where, text in blocks:
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                if kind == "file":
                    with open(where, "w", encoding="utf-8") as file:
                        file.write(text)
                elif kind == "python":
                    exec(compile(text, where, "exec"), names)
                elif kind == "server":
                    command = [sys.executable, "-m", "splitbundle", *shlex.split(text)[1:]]
                    servers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
                    out.write(servers[-1].stdout.readline())
                else:
                    sys.argv = shlex.split(text)
                    runpy.run_module("splitbundle", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code and (end.code, sys.argv[1:2]) != (3, ["diff"]):
                return printed, f"{where}: exit status {end.code} of {text}: {err.getvalue()}"
        except BaseException:
            return printed, f"{where}: {traceback.format_exc()}"
        printed.append(out.getvalue())
    return printed, None

for line in sys.stdin:
    print(json.dumps(run(*json.loads(line))), flush=True)
"""
Block = tuple[str, str, str]
"""The kind (``python``, or ``command`` or ``server`` for one line of a console), where it is, and its text.

The kind ``file`` has the file's name in place of where it is."""


def blocks(page: str) -> Iterator[tuple[Block, str]]:
    """Yield the blocks of a page in order, each with the output that the page prints."""
    for line_number, note, about, kind, body in fences(page):
        where = f"{page}, line {line_number}"
        if kind not in ("python", "console") or note == "not run":
            continue
        if note == "needs" and find_spec(about or "") is None:
            continue
        if note == "file":
            yield ("file", about or "", body), ""
            continue
        if kind == "python":
            yield ("python", where, body), ""
            continue
        first, *commands = re.split(r"^\$ ", re.sub(r"\\\n *", "", body), flags=re.MULTILINE)
        assert not first, f"{where}: a console block begins with a command"
        for command in commands:
            line, _, said = command.partition("\n")
            assert line.startswith("splitbundle "), f"{where}: {line}"
            yield ("server" if note == "serves" else "command", where, line), said


Runner = Callable[[Path, list[Block]], list[str]]
"""Run blocks in a directory, and return each block's stdout."""


@pytest.fixture(scope="session")
def run() -> Iterator[Runner]:
    """Runs blocks, in one process for all pages."""
    command = [os.environ.get("SPLITBUNDLE_DOCS_PYTHON", sys.executable), "-c", _RUNNER]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}  # models this small only lose by threads
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings) as process:

        def ask(directory: Path, content: list[Block]) -> list[str]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([str(directory), content]) + "\n")
            process.stdin.flush()
            printed: list[str]
            printed, problem = json.loads(process.stdout.readline())
            assert problem is None, problem
            return printed

        yield ask
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, run: Runner) -> Callable[[str], Path]:
    """Make what a page starts with, once, after the earlier entries of ``PREPARED``."""
    directory = tmp_path_factory.mktemp("prepared")

    def make(wanted: str) -> Path:
        for name, command in PREPARED.items():
            if not (directory / name).exists():
                run(directory, [("command", name, f"splitbundle {command}")])
            if name == wanted:
                return directory / name
        raise AssertionError(f"nothing is called {wanted}")

    return make


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, run: Runner, prepared: Callable[[str], Path]) -> None:
    for names in re.findall(r"<!-- starts with: ([^>]*?) -->", (ROOT / page).read_text("utf-8")):
        for name in names.split():
            shutil.copytree(prepared(name), tmp_path / name)
    content = with_free_ports(page, list(blocks(page)))
    if not content:
        pytest.skip("no code that runs")
    printed = run(tmp_path, [block for block, _ in content])
    for ((_, where, text), said), out in zip(content, printed, strict=True):
        assert is_like(said, out), f"{where}: {text}\nprinted:\n{out}"


def with_free_ports(page: str, content: list[tuple[Block, str]]) -> list[tuple[Block, str]]:
    """Return blocks with a free port in place of each port at which the page serves."""
    ports = dict.fromkeys(re.findall(r"<!-- serves: (\d+) -->", (ROOT / page).read_text("utf-8")))
    with contextlib.ExitStack() as held:  # all at once, so that no two are the same
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in ports]
        free = {port: str(own.getsockname()[1]) for port, own in zip(ports, sockets, strict=True)}

    def put(text: str) -> str:
        return re.sub(r"(?<=:)\d+\b|(?<=--port )\d+\b", lambda found: free.get(found[0], found[0]), text)

    return [((kind, where, put(text)), put(said)) for (kind, where, text), said in content]


def is_like(said: str, printed: str) -> bool:
    """Whether a page's lines match the output, where ``…`` is any text. A page may leave out the output."""
    pattern = "".join(
        r"(?:.*\n)*" if line == "…" else ".*".join(map(re.escape, line.split("…"))) + r"\n"
        for line in said.splitlines()
    )
    return not said or re.fullmatch(pattern, printed if printed.endswith("\n") else printed + "\n") is not None


def test_a_page_that_is_wrong_is_seen() -> None:
    assert is_like("a … c\n…\nz\n", "a b c\n1\n2\nz\n")
    assert not is_like("a … c\n", "a b d\n")
    assert not is_like("a\n", "a\nb\n")


def test_the_pages_have_code() -> None:
    """A change of the blocks' form must not leave one out silently."""
    kinds = [block[0] for page in PAGES for block, _ in blocks(page)]
    assert kinds.count("python") > 15
    assert kinds.count("command") > 25
    assert len([page for page in PAGES if any(blocks(page))]) > 10


def test_the_readme_fits_on_a_few_screens() -> None:
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_no_row_is_made_of_what_is_refused(name: str) -> None:
    """If the default configuration is refused, the row comes from one that isn't, and says what it needs."""
    config, _ = summary.default(name)
    FAMILIES[name].facts(config)
    assert not config.problems


@pytest.mark.parametrize("name", LINKED)
def test_paths_in_backticks_exist(name: str) -> None:
    """``test_links.py`` holds the links."""
    prose = re.sub(r"^```(?!\{).*?^```", "", (ROOT / name).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    paths = re.findall(r"`((?:tests|benchmarks|spec|runtime|examples|converter|schemas|docs)/[\w./-]+)`", prose)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_codes_in_the_pages_exist() -> None:
    known = set(
        re.findall(r"^\| `([a-z-]+\.[a-z-]+)` \|", (ROOT / "spec/v1/bundle.md").read_text("utf-8"), re.MULTILINE)
    )
    groups = "|".join(sorted({code.partition(".")[0] for code in known}))
    named = {
        (name, code)
        for name in LINKED
        for code in re.findall(rf"`((?:{groups})\.[a-z-]+)`", (ROOT / name).read_text("utf-8"))
        if code.rpartition(".")[2] not in ("py", "md", "json", "safetensors") and code not in ATTRIBUTES
    }
    assert len(named) > 80
    assert {(name, code) for name, code in named if code not in known} == set()


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = {
        (page.parent / line).with_suffix(".md").resolve()
        for page in DOCS.rglob("*.md")
        for toctree in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        for line in toctree.splitlines()
    }
    pages = {page.resolve() for page in DOCS.rglob("*.md") if page.parent.name != "generated"}
    assert pages - listed == {DOCS / "index.md"}


def test_the_first_page_leads_to_every_page_in_the_order_of_the_contents() -> None:
    """A reader of the first page alone sees each page of the contents, in their order."""
    text = (DOCS / "index.md").read_text("utf-8")
    shown, _, contents = text.partition("\n```{toctree}")
    first = shown.index("## Learn it")
    linked = list(dict.fromkeys(re.findall(r"\]\(([\w./-]+)\.md\)", shown[first:])))
    listed = [line for line in contents.splitlines() if re.fullmatch(r"[\w./-]+", line)]
    assert linked == listed


def test_every_example_is_on_its_page() -> None:
    page = (DOCS / "reference" / "examples.md").read_text("utf-8")
    programs = [path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").rglob("*.py")]
    assert len(programs) > 10
    assert [name for name in programs if f"`{name}`" not in page] == []


def test_every_door_is_named_with_what_guards_it() -> None:
    """Each command that reads files from strangers has a row in SECURITY.md, and the modules in the rows exist."""
    doors = (ROOT / "SECURITY.md").read_text("utf-8").partition("\n## The doors\n")[2].partition("\n## ")[0]
    read_no_file = {"kernels", "completion"}
    commands = {command.name for command in (*COMMANDS, CONVERT, RESPLIT, ADD_ONNX)} - read_no_file
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", doors, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    }
    assert commands <= named
    modules = set(re.findall(r"`([\w/]+\.py)`", doors))
    assert len(modules) > 8
    packages = (ROOT / "runtime" / "splitbundle", ROOT / "converter" / "splitbundle_converter")
    there = [path.relative_to(ROOT).as_posix() for package in packages for path in package.rglob("*.py")]
    assert {name for name in modules if not any(f"/{path}".endswith(f"/{name}") for path in there)} == set()


def test_the_commands_are_the_makefiles() -> None:
    text, makefile = README.read_text("utf-8"), (ROOT / "Makefile").read_text("utf-8")
    in_blocks = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    for command in ("demo", "test"):
        assert re.search(rf"^make {command} ", in_blocks, re.MULTILINE)
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)
    assert re.search(r"^docs:", makefile, re.MULTILINE)
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert script.splitlines()[-3:] == ["make test", "make test-real", "make docs"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
