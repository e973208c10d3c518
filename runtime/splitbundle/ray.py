"""Deploy a pipeline on a cluster of Ray: ``deploy``. It needs the extra ``ray``, and imports it at the first call."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, Literal

from splitbundle import opening, processors
from splitbundle.bundle import Bundle
from splitbundle.errors import MissingExtra, quoted, wrong_argument
from splitbundle.integers import as_integer, as_number

if TYPE_CHECKING:
    from splitbundle.serving.ray_pipeline import RayPipeline

__all__ = ["deploy"]


def deploy(
    bundle: Bundle | str | os.PathLike[str],
    *,
    address: str | None = "auto",
    replicas: int | tuple[int, int] = 1,
    stages: Literal["actors", "inside"] = "actors",
    rows: int = 8,
    name: str = "splitbundle",
    context: int | None = None,
    backend: str | None = None,
    cpus: float = 1.0,
    gpus: float | None = None,
    spread: bool = False,
    timeout: float = 120.0,
    step_timeout: float = 300.0,
    delays: tuple[float, float] = (30.0, 600.0),
    queue: int = 256,
    local_cpus: int | None = None,
    object_store_bytes: int = 200 * 2**20,
    **options: Any,
) -> RayPipeline:
    """Deploy a pipeline on a cluster of Ray, and wait until it computes.

        with splitbundle.ray.deploy("license.splitbundle", address="local") as pipeline:
            print(pipeline.complete_text("Licensed under", max_new_tokens=20).text)

    Each replica is one pipeline. It holds the embedding and the head, and has an actor for each shard between them. If
    an actor is lost, Ray restarts it, and the replica sends it again what its cache has to hold. If a replica is lost,
    its texts go on in another one.

    Args:
        bundle: a bundle, or its path or reference. It has to be the same on every machine of the cluster.
        address: ``"auto"`` for a cluster that this machine belongs to, ``"HOST:PORT"`` for another one, ``"local"`` to
            start one on this machine alone; None for the one that this process is connected to.
        replicas: the number of replicas, or the least and the most: then their number follows the load.
        stages: ``"actors"``, or ``"inside"`` if each replica computes all stages itself.
        rows: the texts that a replica continues at once.
        name: the name of the Serve application. A cluster has each name once.
        context: the most tokens of a text, for which memory is asked; by default as for ``Bundle.plan``.
        backend: ``"torch"`` or ``"onnxruntime"``; by default torch if it is installed here.
        cpus: the processors for each process. Ray counts them; it doesn't enforce them.
        gpus: the GPUs for each process; by default 1 if ``device`` is one, else 0.
        spread: whether the processes of a replica go to different machines, if there are enough.
        timeout: the seconds in which the deployment has to be up, and in which what was lost has to be there again.
        step_timeout: the seconds after which an actor that lives and doesn't answer is given up.
        delays: the seconds of more or less load after which there are more or fewer replicas.
        queue: the texts that may wait in this process for a replica. A further one is refused.
        local_cpus: for ``"local"``, the processors that the cluster gives; by default those of the machine, and at
            least what the replicas ask for.
        object_store_bytes: for ``"local"``, the memory for large messages.
        options: those of ``Bundle.pipeline``, such as ``dtype``, ``device`` and ``threads``.

    Raises:
        BundleError: ``cluster.*``; ``input.value``; ``stage.range``; the errors of opening and of loading.
        MissingExtra: Ray isn't installed.
    """
    settings_of, bounds_of, cluster, deployment = _modules()
    path = os.fspath(bundle.path if isinstance(bundle, Bundle) else bundle)
    opened = bundle if isinstance(bundle, Bundle) else opening.open_bundle(path, shard=[])
    if not isinstance(name, str) or not name.isascii() or not name.isidentifier():
        raise wrong_argument("name", "letters, digits and underscores", quoted(name))
    bounds = bounds_of(replicas)
    waits = tuple(as_number(each) for each in delays)
    if len(waits) != 2 or any(each is None or not 0 <= each <= 86400 for each in waits):
        raise wrong_argument("delays", "two numbers of seconds", quoted(delays))
    for argument, value, least in (("queue", queue, 1), ("local_cpus", local_cpus or 1, 1)):
        if (number := as_integer(value)) is None or not least <= number <= 2**20:
            raise wrong_argument(argument, f"a number from {least} to {2**20}", quoted(value))
    settings = settings_of(
        opened,
        os.path.abspath(path) if os.path.exists(path) else path,
        stages=stages,
        rows=rows,
        context=context,
        backend=backend,
        cpus=cpus,
        gpus=gpus,
        timeout=timeout,
        step_timeout=step_timeout,
        options=options,
    )
    if address == "local" and local_cpus is None:  # Ray only counts them, and a small machine should have room, too
        inner = sum(not (shard.embeds or shard.head) for shard in opened.shards) if stages == "actors" else 0
        local_cpus = max(processors.usable(), math.ceil(float(cpus) * (1 + inner) * bounds[1]))
    joined = cluster.join(address, object_store_bytes=object_store_bytes, cpus=local_cpus)
    return deployment.start(  # type: ignore[no-any-return]
        opened, joined, settings, name=name, replicas=bounds, delays=waits, spread=bool(spread), queue=int(queue)
    )


def _modules() -> tuple[Any, Any, Any, Any]:
    """Return what needs Ray.

    Raises:
        MissingExtra: Ray isn't installed.
    """
    try:
        from splitbundle.serving import ray_cluster, ray_deployment
        from splitbundle.serving.ray_settings import bounds_of, settings_of
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("splitbundle"):
            raise
        raise MissingExtra.of("ray[serve]", "ray", "deploy on a cluster of Ray") from None
    return settings_of, bounds_of, ray_cluster, ray_deployment
