"""One pipeline as a replica of Ray Serve: the ends of the model, an actor for each inner shard, and many texts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

import ray
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from splitbundle.errors import BundleError, Problem
from splitbundle.remote.ray_channel import RayChannel
from splitbundle.serving.ray_actors import StageActor, open_here
from splitbundle.serving.ray_leases import LEASE, Leases
from splitbundle.serving.ray_settings import END, ERROR, HEARTBEAT, STEPS, Settings, waiting_room
from splitbundle.stages.sampling import RowGenerators, Sampling
from splitbundle.stages.shared_pipeline import SharedPipeline

Result = TypeVar("Result")
ELSEWHERE: Final = ("peer.", "server.")
"""The beginnings of codes that say that another replica may do better."""
_UNWANTED: Final = Problem(
    code="server.unwanted",
    argument="text",
    expected="a reader that waits for it",
    got=f"no word from one for {LEASE:g} s",
)
_CALLS: Final = 8
"""The calls that an actor takes at once: a step, the same step again, a hello, health, and some that are late."""
_PING: Final = 10.0
"""The seconds in which an actor that lives tells its health, even while it computes."""


class PipelineReplica:
    """A pipeline with some stages in actors of its own. Ray Serve makes it, and makes another one if it dies."""

    def __init__(self, settings: Settings) -> None:
        """Load the ends of the model, and start the actors.

        What is wrong with the bundle is kept for ``problems``. Serve would answer an error with a new replica, and with
        a traceback.
        """
        self._settings, self._begun = settings, time.monotonic()
        self._actors: dict[str, Any] = {}
        self._shared: Any = None
        self._leases = Leases()
        self._problems: list[dict[str, Any]] = []
        # A thread for each text, which may wait for a row, and some for what has no row.
        self._threads = ThreadPoolExecutor(waiting_room(settings.rows) + 8, "splitbundle-texts")
        try:
            # In another thread, as Serve calls this in an event loop, where Ray doesn't like to wait.
            self._threads.submit(self._open).result()
        except BundleError as error:
            self._problems = _problems(error)

    def _open(self) -> None:
        settings = self._settings
        loading = [self._start(place, shard) for place, shard in enumerate(settings.actors, start=1)]
        bundle = open_here(settings.path, settings.bundle_id, settings.own)  # while the actors load
        self._check_loaded(loading)
        remote = {name: [RayChannel(actor, f"the actor of {name}")] for name, actor in self._actors.items()}
        options = dict(settings.options)
        if remote:
            options |= {"remote": remote, "timeout": settings.timeout, "step_timeout": settings.step_timeout}
        self._shared = SharedPipeline(
            bundle.pipeline(backend=settings.backend, **options),
            rows=settings.rows,
            waiting=waiting_room(settings.rows),
            capacity=settings.context,
        )

    def _start(self, place: int, shard: str) -> Any:
        """Start the actor of a shard in a bundle of the placement group. Return what tells its problems."""
        settings = self._settings
        self._actors[shard] = (
            ray.remote(StageActor)
            .options(
                **_asked(settings.bundles[place]),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=get_current_placement_group(), placement_group_bundle_index=place
                ),
                max_restarts=-1,
                max_task_retries=0,
                max_concurrency=_CALLS,
            )
            .remote(
                settings.path,
                settings.bundle_id,
                shard,
                settings.backend,
                4 * settings.rows * settings.context,  # caches grow in steps, and an old one may still be there
                settings.rows,
                settings.options,
            )
        )
        return self._actors[shard].problems.remote()

    def _check_loaded(self, loading: list[Any]) -> None:
        if not loading:  # Ray would start a cluster, to wait for nothing in it
            return
        try:
            found = [problem for own in ray.get(loading, timeout=self._settings.timeout) for problem in own]
        except ray.exceptions.RayError as error:
            expected, got = "actors that load their stages", f"{type(error).__name__} in {self._settings.timeout:g} s"
            raise BundleError(Problem(code="server.failed", argument="actors", expected=expected, got=got)) from None
        if found:
            raise BundleError(Problem(**problem) for problem in found)

    async def problems(self) -> list[dict[str, Any]]:
        """Return what kept the pipeline from being loaded, as ``Problem.as_json`` has it."""
        return self._problems

    async def steps(
        self, name: str, prompt_ids: Sequence[int], options: dict[str, Any], client: str | None = None
    ) -> AsyncIterator[tuple[Any, ...]]:
        """Continue one row, and yield messages until its end. If the caller goes away, the row is freed.

        Args:
            name: the id of the text, for ``renew``.
            prompt_ids: the prompt.
            options: those of ``SharedPipeline.row_steps``.
            client: who asks. Clients take turns.

        Yields:
            ``("steps", reused, ((id, logprob, top), …))`` with the steps since the last message, perhaps none;
            ``("end",)``; or ``("error", whether another replica may do better, problems)``.
        """
        if self._shared is None:
            yield ERROR, True, self._problems
            return
        loop = asyncio.get_running_loop()
        made: asyncio.Queue[Any] = asyncio.Queue()
        try:
            text = self._shared.of(client).row_steps(prompt_ids, **options)
        except BundleError as error:
            yield _failed(error)
            return
        self._leases.begin(name)
        self._threads.submit(_deliver, text, lambda each: loop.call_soon_threadsafe(made.put_nowait, each))
        try:
            while True:
                steps = []
                last: Any = None
                with contextlib.suppress(asyncio.TimeoutError):
                    last = await asyncio.wait_for(made.get(), HEARTBEAT)
                while isinstance(last, tuple):
                    steps.append(last)
                    last = None if made.empty() else made.get_nowait()
                yield STEPS, text.reused, tuple(steps)
                if isinstance(last, BundleError):
                    yield _failed(last)
                    return
                if isinstance(last, BaseException):
                    raise last
                if last is END:
                    yield (END,)
                    return
                if self._leases.is_over(name):
                    yield _failed(BundleError(_UNWANTED))
                    return
        finally:
            text.cancel()
            self._leases.end(name)

    async def renew(self, names: Sequence[str]) -> None:
        """Renew the leases of texts that somebody waits for."""
        self._leases.renew(names)

    async def scores(self, rows: list[list[int]], last: int | None) -> tuple[Any, ...]:
        """Return ``("end", log-probabilities)`` of some rows, as ``log_probabilities`` has them, or an error."""
        if self._shared is None:
            return ERROR, True, self._problems
        try:
            ids = self._shared.pipeline.token_ids(rows)
            return END, await self._apart(lambda: self._shared.log_probabilities(ids, last=last))
        except BundleError as error:
            return _failed(error)

    async def state(self) -> dict[str, Any]:
        """Return the numbers of ``SharedPipeline.state``, the process, the machine, and the health of each actor."""
        state = {} if self._shared is None else self._shared.state
        asked = {name: actor.health.remote() for name, actor in self._actors.items()}
        ready = await self._apart(lambda: _waited(list(asked.values()), 2.0)[0])
        stages: dict[str, Any] = {}
        for name, reference in asked.items():
            try:
                stages[name] = await reference if reference in ready else None
            except ray.exceptions.RayError:  # it is being restarted
                stages[name] = None
        node = ray.get_runtime_context().get_node_id()
        return {**state, "pid": os.getpid(), "machine": socket.gethostname(), "node": node, "stages": stages}

    async def check_health(self) -> None:
        """Restart actors that hang, and compute a token with every stage.

        Serve calls this every ten seconds, and replaces a replica that fails three times.

        Raises:
            BundleError: ``peer.unreachable``; ``input.value`` for NaN or infinity; what kept it from being loaded.
        """
        if self._shared is not None:
            await self._apart(self._restart_hanging)
            await self._apart(lambda: self._shared.run(_compute))
        elif time.monotonic() > self._begun + self._settings.timeout:  # before, somebody may ask for the problems
            raise BundleError(Problem(**problem) for problem in self._problems)

    def _restart_hanging(self) -> None:
        """End the processes of actors that are up and silent. Ray restarts them, and texts go on by replay."""
        asked = {actor.health.remote(): actor for actor in self._actors.values()}
        for reference in _waited(list(asked), _PING)[1]:
            actor = asked[reference]
            # One that is being restarted is silent, too, while it loads its weights.
            if ray._private.state.actors(actor._actor_id.hex()).get("State") == "ALIVE":
                ray.kill(actor, no_restart=False)

    async def _apart(self, work: Callable[[], Result]) -> Result:
        """Wait for some work in another thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def __del__(self) -> None:
        """End the texts. Serve calls this before it ends the process."""
        if getattr(self, "_shared", None) is not None:
            threading.Thread(target=self._shared.close, daemon=True).start()


def _waited(asked: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
    """Wait for some answers. Return those that are there, and the others."""
    return ray.wait(asked, num_returns=len(asked), timeout=timeout) if asked else ([], [])


def _asked(bundle: dict[str, float]) -> dict[str, float]:
    """Return the resources of a placement group's bundle as the options of an actor."""
    names = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    return {names[name]: value for name, value in bundle.items()}


def _deliver(text: Iterable[Any], put: Callable[[Any], object]) -> None:
    """Hand on the steps of a text as plain values, and then its end."""
    with contextlib.suppress(RuntimeError):  # the event loop has ended, and nobody waits
        try:
            for step in text:
                chances, top = step.logprobs, step.top
                put((step.ids[0], None if chances is None else chances[0], None if top is None else top[0]))
        except BaseException as error:  # noqa: BLE001  # it is raised where the steps are waited for
            put(error)
        else:
            put(END)


def _compute(pipeline: Any) -> None:
    """Compute a token, and draw one. Drawing refuses logits that aren't finite."""
    with pipeline._without_gradients():
        logits = pipeline.forward(pipeline.token_ids([[0]]), logits="last")
        pipeline._draw(logits[:, -1], Sampling(), RowGenerators(None, 1), None)


def _failed(error: BundleError) -> tuple[Any, ...]:
    return ERROR, error.codes[0].startswith(ELSEWHERE), _problems(error)


def _problems(error: BundleError) -> list[dict[str, Any]]:
    return [problem.as_json() for problem in error.problems]
