"""The README's examples run; its list of files is the files' own first lines, its families those that there are.

    python tests/test_readme.py

writes both lists anew.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from splitbundle.cli.commands import COMMANDS
from splitbundle_converter.commands import ADD_ONNX, CONVERT, RESPLIT
from splitbundle_converter.families import summary
from splitbundle_converter.families.table import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BEGIN, END = "## A line for each file\n", "## Licence\n"
FAMILIES_BEGIN, FAMILIES_END = "quantised weights and remote code are refused.\n", BEGIN
OTHERS = {
    "spec/v1/bundle.md": "The format, normative: directory, manifest, weight files, boundaries, ids, error codes",
    "spec/v1/decoder.md": "The decoder, normative: each field of architecture.json with its equation",
    "spec/decisions/": "Where the design was changed or made precise, and why",
    "schemas/splitbundle_schemas/v1/": "The JSON Schemas of manifest.json and architecture.json",
    "examples/license-gpt2/": "A trained checkpoint that knows the Apache License by heart",
    "tests/conformance/": "The conformance kit: cases for readers in any language, and the command that asks them",
    "tests/golden/": "Bundles of each format version, which must open for ever",
    "tests/runtime/": "The runtime's own suite: torch, pytest and the golden bundles are all that it needs",
}


def blocks(kind: str) -> list[str]:
    """The README's code blocks of a kind, in order."""
    return re.findall(rf"^```{kind}\n(.*?)^```", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def file_list() -> str:
    """A table: each module with the first sentence of its docstring, and what isn't a module."""
    lines = ["", "| file | what it is |", "|---|---|"]
    packages = ("runtime/splitbundle", "converter/splitbundle_converter", "schemas/splitbundle_schemas")
    for folder in (*packages, "examples", "benchmarks"):
        for path in sorted((ROOT / folder).glob("*.py")):
            docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
            first = docstring.partition("\n")[0].rstrip(".").replace("|", r"\|")
            assert first, f"{path} has no docstring"
            lines.append(f"| `{path.relative_to(ROOT).as_posix()}` | {first} |")
    lines += [f"| `{path}` | {what} |" for path, what in OTHERS.items()]
    return "\n".join([*lines, "", ""])


def test_the_examples_run(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines()]
    assert commands
    printed = ""
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "splitbundle"
        done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        printed += done.stdout
    assert ', Version 2.0 (the "License");' in printed
    code = "\n".join(blocks("python"))
    assert code.count("\n") > 20
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_list_of_files_is_true() -> None:
    assert between(BEGIN, END) == file_list(), "run python tests/test_readme.py"
    for path in OTHERS:
        assert (ROOT / path).exists(), path


def between(begin: str, end: str) -> str:
    """What the README has between two lines."""
    text = README.read_text("utf-8")
    return text[text.index(begin) + len(begin) : text.index(end)]


def families_table() -> str:
    """The table of families, as the README has it."""
    return f"\n{summary.markdown()}\n\n"


def test_the_table_of_families_is_true() -> None:
    assert between(FAMILIES_BEGIN, FAMILIES_END) == families_table(), "run python tests/test_readme.py"


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_no_row_is_made_of_what_is_refused(name: str) -> None:
    """Where a default configuration is, the row is of one that isn't, and says what it needs."""
    config, _ = summary.default(name)
    FAMILIES[name].facts(config)
    assert not config.problems


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", "CONTRIBUTING.md", "tests/conformance/README.md"])
def test_links_lead_to_files(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = re.findall(r"`((?:tests|benchmarks|spec|runtime|examples|converter)/[\w./-]+)`", page.read_text("utf-8"))
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_door_is_named_with_what_guards_it() -> None:
    """Each command that reads what strangers wrote has a row in SECURITY.md, and the modules in the rows are there."""
    doors = (ROOT / "SECURITY.md").read_text("utf-8").partition("\n## The doors\n")[2].partition("\n## ")[0]
    commands = {command.name for command in (*COMMANDS, CONVERT, RESPLIT, ADD_ONNX)}
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", doors, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    }
    assert commands <= named
    modules = {path.rpartition("/")[2] for path in re.findall(r"`([\w/]+\.py)`", doors)}
    assert len(modules) > 8
    packages = (ROOT / "runtime" / "splitbundle", ROOT / "converter" / "splitbundle_converter")
    assert {name for name in modules if not any((package / name).is_file() for package in packages)} == set()


def test_the_two_commands_are_the_makefiles() -> None:
    text, makefile = README.read_text("utf-8"), (ROOT / "Makefile").read_text("utf-8")
    for command in ("demo", "test"):
        assert re.search(rf"^make {command} ", text, re.MULTILINE)
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text("utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


if __name__ == "__main__":
    for begin, end, content in ((FAMILIES_BEGIN, FAMILIES_END, families_table()), (BEGIN, END, file_list())):
        text = README.read_text("utf-8")
        README.write_text(text[: text.index(begin) + len(begin)] + content + text[text.index(end) :], "utf-8")
