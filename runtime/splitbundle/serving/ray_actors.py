"""A stage in an actor of Ray. It answers the same frames as a stage behind a port."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any, Final

import ray

from splitbundle import opening
from splitbundle.errors import BundleError, Problem, printable
from splitbundle.records import replace
from splitbundle.serving.stage_server import Budget, check_ends, load_service

CLIENT: Final = "replica"
"""The name of the only client: the replica that made the actor."""
LEASE: Final = 86400.0
"""The seconds for which a session lives without a message. An actor ends with its replica, so nothing is left over."""


def open_here(path: str, bundle_id: str, shards: Sequence[str]) -> Any:
    """Open a bundle on the machine of this process.

    Args:
        path: a path or a reference, which means the same bundle on every machine.
        bundle_id: the id of the bundle.
        shards: the shards that are needed here. Of a reference only these are pulled.

    Raises:
        BundleError: the errors of ``splitbundle.open``, with the machine's name.
    """
    try:
        return opening.open_bundle(path, id=bundle_id, shard=shards)
    except BundleError as error:
        hint = f"This is the machine {printable(socket.gethostname())}. Every machine needs the bundle under this path"
        raise BundleError(
            replace(problem, argument=problem.argument or path, hint=hint) for problem in error.problems
        ) from None


class StageActor:
    """A stage that a replica computes with. Ray makes it in a process of its own, and makes it again if that dies.

    A new one knows no session, so its answers make the client send again what its cache has to hold.
    """

    def __init__(
        self, path: str, bundle_id: str, shard: str, backend: str, slots: int, rows: int, options: dict[str, Any]
    ) -> None:
        """Load a stage. What is wrong with the bundle is kept for ``problems``: Ray would tell it as a traceback.

        Args:
            path: the path or the reference of the bundle, on every machine of the cluster.
            bundle_id: the id of the bundle.
            shard: the name of the shard.
            backend: the backend.
            slots: the slots of all caches: the rows times their tokens.
            rows: the most rows of a session.
            options: those of ``Bundle.stage``.
        """
        self._service: Any = None
        self._problems: list[dict[str, Any]] = []
        try:
            bundle = open_here(path, bundle_id, [shard])
            check_ends(bundle, shard, None)
            budget = Budget(slots=slots, rows=rows, lease=LEASE)
            self._service = load_service(bundle, shard, None, backend, budget, **options)
        except BundleError as error:
            self._problems = [problem.as_json() for problem in error.problems]

    def problems(self) -> list[dict[str, Any]]:
        """Return what kept the stage from being loaded, as ``Problem.as_json`` has it."""
        return self._problems

    def answer(self, frame: bytes) -> bytes:
        """Return the frame that answers a frame.

        Raises:
            BundleError: the stage couldn't be loaded.
        """
        if self._service is None:
            raise BundleError(Problem(**problem) for problem in self._problems)
        answer: bytes = self._service.answer(frame, CLIENT)
        return answer

    def health(self) -> dict[str, Any]:
        """Return the process, the machine, Ray's name for it, and the totals of tokens and seconds, for monitoring."""
        service = self._service
        return {
            "pid": os.getpid(),
            "machine": socket.gethostname(),
            "node": ray.get_runtime_context().get_node_id(),
            "sessions": 0 if service is None else len(service.sessions),
            "tokens": 0 if service is None else service.tokens,
            "compute_seconds": 0.0 if service is None else service.computed_seconds,
            "queue_seconds": 0.0 if service is None else service.queued_seconds,
        }
