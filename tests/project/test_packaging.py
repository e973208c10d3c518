"""What other projects get says what this one is: the recipe for conda-forge, the Hub's library, npm, media types."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import yaml

import splitbundle
from splitbundle.version import __version__
from tests.support.paths import ROOT

PACKAGING = ROOT / "packaging"
tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and later read TOML")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NAMES = {"torch": "pytorch"}
"""A package -> its name in conda-forge, where it is another one."""


def recipe() -> Any:
    return yaml.safe_load((PACKAGING / "conda-forge" / "recipe.yaml").read_text("utf-8"))


def test_the_recipe_has_the_versions_of_the_project() -> None:
    made = recipe()
    assert made["context"]["version"] == __version__
    assert PROJECT["requires-python"] == f">={made['context']['python_min']}"
    assert made["about"]["license"] == PROJECT["license"]
    assert made["build"]["python"]["entry_points"] == [
        f"{name} = {target}" for name, target in PROJECT["scripts"].items()
    ]
    needed = {}
    for extra in ("torch", "onnxruntime", "text", "convert", "onnx", "network", "serve", "share"):
        for requirement in PROJECT["optional-dependencies"][extra]:
            found = re.fullmatch(r"([A-Za-z0-9_-]+)(>=[0-9.]+)", requirement)
            if found is not None:
                needed[NAMES.get(found[1], found[1])] = found[2]
    constrained = dict(line.split(" ") for line in made["requirements"]["run_constraints"])
    assert constrained == needed
    assert [line.split(" ")[0] for line in made["requirements"]["run"]] == ["python"]


def test_the_hub_shows_what_the_model_card_shows() -> None:
    text = (PACKAGING / "hub" / "model-library.ts").read_text("utf-8")
    assert callable(splitbundle.open)
    assert "bundle = splitbundle.open(" in text
    assert "logits = bundle.pipeline()(token_ids)" in text
    card = (ROOT / "tests" / "golden" / "v1.0" / "gpt2.splitbundle" / "README.md").read_text("utf-8")
    assert "library_name: splitbundle" in card
    assert "logits = bundle.pipeline()(token_ids)" in card


def test_npm_has_the_same_version() -> None:
    package = json.loads((ROOT / "runtime" / "browser" / "package.json").read_text("utf-8"))
    assert package["version"].replace("-rc.", "rc") == __version__
    assert package["license"] == PROJECT["license"]
    assert not package.get("dependencies")


def test_the_page_of_status_names_the_media_types() -> None:
    status = (ROOT / "spec" / "status.md").read_text("utf-8")
    types = re.findall(r"^## (application/\S+)", (PACKAGING / "media-types.md").read_text("utf-8"), flags=re.MULTILINE)
    assert len(types) == 2
    assert all(f"`{each}`" in status for each in types)


def test_the_changelog_begins_with_this_version() -> None:
    heads = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), flags=re.MULTILINE)
    assert heads[0] in (__version__, "Unreleased")
    assert __version__ in heads


def test_this_python_is_one_that_is_supported() -> None:
    assert sys.version_info >= (3, 10)
    named = {each.rpartition(" ")[2] for each in PROJECT["classifiers"] if "Python :: 3." in each}
    assert named == {"3.10", "3.11", "3.12", "3.13"}
