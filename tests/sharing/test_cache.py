"""The cache: hard links, what prune removes, damage, and file systems without hard links."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import splitbundle
import splitbundle_schemas
from splitbundle import BundleError
from splitbundle.cli.main import main
from splitbundle.format.manifest.document import File
from splitbundle.sharing.cache import Cache, cache_root
from splitbundle.sharing.store import Store
from tests.support.paths import TESTS
from tests.support.static_server import StaticFiles, static_server

GOLDEN = TESTS / "golden" / "v1.0"
Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPLITBUNDLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def server() -> Iterator[StaticFiles]:
    with static_server(GOLDEN) as found:
        yield found


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object, status: int = 0) -> dict[str, Any]:
        assert main([*map(str, arguments), "--json"]) == status
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return call


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_root() == cache
    monkeypatch.setenv("SPLITBUNDLE_CACHE", "~/x")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / "x"
    monkeypatch.delenv("SPLITBUNDLE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "splitbundle"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root() == tmp_path / ".cache" / "splitbundle"


def test_files_are_there_once(server: StaticFiles, run: Run, cache: Path) -> None:
    reference = f"{server.url}/gpt2.splitbundle"
    bundle = splitbundle.open(reference)
    for path, file in bundle.manifest.files.items():
        blob = cache / "blobs" / file.sha256[:2] / file.sha256[2:]
        assert os.path.samefile(blob, bundle.path / path)
        assert blob.stat().st_mode & 0o222 == 0
    (record,) = cache.glob("references/*.json")
    jsonschema.validate(json.loads(record.read_text()), splitbundle_schemas.load("cached-reference"))
    assert (cache / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    found = run("cache", "list")
    (entry,) = found["bundles"]
    assert (entry["bundle_id"], entry["references"]) == (bundle.id, [reference])
    assert entry["bytes"] <= found["bytes"]
    assert entry["whole_shards"] == [shard.name for shard in bundle.shards]


def test_prune(server: StaticFiles, run: Run, cache: Path) -> None:
    assert run("cache", "prune", "--all")["removed"] == []
    names = ("gpt2", "llama", "mistral-bfloat16")
    bundles = {name: splitbundle.open(f"{server.url}/{name}.splitbundle") for name in names}
    assert run("cache", "prune")["removed"] == []
    run("cache", "prune", "0123456789", status=1)
    assert run("cache", "prune", f"{server.url}/gpt2.splitbundle")["removed"] == [bundles["gpt2"].id]
    llama = bundles["llama"].path
    os.utime(llama, (time.time() - 86400 * 10,) * 2)
    assert run("cache", "prune", "--older-than", "11")["removed"] == []
    assert run("cache", "prune", "--older-than", "9")["removed"] == [bundles["llama"].id]
    left = {file.sha256 for file in bundles["mistral-bfloat16"].manifest.files.values()}
    assert {blob.parent.name + blob.name for blob in cache.glob("blobs/*/*")} == left
    assert splitbundle.open(f"{server.url}/mistral-bfloat16.splitbundle", offline=True).verify()
    with pytest.raises(BundleError):
        splitbundle.open(f"{server.url}/llama.splitbundle", offline=True)
    (cache / "parts" / ("0" * 64)).write_bytes(b"left by a killed pull")
    assert run("cache", "prune", bundles["mistral-bfloat16"].id[7:17])["freed"] > 0
    assert not list(cache.glob("blobs/*/*"))
    assert not list(cache.glob("parts/*"))
    assert not list(cache.glob("references/*"))


def test_damage_is_found_and_mended(server: StaticFiles, run: Run, cache: Path) -> None:
    reference = f"{server.url}/gpt2.splitbundle"
    bundle = splitbundle.open(reference)
    assert run("cache", "verify")["files"] == len({file.sha256 for file in bundle.manifest.files.values()})
    place = bundle.path / "layer-000.safetensors"
    place.chmod(0o644)
    data = place.read_bytes()
    place.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    found = run("cache", "verify", status=3)
    assert [each["code"] for each in found["problems"]] == ["file.digest"]
    assert not place.exists()
    assert run("pull", reference)["pulled"] == ["layer-000.safetensors"]
    assert splitbundle.open(reference).verify(exact=True)


def test_a_bundle_that_was_taken_away_twice_is_pruned(server: StaticFiles, run: Run, cache: Path) -> None:
    reference = f"{server.url}/gpt2.splitbundle"
    for _ in range(2):
        (splitbundle.open(reference).path / "architecture.json").unlink()
        run("cache", "verify", status=3)
    assert len(list((cache / "bundles").glob(".*"))) == 2
    splitbundle.open(reference)
    run("cache", "prune", "--all")
    assert not list((cache / "bundles").iterdir())


def test_a_file_system_without_hard_links(
    server: StaticFiles, run: Run, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    reference = f"{server.url}/gpt2.splitbundle"
    bundle = splitbundle.open(reference)
    assert bundle.verify(exact=True)
    assert not list(cache.glob("blobs/*/*"))
    assert run("pull", reference)["moved"] == 0


def test_a_cache_that_cannot_be_written(server: StaticFiles, run: Run, tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file")
    assert run("cache", "list", status=1)["problems"][0]["code"] == "output.failed"
    problem = run("pull", f"{server.url}/gpt2.splitbundle", status=1)["problems"][0]
    assert problem["code"] == "output.failed"
    assert "SPLITBUNDLE_CACHE" in problem["hint"]
    assert run("pull", f"{server.url}/gpt2.splitbundle", "-o", tmp_path / "out")["moved"]


@pytest.mark.parametrize("name", ["manifest.json", "SHA256SUMS"])
def test_damaged_documents_are_written_anew(name: str, server: StaticFiles, run: Run) -> None:
    reference = f"{server.url}/gpt2.splitbundle"
    place = splitbundle.open(reference).path / name
    data = place.read_bytes()
    place.chmod(0o644)
    place.write_bytes(data[:-2] + b"x\n")
    assert [each["code"] for each in run("cache", "verify", status=3)["problems"]] == ["file.digest"]
    assert run("cache", "verify")["ok"]
    assert run("pull", reference)["moved"] == 0
    assert splitbundle.open(reference).verify(exact=True)


OLD = '{"version": 1, "reference": 3, "bundle_id": "x"}'


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1}', OLD, "\x00"])
def test_records_that_say_nothing(text: str, server: StaticFiles, cache: Path) -> None:
    reference = f"{server.url}/gpt2.splitbundle"
    splitbundle.open(reference)
    (record,) = cache.glob("references/*.json")
    record.write_text(text)
    assert Cache().recall(reference) is None
    assert Cache().remembered() == []
    assert splitbundle.open(reference).verify()
    assert Cache().recall(reference) is not None


def test_a_small_file_is_whole_where_the_system_writes_it_in_parts(cache: Path) -> None:
    class Half:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: memoryview) -> int:
            count: int = self._file.write(data[: max(1, len(data) // 2)])
            return count

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    data = bytes(range(256))
    listed = File(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    store = Store(cache)
    store.prepare()
    claim = store.claim_own
    store.claim_own = lambda listed: Half(claim(listed))  # type: ignore[method-assign, assignment, return-value]
    store.add(data, listed)
    assert store.blob(listed.sha256).read_bytes() == data


def test_a_bundle_appears_with_its_files(server: StaticFiles, run: Run, cache: Path) -> None:
    """``cache verify`` finds no damage in a bundle of which the pull was ended before its last links."""
    bundle = Path(run("pull", f"{server.url}/gpt2.splitbundle")["path"])
    (cache / ".CACHEDIR.TAG.0123456789abcdef").touch()
    (cache / ".kept").touch()
    (bundle / "layer-001.safetensors").unlink()
    run("cache", "verify")
    run("cache", "prune")
    assert sorted(place.name for place in cache.glob(".*")) == [".kept"]
