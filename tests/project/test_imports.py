"""The import arrow: tests -> converter -> {runtime, schemas} -> standard library; backends are leaves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import splitbundle
import splitbundle_converter

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "splitbundle": ROOT / "runtime" / "splitbundle",
    "splitbundle_converter": ROOT / "converter" / "splitbundle_converter",
    "splitbundle_schemas": ROOT / "schemas" / "splitbundle_schemas",
}
LEAVES = {"torch_": {"torch"}, "onnxruntime_": {"onnxruntime", "numpy"}, "text_": {"tokenizers"}}
"""Prefix of a runtime module's name -> the libraries that it may import."""
CONVERTER = {
    "splitbundle",
    "splitbundle_converter",
    "splitbundle_schemas",
    "torch",
    "transformers",
    "safetensors",
    "onnx",
    "numpy",
    "jsonschema",
    "huggingface_hub",
}


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Every module that a file imports, its line, and whether that runs when the file is imported."""
    tree = ast.parse(path.read_text("utf-8"))
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
            assert node.level == 0, f"{path}:{node.lineno} has a relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module in PACKAGES else [module]
        for name in names:
            yield name, node.lineno, node not in deferred


def allowed(package: str, path: Path) -> set[str]:
    """The libraries beside the standard one that a module may import."""
    if package == "splitbundle_converter":
        return CONVERTER
    own = {package}
    for prefix, libraries in LEAVES.items():
        if package == "splitbundle" and path.name.startswith(prefix):
            return own | libraries
    return own


@pytest.mark.parametrize("package", PACKAGES)
def test_the_arrow_holds(package: str) -> None:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    for path in files:
        for name, line, _ in imports(path):
            top = name.partition(".")[0]
            good = top in sys.stdlib_module_names or top in allowed(package, path)
            assert good, f"{path.relative_to(ROOT)}:{line} imports {name}, which the arrow forbids"


def test_backends_are_leaves() -> None:
    """No module that runs without a backend imports a leaf when it is imported itself."""
    for path in sorted(PACKAGES["splitbundle"].rglob("*.py")):
        if path.name.startswith(tuple(LEAVES)):
            continue
        for name, line, at_import in imports(path):
            module = name.removeprefix("splitbundle.")
            assert not (at_import and module.startswith(tuple(LEAVES))), f"{path.name}:{line} imports the leaf {name}"


def test_the_guard_sees_what_it_guards(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("import transformers\ndef f():\n    from torch import nn\n")
    assert list(imports(bad)) == [("transformers", 1, True), ("torch", 3, False)]
    assert "torch" not in allowed("splitbundle", bad)


def lines(package: str, *patterns: str) -> int:
    """Of all files of a package that the patterns find."""
    found = {path for pattern in patterns for path in PACKAGES[package].glob(pattern)}
    assert len(found) >= len(patterns)
    return sum(len(path.read_text("utf-8").splitlines()) for path in found)


def test_sizes() -> None:
    """One decoder and one table, each on a few pages: spec/decisions/0008 says what is counted, and why."""
    assert lines("splitbundle", "torch_decoder.py", "torch_positions.py") <= 720
    assert lines("splitbundle_converter", "families.py", "families_*.py") <= 770
    sizes = {path.name: lines(package, path.name) for package in PACKAGES for path in PACKAGES[package].glob("*.py")}
    assert {name: size for name, size in sizes.items() if size > 430} == {}


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
    """Whoever imports this package, or opens a bundle, waits for what that takes and for nothing else."""
    bundle = ROOT / "tests" / "golden" / "v1.0" / "gpt2.splitbundle"
    ran = subprocess.run([sys.executable, "-c", LOADED, str(bundle)], capture_output=True, text=True, check=True)
    imported, opened = (set(line.split()) for line in ran.stdout.splitlines())
    own = {"splitbundle", "splitbundle.errors", "splitbundle.records", "splitbundle.version"}
    assert {name for name in imported if name.startswith("splitbundle")} == own
    assert imported.isdisjoint({"dataclasses", "hashlib", "inspect", "json", "pathlib"})
    assert "splitbundle.bundle" in opened
    later = {"argparse", "concurrent.futures", "dataclasses", "inspect", "logging", "tempfile", "threading"}
    later |= {f"splitbundle.{name}" for name in ("genai", "golden", "graph_rules", "tokenizer_rules", "verification")}
    assert opened.isdisjoint(later)
