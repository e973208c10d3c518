"""What happens on a cluster of Ray. Each function runs in a process and a network namespace of its own.

``python -m tests.support.ray_scenarios NAME BUNDLE`` prints what it saw, as one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PROMPT = "Licensed under the Apache License"
SEEDED = {"max_new_tokens": 60, "temperature": 2.5, "seed": 5, "frequency_penalty": 0.2}
LOCAL: dict[str, Any] = {"address": "local", "local_cpus": 16, "object_store_bytes": 100 * 2**20, "rows": 4}


def _deploy(bundle: Path, **given: Any) -> Any:
    import splitbundle.ray

    return splitbundle.ray.deploy(bundle, **{**LOCAL, "timeout": 90.0, **given})


def _alone(bundle: Path, **given: Any) -> list[int]:
    import splitbundle

    return list(splitbundle.open(bundle).pipeline().complete_text(PROMPT, **given).ids)


def _watch(pipeline: Any, at: int, then: Callable[[], None], **given: Any) -> tuple[list[int], float, int]:
    """Return the ids of a text, the longest pause in it, and how often it moved. Do something after some tokens."""
    ids: list[int] = []
    longest, last = 0.0, time.monotonic()
    steps = pipeline.row_steps(pipeline.tokenizer().encode(PROMPT), **given)
    for step in steps:
        now = time.monotonic()
        longest, last = max(longest, now - last if ids else 0.0), now
        ids.append(step.ids[0])
        if len(ids) == at:
            then()
    return ids, longest, steps.moved


def _stages(pipeline: Any) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return the node of the only replica, and its stages, when all of them answer."""
    until = time.monotonic() + 60
    while True:
        replicas = pipeline.replicas
        if len(replicas) == 1 and None not in replicas[0]["stages"].values():
            return replicas[0]["node"], replicas[0]["stages"]
        if time.monotonic() >= until:
            raise TimeoutError(f"the stages don't answer: {replicas}")
        time.sleep(0.5)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def three_stages(bundle: Path) -> dict[str, Any]:
    """Three stages in actors give the texts of one process."""
    began = time.monotonic()
    with _deploy(bundle) as pipeline:
        started = time.monotonic() - began
        likeliest = pipeline.complete_text(PROMPT, max_new_tokens=60)
        seeded = pipeline.complete_text(PROMPT, **SEEDED)
        scored = pipeline.complete_text(PROMPT, max_new_tokens=4, logprobs=2)
        stopped = pipeline.complete_text(PROMPT, max_new_tokens=60, stop="License")
        asked = pipeline.stream_text(PROMPT, max_new_tokens=200, stop_ids=())
        next(asked)
        asked.close()
        until = time.monotonic() + 10
        while pipeline.state["active"] and time.monotonic() < until:
            time.sleep(0.1)
        state, (replica,) = pipeline.state, pipeline.replicas
        _, stages = _stages(pipeline)
        scores = pipeline.log_probabilities([[1, 2, 3, 4]])
        with ThreadPoolExecutor(6) as pool:
            many = [found.ids for found in pool.map(lambda _: pipeline.complete_text(PROMPT, **SEEDED), range(6))]
    return {
        "started": started,
        "likeliest": likeliest.ids,
        "seeded": seeded.ids,
        "logprobs": [scored.logprobs, scored.top],
        "stop": [stopped.finish_reason, stopped.text],
        "active": state["active"],
        "stages": sorted(stages),
        "pids": len({replica["pid"], *(stage["pid"] for stage in stages.values())}),
        "scores": scores,
        "many": many,
    }


def lost_actor(bundle: Path) -> dict[str, Any]:
    """An actor is killed in the middle of a text, another while nothing runs, and a third one hangs."""
    with _deploy(bundle) as pipeline:
        pids = {name: stage["pid"] for name, stage in _stages(pipeline)[1].items()}
        given = {**SEEDED, "seed": 7}
        pipeline.complete_text(PROMPT, **given)
        ids, pause, moved = _watch(pipeline, 20, lambda: _kill(pids["trunk-2"]), **given)
        _kill(pids["trunk-1"])
        again = pipeline.complete_text(PROMPT, **given).ids
        hung, hanging, _ = _watch(pipeline, 20, lambda: os.kill(pids["trunk-3"], signal.SIGSTOP), **given)
        new = {name: stage["pid"] for name, stage in _stages(pipeline)[1].items()}
    return {
        "want": _alone(bundle, **given),
        "got": ids,
        "again": again,
        "hung": hung,
        "pauses": [pause, hanging],
        "moved": moved,
        "restarted": sorted(name for name, pid in pids.items() if new[name] != pid),
    }


def lost_replica(bundle: Path) -> dict[str, Any]:
    """The replica that makes a text is killed, and another one goes on. Then all are, and a new one goes on."""
    with _deploy(bundle, replicas=2, stages="inside") as pipeline:

        def kill_busy() -> None:
            _kill(next(each["pid"] for each in pipeline.replicas if each.get("active")))

        def kill_all() -> None:
            for each in pipeline.replicas:
                _kill(each["pid"])

        first = _watch(pipeline, 20, kill_busy, **SEEDED)
        second = _watch(pipeline, 20, kill_all, **SEEDED)
        greedy = _watch(pipeline, 20, kill_all, max_new_tokens=60)
    return {
        "want": _alone(bundle, **SEEDED),
        "greedy": _alone(bundle, max_new_tokens=60),
        "first": first,
        "second": second,
        "third": greedy,
    }


def scaled(bundle: Path) -> dict[str, Any]:
    """Load makes a second replica, and its end takes it away."""
    seen: list[tuple[float, float]] = []
    began = time.monotonic()
    with _deploy(bundle, replicas=(1, 2), rows=1, delays=(1.0, 2.0), stages="inside") as pipeline:
        ended = threading.Event()

        def load() -> list[list[int]]:
            made = []
            while not ended.is_set():
                made.append(list(pipeline.complete_text(PROMPT, **SEEDED).ids))
            return made

        def wait(wanted: int, seconds: float) -> bool:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                count = pipeline.state["replicas"]
                if not seen or seen[-1][1] != count:
                    seen.append((time.monotonic() - began, count))
                if count == wanted:
                    return True
                time.sleep(0.3)
            return False

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(load) for _ in range(4)]
            more = wait(2, 90)
            time.sleep(1)
            ended.set()
            texts = [text for each in running for text in each.result()]
        fewer = wait(1, 90)
    return {
        "more": more,
        "fewer": fewer,
        "seen": seen,
        "texts": len(texts),
        "wrong": sum(text != _alone(bundle, **SEEDED) for text in texts[:1]) + sum(text != texts[0] for text in texts),
    }


def no_room(bundle: Path) -> dict[str, Any]:
    """What doesn't fit is refused with what was asked and what is free, and leaves nothing."""
    import ray

    from splitbundle.errors import BundleError

    os.environ["RAY_AUTH_TOKEN"] = "b" * 64
    ray.init(address="local", include_dashboard=False, num_cpus=3, object_store_memory=100 * 2**20)
    began = time.monotonic()
    try:
        _deploy(bundle, address=None, timeout=8.0)
    except BundleError as error:
        problem = error.problems[0].as_json()
    return {"problem": problem, "seconds": time.monotonic() - began, "left": left_over()}


def no_token(bundle: Path) -> dict[str, Any]:
    """A cluster that demands no token is refused."""
    import ray

    from splitbundle.errors import BundleError

    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", include_dashboard=False, num_cpus=8, object_store_memory=100 * 2**20)
    problems = []
    for address in (None, "auto"):
        try:
            _deploy(bundle, address=address)
        except BundleError as error:
            problems.append(error.problems[0].as_json())
    left = left_over()
    ray.shutdown()
    for address in ("local", "auto"):
        try:
            _deploy(bundle, address=address)
        except BundleError as error:
            problems.append(error.problems[0].as_json())
    return {"problems": problems, "left": left}


def other_processes(bundle: Path) -> dict[str, Any]:
    """Processes with the token of a cluster, with another one, and with none deploy on it by its address."""
    import ray

    os.environ["RAY_AUTH_TOKEN"] = "b" * 64
    ray.init(address="local", include_dashboard=False, num_cpus=4, object_store_memory=100 * 2**20)
    address = ray.get_runtime_context().gcs_address
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    found = {}
    for name, own in (("same", {"RAY_AUTH_TOKEN": "b" * 64}), ("wrong", {"RAY_AUTH_TOKEN": "c" * 64}), ("none", {})):
        command = [sys.executable, "-m", "tests.support.ray_scenarios", "_one_text", str(bundle), address]
        ran = subprocess.run(command, stdout=subprocess.PIPE, env={**others, **own}, text=True, timeout=200)
        found[name] = json.loads(ran.stdout.strip().splitlines()[-1])
    return {**found, "left": left_over()}


def _one_text(bundle: Path, address: str) -> list[Any]:
    from splitbundle.errors import BundleError

    try:
        with _deploy(bundle, address=address, stages="inside") as pipeline:
            return [pipeline.complete_text(PROMPT, max_new_tokens=8).ids]
    except BundleError as error:
        return [error.codes[0], str(error)]


def nothing_left(bundle: Path) -> dict[str, Any]:
    """After ``close``, a cluster that was there before has no actor and no placement group of a deployment."""
    import ray

    from splitbundle.errors import BundleError

    os.environ["RAY_AUTH_TOKEN"] = "b" * 64
    ray.init(address="local", include_dashboard=False, num_cpus=16, object_store_memory=100 * 2**20)
    codes = []
    with _deploy(bundle, address=None) as pipeline:
        during = left_over()
        pids = [pipeline.replicas[0]["pid"], *(each["pid"] for each in _stages(pipeline)[1].values())]
        for given in ({"name": "splitbundle"}, {"address": "local", "name": "other"}):
            try:
                _deploy(bundle, **{"address": None, **given})
            except BundleError as error:
                codes.append([error.codes[0], error.problems[0].argument])
        running = pipeline.stream_text(PROMPT, max_new_tokens=250, stop_ids=())
        next(running)
    try:
        pipeline.row_steps([1])
    except BundleError as error:
        codes.append([error.codes[0], error.problems[0].argument])
    moved = bundle.rename(bundle.with_name("moved"))
    (bundle.with_name("documents")).mkdir()
    for name in ("manifest.json", "architecture.json"):
        (bundle.with_name("documents") / name).write_bytes((moved / name).read_bytes())
    try:
        _deploy(bundle.with_name("documents"), address=None)
    except BundleError as error:
        absent = error.problems[0].as_json()
    return {
        "during": during,
        "left": left_over(),
        "alive": [pid for pid in pids if Path(f"/proc/{pid}").exists()],
        "codes": codes,
        "absent": absent,
        "connected": ray.is_initialized(),
    }


def lost_machine(bundle: Path) -> dict[str, Any]:
    """The machine of an actor is lost in the middle of a text, and then that of the replica."""
    os.environ |= {"RAY_AUTH_TOKEN": "b" * 64, "RAY_AUTH_MODE": "token"}  # Ray reads them when it is imported
    import ray
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 4, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(**small) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)

    def lose(node_id: str) -> None:
        (lost,) = [node for node in nodes if node.node_id == node_id]
        nodes.remove(lost)
        cluster.remove_node(lost, allow_graceful=False)

    found: dict[str, Any] = {"want": _alone(bundle, **SEEDED)}
    with _deploy(bundle, address=None, spread=True, rows=2) as pipeline:
        home, stages = _stages(pipeline)
        own = {node.node_id for node in nodes} - {home}
        lost = next(stage["node"] for stage in stages.values() if stage["node"] in own)
        found["actor"] = _watch(pipeline, 20, lambda: lose(lost), **SEEDED)
        nodes.append(cluster.add_node(**small))
        home, stages = _stages(pipeline)
        found["left"] = [name for name, stage in stages.items() if stage["node"] == lost]
        if home in {node.node_id for node in nodes}:  # it isn't at the head, which can't be lost
            found["replica"] = _watch(pipeline, 20, lambda: lose(home), **SEEDED)
    ray.shutdown()
    cluster.shutdown()
    return found


def left_over() -> list[str]:
    """Return the actors that live and the placement groups, by name."""
    import ray
    from ray._private import state
    from ray.util import placement_group_table

    actors = [each["ActorClassName"] for each in state.actors().values() if each["State"] != "DEAD"]
    groups = [each["name"].split("#")[0] for each in placement_group_table().values() if each["state"] != "REMOVED"]
    assert ray.is_initialized()
    return sorted(actors + groups)


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])))
