"""Bundles in the file systems of fsspec: each scheme that a reference may have, against a server on loopback."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import splitbundle
from splitbundle import Bundle, BundleError, VerificationError
from splitbundle.cli.main import main
from splitbundle.sharing.reference import FILE_SYSTEMS
from tests.support.file_servers import ftp_server, s3_server, sftp_server
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0"
Run = Callable[..., dict[str, Any]]


@contextlib.contextmanager
def serving(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a server for a scheme, and yield the URL of a directory of it."""
    with contextlib.ExitStack() as stack:
        (tmp_path / "files").mkdir()
        if scheme == "s3":
            server = stack.enter_context(s3_server())
        elif scheme == "ftp":
            server = stack.enter_context(ftp_server(tmp_path / "files", anonymous=True))
        else:
            server = stack.enter_context(sftp_server(tmp_path / "files", home=tmp_path / "home"))
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        _, _, rest = server.url.partition("://")
        yield f"{scheme}://{rest}/{tmp_path.name}"  # moto's servers have one memory


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPLITBUNDLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SPLITBUNDLE_RETRIES", "1")
    return tmp_path / "cache"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object, status: int = 0) -> dict[str, Any]:
        assert main([*map(str, arguments), "--json"]) == status
        found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return found

    return call


def size(bundle: Bundle) -> int:
    return sum(file.size for file in bundle.manifest.files.values())


@pytest.mark.rule("SB-S-040")
@pytest.mark.parametrize("scheme", FILE_SYSTEMS)
def test_there_and_back(scheme: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpt2, llama = (splitbundle.open(GOLDEN / f"{name}.splitbundle") for name in ("gpt2", "llama"))
    with serving(scheme, tmp_path, monkeypatch) as url:
        place = f"{url}/a"
        assert run("pull", place, status=5)["problems"][0]["code"] == "network.missing"
        assert run("push", gpt2.path, place)["moved"] > size(gpt2)
        assert run("push", gpt2.path, place)["moved"] == 0
        part = run("pull", place, "--shard", "trunk")
        assert part["whole_shards"] == ["trunk"]
        rest = run("pull", f"{place}@{gpt2.id}")
        assert part["moved"] + rest["moved"] == size(gpt2)
        assert splitbundle.open(place, offline=True).verify().bytes == size(gpt2)
        # Another bundle isn't replaced by accident, and then it is replaced as a whole.
        assert run("push", llama.path, place, status=1)["problems"][0]["code"] == "output.exists"
        assert run("push", llama.path, place, "--force", "--dry-run")["dry_run"]
        assert run("pull", place)["bundle_id"] == gpt2.id
        run("push", llama.path, place, "--force")
        assert run("pull", place, "-o", tmp_path / "out")["bundle_id"] == llama.id
        assert splitbundle.open(tmp_path / "out").verify(exact=True, whole=True)
        assert run("pull", f"{place}@{gpt2.id}", "-o", tmp_path / "other")["moved"] == 0  # from the cache


@pytest.mark.parametrize("scheme", ["s3", "ftp"])
def test_wrong_bytes(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    with serving(scheme, tmp_path, monkeypatch) as url:
        splitbundle.push(GOLDEN / "gpt2.splitbundle", f"{url}/a")
        system, path = fsspec.core.url_to_fs(f"{url}/a/layer-000.safetensors")
        data = bytearray(system.cat_file(path))
        data[-1] ^= 1
        system.pipe_file(path, bytes(data))
        with pytest.raises(VerificationError) as caught:
            splitbundle.pull(f"{url}/a")
        assert caught.value.codes == ("file.digest",)
        system.pipe_file(path, bytes(data[:-1]))
        with pytest.raises(BundleError) as shorter:
            splitbundle.pull(f"{url}/a")
        assert shorter.value.codes == ("file.size",)
    names = {blob.parent.name + blob.name for blob in cache.glob("blobs/*/*")}
    listed = {file.sha256 for file in splitbundle.open(GOLDEN / "gpt2.splitbundle").manifest.files.values()}
    assert names <= listed


@pytest.mark.rule("SB-S-040")
def test_an_interrupted_push_shows_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from splitbundle.sharing.filesystems import FileSystemDestination

    gpt2 = splitbundle.open(GOLDEN / "gpt2.splitbundle")
    with serving("s3", tmp_path, monkeypatch) as url:
        send = FileSystemDestination.send

        def fail(self: FileSystemDestination, path: str, *rest: Any) -> None:
            if path == "head.safetensors":
                raise KeyboardInterrupt
            send(self, path, *rest)

        monkeypatch.setattr(FileSystemDestination, "send", fail)
        assert main(["push", str(gpt2.path), f"{url}/a"]) == 130
        monkeypatch.setattr(FileSystemDestination, "send", send)
        assert run("pull", f"{url}/a", status=5)["problems"][0]["code"] == "network.missing"
        run("push", gpt2.path, f"{url}/a")
        assert run("pull", f"{url}/a")["bundle_id"] == gpt2.id


@pytest.mark.rule("SB-S-005")
def test_an_unknown_host_is_not_believed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("sftp", tmp_path, monkeypatch) as url:
        (tmp_path / "home" / ".ssh" / "known_hosts").write_text("")
        problem = run("push", GOLDEN / "gpt2.splitbundle", f"{url}/a", status=5)["problems"][0]
        assert problem["code"] == "network.auth"
        assert "known_hosts" in problem["hint"]


def test_a_login_that_lacks(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving("s3", tmp_path, monkeypatch) as url:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert run("pull", f"{url}/a", status=5)["problems"][0]["code"] == "network.auth"
