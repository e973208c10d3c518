"""Pulls that are killed go on: how many bytes move in all, with ranges and without."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers

import splitbundle
import splitbundle_converter
from splitbundle import Bundle
from splitbundle.sharing.cache import Cache
from splitbundle.sharing.pushing import PushHow, push
from splitbundle.sharing.reference import parse_reference
from tests.support.fake_registry import FakeRegistry
from tests.support.http_server import Exchange, LoopbackServer
from tests.support.static_server import static_server

KILLS = 10
PIECE = 2**15
BUFFERED = 2**18


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of 26 MB, in files of 3 MB."""
    root = tmp_path_factory.mktemp("made")
    configuration = transformers.GPT2Config(n_embd=256, n_layer=8, n_head=4, vocab_size=1000, n_positions=64)
    transformers.GPT2LMHeadModel(configuration).save_pretrained(root / "source")
    return splitbundle_converter.convert(root / "source", root / "b.splitbundle", split=[4], check=False)


def killed(command: list[str], environment: dict[str, str], server: LoopbackServer, enough: int) -> bool:
    """Run a command, and kill it once the server has sent some bytes more. Return whether it was killed."""
    before = server.sent
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        while child.poll() is None and server.sent - before < enough:
            time.sleep(0.001)
        child.kill()
    return child.returncode == -signal.SIGKILL


@pytest.mark.rule("SB-S-008")
@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("ranges", False),
        ("no ranges", True),
        ("registry", False),
        pytest.param("ranges", True, marks=pytest.mark.long),
        pytest.param("no ranges", False, marks=pytest.mark.long),
        pytest.param("registry", True, marks=pytest.mark.long),
    ],
)
def test_ten_kills(kind: str, output: bool, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_ = random.Random(kind)
    size = sum(file.size for file in bundle.manifest.files.values())
    largest = max(file.size for file in bundle.manifest.files.values())
    environment = os.environ | {"SPLITBUNDLE_CACHE": str(tmp_path / "cache")}
    server: LoopbackServer
    server = FakeRegistry() if kind == "registry" else static_server(bundle.path.parent, ranges=kind == "ranges")
    with server:
        reference = f"oci://{server.host}/a/b:v1" if kind == "registry" else f"{server.url}/b.splitbundle"
        if kind == "registry":
            push(bundle, parse_reference(reference), PushHow())
        monkeypatch.setattr(Exchange, "body_bytes", in_pieces)
        command = [sys.executable, "-m", "splitbundle", "pull", reference, "--jobs", "1"]
        command += ["-o", str(tmp_path / "out")] if output else []
        server.reset_counters()
        kills = sum(killed(command, environment, server, random_.randrange(1000, size // 8)) for _ in range(KILLS))
        assert kills
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        sent = server.sent
    # What lay in the buffers of a connection when its client was killed was sent too. A busy client leaves more there.
    assert sent <= (1.1 * size + kills * BUFFERED if kind != "no ranges" else size + kills * largest)
    monkeypatch.setenv("SPLITBUNDLE_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "out" if output else Cache().path_of(bundle.id)
    assert splitbundle.open(root).verify(exact=True, whole=True).bytes == size


def test_a_holder_that_is_stopped(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has a file, and makes no progress, doesn't hold up the others for ever."""
    environment = os.environ | {"SPLITBUNDLE_CACHE": str(tmp_path / "cache")}
    with static_server(bundle.path.parent) as server:
        monkeypatch.setattr(Exchange, "body_bytes", in_pieces)
        command = [sys.executable, "-m", "splitbundle", "pull", f"{server.url}/b.splitbundle"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as first:
            while not list((tmp_path / "cache").glob("parts/*")):
                time.sleep(0.005)
            first.send_signal(signal.SIGSTOP)
            held = list((tmp_path / "cache").glob("parts/*"))
            subprocess.run([*command, "--timeout", "0.5"], env=environment, check=True, stdout=subprocess.DEVNULL)
            first.send_signal(signal.SIGCONT)
            assert first.wait() == 0
        assert held
    monkeypatch.setenv("SPLITBUNDLE_CACHE", str(tmp_path / "cache"))
    assert splitbundle.open(Cache().path_of(bundle.id)).verify(exact=True, whole=True)
    assert not list((tmp_path / "cache").glob("parts/*"))


def in_pieces(exchange: Exchange, data: bytes) -> None:
    """Send a body at some 50 MB/s, so that a kill comes in the middle of it, and little is under way at that moment."""
    for at in range(0, len(data), PIECE):
        exchange._handler.wfile.write(data[at : at + PIECE])
        exchange.server.sent += len(data[at : at + PIECE])
        time.sleep(0.0005)
