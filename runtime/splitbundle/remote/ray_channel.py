"""A way to a stage in an actor of Ray: the same bytes as over gRPC, as arguments and results of its method."""

from __future__ import annotations

from typing import Any

import ray
from ray import exceptions

from splitbundle.remote.carrier import Lost


class RayChannel:
    """A way to one actor with a method ``answer``, which takes a frame and returns one. Threads may share it.

    Ray may restart the actor: the same handle then leads to a new one, which knows no session. The client replays.
    """

    def __init__(self, actor: Any, text: str) -> None:
        """Name an actor. Nothing is sent yet.

        Args:
            actor: the handle of the actor. Its calls must not be retried by Ray (``max_task_retries=0``): whether a
                frame is sent again is the client's affair.
            text: the name of the actor, for messages.
        """
        self._actor, self.text = actor, text

    def call(self, frame: bytes, timeout: float) -> bytes:
        """Return the answer to a frame.

        Args:
            frame: the frame.
            timeout: the seconds to wait.

        Raises:
            Lost: there is no answer, or the actor is dead or being restarted.
        """
        try:
            answer = ray.get(self._actor.answer.remote(frame), timeout=timeout)
        except exceptions.GetTimeoutError:
            raise Lost("no answer in time", silent=True) from None
        except exceptions.RayError as error:
            raise Lost(_reason(error)) from None
        if not isinstance(answer, bytes):
            raise Lost(f"an answer that is {type(answer).__name__} and not bytes")
        return answer

    step = call

    def send(self, frame: bytes, timeout: float) -> None:
        """Send a frame whose answer doesn't matter, and don't wait.

        Raises:
            Lost: the actor is known to be dead.
        """
        try:
            self._actor.answer.remote(frame)
        except exceptions.RayError as error:
            raise Lost(_reason(error)) from None


def _reason(error: Exception) -> str:
    """Return the kind of an error, and its first line: the rest is where in Ray it happened."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no reason'}"
