"""The import arrows: tests -> converter -> {runtime, schemas} -> standard library, and to the left inside each package.

Every import counts: lazy ones, annotations under ``TYPE_CHECKING``, and module names in strings.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatch
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import splitbundle
import splitbundle_converter
from tests.support.paths import ROOT

PACKAGES = {
    "splitbundle": ROOT / "runtime" / "splitbundle",
    "splitbundle_converter": ROOT / "converter" / "splitbundle_converter",
    "splitbundle_schemas": ROOT / "schemas" / "splitbundle_schemas",
}
FLOORS = {
    "splitbundle": (
        ("records", "version", "logs"),
        ("errors",),
        ("giving_way", "integers", "processors"),
        ("format",),
        ("storage",),
        ("writing", "wire"),
        ("verification", "stages", "planning", "comparison", "partial"),
        ("remote",),
        ("backends.torch", "backends.onnxruntime", "text", "sharing"),
        ("text_tokenizer",),  # a door to text.huggingface, for one release
        ("backends.registry",),
        ("remote_stages", "boundary_bytes", "training", "extending"),
        ("bundle_files",),
        ("bundle_saving",),
        ("bundle",),
        ("opening",),
        ("serving",),
        ("ray",),
        ("cli",),
        ("__init__", "__main__"),
    ),
    "splitbundle_converter": (
        ("errors", "options", "quiet_transformers", "published_schemas", "code_fields"),
        ("checkpoint",),
        ("quantized",),
        ("graphs", "families", "text", "example_checkpoints"),
        ("translation", "reference"),
        ("split_learning", "language_part", "gguf_files"),
        ("open_checkpoint",),
        ("carried_configuration", "original_check"),
        ("conversion", "resplitting", "exporting"),
        ("__init__",),
        ("commands",),
        ("export_command",),
    ),
    "splitbundle_schemas": (("__init__",),),
}
"""Rooms from left to right. A room is a file or a folder. It may import itself and the rooms to its left."""
LIBRARIES = {
    "splitbundle": {
        "backends/torch/*.py": {"torch"},
        "backends/onnxruntime/*.py": {"onnxruntime", "numpy"},
        "text/huggingface.py": {"tokenizers"},
        "text/control_tokens.py": {"tokenizers"},
        "text/chat_template.py": {"jinja2"},
        "text/template_*.py": {"jinja2"},
        "sharing/signing.py": {"cryptography"},
        "serving/keys.py": {"cryptography"},
        "remote/channel.py": {"grpc"},
        "serving/grpc_server.py": {"grpc"},
        **{f"serving/web/{name}.py": {"starlette"} for name in ("app", "guard", "sending")},
        **{f"serving/gateway/{name}.py": {"starlette"} for name in ("app", "sent_files")},
        "serving/web/web_server.py": {"uvicorn"},
        "serving/web/patient_protocol.py": {"uvicorn"},
        "serving/web/web_metrics.py": {"prometheus_client"},
        "remote/ray_channel.py": {"ray"},
        "serving/ray_*.py": {"ray"},
        "serving/ray_cluster.py": {"ray", "grpc"},
        "cli/completion.py": {"shtab"},
        "sharing/hub.py": {"huggingface_hub"},
        "sharing/filesystems.py": {"fsspec"},
        "bundle*.py": {"typing_extensions"},  # only for annotations; type checkers bring it themselves
    },
    "splitbundle_converter": {
        "*": {
            *("splitbundle", "splitbundle_schemas", "torch", "transformers", "safetensors"),
            *("onnx", "numpy", "jsonschema", "huggingface_hub"),
        },
        "gguf_files/*": {"splitbundle", "torch", "numpy", "transformers", "gguf"},
        "exporting/gguf_*": {"splitbundle", "torch", "numpy", "gguf"},
        "text/*": {"splitbundle", "transformers", "tokenizers", "sentencepiece"},
    },
    "splitbundle_schemas": {},
}
"""Files of a package -> the libraries that they may import beside the standard one."""
BANNED = {"splitbundle": {"format/*": {"os", "mmap", "io", "socket", "subprocess"}}}
"""Files of a package -> the standard modules that they may not import: the documents open no file."""
PARTS_OF_A_MODEL = {"norms", "rotary", "positions", "attention", "feedforward", "decoder"}
"""The files that ``format/architecture``, ``backends/torch`` and ``graphs`` have in common."""


class Import(NamedTuple):
    """An import: the module that is imported, the line, and whether it runs when the file is imported."""

    module: str
    line: int
    at_import: bool


def modules(root: Path, package: str) -> dict[str, Path]:
    """Return the modules of a package by their dotted names."""
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join((package, *parts[: -1 if parts[-1] == "__init__" else None]))] = path
    return found


def imports(path: Path, known: Mapping[str, Path]) -> tuple[Import, ...]:
    """Return every import of a file. Names of ``known`` modules in strings count too."""
    return imports_of(path.read_text("utf-8"), tuple(known))


@cache
def imports_of(text: str, known: tuple[str, ...]) -> tuple[Import, ...]:
    """Return every import of a text, which the tests below read again and again."""
    return tuple(_imports(text, frozenset(known)))


def _imports(text: str, known: Collection[str]) -> Iterator[Import]:
    tree = ast.parse(text)
    deferred = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno} has a relative import: {ast.unparse(node)}"
            module = node.module or ""
            inner = [f"{module}.{alias.name}" for alias in node.names]
            names = [name if name in known else module for name in inner]
        elif isinstance(node, ast.Constant) and node.value in known and "." in str(node.value):
            names = [str(node.value)]
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            start = str(node.values[0].value)  # f"splitbundle.backends.{name}" may be any module in there
            names = [name for name in known if name.startswith(start)] if start.partition(".")[0] in PACKAGES else []
        for name in dict.fromkeys(names):
            yield Import(name, node.lineno, node not in deferred and not isinstance(node, ast.Constant | ast.JoinedStr))


def room(module: str, package: str) -> tuple[int, str]:
    """Return the floor and the room of a module."""
    inside = module.removeprefix(package).removeprefix(".") or "__init__"
    for floor, rooms in enumerate(FLOORS[package]):
        for each in rooms:
            if inside == each or inside.startswith(f"{each}."):
                return floor, each
    return -1, inside


def wrong_imports(root: Path, package: str) -> list[str]:
    """Return the forbidden imports of a package at ``root``, one line for each."""
    known = modules(root, package)
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        if not path.read_text("utf-8").strip():
            continue  # the __init__ of a folder
        floor, own = room(module, package)
        if floor < 0:
            found.append(f"{module} has no place in FLOORS")
        graph[module] = set()
        at = path.relative_to(root).as_posix()
        for each in imports(path, known):
            top = each.module.partition(".")[0]
            if top != package:
                allowed = {lib for glob, libs in LIBRARIES[package].items() if fnmatch(at, glob) for lib in libs}
                banned = {lib for glob, libs in BANNED.get(package, {}).items() if fnmatch(at, glob) for lib in libs}
                if (top not in sys.stdlib_module_names and top not in allowed) or top in banned:
                    found.append(f"{at}:{each.line} imports {each.module}, a library that is not for this file")
                continue
            if each.module != module:
                graph[module].add(each.module)
            other_floor, other = room(each.module, package)
            if other != own and other_floor >= floor:
                found.append(f"{at}:{each.line} imports {each.module}, which is not left of it")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a circle: {' <- '.join(error.args[1])}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_the_arrows_hold(package: str) -> None:
    assert modules(PACKAGES[package], package)
    assert wrong_imports(PACKAGES[package], package) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("errors.py", "import transformers", "imports transformers, a library that is not for this file"),
        ("stages/call.py", "import torch", "imports torch, a library that is not for this file"),
        ("backends/torch/stage.py", "import numpy", "imports numpy, a library that is not for this file"),
        ("format/manifest/rules.py", "import os", "imports os, a library that is not for this file"),
        ("format/fields.py", "from splitbundle.storage import files", "imports splitbundle.storage.files"),
        (
            "backends/torch/stage.py",
            "def f():\n    from splitbundle.backends.onnxruntime import stage",
            "imports splitbundle.backends.onnxruntime.stage",
        ),
        (
            "storage/reader.py",
            "if TYPE_CHECKING:\n    from splitbundle.bundle import Bundle",
            "imports splitbundle.bundle",
        ),
        ("storage/files.py", 'NAME = "splitbundle.bundle"', "imports splitbundle.bundle"),
        ("format/strict_json.py", "from splitbundle.format import fields", "a circle: "),
        ("added.py", "import json", "splitbundle.added has no place in FLOORS"),
    ],
)
def test_a_wrong_import_is_seen(file: str, line: str, complaint: str, tmp_path: Path) -> None:
    root = Path(shutil.copytree(PACKAGES["splitbundle"], tmp_path / "splitbundle"))
    with (root / file).open("a", encoding="utf-8") as opened:
        opened.write(f"\n{line}\n")
    found = wrong_imports(root, "splitbundle")
    assert [each for each in found if complaint in each], found


def test_backends_are_leaves() -> None:
    """No module that runs without a backend imports a backend when it is imported itself."""
    leaves = ("splitbundle.backends.torch", "splitbundle.backends.onnxruntime", "splitbundle.text.")
    known = modules(PACKAGES["splitbundle"], "splitbundle")
    for module, path in known.items():
        if module.startswith((*leaves, "splitbundle.text_tokenizer")):
            continue
        for each in imports(path, known):
            bad = each.at_import and each.module.startswith(leaves)
            assert not bad, f"{path}:{each.line} imports the leaf {each.module}"


def test_each_part_of_a_model_has_a_file_on_each_floor() -> None:
    runtime, converter = PACKAGES["splitbundle"], PACKAGES["splitbundle_converter"]
    for folder in (runtime / "format" / "architecture", runtime / "backends" / "torch", converter / "graphs"):
        there = {path.stem for path in folder.glob("*.py")}
        assert PARTS_OF_A_MODEL - there == set(), folder


def lines(*paths: Path) -> int:
    """Count the lines of all these files."""
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


def test_sizes() -> None:
    """The decoder and the table have a few pages each. spec/decisions/0008 says what is counted, and why."""
    torch, families = PACKAGES["splitbundle"] / "backends" / "torch", PACKAGES["splitbundle_converter"] / "families"
    model = PARTS_OF_A_MODEL | {"modules", "cache"}
    assert lines(*(torch / f"{name}.py" for name in model)) <= 900
    assert lines(*(families / f"{name}.py" for name in ("table", "llama", "gemma", "gpt", "megatron"))) <= 900
    sizes = {path: lines(path) for package in PACKAGES.values() for path in package.rglob("*.py")}
    assert {path.as_posix(): size for path, size in sizes.items() if size > 400} == {}


@pytest.mark.parametrize("module", [splitbundle, splitbundle_converter])
def test_all_is_what_is_public(module: object) -> None:
    names = module.__all__  # type: ignore[attr-defined]
    for name in names:
        assert getattr(module, name) is not None
    submodules = {path.stem for path in PACKAGES[module.__name__].iterdir()}  # type: ignore[attr-defined]
    public = {name for name in vars(module) if not name.startswith("_")} - submodules
    assert public - {"annotations", "Any", "TYPE_CHECKING"} <= set(names)


LOADED = """
import sys
def new(before):
    return [name for name in sys.modules if name not in before]
before = set(sys.modules)
import splitbundle
print(*new(before))
splitbundle.open(sys.argv[1])
print(*new(before))
"""


def test_what_starting_imports() -> None:
    """Importing this package, and opening a bundle, load only the modules that they need."""
    bundle = ROOT / "tests" / "golden" / "v1.0" / "gpt2.splitbundle"
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(PACKAGES['splitbundle'].parent)!r})"]
    command[-1] += LOADED
    ran = subprocess.run([*command, str(bundle)], capture_output=True, text=True, check=True)
    imported, opened = (set(line.split()) for line in ran.stdout.splitlines())
    own = {"splitbundle", "splitbundle.errors", "splitbundle.records", "splitbundle.version"}
    assert {name for name in imported if name.startswith("splitbundle")} == own
    heavy = {"collections", "dataclasses", "functools", "hashlib", "inspect", "json", "pathlib", "re", "typing"}
    assert imported.isdisjoint(heavy)
    assert "splitbundle.bundle" in opened
    later = {"argparse", "concurrent.futures", "dataclasses", "inspect", "logging", "tempfile", "threading"}
    later |= {"splitbundle.format.genai", "splitbundle.stages.golden"}
    assert opened.isdisjoint(later)
    assert not [name for name in opened if name.startswith("splitbundle.verification")]
