"""The command peers: what it measures, how it ends, and what it says to do next."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

import splitbundle
import splitbundle_schemas
from splitbundle import StageServer
from splitbundle.cli.main import main
from splitbundle.remote.carrier import Lost
from splitbundle.remote.channel import Channel
from tests.support.paths import TESTS

BUNDLE = str(TESTS / "golden" / "v1.0" / "gpt2.splitbundle")
GOLDEN = ("--bundle", BUNDLE, "--shard", "trunk")


@pytest.fixture(scope="module")
def server() -> Iterator[StageServer]:
    with StageServer(splitbundle.open(BUNDLE), "trunk", threads=1) as started:
        yield started


@pytest.fixture(scope="module")
def liar() -> Iterator[StageServer]:
    """A server that computes other numbers."""
    with StageServer(splitbundle.open(BUNDLE), "trunk", threads=1) as started:
        served = started.service.served
        run = served.run
        served.run = lambda *given: run(*given) + 1
        yield started


@pytest.fixture(scope="module")
def nobody() -> str:
    """An address at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"grpc://127.0.0.1:{free.getsockname()[1]}"


def peers(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    """Return the status of the command, its document, and what it says on stderr."""
    capsys.readouterr()
    status = main(["peers", *arguments, "--repeats", "2", "--json"])
    out, errors = capsys.readouterr()
    document = json.loads(out)
    jsonschema.validate(document, splitbundle_schemas.load("peers"))
    if status:
        jsonschema.validate(document, splitbundle_schemas.load("problems"))
    return status, document, errors


def test_a_server_that_works(server: StageServer, capsys: pytest.CaptureFixture[str]) -> None:
    status, document, errors = peers(capsys, server.url, *GOLDEN)
    assert (status, errors, document["ok"]) == (0, "", True)
    (peer,) = document["peers"]
    assert [step["tokens"] for step in peer["steps"]] == [1, 64]
    assert peer["golden"][0]["relative"] <= peer["golden"][0]["tolerance"]


def test_several_of_which_one_fails(
    server: StageServer, liar: StageServer, nobody: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All are measured, and each failure is named with what to do. Wrong numbers weigh more."""
    status, document, errors = peers(capsys, nobody, server.url, *GOLDEN)
    assert (status, [each["ok"] for each in document["peers"]]) == (5, [False, True])
    assert document["problems"][0]["code"] == "peer.unreachable"
    assert f"{nobody}: [peer.unreachable] any stage: expected a server that answers" in errors
    assert "Look whether splitbundle serve-stage runs there" in errors
    status, document, errors = peers(capsys, nobody, liar.url, server.url, *GOLDEN)
    assert (status, [each["ok"] for each in document["peers"]]) == (3, [False, False, True])
    assert document["peers"][1]["problems"][0]["code"] == "parity"
    assert document["peers"][1]["steps"], "what was measured is kept"
    assert "Don't compute with this server" in errors


def test_another_stage_than_asked_for(server: StageServer, capsys: pytest.CaptureFixture[str]) -> None:
    other = str(TESTS / "golden" / "v1.0" / "llama.splitbundle")
    status, document, errors = peers(capsys, server.url, "--bundle", other, "--shard", "trunk-1")
    assert (status, document["problems"][0]["code"]) == (5, "peer.fingerprint")
    assert "Give --bundle the bundle from which the server was started" in errors


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("grpc://127.0.0.1:1", "here"), 2),
        (("grpc://192.0.2.1:7000",), 2),
        (("grpc://127.0.0.1:1", "--bundle", BUNDLE), 2),
        (("grpc://127.0.0.1:1", "--bundle", BUNDLE, "--shard", "nothing"), 2),
        (("grpc://127.0.0.1:1", "--bundle", BUNDLE, "--shard", "top"), 1),
        (("grpc://127.0.0.1:1", "--bundle", "nowhere", "--shard", "trunk"), 1),
        (("grpcs://127.0.0.1:1", "grpcs://127.0.0.1:2", "--tls", "nowhere"), 1),
    ],
)
def test_what_is_refused_before_anything_is_measured(
    arguments: tuple[str, ...], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["peers", *arguments])
    except SystemExit as ended:
        found = int(str(ended.code))
    out, errors = capsys.readouterr()
    assert (found, out) == (status, ""), errors
    assert "nowhere" not in arguments or errors.count("[") == 1, "it is said once, and not for each server"


def test_a_silent_server_is_given_up_after_the_timeout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []

    def call(_: Channel, frame: bytes, timeout: float) -> bytes:
        waited.append(timeout)
        raise Lost("no answer in time", silent=True)

    monkeypatch.setattr(Channel, "call", call)
    for seconds in (0.3, 30.0):  # also more than the time in which a server in use has to answer
        status, document, _ = peers(capsys, "grpc://127.0.0.1:1", "--timeout", str(seconds))
        assert (status, document["problems"][0]["code"]) == (5, "peer.unreachable")
        assert waited.pop() == seconds
    assert waited == []
