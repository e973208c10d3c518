"""Reading a checkpoint directory: large files, links, pipes, and files that change during the conversion."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from splitbundle.cli import main
from splitbundle.format import strict_json
from splitbundle.storage.files import MAX_TEXT_BYTES
from splitbundle_converter.errors import AGAIN
from tests.support.checkpoints import INDEX, PIECES, WEIGHTS, accepted, refused, said

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_a_file_that_is_too_large_is_not_read(source: Callable[[str], Path], output: Path, name: str) -> None:
    """Make a sparse file of 3 GiB."""
    path = source("llama")
    with (path / name).open("wb") as file:
        file.truncate(3 * 2**30)
    tracemalloc.start()
    text = str(refused(path, output))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    most = strict_json.MAX_BYTES if "config" in name else MAX_TEXT_BYTES
    assert text.startswith(f"[source.unreadable] {name}: expected a file of at most {most} bytes, got 3221225472 bytes")
    assert peak < 2 * most + 2**26


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with a name")
def test_a_pipe_is_no_configuration(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / "config.json").unlink()
    os.mkfifo(path / "config.json")
    assert said(refused(path, output)) == (
        "[source.unreadable] config.json: expected a regular file, got a pipe, a socket or a device"
    )


def test_a_file_may_be_a_link(source: Callable[[str], Path], output: Path) -> None:
    """A link into the blobs of the hub's cache is allowed."""
    path = source("llama")
    (path / "config.json").rename(path / "blob")
    (path / "config.json").symlink_to("blob")
    accepted(path, output, check=False)


WITHOUT = "tokenizer=False converts without a tokenizer"
LINK = (
    "expected a file of the checkpoint, got a link that leads out of it. To use this file, copy it into the checkpoint"
)


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "chat_template.jinja", "merges.txt", "generation_config.json"],
)
def test_a_link_that_leads_out_of_the_checkpoint(source: Callable[[str], Path], output: Path, name: str) -> None:
    path = source("llama")
    secret = path.parent / "secret"
    secret.write_text("a secret")
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(secret)
    offer = "" if name in ("config.json", "generation_config.json") else f". {WITHOUT}"
    assert str(refused(path, output)) == f"[source.unreadable] {name}: {LINK}{offer}"
    (path / name).unlink()
    (path / name).symlink_to("../source/../secret")
    assert str(refused(path, output)) == f"[source.unreadable] {name}: {LINK}{offer}"
    (path / name).unlink()
    (path / name).symlink_to("nowhere")
    assert str(refused(path, output)).startswith(f"[source.missing] {name}: expected a file {name} in source, got ")


@pytest.mark.parametrize("target", ["nowhere", "../secret", "."])
def test_a_model_card_need_not_be_readable(source: Callable[[str], Path], output: Path, target: str) -> None:
    """Only its license would be read, and a link out of the checkpoint is not followed."""
    path = source("llama")
    (path.parent / "secret").write_text("---\nlicense: mit\n---\n")
    (path / "README.md").unlink(missing_ok=True)
    (path / "README.md").symlink_to(target)
    assert accepted(path, output, check=False).manifest.model.license is None


def test_the_index_of_weights_is_no_link_out_either(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / WEIGHTS).rename(path / PIECES[0])
    (path.parent / "index").write_text(json.dumps({"weight_map": {}}))
    (path / INDEX).symlink_to(path.parent / "index")
    assert str(refused(path, output)) == f"[source.unreadable] {INDEX}: {LINK}"


def test_weights_may_be_a_link_to_anywhere(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / WEIGHTS).rename(path.parent / "elsewhere")
    (path / WEIGHTS).symlink_to(path.parent / "elsewhere")
    accepted(path, output)
    (path.parent / "elsewhere").write_text("a secret that is no weights")
    assert refused(path, output.with_name("other.splitbundle")).codes == ("source.safetensors",)


def test_the_hubs_cache_has_links_to_its_blobs(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    cache = path.parent / "models--x--y"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    path.rename(cache / "blobs")
    for blob in (cache / "blobs").iterdir():
        (snapshot / blob.name).symlink_to(f"../../blobs/{blob.name}")
    accepted(snapshot, output, check=False)
    # Before version 0.23 of huggingface_hub, local_dir made links to the cache's blobs too.
    local = path.parent / "local"
    local.mkdir()
    for blob in (cache / "blobs").iterdir():
        (local / blob.name).symlink_to(blob)
    accepted(local, output.with_name("b"), check=False)
    # No other directory beside one that is called so.
    cache.rename(path.parent / "mine")
    assert str(refused(path.parent / "mine" / "snapshots" / "0123", output.with_name("c"))).endswith(LINK)


def test_a_snapshot_has_the_name_of_its_repository(
    source: Callable[[str], Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache names the directory of a snapshot by its commit."""
    commit = "0123456789" * 4
    path = source("llama")
    snapshot = path.parent / "models--some--model--name" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    path.rename(snapshot)
    model = accepted(snapshot, output, check=False).manifest.model
    assert (model.name, model.source, model.revision) == ("model--name", "some/model--name", commit)
    monkeypatch.chdir(path.parent)
    assert main.main(["convert", str(snapshot), "--no-check"]) == 0
    assert (path.parent / "model--name.splitbundle").is_dir()


@pytest.mark.parametrize("name", ["tokenizer.json", "merges.txt", "generation_config.json"])
@pytest.mark.parametrize("kind", ["a directory", "a pipe, a socket or a device"])
def test_what_is_no_file_is_not_passed_over(source: Callable[[str], Path], output: Path, name: str, kind: str) -> None:
    path = source("llama")
    (path / name).unlink(missing_ok=True)
    if kind == "a directory":
        (path / name).mkdir()
    elif hasattr(os, "mkfifo"):
        os.mkfifo(path / name)
    else:
        pytest.skip("no pipes with a name")
    offer = "" if name == "generation_config.json" else f". {AGAIN}. {WITHOUT}"
    assert said(refused(path, output)) == f"[source.unreadable] {name}: expected a regular file, got {kind}{offer}"


def test_a_generation_config_that_is_no_object(source: Callable[[str], Path], output: Path) -> None:
    path = source("llama")
    (path / "generation_config.json").write_text("[1]")
    for check in (False, True):
        assert said(refused(path, output, check=check)) == (
            "[source.config] generation_config.json: expected an object, got [1]"
        )
    # What it says otherwise has no say in the golden vectors.
    (path / "generation_config.json").write_text('{"max_length": "x", "cache_implementation": {}}')
    accepted(path, output)


def changed(name: str) -> str:
    return (
        f"[source.changed] {name}: expected a file that does not change during the conversion, "
        "got a file that was changed or replaced. Convert again when no program writes to it"
    )


def overwritten(file: Path) -> None:
    """Change one bit of a file, and restore its times."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with file.open("r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchanged(file: Path) -> None:
    shutil.copy2(file, file.with_name("copy"))
    file.with_name("copy").replace(file)


def removed(file: Path) -> None:
    file.rename(file.with_name("moved"))


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
@pytest.mark.parametrize("change", [overwritten, exchanged, removed])
def test_a_source_that_changes_while_it_is_converted(
    source: Callable[[str], Path], output: Path, name: str, change: Callable[[Path], None]
) -> None:
    path = source("llama")
    done = False

    def progress(what: str, at: int, total: int) -> None:
        nonlocal done
        if what == "converting" and at == total and not done:
            done = True
            change(path / name)

    assert str(refused(path, output, progress=progress)) == changed(name)
    assert done


@pytest.mark.parametrize("change", [lambda file: file.write_bytes(b"x" * 100), removed], ids=["truncated", "removed"])
def test_a_source_that_changes_before_it_is_checked(
    source: Callable[[str], Path], output: Path, change: Callable[[Path], None]
) -> None:
    path = source("llama")

    def progress(what: str, at: int, total: int) -> None:
        if what == "running the original model" and at == 0:
            change(path / WEIGHTS)

    assert str(refused(path, output, progress=progress, check=True)) == changed(WEIGHTS)
