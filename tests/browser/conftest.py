"""Gateways for tests: over a stage that is written down, and as processes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

import splitbundle
import splitbundle_converter
from splitbundle.remote.carrier import Lost
from splitbundle.serving.gateway.opening import open_gateway, open_relays
from splitbundle.serving.stage_service import StageService
from splitbundle.serving.web.access import Access
from splitbundle.serving.web.web_server import WebServer
from tests.support.onnxruntime_web import find_onnxruntime_web
from tests.support.paths import ROOT

EXAMPLE: Final = ROOT / "examples" / "license-gpt2"
NODE_TIMEOUT: Final = 120


class StandInCarrier:
    """A way to a service in this process. ``down`` cuts it, and ``lose`` loses the next answers."""

    def __init__(self, service: StageService, text: str = "grpc://127.0.0.1:1") -> None:
        self.service, self.text, self.down, self.lose = service, text, False, 0
        self.frames: list[bytes] = []

    def call(self, frame: bytes, timeout: float) -> bytes:
        if self.down:
            raise Lost("nothing is there")
        self.frames.append(frame)
        answer = self.service.answer(frame, "gateway")
        if self.lose:
            self.lose -= 1
            raise Lost("the answer was lost")
        return answer

    step = call

    def send(self, frame: bytes, timeout: float) -> None:
        self.call(frame, timeout)


def run_node(*arguments: object) -> str:
    """Run Node, and return what it wrote."""
    command = ["node", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=NODE_TIMEOUT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="session")
def license_bundle(tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    """The trained example in three shards, each with a graph."""
    place = tmp_path_factory.mktemp("gateway") / "license.splitbundle"
    return splitbundle_converter.convert(EXAMPLE, place, split=[2, 4], onnx=True)


@pytest.fixture
def opened(license_bundle: splitbundle.Bundle) -> Iterator[Callable[..., WebServer]]:
    """A function that opens a gateway over carriers."""
    made: list[WebServer] = []

    def serve(*carriers: Any, keys: Path | None = None, **options: Any) -> WebServer:
        given = {"timeout": 0.2, "same_weights": False}
        relays = open_relays(license_bundle, {"trunk": carriers} if carriers else {}, given)
        server = open_gateway(license_bundle, relays, Access(keys), **options)
        server.start()
        made.append(server)
        return server

    yield serve
    for server in made:
        server.stop(0)


@pytest.fixture(scope="session")
def onnxruntime_web() -> Path:
    """Return the directory of onnxruntime-web, which npm fetches at the first run."""
    return find_onnxruntime_web()
