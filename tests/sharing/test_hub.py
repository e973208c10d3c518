"""Bundles on the Hugging Face Hub, through the real library and a Hub of the tests, each command in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")

import splitbundle
from tests.support.fake_hub import READ, WRITE, FakeHub
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0"
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as found:
        yield found


@pytest.fixture
def run(hub: FakeHub, tmp_path: Path) -> Run:
    """Run the command with --json, and return its document, with what it wrote to stderr."""

    def call(*arguments: object, status: int = 0, token: str | None = WRITE) -> dict[str, Any]:
        own = hub.environment(tmp_path / "hf", token) | {"SPLITBUNDLE_CACHE": str(tmp_path / "cache")}
        environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"} | own
        command = [sys.executable, "-m", "splitbundle", *map(str, arguments), "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert token is None or token not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found | {"stderr": done.stderr}

    return call


def check_hosts(hub: FakeHub) -> None:
    for seen in hub.requests:
        assert seen.host == hub.host or seen.authorization is None, seen


@pytest.mark.rule("SB-S-005", "SB-S-030")
def test_there_and_back(hub: FakeHub, run: Run, tmp_path: Path) -> None:
    gpt2, llama = (splitbundle.open(GOLDEN / f"{name}.splitbundle") for name in ("gpt2", "llama"))
    whole = sum(file.size for file in gpt2.manifest.files.values())
    first = run("push", gpt2.path, "hf://me/model")
    assert len(hub.repositories["me/model"].history(first["revision"])) <= 2  # the repository's own, and one more
    assert run("push", gpt2.path, "hf://me/model")["moved"] == 0
    part = run("pull", "hf://me/model", "--shard", "trunk")
    assert (part["whole_shards"], part["revision"]) == (["trunk"], first["revision"])
    assert run("pull", "hf://me/model@main")["moved"] == whole - part["moved"]
    assert run("pull", f"hf://me/model@{first['revision']}@{gpt2.id}")["moved"] == 0
    card = hub.repositories["me/model"].resolve("main")
    assert card == first["revision"]
    # Another bundle replaces it in one commit, and the old revision stays.
    second = run("push", llama.path, "hf://me/model")
    assert run("pull", "hf://me/model")["bundle_id"] == llama.id
    assert run("pull", f"hf://me/model@{first['revision']}", "-o", tmp_path / "old")["bundle_id"] == gpt2.id
    assert splitbundle.open(tmp_path / "old").verify(exact=True, whole=True)
    run("tag", f"hf://me/model@{first['revision']}", "v1")
    tags = {each["tag"]: each["revision"] for each in run("list", "hf://me/model")["tags"]}
    assert tags == {"main": second["revision"], "v1": first["revision"]}
    assert run("inspect", "hf://me/model@v1")["bundle_id"] == gpt2.id
    run("untag", "hf://me/model@v1")
    assert run("pull", "hf://me/model@v1", "-o", tmp_path / "x", status=5)["problems"][0]["code"] == "network.missing"
    check_hosts(hub)


@pytest.mark.rule("SB-S-030")
def test_other_files_stay(hub: FakeHub, run: Run, tmp_path: Path) -> None:
    hub.create("me/model", {"config.json": b"{}", "model.safetensors": b"x" * 100})
    gpt2 = GOLDEN / "gpt2.splitbundle"
    refused = run("push", gpt2, "hf://me/model", status=1)["problems"][0]
    assert refused["code"] == "output.exists"
    assert "hf://me/model/FOLDER" in refused["hint"]
    run("push", gpt2, "hf://me/model/split/gpt2")
    run("push", GOLDEN / "llama.splitbundle", "hf://me/model/split/gpt2")
    found = run("pull", "hf://me/model/split/gpt2", "-o", tmp_path / "out")
    assert found["bundle_id"] == splitbundle.open(GOLDEN / "llama.splitbundle").id
    info = hub.repositories["me/model"]
    assert {"config.json", "model.safetensors"} <= set(info.commits[str(info.resolve("main"))])


def test_private_and_gated(hub: FakeHub, run: Run, tmp_path: Path) -> None:
    files = {
        path.relative_to(GOLDEN / "gpt2.splitbundle").as_posix(): path.read_bytes()
        for path in (GOLDEN / "gpt2.splitbundle").rglob("*")
        if path.is_file()
    }
    hub.create("me/private", files, private=True).readers.update(("me", "reader"))
    hub.create("me/gated", files, gated=True)
    hidden = run("pull", "hf://me/private", status=5, token=None)["problems"][0]
    assert hidden["code"] == "network.missing"
    assert "HF_TOKEN" in hidden["hint"]
    assert run("pull", "hf://me/private")["moved"]
    gated = run("pull", "hf://me/gated", "-o", tmp_path / "gated", status=5, token=None)["problems"][0]
    assert gated["code"] == "network.auth"
    assert f"{hub.url}/me/gated" in gated["hint"]
    denied = run("push", GOLDEN / "llama.splitbundle", "hf://me/private", status=5, token=READ)["problems"][0]
    assert denied["code"] == "network.auth"
    check_hosts(hub)


def test_files_in_the_librarys_own_cache_do_not_move(hub: FakeHub, run: Run, tmp_path: Path) -> None:
    gpt2 = splitbundle.open(GOLDEN / "gpt2.splitbundle")
    run("push", gpt2.path, "hf://me/model")
    environment = os.environ | hub.environment(tmp_path / "hf", WRITE)
    program = "import huggingface_hub; huggingface_hub.snapshot_download('me/model')"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True)
    hub.reset_counters()
    assert run("pull", "hf://me/model")["bundle_id"] == gpt2.id
    assert not hub.seen("GET", "*.safetensors")
