"""Requests that no good client sends, and the answers to them; the bytes of streams."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from splitbundle import BundleError, SharedPipeline
from splitbundle.serving.web.access import Access
from splitbundle.serving.web.errors import RequestError
from splitbundle.serving.web.models import Model, Models
from splitbundle.serving.web.opening import open_web_server
from splitbundle.serving.web.requests import parse_completion
from splitbundle.serving.web.web_server import WebServer
from tests.serving.web.conftest import ask
from tests.support.paths import TESTS
from tests.support.scripted_pipeline import ScriptedPipeline, wait_until

STREAMS = TESTS / "serving" / "web" / "streams"
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
MESSAGES = [{"role": "user", "content": "?"}]
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", "Zürich — yes", {"messages": MESSAGES}),
    "chat-usage": (
        "/v1/chat/completions",
        "Yes",
        {"messages": MESSAGES, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 2},
    ),
    "chat-tools": (
        "/v1/chat/completions",
        '<think>hm</think>Wait.<tool_call>{"name": "weather", "arguments": {}}</tool_call>',
        {"messages": MESSAGES, "tools": TOOLS},
    ),
    "completion": ("/v1/completions", "one two", {"prompt": "x", "n": 2, "max_tokens": 9}),
    "completion-echo": ("/v1/completions", "two", {"prompt": "one ", "echo": True, "logprobs": 1, "max_tokens": 9}),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_of_a_stream(name: str, scripted: Callable[..., WebServer]) -> None:
    """Clients read these bytes. A change of them has to be meant: delete the file, and the test writes it again."""
    path, answer, body = CASES[name]
    status, headers, data = ask(scripted(answer), path, {"model": "script", "stream": True, "temperature": 0, **body})
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    text = re.sub(r'"created":[0-9]+', '"created":0', data.decode("utf-8"))
    text = re.sub(r'"(chatcmpl|cmpl|call)[-_][0-9a-f]{24}"', r'"\1"', text)
    text = re.sub(r'("logprob(?:s)?":|: ?)(-?[0-9]+\.[0-9]{4})[0-9]+', r"\1\2", text)
    if name == "completion":  # two threads make the choices, in any order
        text = "\n\n".join(
            sorted(text.split("\n\n"), key=lambda each: (each == "", '"index":1' in each, "[DONE]" in each))
        )
    recorded = STREAMS / f"{name}.txt"
    if not recorded.exists():
        STREAMS.mkdir(exist_ok=True)
        recorded.write_text(text, "utf-8")
    assert text == recorded.read_text("utf-8")
    assert all(event.startswith("data: ") and "\n" not in event for event in text.strip().split("\n\n"))


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "json.syntax"),
        (b"{", 400, "json.syntax"),
        (b"[]", 400, "invalid_type"),
        (b"null", 400, "invalid_type"),
        (b"\xff{}", 400, "json.encoding"),
        (b'{"prompt": "x", "prompt": "y"}', 400, "json.duplicate-key"),
        (b'{"prompt": "x", "temperature": NaN}', 400, "json.number"),
        (b'{"prompt": "x", "temperature": 1e999}', 400, None),
        (b"[" * 5000 + b"]" * 5000, 400, None),
        (b'{"prompt": "\\ud800"}', 400, None),
        (b'{"prompt": {}}', 400, "invalid_type"),
        (b'{"prompt": []}', 400, "invalid_type"),
        (b'{"prompt": [99999]}', 400, "input.value"),
        (b'{"prompt": ""}', 400, "input.value"),
        (b'{"prompt": "x", "suffix": "y"}', 400, "unsupported_parameter"),
        (b'{"prompt": "x", "best_of": 3}', 400, "unsupported_parameter"),
        (b"{}", 400, "missing_required_parameter"),
        (b" " * (16 * 2**20 + 1), 413, "too_large"),
    ],
)
def test_wrong_bodies(server: WebServer, body: bytes, status: int, code: str | None) -> None:
    found, headers, data = ask(server, "/v1/completions", body)
    error = json.loads(data)["error"]
    assert (found, error["type"]) == (status, "invalid_request_error")
    assert error["message"]
    assert code is None or error["code"] == code
    assert headers["content-type"] == "application/json"


def test_null_is_as_good_as_nothing(server: WebServer) -> None:
    names = (
        "n",
        "stop",
        "seed",
        "logprobs",
        "logit_bias",
        "temperature",
        "user",
        "suffix",
        "best_of",
        "stream",
        "model",
    )
    status, headers, data = ask(
        server, "/v1/completions", {"prompt": "You may", "max_tokens": 1, **dict.fromkeys(names)}
    )
    assert status == 200
    assert "splitbundle-ignored" not in headers
    assert json.loads(data)["model"] == "license"


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/v1/chat/completions", "GET", 405),
        ("/v1/models", "POST", 405),
        ("/v1/other", "POST", 404),
        ("/nothing", "GET", 404),
        ("/../pyproject.toml", "GET", 404),
        ("/page/../app.py", "GET", 404),
        ("/%2e%2e/app.py", "GET", 404),
        ("/app.py", "GET", 404),
    ],
)
def test_wrong_paths(server: WebServer, path: str, method: str, status: int) -> None:
    found, _, data = ask(server, path, None, method)
    assert found == status
    assert json.loads(data)["error"]["code"]


def test_another_site_cannot_ask(server: WebServer, chat_bundle: Any, pipeline: Any) -> None:
    body = b'{"prompt": "x", "max_tokens": 1}'
    assert ask(server, "/v1/completions", body, Content_Type="text/plain")[0] == 415
    preflight = {"Origin": "https://site.example", "Access_Control_Request_Method": "POST"}
    _, headers, _ = ask(server, "/v1/completions", None, "OPTIONS", **preflight)
    assert "access-control-allow-origin" not in headers
    models = Models({"m": Model("m", chat_bundle, lambda: SharedPipeline(pipeline, rows=1))})
    with open_web_server(models, hosts=("localhost",), origins=("https://own.example",)) as strict:
        assert ask(strict, "/v1/models", Host="localhost:1")[0] == 200
        assert ask(strict, "/v1/models", Host="site.example:8000")[0] == 403
        assert ask(strict, "/", Host="site.example")[0] == 403
        own = {"Origin": "https://own.example", "Access_Control_Request_Method": "POST", "Host": "localhost"}
        status, headers, _ = ask(strict, "/v1/completions", None, "OPTIONS", **own)
        assert (status, headers["access-control-allow-origin"]) == (200, "https://own.example")
        status, headers, _ = ask(
            strict, "/v1/completions", None, "OPTIONS", **own | {"Origin": "https://other.example"}
        )
        assert "access-control-allow-origin" not in headers


def test_the_page_and_its_headers(server: WebServer) -> None:
    status, headers, data = ask(server, "/")
    assert status == 200
    assert b"<html" in data.lower()
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert ask(server, "/page.css")[1]["content-type"] == "text/css; charset=utf-8"
    assert ask(server, "/page.js")[1]["content-type"] == "text/javascript; charset=utf-8"


def test_what_the_page_reads(server: WebServer, chat_bundle: Any) -> None:
    assert ask(server, "/v1/completions", {"prompt": "You may", "max_tokens": 3})[0] == 200
    (found,) = json.loads(ask(server, "/api/bundles")[2])["bundles"]
    assert (found["id"], found["loaded"], found["bundle_id"]) == ("license", True, chat_bundle.id)
    assert [shard["name"] for shard in found["shards"]] == ["bottom", "trunk", "top"]
    assert all(shard["milliseconds"] > 0 and shard["where"] == "here" for shard in found["shards"])
    assert all(len(file["sha256"]) == 64 for shard in found["shards"] for file in shard["files"])
    assert found["chat"] is True
    state = json.loads(ask(server, "/api/status")[2])["models"]["license"]
    assert (state["rows"], state["active"], state["waiting"]) == (4, 0, 0)
    assert state["new_tokens"] >= 3


def test_health_computes(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(server, "/healthz")[::2] == (200, b'{"ok":true}')
    model = server._door.models.first
    monkeypatch.setattr(model, "_checked", -1e9)
    monkeypatch.setattr(model.pipeline, "log_probabilities", lambda ids: [[float("nan")]])
    assert ask(server, "/healthz")[0] == 503
    monkeypatch.setattr(model, "_checked", -1e9)
    monkeypatch.undo()
    monkeypatch.setattr(model, "_checked", -1e9)
    assert ask(server, "/healthz")[0] == 200


def test_the_metrics_are_prometheus(server: WebServer) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    before = _metrics(server)
    ask(server, "/v1/completions", {"prompt": "You may", "max_tokens": 4})
    wait_until(
        lambda: _metrics(server)["splitbundle_request_seconds_count"] > before["splitbundle_request_seconds_count"]
    )
    after = _metrics(server)
    assert after["splitbundle_new_tokens_total"] - before["splitbundle_new_tokens_total"] == 4
    assert after["splitbundle_first_token_seconds_count"] > before["splitbundle_first_token_seconds_count"]
    text = ask(server, "/metrics")[2].decode()
    assert "You may" not in text
    assert {family.name for family in text_string_to_metric_families(text)} >= {
        "splitbundle_active",
        "splitbundle_waiting",
    }


def _metrics(server: WebServer) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    text = ask(server, "/metrics")[2].decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


# Keys.


@pytest.fixture
def keyed(tmp_path: Path, chat_bundle: Any, pipeline: Any) -> Iterator[tuple[WebServer, Path]]:
    path = tmp_path / "keys"
    path.write_text(
        "# people\nalice sk-alice-0123456789\nbob sk-bob-0123456789ab concurrent=1\n"
        "eve sk-eve-0123456789ab requests-per-minute=2\ndan sk-dan-0123456789ab tokens-per-minute=5\n"
    )
    scripted = ScriptedPipeline(pipeline, lambda prompt: "an answer", 0.05)
    models = Models({"m": Model("m", chat_bundle, lambda: scripted)})
    with open_web_server(models, Access(path)) as server:
        yield server, path


def spoken(server: WebServer, key: str | None, **body: Any) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return ask(server, "/v1/completions", {"prompt": "x", "max_tokens": 3, **body}, **headers)[0]


def test_keys(keyed: tuple[WebServer, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    server, path = keyed
    notes: list[str] = []
    monkeypatch.setattr(server._door.access, "_note", notes.append)
    for wrong in (None, "", "sk-alice", "sk-alice-0123456789x", "Sk-alice-0123456789", "\xff\xfe"):
        assert spoken(server, wrong) == 401
    assert ask(server, "/v1/models")[0] == 401
    assert ask(server, "/api/bundles")[0] == 401
    assert ask(server, "/v1/models", Authorization="Basic sk-alice-0123456789")[0] == 401
    assert ask(server, "/")[0] == ask(server, "/healthz")[0] == 200
    assert spoken(server, "sk-alice-0123456789") == 200
    path.write_text("carol sk-carol-0123456789\n")
    assert spoken(server, "sk-alice-0123456789") == 401
    assert spoken(server, "sk-carol-0123456789") == 200
    path.write_text("half a li")  # it is being written: the last keys hold on
    assert spoken(server, "sk-carol-0123456789") == 200
    assert notes[-1].startswith("the keys stay as they were: [keys.file]")


def test_the_limits_of_a_key(keyed: tuple[WebServer, Path]) -> None:
    server, _ = keyed
    assert [spoken(server, "sk-eve-0123456789ab") for _ in range(3)] == [200, 200, 429]
    assert [spoken(server, "sk-dan-0123456789ab") for _ in range(3)] == [200, 429, 429]
    headers = {"Authorization": "Bearer sk-bob-0123456789ab", "Content-Type": "application/json"}
    first = http.client.HTTPConnection("127.0.0.1", server.port)
    first.request("POST", "/v1/completions", json.dumps({"prompt": "x", "stream": True}).encode(), headers)
    answer = first.getresponse()
    assert answer.status == 200
    assert spoken(server, "sk-bob-0123456789ab") == 429
    answer.read()
    first.close()
    wait_until(lambda: spoken(server, "sk-bob-0123456789ab") == 200)
    _, headers_of, data = ask(server, "/v1/completions", {"prompt": "x"}, Authorization="Bearer sk-eve-0123456789ab")
    assert 1 <= int(headers_of["retry-after"]) <= 60
    assert json.loads(data)["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize(
    "line",
    ["alice", "alice short", "alice sk-alice-0123456789 fast", "alice sk-alice-0123456789 concurrent=0", "", "# none"],
)
def test_wrong_files_of_keys(tmp_path: Path, line: str) -> None:
    (tmp_path / "keys").write_text(line + "\n")
    with pytest.raises(BundleError) as caught:
        Access(tmp_path / "keys")
    assert caught.value.codes == ("keys.file",)


# Several models.


def test_models_are_loaded_on_demand_and_make_room(chat_bundle: Any, pipeline: Any) -> None:
    loads: list[str] = []

    def loader(name: str) -> Callable[[], Any]:
        def load() -> Any:
            loads.append(name)
            return ScriptedPipeline(pipeline, lambda prompt: name, 0.02)

        return load

    made = {name: Model(name, chat_bundle, loader(name)) for name in ("a", "b", "c")}
    models = Models(made, max_bytes=2 * made["a"].bytes)
    with open_web_server(models) as server:
        assert [each["id"] for each in json.loads(ask(server, "/v1/models")[2])["data"]] == ["a", "b", "c"]
        assert loads == []
        for name in ("a", "b", "a", "c", "a"):  # b has rested longest when c comes
            status, _, data = ask(server, "/v1/completions", {"model": name, "prompt": "x"})
            assert (status, json.loads(data)["choices"][0]["text"]) == (200, name)
        assert loads == ["a", "b", "c"]
        assert [model.pipeline is not None for model in models] == [True, False, True]
        with models.using("a"), models.using("c"):  # nobody is idle
            status, headers, data = ask(server, "/v1/completions", {"model": "b", "prompt": "x"})
            assert (status, json.loads(data)["error"]["code"]) == (503, "server.memory")
            assert headers["retry-after"] == "1"
        assert ask(server, "/v1/completions", {"model": "b", "prompt": "x"})[0] == 200
    assert [model.pipeline for model in models] == [None] * 3
    with pytest.raises(BundleError) as caught:
        Models(made, max_bytes=1000)
    assert caught.value.codes == ("server.memory",)


# Clients that behave badly.


def test_a_slow_reader_keeps_no_row(scripted: Callable[..., WebServer], monkeypatch: pytest.MonkeyPatch) -> None:
    from splitbundle.serving.web import sending

    monkeypatch.setattr(sending, "PATIENCE", 0.5)
    server = scripted("word " * 60000)
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 200000}).encode()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", server.port))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        slow.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_until(lambda: server._door.running == 1)
        wait_until(lambda: server._door.running == 0)  # it is given up
        assert ask(server, "/v1/models")[0] == 200


def test_stopping_ends_what_runs(scripted: Callable[..., WebServer]) -> None:
    server = scripted("word " * 500, seconds=0.05)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 1000}).encode()
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.read(6) == b"data: "
    server.stop(0.2)
    rest = answer.read()
    assert b"[DONE]" not in rest
    assert b'"code":"server.draining"' in rest
    with pytest.raises(OSError, match=r"refused|reset"):
        ask(server, "/v1/models")


def test_a_head_that_comes_slowly_is_cut_off(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from splitbundle.serving.web import patient_protocol

    monkeypatch.setattr(patient_protocol, "SECONDS", 0.3)
    for before in (b"", b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"):  # the first head, and a later one
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.settimeout(30)
            if before:
                slow.sendall(before)
                assert slow.recv(4096).startswith(b"HTTP/1.1 200")
            slow.sendall(b"GET / HTTP/1.1\r\nX: ")
            while slow.recv(4096):
                pass
    body = json.dumps({"prompt": "You may", "max_tokens": 40}).encode()
    assert ask(server, "/v1/completions", body)[0] == 200  # an answer may take longer


def test_a_body_that_never_ends_is_a_hang_up(server: WebServer) -> None:
    before = _metrics(server).get("splitbundle_http_requests_total", 0)
    with socket.create_connection(("127.0.0.1", server.port)) as gone:
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        )
        gone.sendall(head.encode() + b"{")
    wait_until(lambda: _metrics(server)["splitbundle_http_requests_total"] >= before + 2)
    assert b'status="499"' in ask(server, "/metrics")[2]
    assert b'status="500"' not in ask(server, "/metrics")[2]


def test_a_text_that_cannot_fit_is_refused_at_once(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = server._door.models.first.pipeline.tokenizer()  # type: ignore[union-attr]
    monkeypatch.setattr(tokenizer, "encode", lambda *args, **given: pytest.fail("it was tokenized"))
    text = "word " * 10**6
    for path, given in (
        ("/v1/completions", {"prompt": text}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
    ):
        status, _, data = ask(server, path, given)
        assert (status, json.loads(data)["error"]["param"]) == (400, next(iter(given)))


def test_more_texts_than_there_is_room_for_are_refused(server: WebServer) -> None:
    status, _, data = ask(server, "/v1/completions", {"prompt": ["x"] * 64, "n": 2})
    assert (status, json.loads(data)["error"]["param"]) == (400, "n")


def test_names_that_no_header_can_have(server: WebServer) -> None:
    status, headers, _ = ask(server, "/v1/completions", {"prompt": "You", "max_tokens": 1, "ключ": 1, "€\n": 2})
    assert status == 200
    assert headers["splitbundle-ignored"].isascii()


@pytest.mark.parametrize("name", ["messages", "self", "add_generation_prompt", "tokenize", "a b"])
def test_variables_that_are_arguments(server: WebServer, name: str) -> None:
    body = {"messages": MESSAGES, "chat_template_kwargs": {name: 1}}
    status, _, data = ask(server, "/v1/chat/completions", body)
    assert (status, json.loads(data)["error"]["param"]) == (400, f"chat_template_kwargs.{name}")


@pytest.mark.parametrize("given", [{"response_format": {"type": "json_object"}}, {"tools": TOOLS}])
def test_what_completions_have_not(server: WebServer, given: dict[str, Any]) -> None:
    status, _, data = ask(server, "/v1/completions", {"prompt": "x", **given})
    assert (status, json.loads(data)["error"]["param"]) == (400, next(iter(given)))


def test_an_echo_stops_with_its_client(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from splitbundle.serving.web.generating import Job

    pieces: list[object] = []
    monkeypatch.setattr("splitbundle.stages.scoring.PIECE", 1)
    with server._door.models.using("license") as (model, shared):
        request = parse_completion({"prompt": [5] * 200, "echo": True, "logprobs": 1, "max_tokens": 0, "n": 3})
        job = Job(model, shared, request, "x")
        real = job._pipeline.run

        def run(work: Any) -> Any:
            pieces.append(work)
            if len(pieces) == 5:
                job.cancel()
            return real(work)

        monkeypatch.setattr(type(job._pipeline), "run", lambda self, work: run(work))
        job.begin()
    assert len(pieces) == 5  # and not once more for the other choices


def test_a_failed_health_check_is_shared(server: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, calls = server._door.models.first, []
    real = model.pipeline.log_probabilities  # type: ignore[union-attr]
    monkeypatch.setattr(model.pipeline, "log_probabilities", lambda ids: (calls.append(1), real(ids))[1])
    monkeypatch.setattr(model, "_checked", -1e9)
    with ThreadPoolExecutor(20) as pool:
        assert set(pool.map(lambda _: ask(server, "/healthz")[0], range(20))) == {200}
    assert len(calls) == 1


def test_tokens_are_set_aside_while_a_request_runs(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("dan sk-dan-0123456789ab tokens-per-minute=30\n")
    now = [0.0]
    access = Access(tmp_path / "keys", lambda: now[0])
    key = access.identify("Bearer sk-dan-0123456789ab")
    with access.using(key) as first, access.using(key) as second:
        first.reserve(200)  # alone, it may have more
        with pytest.raises(RequestError, match="30 tokens in a minute"):
            second.reserve(1)
        first.spend(12)
    with access.using(key) as third:
        third.reserve(18)
        with access.using(key) as fourth, pytest.raises(RequestError):
            fourth.reserve(1)
    now[0] = 61.0
    with access.using(key) as fifth:
        fifth.reserve(30)
