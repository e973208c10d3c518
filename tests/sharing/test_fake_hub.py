"""The test Hub serves the real library; the clients' own tests rely on it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub")
import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

from tests.support.fake_hub import READ, WRITE, FakeHub
from tests.support.lies import after_first
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
LARGE = os.urandom(2**20) * 12


@pytest.fixture(autouse=True)
def no_xet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The library reads these at each call."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def client(hub: FakeHub, token: str | bool = WRITE) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def push(hub: FakeHub, **files: bytes) -> str:
    adds = [CommitOperationAdd(name.replace("_", "."), data) for name, data in files.items()]
    return str(client(hub).create_commit("me/model", adds, commit_message="x").oid)


def test_a_large_file_goes_there_and_back(tmp_path: Path) -> None:
    with FakeHub() as hub:
        api = client(hub)
        assert api.whoami()["name"] == "me"
        api.create_repo("me/model")
        api.create_repo("me/model", exist_ok=True)
        with pytest.raises(errors.HfHubHTTPError):
            api.create_repo("me/model")
        made = push(hub, model_safetensors=LARGE, config_json=b"{}\n")
        assert len(LARGE) < hub.received < len(LARGE) + 2000
        before = hub.received
        push(hub, same_safetensors=LARGE)
        assert hub.received - before < 2000  # it is there already

        about = api.model_info("me/model", revision=made, files_metadata=True)
        assert about.sha == made
        files = {each.rfilename: each for each in about.siblings or []}
        assert set(files) == {".gitattributes", "config.json", "model.safetensors"}
        assert files["model.safetensors"].lfs is not None
        assert files["model.safetensors"].lfs["size"] == len(LARGE)
        assert files["config.json"].lfs is None

        hub.reset_counters()
        got = Path(api.snapshot_download("me/model", revision=made, allow_patterns=["*.safetensors", "*.json"]))
        assert (got / "model.safetensors").read_bytes() == LARGE
        assert (got / "config.json").read_bytes() == b"{}\n"
        assert {seen.host for seen in hub.seen("GET", "/storage/*")} == {hub.storage_host}
        assert [seen for seen in hub.requests if seen.host == hub.storage_host and seen.authorization] == []
        assert {seen.authorization for seen in hub.seen("HEAD", "*/resolve/*")} == {f"Bearer {WRITE}"}


def test_the_parent_of_a_commit() -> None:
    with FakeHub() as hub:
        hub.create("me/model", {"a.json": b"1"})
        first = hub.repositories["me/model"].branches["main"]
        second = push(hub, b_json=b"2")
        with pytest.raises(errors.HfHubHTTPError) as caught:
            client(hub).create_commit(
                "me/model", [CommitOperationAdd("c.json", b"3")], commit_message="x", parent_commit=first
            )
        assert caught.value.response.status_code == 412
        client(hub).create_commit(
            "me/model",
            [CommitOperationDelete("a.json"), CommitOperationAdd("d/e.json", b"4")],
            commit_message="x",
            parent_commit=second,
        )
        assert client(hub).list_repo_files("me/model") == [".gitattributes", "b.json", "d/e.json"]
        assert client(hub).list_repo_files("me/model", revision=first) == [".gitattributes", "a.json"]
        assert [each.path for each in client(hub).list_repo_tree("me/model")] == [".gitattributes", "b.json", "d"]
        assert len(client(hub).list_repo_commits("me/model")) == 4


def test_tags_and_branches() -> None:
    with FakeHub() as hub:
        hub.create("me/model", {"a.json": b"1"})
        api = client(hub)
        api.create_tag("me/model", tag="v1")
        with pytest.raises(errors.HfHubHTTPError):
            api.create_tag("me/model", tag="v1")
        hub.commit("me/model", {"a.json": b"2"})
        api.create_branch("me/model", branch="other", revision="v1")
        refs = api.list_repo_refs("me/model")
        assert [each.name for each in refs.tags] == ["v1"]
        assert [each.name for each in refs.branches] == ["main", "other"]
        assert refs.tags[0].target_commit == refs.branches[1].target_commit != refs.branches[0].target_commit
        assert Path(api.hf_hub_download("me/model", "a.json", revision="v1")).read_bytes() == b"1"
        api.delete_tag("me/model", tag="v1")
        with pytest.raises(errors.RevisionNotFoundError):
            api.model_info("me/model", revision="v1")
        with pytest.raises(errors.RemoteEntryNotFoundError):
            api.hf_hub_download("me/model", "none.json")


def test_private_gated_and_missing() -> None:
    with FakeHub() as hub:
        hub.create("me/private", {"a.json": b"1"}, private=True).readers.add("me")
        hub.create("me/gated", {"a.json": b"1"}, gated=True).accepted.add("me")
        for token in (READ, False):
            with pytest.raises(errors.RepositoryNotFoundError):
                client(hub, token).model_info("me/private")
            with pytest.raises(errors.RepositoryNotFoundError):
                client(hub, token).model_info("me/none")
            with pytest.raises(errors.GatedRepoError, match="restricted"):
                client(hub, token).hf_hub_download("me/gated", "a.json")
            assert client(hub, token).model_info("me/gated").gated == "manual"
        assert client(hub).model_info("me/private").private
        for name in ("me/private", "me/gated"):
            assert Path(client(hub).hf_hub_download(name, "a.json")).read_bytes() == b"1"
        with pytest.raises(errors.HfHubHTTPError) as caught:
            client(hub, "hf_wrong").model_info("me/gated")
        assert caught.value.response.status_code == 401
        with pytest.raises(errors.HfHubHTTPError) as caught:
            client(hub, READ).create_repo("reader/model")
        assert caught.value.response.status_code == 403


def test_ranges_and_lies() -> None:
    def get(url: str, start: int = 0) -> tuple[int, bytes]:
        headers = {"Range": f"bytes={start}-"} if start else {}
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, answer.read()

    with FakeHub(lies={"*/resolve/*/b.safetensors": "wrong bytes", "*/revision/v9": "404"}) as hub:
        hub.create("me/model", {"a.safetensors": LARGE[:1000], "b.safetensors": LARGE[:1000], "c.json": b"0123456789"})
        base = f"{hub.url}/me/model/resolve/main"
        assert get(f"{base}/a.safetensors", 100) == (206, LARGE[100:1000])
        assert get(f"{base}/c.json", 5) == (206, b"56789")
        status, body = get(f"{base}/b.safetensors")
        assert (status, len(body), body == LARGE[:1000]) == (200, 1000, False)
        assert len(hub.seen(path="/storage/*")) == 1


def test_a_branch_that_moves() -> None:
    with FakeHub() as hub:
        hub.create("me/model", {"a.json": b"1"})
        after_first(hub, lambda seen: "/api/models/" in seen.path, lambda: hub.commit("me/model", {"a.json": b"2"}))
        found = [client(hub).model_info("me/model").sha for _ in range(3)]
        assert found[0] != found[1] == found[2]


SCRIPT = """
import sys, splitbundle
bundle = splitbundle.open(sys.argv[1])
splitbundle.push(bundle, "hf://me/model")
print(splitbundle.pull("hf://me/model", output=sys.argv[2]).id == bundle.id)
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """Run a program with the variables of a hub, which the library reads at its import."""

    def call(hub: FakeHub, script: str, *arguments: object) -> str:
        variables = hub.environment(tmp_path / "home", WRITE) | {"SPLITBUNDLE_CACHE": str(tmp_path / "cache")}
        ran = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
            env=os.environ | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    return call


def test_a_bundle_goes_there_and_back(run: Callable[..., str], tmp_path: Path) -> None:
    with FakeHub() as hub:
        assert run(hub, SCRIPT, GOLDEN, tmp_path / "pulled.splitbundle") == "True\n"
        assert [seen for seen in hub.requests if seen.host == hub.storage_host and seen.authorization] == []
        commits = hub.seen("POST", "*/commit/*")
        assert len(commits) == 1
