"""Checkpoints from a hub (a small one on loopback), from its cache, or from a directory."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

import splitbundle
import splitbundle_converter
from splitbundle import BundleError
from splitbundle.cli.main import main
from tests.support.checkpoints import refused, said
from tests.support.models import checkpoint
from tests.support.paths import ROOT

CHECKPOINT = ROOT / "examples" / "license-gpt2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/license-gpt2"


Convert = Callable[..., subprocess.CompletedProcess[str]]


class Hub(http.server.BaseHTTPRequestHandler):
    """A small hub that can serve snapshots of models, each with a branch "old"."""

    asked: ClassVar[list[str]] = []
    models: ClassVar[dict[str, Path]] = {}

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path} {self.headers.get('Authorization', '')}".strip())
        model = next((model for model in self.models if f"/{model}/" in path), "")
        files = sorted(file for file in self.models[model].iterdir() if file.is_file()) if model else []
        for revision in ("main", "old", COMMIT):
            if path == f"/api/models/{model}/revision/{revision}":
                names = {*(file.name for file in files), "pytorch_model.bin"}
                siblings = [{"rfilename": name} for name in sorted(names)]
                self.send(200, json.dumps({"id": model, "sha": COMMIT, "siblings": siblings}).encode(), body)
                return
            if path == f"/api/models/{model}/tree/{revision}":
                tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
                self.send(200, json.dumps(tree).encode(), body)
                return
        for file in files:
            if path.startswith(f"/{model}/resolve/") and path.endswith(f"/{file.name}"):
                self.send(200, file.read_bytes(), body)
                return
        self.send(404, b"{}", body, **{"X-Error-Code": "RepoNotFound"})

    def send(self, status: int, data: bytes, body: bool, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Write no log."""


@pytest.fixture
def hub() -> Iterator[str]:
    """Yield the address of a hub on loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()
    Hub.models = {REPOSITORY: CHECKPOINT}
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def convert(hub: str, home: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Convert in a separate process, as the hub's library reads its variables once."""
    import os

    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **variables}
    return subprocess.run(
        [sys.executable, "-m", "splitbundle", "convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )


@pytest.fixture
def convert_here(monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Convert in this process, whose imports take no time. What the library has read of its variables is replaced."""
    from huggingface_hub import constants

    def run(hub: str, home: Path, *arguments: object, offline: bool = False) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        with monkeypatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(constants, "ENDPOINT", hub)
            template = f"{hub}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
            patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
            patch.setattr(constants, "HF_HUB_OFFLINE", offline)
            status = main(["convert", *map(str, arguments)])
        return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())

    return run


def test_a_hub_id_is_fetched_and_pinned_to_its_commit(hub: str, tmp_path: Path, convert_here: Convert) -> None:
    output = tmp_path / "x.splitbundle"
    done = convert(
        hub, tmp_path / "hf", REPOSITORY, "--revision", "old", "--no-check", "-o", output, HF_TOKEN="hf_secret"
    )
    assert done.returncode == 0, done.stderr
    bundle = splitbundle.open(output)
    assert (bundle.manifest.model.name, bundle.manifest.model.source) == ("license-gpt2", REPOSITORY)
    assert bundle.manifest.model.revision == COMMIT
    bundle.verify(exact=True)
    assert not any(path.is_symlink() for path in output.rglob("*"))  # the hub's cache holds links; a bundle none
    assert any("Bearer hf_secret" in line for line in Hub.asked)
    assert not any("pytorch_model.bin" in line for line in Hub.asked)
    local = splitbundle_converter.convert(CHECKPOINT, tmp_path / "local.splitbundle", check=False)
    assert local.fingerprint == bundle.fingerprint

    # From the cache alone, with the hub gone.
    again = tmp_path / "again.splitbundle"
    away = ("http://127.0.0.1:9", tmp_path / "hf", REPOSITORY, "--revision", COMMIT, "--no-check", "-o", again)
    done = convert_here(*away, offline=True)
    assert done.returncode == 0, done.stderr
    assert splitbundle.open(again).id == bundle.id


def test_a_model_that_the_hub_has_as_a_pickle(
    hub: str, tmp_path: Path, convert_here: Convert, pickles_here: None
) -> None:
    """A pickle is fetched only if it is allowed. Files beside the model are never fetched."""
    local = tmp_path / "pickled"
    shutil.copytree(CHECKPOINT, local)
    torch.save(load_file(local / "model.safetensors"), local / "pytorch_model.bin")
    (local / "model.safetensors").unlink()
    for name in ("training_args.bin", "optimizer.pt"):
        (local / name).write_bytes(b"never fetched")
    Hub.models = {"someone/pickled": local}
    output, words = tmp_path / "x.splitbundle", ("someone/pickled", "--no-check")
    done = convert_here(hub, tmp_path / "hf", *words, "-o", output)
    assert done.returncode == 1
    assert "[source.pickle] pytorch_model.bin: expected weights in model.safetensors or " in done.stderr
    assert not any(".bin" in line for line in Hub.asked)

    done = convert_here(hub, tmp_path / "hf", *words, "--allow-pickle", "-o", output)
    assert done.returncode == 0, done.stderr
    made = splitbundle.open(output)
    assert (made.manifest.model.source, made.manifest.model.revision) == ("someone/pickled", COMMIT)
    assert not any("training_args" in line or "optimizer" in line for line in Hub.asked)
    safe = splitbundle_converter.convert(CHECKPOINT, tmp_path / "safe.splitbundle", check=False)
    assert made.fingerprint == safe.fingerprint

    # From the cache alone, with the hub gone.
    again = tmp_path / "again.splitbundle"
    away = ("http://127.0.0.1:9", tmp_path / "hf", *words, "--allow-pickle", "-o", again)
    done = convert_here(*away, offline=True)
    assert done.returncode == 0, done.stderr


def test_safetensors_of_the_hub_come_first(hub: str, tmp_path: Path, convert_here: Convert) -> None:
    done = convert_here(
        hub, tmp_path / "hf", REPOSITORY, "--no-check", "--allow-pickle", "-o", tmp_path / "x.splitbundle"
    )
    assert done.returncode == 0, done.stderr
    assert not any("pytorch_model.bin" in line for line in Hub.asked)


def test_a_model_that_the_hub_lacks(hub: str, tmp_path: Path, convert_here: Convert) -> None:
    done = convert_here(hub, tmp_path / "hf", "someone/else", "-o", tmp_path / "x.splitbundle")
    assert done.returncode == 1
    assert "[source.missing] someone/else: expected a directory here, or a model on the hub, got neither" in done.stderr
    assert "Check the path, or the id and --revision; a private model needs HF_TOKEN" in done.stderr


def test_what_is_neither_a_directory_nor_an_id(tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        splitbundle_converter.convert("./no/such/place", tmp_path / "x.splitbundle")
    assert (
        said(caught.value)
        == "[source.missing] ./no/such/place: expected a checkpoint directory or a hub id, got neither"
    )


def test_a_source_that_does_not_exist(output: Path) -> None:
    expected = "expected a checkpoint directory or a hub id"
    assert said(refused("/no/such/place", output)) == f"[source.missing] /no/such/place: {expected}, got neither"
    assert said(refused("two words", output)) == f"[source.missing] two words: {expected}, got neither"
    file = checkpoint("llama") / "config.json"
    assert said(refused(file, output)) == f"[source.missing] {file}: {expected}, got a file"


def test_a_hub_id_without_a_network(tmp_path: Path, output: Path) -> None:
    """Use another process, as the hub's library reads HF_HUB_OFFLINE at import."""
    program = f"""
import splitbundle, splitbundle_converter
try:
    splitbundle_converter.convert("some-owner/some-model", {str(output)!r})
except splitbundle.BundleError as error:
    print(error)
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment, timeout=600
    )
    assert done.stdout.startswith("[network] some-owner/some-model: expected the model from the hub, got ")
    assert done.stdout.endswith(". There is no such directory here, and the hub can't be reached\n")
    assert not list(output.parent.iterdir())
