"""Put a pipeline on a cluster: a Serve application of replicas, each with a placement group for its actors."""

from __future__ import annotations

import atexit
import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus
from ray.util import placement_group_table

from splitbundle import logs
from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.serving.ray_cluster import Cluster, no_room
from splitbundle.serving.ray_pipeline import RayPipeline
from splitbundle.serving.ray_replica import PipelineReplica
from splitbundle.serving.ray_settings import Settings, waiting_room

if TYPE_CHECKING:
    from splitbundle.bundle import Bundle

DEPLOYMENT: Final = "pipeline"
_POLL: Final = 0.2
_END: Final = 60.0
"""The seconds in which a deployment ends."""
_GRACE: Final = 10.0
"""The seconds that the texts of a replica get when it is ended. Then they go on elsewhere."""


def start(
    bundle: Bundle,
    cluster: Cluster,
    settings: Settings,
    *,
    name: str,
    replicas: tuple[int, int],
    delays: tuple[float, float],
    spread: bool,
    queue: int,
) -> RayPipeline:
    """Deploy a pipeline, and wait until its first replicas compute.

    Raises:
        BundleError: ``cluster.placement`` if there is no room in time; ``cluster.start`` if it isn't up in time;
            ``input.value`` for a name that is taken; what a replica says of the bundle.
    """
    statuses = _statuses()
    own_serve = statuses is None
    if statuses and name in statuses:
        hint = f"Give another name, or end that one: ray.serve.delete({name!r})"
        raise wrong_argument("name", "a name that no application of the cluster has", quoted(name), hint)
    end = _End(name, cluster, own_serve)
    try:
        serve.start(proxy_location="Disabled")
        application = _deployment(settings, replicas, delays, spread, queue).bind(settings)
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        target = serve.RunTarget(application, name=name, route_prefix=None, logging_config=quiet)
        (handle,) = serve.run_many([target], wait_for_applications_running=False)
        _wait(handle, cluster, settings, name)
    except BaseException:
        end()
        raise
    atexit.register(end)  # before Ray's own, which ends the connection
    logs.debug("deployed %s with %d to %d replicas", name, *replicas)
    return RayPipeline(bundle, handle, settings, end)


def _deployment(
    settings: Settings, replicas: tuple[int, int], delays: tuple[float, float], spread: bool, queue: int
) -> Any:
    own = settings.bundles[0]
    options: dict[str, Any] = {
        "name": DEPLOYMENT,
        "ray_actor_options": {
            "num_cpus": own.get("CPU", 0),
            "num_gpus": own.get("GPU", 0),
            "memory": own.get("memory", 0),
        },
        "placement_group_bundles": [dict(bundle) for bundle in settings.bundles],
        "placement_group_strategy": "SPREAD" if spread else "PACK",
        "max_ongoing_requests": waiting_room(settings.rows),
        "max_queued_requests": queue,
        # A step may have to wait for an actor that is being restarted, and a check waits for the step.
        "health_check_timeout_s": settings.timeout + 30,
        "graceful_shutdown_timeout_s": _GRACE,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
    least, most = replicas
    if least == most:
        options["num_replicas"] = least
    else:
        options["autoscaling_config"] = {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": max(1.0, 0.75 * settings.rows),
            "upscale_delay_s": delays[0],
            "downscale_delay_s": delays[1],
            "metrics_interval_s": min(10.0, max(1.0, delays[0] / 3)),
            "look_back_period_s": min(30.0, max(2.0, delays[0])),
        }
    return serve.deployment(**options)(PipelineReplica)


def _wait(handle: Any, cluster: Cluster, settings: Settings, name: str) -> None:
    until = time.monotonic() + settings.timeout
    while True:
        application = (_statuses() or {}).get(name)
        status = None if application is None else application.status
        if status == ApplicationStatus.RUNNING:
            break
        if application is not None and status == ApplicationStatus.DEPLOY_FAILED:
            raise _not_started(" ".join(application.message.split())[-600:])
        if time.monotonic() >= until:
            if _waits_for_room(name):
                raise no_room(settings.bundles, cluster, settings.timeout)
            raise _not_started(f"{getattr(status, 'value', 'nothing')} after {settings.timeout:g} s")
        time.sleep(_POLL)
    try:
        problems = handle.problems.remote().result(timeout_s=settings.timeout)
    except (TimeoutError, ray.exceptions.RayError, RayServeException) as error:
        raise _not_started(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
    if problems:
        raise BundleError(Problem(**problem) for problem in problems)


def _not_started(got: str) -> BundleError:
    return BundleError(
        Problem(code="cluster.start", argument="replicas", expected="a replica that starts and answers", got=got)
    )


def _statuses() -> dict[str, Any] | None:
    """Return the Serve applications of the cluster by their names, or None if Serve isn't up."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return None
    return dict(serve.status().applications)


def _groups(name: str) -> list[str]:
    """Return the states of the placement groups of a deployment that aren't removed."""
    prefix = f"SERVE_REPLICA::{name}#{DEPLOYMENT}#"
    states = [group["state"] for group in placement_group_table().values() if group["name"].startswith(prefix)]
    return [state for state in states if state != "REMOVED"]


def _waits_for_room(name: str) -> bool:
    return any(state not in ("CREATED", "PREPARED") for state in _groups(name))


class _End:
    """Ends a deployment, once. It holds no pipeline."""

    def __init__(self, name: str, cluster: Cluster, own_serve: bool) -> None:
        self._name, self._cluster, self._own_serve = name, cluster, own_serve
        self._done = False

    def __call__(self) -> None:
        if self._done:
            return
        self._done = True
        atexit.unregister(self)
        if not ray.is_initialized():  # the connection was lost, or the program ended it
            return
        try:
            if not self._cluster.started:  # otherwise all of it ends with the cluster
                with contextlib.suppress(RayServeException, TimeoutError, ray.exceptions.RayError):
                    self._delete()
        finally:
            self._cluster.close()

    def _delete(self) -> None:
        serve.delete(self._name)
        until = time.monotonic() + _END
        while _groups(self._name) and time.monotonic() < until:
            time.sleep(_POLL)
        if self._own_serve and not _statuses():
            serve.shutdown()
