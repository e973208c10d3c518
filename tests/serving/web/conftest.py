"""An HTTP server over the trained example, and one over answers that are written down."""

from __future__ import annotations

import http.client
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import splitbundle
import splitbundle_converter
from splitbundle import SharedPipeline
from splitbundle.serving.web.models import Model, Models
from splitbundle.serving.web.opening import open_web_server
from splitbundle.serving.web.web_server import WebServer
from tests.support.paths import ROOT
from tests.support.scripted_pipeline import ScriptedPipeline

EXAMPLE = ROOT / "examples" / "license-gpt2"
TEMPLATE = """{%- for m in messages -%}
{%- if m.role not in ('system', 'user', 'assistant', 'tool') %}{{ raise_exception('no such role') }}{% endif -%}
{{- m.content or '' }}{% if m.role == 'system' %}<|endoftext|>{% endif %}
{%- endfor -%}
{%- if tools %} tools: {{ tools | length }}{% endif %}
{%- if shout is defined %} {{ shout }}{% endif %}"""


@pytest.fixture(scope="session")
def chat_bundle(tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    """The trained example with a chat template that puts the messages one after another."""
    place = tmp_path_factory.mktemp("door")
    source = Path(shutil.copytree(EXAMPLE, place / "source"))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    return splitbundle_converter.convert(source, place / "chat.splitbundle", split=[2, 4])


@pytest.fixture(scope="session")
def pipeline(chat_bundle: splitbundle.Bundle) -> Any:
    return chat_bundle.pipeline(threads=1)


@pytest.fixture(scope="module")
def server(chat_bundle: splitbundle.Bundle, pipeline: Any) -> Iterator[WebServer]:
    """A server with the model ``license``."""
    models = Models({"license": Model("license", chat_bundle, lambda: SharedPipeline(pipeline, rows=4, piece=16))})
    with open_web_server(models) as made:
        yield made


@pytest.fixture
def scripted(chat_bundle: splitbundle.Bundle, pipeline: Any) -> Iterator[Callable[..., WebServer]]:
    """A function that returns a server whose answers are written down."""
    made = []

    def serve(answer: Callable[[str], str] | str, seconds: float = 0.0) -> WebServer:
        own = (lambda prompt: answer) if isinstance(answer, str) else answer
        scripted = ScriptedPipeline(pipeline, own, seconds)
        server = open_web_server(Models({"script": Model("script", chat_bundle, lambda: scripted)}))
        server.scripted = scripted  # type: ignore[attr-defined]
        server.start()
        made.append(server)
        return server

    yield serve
    for server in made:
        server.stop(0.1)


def client_of(server: WebServer, key: str = "none", **options: Any) -> openai.OpenAI:
    """Return OpenAI's own client of a server."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, **options)


def ask(
    server: WebServer, path: str, body: Any = None, method: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Send one request, and return the status, the headers and the body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} if data is not None else {}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method or ("GET" if data is None else "POST"), path, data, given)
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found
