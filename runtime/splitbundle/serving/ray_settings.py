"""What a deployment on Ray is made of, as plain values that travel to other processes. It runs without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from splitbundle.backends import registry
from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.integers import as_integer, as_number
from splitbundle.planning.plan import make_plan
from splitbundle.records import record

if TYPE_CHECKING:
    from splitbundle.bundle import Bundle

ACTORS, INSIDE = "actors", "inside"
STEPS, END, ERROR = "steps", "end", "error"
"""The kinds of a replica's messages. Each message is a tuple that begins with one."""
HEARTBEAT: Final = 5.0
"""The seconds after which a text without a new token sends a message, so that its reader knows that it lives."""
PROCESS_BYTES: Final = 512 * 2**20
"""The memory of a process beside its weights and caches: Python, the backend's library, activations."""
MOST_ROWS: Final = 4096
MOST_REPLICAS: Final = 4096


@record(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a model is deployed on Ray. Every process of it gets the same settings."""

    path: str
    """The path or the reference of the bundle, on every machine of the cluster."""
    bundle_id: str
    own: tuple[str, ...]
    """The shards that a replica computes itself."""
    actors: tuple[str, ...]
    """The shards that have an actor each."""
    backend: str
    rows: int
    """The texts that a replica continues at once."""
    context: int
    """The most tokens of a text, with its prompt."""
    timeout: float
    """The seconds in which an actor has to be there: at the start, and after its process or its machine was lost."""
    step_timeout: float
    """The seconds after which an actor that is alive and doesn't answer is given up."""
    options: dict[str, Any]
    """The options of ``Bundle.pipeline``."""
    bundles: tuple[dict[str, float], ...]
    """The resources of the replica's process and of each actor, in order: a placement group's bundles."""


def settings_of(
    bundle: Bundle,
    path: str,
    *,
    stages: object,
    rows: object,
    context: int | None,
    backend: str | None,
    cpus: object,
    gpus: object,
    timeout: object,
    step_timeout: object,
    options: dict[str, Any],
) -> Settings:
    """Return the settings for the arguments of ``splitbundle.ray.deploy``.

    Raises:
        BundleError: ``input.value``; ``stage.range`` for actors of a bundle without a shard in the middle;
            ``stage.backend``.
    """
    if stages not in (ACTORS, INSIDE):
        raise wrong_argument("stages", f"{ACTORS} or {INSIDE}", quoted(stages))
    number = as_integer(rows)
    if number is None or not 1 <= number <= MOST_ROWS:
        raise wrong_argument("rows", f"a number from 1 to {MOST_ROWS}", quoted(rows))
    chosen = backend or registry.installed_backend()
    options = registry.own_options(chosen, options, "deploy")
    inner = tuple(shard.name for shard in bundle.shards if not (shard.embeds or shard.head))
    actors = inner if stages == ACTORS else ()
    if stages == ACTORS and not actors:
        expected = "a bundle with a shard between the embedding and the head: token ids and logits stay in the replica"
        problem = Problem(
            code="stage.range",
            argument="stages",
            expected=expected,
            got=f"one of {len(bundle.shards)} shards, all of which embed or have the head",
            hint='Cut the bundle anew, or choose stages="inside"',
        )
        raise BundleError(problem)
    own = tuple(shard.name for shard in bundle.shards if shard.name not in actors)
    plan = make_plan(bundle.manifest, bundle.architecture, context=context, batch=number, dtype=options.get("dtype"))
    memory = {shard.name: shard.memory_bytes for shard in plan.shards}
    on_gpu = str(options.get("device", "")).startswith("cuda") or "CUDA" in str(options.get("providers", ""))
    processors = _least("cpus", cpus, 0.001)
    accelerators = float(on_gpu) if gpus is None else _least("gpus", gpus, 0.0)
    return Settings(
        path=path,
        bundle_id=bundle.id,
        own=own,
        actors=actors,
        backend=chosen,
        rows=number,
        context=plan.context,
        timeout=_seconds("timeout", timeout),
        step_timeout=_seconds("step_timeout", step_timeout),
        options=options,
        bundles=tuple(
            resources(sum(memory[name] for name in names), processors, accelerators)
            for names in (own, *([name] for name in actors))
        ),
    )


def waiting_room(rows: int) -> int:
    """Return the number of requests that a replica takes at once. Some wait for a row; others have none."""
    return rows + max(2, rows // 2)


def resources(memory: int, cpus: float, gpus: float) -> dict[str, float]:
    """Return what a process needs, in Ray's words. Ray doesn't know a zero of something."""
    needs = {"CPU": cpus, "GPU": gpus, "memory": float(memory + PROCESS_BYTES)}
    return {name: value for name, value in needs.items() if value}


def told(resources: dict[str, float]) -> str:
    """Return resources as words: ``1 CPU and 0.53 GB of memory``."""
    words = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    if "memory" in resources:
        words.append(f"{resources['memory'] / 1e9:.2f} GB of memory")
    return " and ".join(words) or "nothing"


def bounds_of(replicas: object) -> tuple[int, int]:
    """Return the least and the most replicas that a caller means.

    Raises:
        BundleError: ``input.value``.
    """
    pair = replicas if isinstance(replicas, Sequence) and not isinstance(replicas, str) else (replicas, replicas)
    numbers = [as_integer(each) for each in pair]
    least, most = numbers if len(numbers) == 2 else (None, None)
    if least is None or most is None or not 1 <= least <= most <= MOST_REPLICAS:
        expected = f"a number from 1 to {MOST_REPLICAS}, or two of them: the least and the most"
        raise wrong_argument("replicas", expected, quoted(replicas))
    return least, most


def _least(name: str, value: object, least: float) -> float:
    number = as_number(value)
    if number is None or not least <= number <= 1e6:
        raise wrong_argument(name, "a number above 0" if least else "a number from 0", quoted(value))
    return float(number)


def _seconds(name: str, value: object) -> float:
    number = as_number(value)
    if number is None or not 0 < number <= 86400:
        raise wrong_argument(name, "seconds, above 0, at most 86400", quoted(value))
    return float(number)
