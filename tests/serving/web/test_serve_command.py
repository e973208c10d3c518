"""The command ``serve``, as a process: its options, many users at once, a stage that is killed, and its end."""

from __future__ import annotations

import importlib.util
import json
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest

import splitbundle
from splitbundle.cli.main import main
from tests.support.door_users import DoorProcess, Users, get
from tests.support.scripted_pipeline import wait_until
from tests.support.stage_servers import StageProcess

PROMPTS = [f"Licensed under the Apache License{' and' * i}" for i in range(6)] + ["You may", "Unless required " * 9]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "BUNDLE"),
        (["nowhere"], 1, "nowhere"),
        (["{bundle}", "--listen", "here"], 2, "HOST:PORT"),
        (["{bundle}", "--listen", "0.0.0.0:0"], 5, "--api-key-file"),
        (["{bundle}", "--listen", "0.0.0.0:0", "--api-key-file", "{keys}"], 5, "--plain-http"),
        (["{bundle}", "--certificate", "x"], 2, "--private-key"),
        (["{bundle}", "--certificate", "x", "--private-key", "y"], 1, "certificate"),
        (["{bundle}", "--api-key-file", "{empty}"], 1, "at least one key"),
        (["{bundle}", "{bundle}"], 2, "twice"),
        (["{bundle}", "--memory", "1KiB"], 5, "server.memory"),
        (["{bundle}", "other={bundle}", "--remote", "trunk=grpc://127.0.0.1:1"], 2, "one bundle"),
        (["{golden}"], 1, "text.none"),
        (["{bundle}", "--replicas", "2"], 2, "--ray"),
        (["{bundle}", "--ray", "auto", "--replicas", "2:x"], 2, "LEAST"),
        (["{bundle}", "--ray", "auto", "--remote", "trunk=grpc://127.0.0.1:1"], 2, "--remote"),
    ],
)
def test_exit_statuses(
    arguments: list[str],
    status: int,
    said: str,
    chat_bundle: splitbundle.Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "keys").write_text("alice sk-alice-0123456789\n")
    (tmp_path / "empty").write_text("\n")
    golden = Path(__file__).parents[2] / "golden" / "v1.0" / "gpt2.splitbundle"
    places = {"bundle": chat_bundle.path, "keys": tmp_path / "keys", "empty": tmp_path / "empty", "golden": golden}
    try:
        found = main(["serve", *(argument.format(**places) for argument in arguments)])
    except SystemExit as ended:
        found = int(str(ended.code))
    error = capsys.readouterr().err
    assert (found, "Traceback" in error) == (status, False), error
    assert said in error


def test_without_its_libraries_it_says_what_to_install(
    chat_bundle: splitbundle.Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith(("starlette", "splitbundle.serving.web.app"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette", None)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert main(["serve", str(chat_bundle.path)]) == 4
    assert 'pip install "splitbundle[serve]"' in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_it_says_what_to_install(
    chat_bundle: splitbundle.Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(chat_bundle.path), "--ray", "auto", "--listen", "127.0.0.1:0"]) == 4
    assert 'pip install "splitbundle[ray]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "seconds"), [(12, 4.0), pytest.param(64, 180.0, marks=pytest.mark.long)], ids=["short", "long"]
)
def test_many_users(chat_bundle: splitbundle.Bundle, number: int, seconds: float, record_property: Any) -> None:
    """They hang up, read slowly, and cancel. Nobody sees an error but a stated 429, and nothing is left over."""
    with DoorProcess(chat_bundle.path, "--threads", "1", "--queue", str(number // 2)) as door:
        Users(door.port, PROMPTS, number, max(2.0, seconds / 6))  # libraries are loaded, and pools have their threads
        held = door.held
        users = Users(door.port, PROMPTS, number, seconds)
        expected = {"whole", "stream", "hang-up", "slow", "cancel", "early", "429"}
        assert set(users.results) <= expected, users.results
        assert users.wrong == []
        assert users.results["stream"] > 0
        wait_until(lambda: json.loads(get(door.port, "/api/status")[1])["models"]["chat"]["active"] == 0)
        state = json.loads(get(door.port, "/api/status")[1])["models"]["chat"]
        assert state["waiting"] == 0
        assert get(door.port, "/healthz") == (200, b'{"ok":true}')
        wait_until(lambda: door.held["descriptors"] <= held["descriptors"] + 2)
        after = door.held
        assert after["memory"] < held["memory"] + 64 * 1024
        assert after["threads"] <= held["threads"] + number + 8  # a pool keeps its threads
        first = sorted(users.first_tokens)
        record_property("results", dict(users.results))
        record_property("first token, s: median, 99 %", (statistics.median(first), first[int(0.99 * len(first))]))
        print(
            dict(users.results),
            f"first token {statistics.median(first):.3f} s, 99 % {first[int(0.99 * len(first))]:.3f}",
            held,
            after,
        )
        assert door.end() == 0


def test_a_stage_that_is_killed_costs_a_pause(chat_bundle: splitbundle.Bundle) -> None:
    local = chat_bundle.pipeline(threads=1)
    own = [local.complete_text(prompt, max_new_tokens=60).text for prompt in PROMPTS[:3]]
    stages = [StageProcess(chat_bundle.path, "trunk", "--threads", "1") for _ in range(2)]
    try:
        remote = f"trunk={','.join(stage.url for stage in stages)}"
        with DoorProcess(chat_bundle.path, "--remote", remote, "--threads", "1", "--timeout", "3") as door:
            client = openai.OpenAI(base_url=f"{door.url}/v1", api_key="x", max_retries=0)
            found = ["", "", ""]
            reached = threading.Barrier(4)

            def read(i: int) -> None:
                request: dict[str, Any] = {"prompt": PROMPTS[i], "max_tokens": 60, "temperature": 0, "stream": True}
                for number, chunk in enumerate(client.completions.create(model="chat", **request)):
                    found[i] += chunk.choices[0].text
                    if number == 5:
                        reached.wait(60)

            threads = [threading.Thread(target=read, args=(i,)) for i in range(3)]
            for thread in threads:
                thread.start()
            reached.wait(60)
            stages[0].kill()
            for thread in threads:
                thread.join(120)
            assert found == own
            (shown,) = json.loads(get(door.port, "/api/bundles")[1])["bundles"]
            assert [shard["where"][:7] for shard in shown["shards"]] == ["here", "grpc://", "here"]
            stages[1].kill()  # nobody is left
            client = openai.OpenAI(base_url=f"{door.url}/v1", api_key="x", max_retries=0, timeout=90)
            with pytest.raises(openai.APIStatusError) as caught:
                client.completions.create(model="chat", prompt="You", max_tokens=3)
            assert (caught.value.status_code, caught.value.code) == (503, "peer.unreachable")
            assert get(door.port, "/healthz")[0] == 503
    finally:
        for stage in stages:
            stage.end()


def test_its_end(chat_bundle: splitbundle.Bundle) -> None:
    with DoorProcess(chat_bundle.path, "--threads", "1", "--grace", "30", "--log") as door:
        client = openai.OpenAI(base_url=f"{door.url}/v1", api_key="x", max_retries=0)
        request: dict[str, Any] = {"prompt": "You may", "max_tokens": 150, "extra_body": {"stop_token_ids": []}}
        stream = client.completions.create(model="chat", stream=True, **request)
        next(iter(stream))
        door.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        rest = list(stream)  # an answer that is sent ends as usual
        assert rest[-1].choices[0].finish_reason == "length"
        out, error = door.process.communicate(timeout=60)
        assert (door.process.returncode, out) == (0, "")
        assert "POST /v1/completions 200" in error
        assert "You may" not in error
        assert "Traceback" not in error


def test_starting_does_not_load_the_libraries() -> None:
    code = "import sys, splitbundle.cli.serve; print({'starlette', 'uvicorn', 'torch'} & sys.modules.keys())"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "set()"
