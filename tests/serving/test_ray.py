"""A pipeline on a cluster of Ray. Each scenario has a cluster in a network namespace of its own.

In a namespace, nobody else reaches the cluster, and Ray keeps the address 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import splitbundle
import splitbundle_converter
from tests.support import ray_scenarios
from tests.support.paths import ROOT
from tests.support.ray_scenarios import PROMPT, SEEDED

SECONDS = 400
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray isn't installed"),
]


@cache
def namespace() -> list[str] | None:
    """Return the command that runs another one in a network namespace, or None where the system has none."""
    for options in (["-n"], ["-rn"]):
        command = ["unshare", *options, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        try:
            ran = subprocess.run([*command, "true"], capture_output=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if ran.returncode == 0:
            return command
    return None


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained example in five shards, of which three are inner ones."""
    output = tmp_path_factory.mktemp("ray") / "five.splitbundle"
    return Path(splitbundle_converter.convert(ROOT / "examples" / "license-gpt2", output, split=[1, 2, 4, 5]).path)


@pytest.fixture
def sockets() -> Iterator[str]:
    """A directory with a short name: Ray puts sockets there, whose names the system bounds."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as made:
        yield made


def run(name: str, bundle: Path, sockets: str) -> dict[str, Any]:
    """Run a scenario, and return what it saw."""
    command = namespace()
    if command is None:
        pytest.skip("this system gives no network namespace (unshare -n)")
    places = [str(ROOT / each) for each in ("runtime", "converter", "schemas", ".")]
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"PYTHONPATH": os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")]), "RAY_TMPDIR": sockets}
    scenario = [sys.executable, "-m", "tests.support.ray_scenarios", name, str(bundle)]
    ran = subprocess.run([*command, *scenario], capture_output=True, text=True, timeout=SECONDS, env=env)
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert lines, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def alone(bundle: Path, **given: Any) -> Any:
    """Complete the prompt in this process."""
    return splitbundle.open(bundle).pipeline().complete_text(PROMPT, **given)


def test_three_stages_in_actors_give_the_texts_of_one_process(five: Path, sockets: str) -> None:
    found = run("three_stages", five, sockets)
    seeded = list(alone(five, **SEEDED).ids)
    assert found["likeliest"] == list(alone(five, max_new_tokens=60).ids)
    assert found["seeded"] == seeded != found["likeliest"]
    assert found["many"] == [seeded] * 6
    scored = alone(five, max_new_tokens=4, logprobs=2)
    assert found["logprobs"][0] == pytest.approx(scored.logprobs, abs=2e-5)
    assert [[token for token, _ in top] for top in found["logprobs"][1]] == [[t for t, _ in top] for top in scored.top]
    stopped = alone(five, max_new_tokens=60, stop="License")
    assert found["stop"] == ["stop", stopped.text]
    assert found["active"] == 0  # the row of a text that was closed is free
    assert found["stages"] == ["trunk-1", "trunk-2", "trunk-3"]
    assert found["pids"] == 4  # each stage has a process, and the replica has one
    pipeline = splitbundle.open(five).pipeline()
    (scores,) = pipeline.log_probabilities(pipeline.token_ids([[1, 2, 3, 4]]))
    assert found["scores"][0] == pytest.approx(scores, abs=2e-5)


def test_a_lost_actor_costs_a_pause(five: Path, sockets: str) -> None:
    found = run("lost_actor", five, sockets)
    assert found["got"] == found["again"] == found["hung"] == found["want"]
    assert found["moved"] == 0  # the replica goes on itself
    assert found["restarted"] == ["trunk-1", "trunk-2", "trunk-3"]


def test_texts_of_a_lost_replica_go_on_in_another_one(five: Path, sockets: str) -> None:
    found = run("lost_replica", five, sockets)
    for name, wanted in (("first", "want"), ("second", "want"), ("third", "greedy")):
        ids, _, moved = found[name]
        assert ids == found[wanted]
        assert moved >= 1


def test_a_lost_machine_costs_a_pause(five: Path, sockets: str) -> None:
    found = run("lost_machine", five, sockets)
    ids, _, moved = found["actor"]
    assert ids == found["want"]
    assert moved == 0
    assert found["left"] == []
    if "replica" in found:
        ids, _, _ = found["replica"]
        assert ids == found["want"]  # it may have ended before the loss was noticed


def test_the_number_of_replicas_follows_the_load(five: Path, sockets: str) -> None:
    found = run("scaled", five, sockets)
    assert found["more"], found["seen"]
    assert found["fewer"], found["seen"]
    assert found["wrong"] == 0
    assert found["texts"] > 4


def test_what_does_not_fit_is_refused_in_time(five: Path, sockets: str) -> None:
    found = run("no_room", five, sockets)
    problem = found["problem"]
    assert problem["code"] == "cluster.placement"
    assert problem["expected"].startswith("room for each replica's processes within 8 s: ")
    assert "4 × 1 CPU and 0.5" in problem["expected"]
    assert problem["got"].startswith("3 CPU and ")
    assert found["left"] == []
    assert found["seconds"] < 60


def test_a_cluster_without_tokens_is_refused(five: Path, sockets: str) -> None:
    found = run("no_token", five, sockets)
    assert [problem["code"] for problem in found["problems"]] == ["cluster.token"] * 4
    answered, _, disabled, _ = found["problems"]
    assert answered["got"] == "a cluster that answers without one"
    assert disabled["got"] == "RAY_AUTH_MODE=disabled"
    assert "RAY_AUTH_MODE=token" in answered["hint"]
    assert found["left"] == []


def test_a_process_needs_the_token_of_the_cluster(five: Path, sockets: str) -> None:
    found = run("other_processes", five, sockets)
    assert found["same"] == [list(alone(five, max_new_tokens=8).ids)]
    assert found["wrong"][0] == "cluster.address"
    assert "the token (RAY_AUTH_TOKEN)" in found["wrong"][1]
    assert found["none"][0] == "cluster.token"
    assert found["left"] == []


def test_nothing_is_left_after_close(five: Path, sockets: str, tmp_path: Path) -> None:
    found = run("nothing_left", Path(shutil.copytree(five, tmp_path / five.name)), sockets)  # it moves the bundle
    assert found["during"].count("StageActor") == 3
    assert "SERVE_REPLICA::splitbundle" in found["during"]
    assert found["left"] == []
    assert found["alive"] == []
    assert found["connected"]  # the connection was there before
    assert found["codes"] == [["input.value", "name"], ["input.value", "address"], ["server.draining", "pipeline"]]
    assert found["absent"]["code"] == "file.missing"
    assert "Every machine needs the bundle under this path" in found["absent"]["hint"]


def test_a_replica_ends_the_texts_of_a_reader_that_is_gone(five: Path) -> None:
    """The replica alone, without a cluster: no lease is renewed here, and time passes at once."""
    from splitbundle.serving import ray_replica, ray_settings
    from splitbundle.serving.ray_leases import LEASE, Leases

    bundle = splitbundle.open(five)
    given = {"stages": "inside", "rows": 1, "context": 256, "backend": "torch", "cpus": 1, "gpus": None}
    settings = ray_settings.settings_of(bundle, str(five), **given, timeout=60, step_timeout=60, options={})
    replica = ray_replica.PipelineReplica(settings)
    now = 0.0
    replica._leases = Leases(lambda: now)

    async def read(name: str, most: int, *, at: int, then: float, renew: bool = False, token: int = 3) -> list[Any]:
        nonlocal now
        messages = []
        async for message in replica.steps(name, [1, 2, token], {"max_new_tokens": most}):
            messages.append(message)
            if len(messages) == at:
                now += then
                if renew:
                    await replica.renew([name, "another"])
        return messages

    whole = asyncio.run(read("a", 30, at=2, then=LEASE, renew=True))
    assert whole[-1] == ("end",)
    assert sum(len(message[2]) for message in whole[:-1]) == 30
    left = asyncio.run(read("b", 200, at=2, then=LEASE))
    kind, elsewhere, (problem,) = left[-1]
    assert (kind, elsewhere, problem["code"]) == ("error", True, "server.unwanted")
    assert asyncio.run(read("c", 1, at=0, then=0))[-1] == ("end",)  # the only row is free
    kind, elsewhere, (problem,) = asyncio.run(read("d", 10, at=0, then=0, token=10**9))[-1]
    assert (kind, elsewhere, problem["code"]) == ("error", False, "input.value")
    asyncio.run(replica.check_health())
    replica._shared.close()


def test_the_scenarios_are_tested() -> None:
    names = {name for name, each in vars(ray_scenarios).items() if callable(each) and not name.startswith("_")}
    text = Path(__file__).read_text("utf-8")
    own = {name for name in names if getattr(ray_scenarios, name).__module__ == ray_scenarios.__name__}
    assert {name for name in own if f'run("{name}"' not in text} == {"left_over"}
