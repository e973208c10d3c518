"""Push and pull through a real registry, as a user does it with the command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import splitbundle
import splitbundle_converter
from splitbundle import Bundle, BundleError
from splitbundle.cli.main import main
from splitbundle.sharing.cache import Cache
from tests.support.paths import ROOT
from tests.support.real_registry import real_registry
from tests.support.signing_keys import Keys

EXAMPLE = ROOT / "examples" / "license-gpt2"
Command = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with real_registry(tmp_path_factory.mktemp("registry") / "storage") as found:
        yield found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The trained example with graphs."""
    output = tmp_path_factory.mktemp("made") / "b.splitbundle"
    return splitbundle_converter.convert(EXAMPLE, output, split=[2, 4], onnx="standard")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command with --json, and return its document."""

    def call(*arguments: object, status: int = 0) -> dict[str, Any]:
        assert main([*map(str, arguments), "--json"]) == status
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert found["ok"] is (status == 0)
        return found

    return call


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPLITBUNDLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def size(bundle: Bundle) -> int:
    return sum(file.size for file in bundle.manifest.files.values())


@pytest.mark.rule("SB-S-003", "SB-S-004", "SB-S-026")
def test_whole_then_nothing_then_what_changed(address: str, bundle: Bundle, run: Command, tmp_path: Path) -> None:
    reference = f"oci://{address}/whole:v1"
    pushed = run("push", bundle.path, reference)
    assert pushed["bundle_id"] == bundle.id
    assert run("push", bundle.path, reference)["moved"] == 0
    first = run("pull", reference)
    assert (first["bundle_id"], first["moved"]) == (bundle.id, size(bundle))
    assert first["whole_shards"] == ["bottom", "trunk", "top"]
    assert run("pull", reference)["moved"] == 0
    assert run("verify", reference, "--exact", "--run", "--backend", "all")["bundle_id"] == bundle.id

    # A version with one changed layer.
    stage = bundle.stage(layers=(3, 4), trainable=True)
    with torch.no_grad():
        next(stage.parameters()).add_(1.0)
    changed = bundle.save_as(tmp_path / "changed.splitbundle", stage, notes=lambda _: None)
    differ = [path for path, file in changed.manifest.files.items() if file != bundle.manifest.files.get(path)]
    assert "layer-003.safetensors" in differ
    assert not [path for path in differ if path.startswith(("embedding", "head", "layer-00")) and "003" not in path]
    again = run("push", changed.path, reference)
    assert set(again["pushed"]) == {"manifest.json", "SHA256SUMS", *differ}
    second = run("pull", reference)
    assert second["bundle_id"] == changed.id
    assert sorted(second["pulled"]) == sorted(differ)
    assert second["moved"] == sum(changed.manifest.files[path].size for path in differ)

    # Another cut of the same model: no weights move.
    cut = splitbundle_converter.resplit(bundle, tmp_path / "cut.splitbundle", split=[3])
    other = f"oci://{address}/whole:cut"
    assert not [path for path in run("push", cut.path, other)["pushed"] if path.endswith(".safetensors")]
    assert not [path for path in run("pull", other)["pulled"] if path.endswith(".safetensors")]


def test_two_cuts_take_the_space_of_one(
    address: str, bundle: Bundle, run: Command, tmp_path: Path, cache: Path
) -> None:
    cut = splitbundle_converter.resplit(bundle, tmp_path / "cut.splitbundle", split=[3], onnx=False)
    for name, each in (("a", bundle), ("b", cut)):
        run("push", each.path, f"oci://{address}/space:{name}")
        run("pull", f"oci://{address}/space:{name}")
    taken = {(s.st_dev, s.st_ino): s.st_size for p in cache.rglob("*") if p.is_file() for s in (p.stat(),)}
    overhead = sum(len((each.path / name).read_bytes()) for each in (bundle, cut) for name in ("manifest.json",))
    # The example is small: its manifests are a larger part of it than of a real model.
    assert sum(taken.values()) - overhead <= 1.02 * max(size(bundle), size(cut))


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_one_shard_computes_under_both_backends(address: str, bundle: Bundle, run: Command, backend: str) -> None:
    reference = f"oci://{address}/shard:v1"
    revision = run("push", bundle.path, reference)["revision"]
    planned = run("pull", reference, "--shard", "trunk", "--dry-run")
    found = run("pull", reference, "--shard", "trunk")
    assert planned["moved"] == found["moved"]
    assert found["whole_shards"] == ["trunk"]
    assert set(found["files"]) == set(bundle.paths("trunk", vectors=True)) - {"manifest.json", "SHA256SUMS"}
    opened = splitbundle.open(reference, shard="trunk")
    assert opened.run_vectors("trunk", backend=backend)
    with pytest.raises(BundleError) as caught:
        opened.stage("top", backend=backend)
    assert caught.value.problems[0].hint == f"Pull it: splitbundle pull oci://{address}/shard@{revision} --shard top"


def test_a_directory_grows(address: str, bundle: Bundle, run: Command, tmp_path: Path, cache: Path) -> None:
    reference, output = f"oci://{address}/grows:v1", tmp_path / "out.splitbundle"
    revision = run("push", bundle.path, reference)["revision"]
    run("pull", reference, "--shard", "trunk", "-o", output)
    hint = run("verify", "--shard", "top", output, status=3)["problems"][0]["hint"]
    assert hint == f"Pull it: splitbundle pull oci://{address}/grows@{revision} --shard top -o {output}"
    more = run("pull", reference, "--shard", "top", "-o", output)
    assert more["whole_shards"] == ["trunk", "top"]
    assert more["moved"] < size(bundle)
    (output / "layer-002.safetensors").write_bytes(b"damaged")
    healed = run("pull", reference, "-o", output)
    assert "layer-002.safetensors" in healed["pulled"]
    assert splitbundle.open(output).verify(exact=True, whole=True)
    assert run("pull", reference, "-o", output)["moved"] == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert not (cache / "blobs").exists() or not any((cache / "blobs").iterdir())
    # Another bundle isn't replaced unless that is asked for, and then its equal files don't move.
    cut = splitbundle_converter.resplit(bundle, tmp_path / "cut.splitbundle", split=[3], onnx=False)
    run("push", cut.path, f"oci://{address}/grows:cut")
    refused = run("pull", f"oci://{address}/grows:cut", "-o", output, status=1)
    assert refused["problems"][0]["code"] == "output.exists"
    replaced = run("pull", f"oci://{address}/grows:cut", "-o", output, "--force")
    assert not [path for path in replaced["pulled"] if path.endswith(".safetensors")]
    assert splitbundle.open(output).id == cut.id


@pytest.mark.rule("SB-S-002")
def test_pins(address: str, bundle: Bundle, run: Command, cache: Path) -> None:
    reference = f"oci://{address}/pinned:v1"
    revision = run("push", bundle.path, reference)["revision"]
    wrong = "sha256:" + "0" * 64
    for text in (f"{reference}@{wrong}", f"oci://{address}/pinned@{wrong}"):
        refused = run("pull", text, status=5 if "v1" not in text else 3)
        assert refused["problems"][0]["code"] == ("file.digest" if "v1" in text else "network.missing")
    assert not list(cache.glob("bundles/*"))
    for text in (f"{reference}@{bundle.id}", f"{reference}@{revision}", f"oci://{address}/pinned@{revision}"):
        assert run("pull", text)["bundle_id"] == bundle.id
    assert run("inspect", f"{reference}@{bundle.id}")["bundle_id"] == bundle.id


def test_tags(address: str, bundle: Bundle, run: Command) -> None:
    reference = f"oci://{address}/tags"
    revision = run("push", bundle.path, f"{reference}:v1")["revision"]
    run("tag", f"{reference}:v1", "v2")
    run("tag", f"{reference}@{revision}", "v3")
    run("untag", f"{reference}:v1")
    assert run("list", reference)["tags"] == [
        {"tag": tag, "bundle_id": bundle.id, "revision": revision} for tag in ("v2", "v3")
    ]
    assert run("pull", f"{reference}:v1", status=5)["problems"][0]["code"] == "network.missing"
    assert run("pull", f"{reference}:v2")["bundle_id"] == bundle.id
    assert run("list", f"{reference}:v2", status=2)["problems"][0]["code"] == "usage.reference"
    got = run("list", f"oci://{address}/nowhere", status=5)["problems"][0]["got"]
    assert got == "status 404 'Not Found': 'repository name not known to registry'"
    assert run("untag", f"{reference}:v1", status=5)["problems"][0]["code"] == "network.missing"
    assert run("tag", f"{reference}:v2", "-x y", status=2)["problems"][0]["code"] == "usage.reference"


def test_new_signatures_come_to_a_bundle_that_is_here(
    address: str, bundle: Bundle, run: Command, tmp_path: Path, cache: Path
) -> None:
    """Also to one that came under another tag, into a directory, or by its pin."""
    private, public = Keys(tmp_path).make("ed25519")
    reference = f"oci://{address}/signed"
    run("push", bundle.path, f"{reference}:v1")
    run("pull", f"{reference}:v1")
    copy = splitbundle.pull(f"{reference}:v1", tmp_path / "copy.splitbundle")
    copy.sign(private)
    run("push", copy.path, f"{reference}:v2")
    run("pull", f"{reference}:v2", "-o", tmp_path / "x")
    assert run("verify", f"{reference}:v2", "--public-key", public)["signature"]["files"]
    shutil.rmtree(Path(splitbundle.pull(f"{reference}:v2").path) / "signatures")
    assert run("verify", f"{reference}:v2@{bundle.id}", "--public-key", public)["bundle_id"] == bundle.id
    assert run("pull", f"{reference}:v2@{bundle.id}", "-o", tmp_path / "y")["moved"] == 0
    assert list((tmp_path / "y" / "signatures").iterdir())


def test_offline(address: str, bundle: Bundle, run: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reference = f"oci://{address}/offline:v1"
    run("push", bundle.path, reference)
    monkeypatch.setenv("SPLITBUNDLE_OFFLINE", "1")
    assert "offline" in run("pull", reference, status=5)["problems"][0]["got"]
    monkeypatch.delenv("SPLITBUNDLE_OFFLINE")
    run("pull", reference, "--shard", "trunk")
    with monkeypatch.context() as patch:  # a cache that this user can only read serves what it has

        def refuse(cache: Cache) -> None:
            raise AssertionError

        patch.setattr(Cache, "prepare", refuse)
        assert run("pull", reference, "--shard", "trunk")["moved"] == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("pull", reference, "--shard", "trunk", "-o", tmp_path / "trunk")["moved"] == 0
    assert splitbundle.open(tmp_path / "trunk").whole_shards() == ("trunk",)
    assert run("verify", reference, "--shard", "trunk")["bundle_id"] == bundle.id
    assert run("pull", reference, status=5)["problems"][0]["code"] == "network"


def test_two_processes_fetch_it_once(address: str, bundle: Bundle, run: Command, tmp_path: Path) -> None:
    reference = f"oci://{address}/twice:v1"
    run("push", bundle.path, reference)
    command = [sys.executable, "-m", "splitbundle", "pull", reference, "--json"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(3)]
    moved = [json.loads(child.communicate()[0])["moved"] for child in children]
    documents = bundle.manifest.files["architecture.json"].size  # each process reads it to know what else it needs
    assert size(bundle) <= sum(moved) <= size(bundle) + 2 * documents
    assert Bundle.verify(splitbundle.open(reference)).bytes == size(bundle)


def test_a_part_is_not_pushed(address: str, bundle: Bundle, run: Command, tmp_path: Path) -> None:
    bundle.extract(tmp_path / "trunk", "trunk")
    refused = run("push", tmp_path / "trunk", f"oci://{address}/part:v1", status=1)
    assert {each["code"] for each in refused["problems"]} == {"file.missing"}
    (bundle_copy := tmp_path / "copy").mkdir()
    whole = bundle.extract(bundle_copy / "b", "bottom", "trunk", "top", text=True)
    data = bytearray((whole.path / "head.safetensors").read_bytes())
    data[-1] ^= 1
    (whole.path / "head.safetensors").write_bytes(data)
    refused = run("push", whole.path, f"oci://{address}/part:v1", status=1)
    assert refused["problems"][0]["code"] == "file.digest"
    assert run("list", f"oci://{address}/part", status=5)["problems"][0]["code"] == "network.missing"


@pytest.mark.parametrize(
    "arguments", [("cast", "--dtype", "float16", "-o", "oci://h/x:y"), ("add-onnx", "oci://h/x:y")]
)
def test_outputs_are_paths_of_this_machine(
    bundle: Bundle, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    own = [str(bundle.path)] if arguments[0] == "cast" else []
    with pytest.raises(SystemExit) as caught:
        main([arguments[0], *own, *arguments[1:], "--json"])
    assert caught.value.code == 2
    assert "usage.arguments" in capsys.readouterr().out
    assert not Path("oci:").exists()
