"""The command ``gateway``: files with ranges, frames to a stage, keys, and what it refuses."""

from __future__ import annotations

import http.client
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

import splitbundle
import splitbundle_schemas
from splitbundle.cli.main import main
from splitbundle.errors import BundleError
from splitbundle.serving.gateway.opening import open_relays
from splitbundle.serving.gateway.page_files import ONNXRUNTIME, onnxruntime_files, page_files
from splitbundle.serving.gateway.relay import MAX_SESSIONS
from splitbundle.serving.web.web_server import WebServer
from splitbundle.wire import frames
from splitbundle.wire.messages import (
    Close,
    Failure,
    Health,
    Hello,
    Message,
    Open,
    Opened,
    Ran,
    Renew,
    Run,
    Train,
    Welcome,
)
from tests.browser.conftest import StandInCarrier
from tests.support import stand_in_stage
from tests.support.stand_in_stage import packed

FRAME = {"Content-Type": "application/vnd.splitbundle.frame"}
Opener = Callable[..., WebServer]


@pytest.fixture
def stage(license_bundle: splitbundle.Bundle, monkeypatch: pytest.MonkeyPatch) -> StandInCarrier:
    """A service with the layers and the width of the example's trunk."""
    monkeypatch.setattr(stand_in_stage, "WIDTH", license_bundle.architecture.hidden_size)
    monkeypatch.setattr(stand_in_stage.StandIn, "layer_range", (2, 4))
    facts = SimpleNamespace(hidden_size=license_bundle.architecture.hidden_size)
    monkeypatch.setattr(stand_in_stage.StandIn, "architecture", facts)
    service, _, _ = stand_in_stage.service(trains=False)
    return StandInCarrier(service)


def ask(
    server: WebServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def sent(server: WebServer, message: Message, numbers: list[float] = [], **headers: str) -> Any:  # noqa: B006
    frame = frames.pack(message, [packed(numbers)])
    status, _, data = ask(server, "/stages/trunk", "POST", frame, **{"Content-Type": FRAME["Content-Type"], **headers})
    assert status == 200, data
    return frames.unpack(data)[0]


def run(session: str | None, number: int, width: int, past: int = 0) -> Run:
    return Run(session=session, number=number, past=(past,), count=(1,), sequence=1, width=width, encoding="float32")


def test_the_page_and_what_browsers_are_told(opened: Opener) -> None:
    server = opened()
    status, headers, _ = ask(server, "/")
    assert (status, headers["location"]) == (307, "page/")
    status, headers, data = ask(server, "/page/")
    assert status == 200
    assert b"<title>splitbundle" in data
    assert "'wasm-unsafe-eval'" in headers["content-security-policy"]
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["cross-origin-embedder-policy"] == "require-corp"
    assert "access-control-allow-origin" not in headers
    status, headers, data = ask(server, "/reader/bundle.js")
    assert (status, headers["content-type"]) == (200, "text/javascript; charset=utf-8")
    assert ask(server, "/reader/bundle.js", **{"If-None-Match": headers["etag"]})[0] == 304
    assert headers["content-security-policy"].endswith("connect-src 'self'")
    other = ask(opened(origins=("https://files.example",)), "/page/")[1]
    assert other["content-security-policy"].endswith("connect-src 'self' https://files.example")
    said = json.loads(ask(server, "/gateway.json")[2])
    assert said["stages"] == {}
    jsonschema.validate(said, splitbundle_schemas.load("gateway"))
    assert ask(server, "/healthz")[0] == 200
    for path in ("/package.json", "/page/../../pyproject.toml", "/nothing", "/stages/trunk"):
        assert ask(server, path)[0] in (404, 405)


def test_listed_files_come_whole_and_in_ranges(opened: Opener, license_bundle: splitbundle.Bundle) -> None:
    server = opened()
    path = license_bundle.path / "layer-002.safetensors"
    whole = path.read_bytes()
    status, headers, data = ask(server, "/bundle/layer-002.safetensors")
    assert (status, data, headers["accept-ranges"]) == (200, whole, "bytes")
    tag = f'"{license_bundle.manifest.files["layer-002.safetensors"].sha256}"'
    assert headers["etag"] == tag
    assert headers["content-security-policy"] == "default-src 'none'; sandbox"
    for wanted, (start, stop) in {
        "bytes=0-0": (0, 1),
        "bytes=8-4095": (8, 4096),
        "bytes=-100": (len(whole) - 100, len(whole)),
        "bytes=4096-": (4096, len(whole)),
        "bytes=10-99999999999": (10, len(whole)),
    }.items():
        status, headers, data = ask(server, "/bundle/layer-002.safetensors", Range=wanted)
        assert (status, data) == (206, whole[start:stop]), wanted
        assert headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"
        assert headers["content-length"] == str(stop - start)
    assert ask(server, "/bundle/layer-002.safetensors", Range=f"bytes={len(whole)}-")[0] == 416
    assert ask(server, "/bundle/layer-002.safetensors", Range="bytes=0-9", **{"If-Range": tag})[0] == 206
    assert ask(server, "/bundle/layer-002.safetensors", Range="bytes=0-9", **{"If-Range": '"other"'})[0] == 200
    assert ask(server, "/bundle/layer-002.safetensors", **{"If-None-Match": tag})[0] == 304
    status, headers, data = ask(server, "/bundle/layer-002.safetensors", "HEAD")
    assert (status, headers["content-length"], data) == (200, str(len(whole)), b"")
    for name in ("manifest.json", "SHA256SUMS", "text.json", "tokenizer/tokenizer.json"):
        assert ask(server, f"/bundle/{name}")[2] == (license_bundle.path / name).read_bytes()


def test_nothing_else_of_the_directory_is_served(license_bundle: splitbundle.Bundle, tmp_path: Path) -> None:
    from splitbundle.serving.gateway.opening import open_gateway

    place = Path(shutil.copytree(license_bundle.path, tmp_path / "some.splitbundle"))
    (place / "secret.txt").write_text("secret")
    (tmp_path / "secret.txt").write_text("secret")
    (place / "trunk.onnx").unlink()
    (place / "top.onnx").unlink()
    (place / "top.onnx").symlink_to(tmp_path / "secret.txt")
    with open_gateway(splitbundle.open(place), {}) as server:
        for path in ("secret.txt", "../secret.txt", "%2e%2e/secret.txt", "tokenizer/../secret.txt", "", "tokenizer"):
            assert ask(server, f"/bundle/{path}")[0] == 404, path
        assert ask(server, "/bundle/trunk.onnx")[0] == 404  # the bundle is partial
        assert ask(server, "/bundle/top.onnx")[0] == 404  # a link
        assert ask(server, "/bundle/bottom.onnx")[0] == 200


@pytest.mark.rule("SB-X-031", "SB-X-032")
def test_frames_reach_the_stage_as_they_are(opened: Opener, stage: StandInCarrier) -> None:
    server = opened(stage)
    width = stand_in_stage.WIDTH
    assert isinstance(sent(server, Hello(protocol=1, fingerprint=None, layers=None)), Welcome)
    session = sent(server, Open(rows=1, capacity=8))
    assert isinstance(session, Opened)
    first = run(session.session, 1, width)
    for _ in range(2):  # the same frame again gets the same answer
        assert isinstance(sent(server, first, [1.0] * width), Ran)
    assert stage.frames[-1] == frames.pack(first, [packed([1.0] * width)])
    assert isinstance(sent(server, run(None, 0, width), [1.0] * width), Ran)
    assert sent(server, Renew(session=session.session)).op == "renewed"
    assert sent(server, Close(session=session.session)).op == "closed"
    ended = sent(server, run(session.session, 2, width, 1), [1.0] * width)
    assert (ended.code, ended.retry) == ("session.unknown", "replay")


def test_other_frames_are_answered_with_errors(opened: Opener, stage: StandInCarrier) -> None:
    server = opened(stage)
    stage.frames.clear()
    for message, code in ((Train(), "train.refused"), (Health(), "wire.header")):
        found = sent(server, message)
        assert (type(found), found.code, found.retry) == (Failure, code, "never")
    status, _, data = ask(server, "/stages/trunk", "POST", b"no frame", **FRAME)
    found = frames.unpack(data)[0]
    assert (status, getattr(found, "code", None), getattr(found, "retry", None)) == (200, "wire.frame", "same")
    assert stage.frames == []
    assert ask(server, "/stages/trunk", "POST", b"x", **{"Content-Type": "text/plain"})[0] == 415
    assert ask(server, "/stages/top", "POST", b"x", **FRAME)[0] == 404
    large = {**FRAME, "Content-Length": str(2**40)}
    assert ask(server, "/stages/trunk", "POST", b"x", **large)[0] == 413


@pytest.mark.rule("SB-X-032")
def test_a_session_stays_with_its_server_and_with_its_key(
    opened: Opener, stage: StandInCarrier, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice sk-alice-0123456789\nbob sk-bob-0123456789ab concurrent=1\n")
    alice, bob = ({"Authorization": f"Bearer {key}"} for key in ("sk-alice-0123456789", "sk-bob-0123456789ab"))
    server = opened(stage, keys=keys)
    width = stand_in_stage.WIDTH
    assert ask(server, "/page/")[0] == 200  # the page asks for the key
    for path in ("/bundle/manifest.json", "/gateway.json"):
        assert ask(server, path)[0] == 401
        assert ask(server, path, **alice)[0] == 200
    assert ask(server, "/stages/trunk", "POST", b"x", **FRAME)[0] == 401
    session = sent(server, Open(rows=1, capacity=8), **alice).session
    for message in (run(session, 1, width), Renew(session=session), Close(session=session)):
        numbers = [1.0] * width if isinstance(message, Run) else []
        assert sent(server, message, numbers, **bob).code == "session.unknown"
    assert isinstance(sent(server, run(session, 1, width), [1.0] * width, **alice), Ran)


def test_a_server_that_is_lost(opened: Opener, stage: StandInCarrier) -> None:
    other = StandInCarrier(stage.service, "grpc://127.0.0.1:2")
    server = opened(stage, other)
    width = stand_in_stage.WIDTH
    session = sent(server, Open(rows=1, capacity=8)).session
    stage.lose = 1  # the step is computed, and its answer is asked for again
    assert isinstance(sent(server, run(session, 1, width), [1.0] * width), Ran)
    stage.down = True
    lost = sent(server, run(session, 2, width, 1), [1.0] * width)
    assert (lost.code, lost.retry) == ("peer.unreachable", "replay")
    assert "127.0.0.1" not in f"{lost.expected} {lost.got} {lost.argument}"  # that is for the log
    again = sent(server, Open(rows=1, capacity=8)).session
    assert isinstance(sent(server, run(again, 1, width), [1.0] * width), Ran)
    assert other.frames
    other.down = True
    gone = sent(server, Open(rows=1, capacity=8))
    assert (gone.code, gone.retry) == ("peer.unreachable", "other")


def test_many_sessions_are_remembered_up_to_a_limit(license_bundle: splitbundle.Bundle, stage: StandInCarrier) -> None:
    relay = open_relays(license_bundle, {"trunk": [stage]}, {"same_weights": False})["trunk"]
    made = frames.pack(Opened(session="0" * 32, instance="0" * 32, lease=60.0))
    for number in range(MAX_SESSIONS + 1):
        relay._remember(made.replace(b"0" * 32, b"%032x" % number, 1), relay.peers.peers[0], "")
    assert len(relay._sessions) == MAX_SESSIONS
    assert f"{0:032x}" not in relay._sessions


def test_other_host_names_are_refused(opened: Opener) -> None:
    server = opened(hosts=("localhost", "127.0.0.1"))
    assert ask(server, "/page/")[0] == 200
    assert ask(server, "/page/", Host="evil.example")[0] == 403
    assert ask(server, "/bundle/manifest.json", Host="evil.example:80")[0] == 403


def test_an_end_and_a_full_house_are_said(opened: Opener, stage: StandInCarrier) -> None:
    server = opened(stage)
    gateway: Any = server._door
    gateway._held = 4 * frames.MAX_FRAME
    assert ask(server, "/stages/trunk", "POST", b"x", **FRAME)[0] == 503
    gateway._held = 0
    gateway.running = 64
    status, headers, _ = ask(server, "/stages/trunk", "POST", b"x", **FRAME)
    assert (status, headers["retry-after"]) == (429, "1")
    gateway.running, gateway.draining = 0, True
    assert ask(server, "/stages/trunk", "POST", b"x", **FRAME)[0] == 503
    assert ask(server, "/healthz")[0] == 503


def test_onnxruntime_web_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: Opener) -> None:
    package = tmp_path / "node_modules" / "onnxruntime-web"
    (package / "dist").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert onnxruntime_files(None) == {}
    for name in ONNXRUNTIME:
        (package / "dist" / name).write_bytes(name.encode())
    assert set(onnxruntime_files(None)) == set(ONNXRUNTIME)
    assert set(onnxruntime_files(str(package / "dist"))) == set(ONNXRUNTIME)
    with pytest.raises(BundleError, match=r"\[file.missing\].*npm install onnxruntime-web"):
        onnxruntime_files(str(tmp_path))
    server = opened(onnxruntime_web=str(package))
    status, headers, data = ask(server, "/onnxruntime-web/ort-wasm-simd-threaded.wasm")
    assert (status, headers["content-type"], data) == (200, "application/wasm", b"ort-wasm-simd-threaded.wasm")
    assert json.loads(ask(server, "/gateway.json")[2])["onnxruntime_web"] is True


def test_the_page_has_every_file_that_it_imports() -> None:
    found = page_files()
    for path, file in found.items():
        if path.endswith(".js"):
            for line in file.data.decode().splitlines():
                if line.startswith(("import ", "} from ", "export ")) and ' from "' in line:
                    target = line.split(' from "')[1].split('"')[0]
                    if not target.startswith("node:"):
                        parts = [*path.split("/")[:-1], *target.split("/")]
                        place: list[str] = []
                        for part in parts:
                            place = place[:-1] if part == ".." else place if part == "." else [*place, part]
                        assert "/".join(place) in found, (path, target)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["{bundle}"], 2, "--remote"),
        (["{bundle}", "--remote", "trunk"], 2, "SHARD=ADDRESS"),
        (["{bundle}", "--remote", "nothing=grpc://127.0.0.1:1"], 2, "stage.name"),
        (["{bundle}", "--remote", "top=grpc://127.0.0.1:1"], 1, "stage.range"),
        (["{bundle}", "--remote", "trunk=grpc://far.example:1"], 2, "grpcs://"),
        (["{bundle}", "--remote", "trunk=grpc://127.0.0.1:1", "--timeout", "0.1"], 5, "peer.unreachable"),
        (["{bundle}", "--remote", "trunk=grpc://127.0.0.1:1", "--listen", "0.0.0.0:0"], 5, "--api-key-file"),
        (["{bundle}", "--remote", "trunk=grpc://127.0.0.1:1", "--certificate", "x"], 2, "--private-key"),
        (["{bundle}", "--bundles-from", "https://x.example; script-src *"], 2, "origin"),
        (["nowhere", "--remote", "trunk=grpc://127.0.0.1:1"], 1, "nowhere"),
    ],
)
def test_exit_statuses(
    arguments: list[str],
    status: int,
    said: str,
    license_bundle: splitbundle.Bundle,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        found = main(["gateway", *(argument.format(bundle=license_bundle.path) for argument in arguments)])
    except SystemExit as ended:
        found = int(str(ended.code))
    error = capsys.readouterr().err
    assert (found, "Traceback" in error) == (status, False), error
    assert said in error


@pytest.mark.parametrize(("library", "extra"), [("starlette", "serve"), ("grpc", "network")])
def test_without_its_libraries_it_says_what_to_install(
    library: str,
    extra: str,
    license_bundle: splitbundle.Bundle,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine = ("splitbundle.serving.gateway.app", "splitbundle.serving.gateway.relay", "splitbundle.remote.peers")
    for name in [name for name in sys.modules if name.startswith((library, "splitbundle.remote.channel", *mine))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    if library == "starlette":
        monkeypatch.setitem(sys.modules, "starlette.applications", None)
        monkeypatch.setattr("splitbundle.cli.gateway.open_relays", lambda *given: {})
    arguments = ["gateway", str(license_bundle.path), "--remote", "trunk=grpc://127.0.0.1:1", "--timeout", "0.1"]
    assert main(arguments) == 4
    assert f'pip install "splitbundle[{extra}]"' in capsys.readouterr().err
