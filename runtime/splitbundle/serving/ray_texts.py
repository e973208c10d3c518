"""The texts of a deployment on Ray, as their reader sees them: they go on in another replica if theirs is lost."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Final

import ray
from ray import exceptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from splitbundle import logs
from splitbundle.errors import BundleError, Problem
from splitbundle.serving.ray_settings import END, ERROR, HEARTBEAT
from splitbundle.stages.generation import Step

SILENCE: Final = 6 * HEARTBEAT
"""The seconds without a message after which a replica that computes a text counts as lost."""
_FIRST_BACK_OFF: Final = 0.1
_LAST_BACK_OFF: Final = 2.0


class Elsewhere(Exception):
    """A replica can't go on with a text. Another one may."""

    def __init__(self, reason: str, problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(reason)
        self.reason, self.problems = reason, problems


class _Cancelled:
    """What ends a wait because the reader has cancelled."""


class RaySteps:
    """The steps of one row, which replicas make: an iterator with ``reused``, ``cancel`` and ``close``."""

    def __init__(
        self,
        ask: Callable[[str, list[int], dict[str, Any]], Any],
        prompt_ids: Sequence[int],
        options: dict[str, Any],
        timeout: float,
    ) -> None:
        """Begin a text.

        Args:
            ask: called with the id of the text, a prompt, and options of ``PipelineReplica.steps``; returns an iterator
                of its messages with a method ``cancel``.
            prompt_ids: the prompt.
            options: those of ``SharedPipeline.row_steps``.
            timeout: the seconds in which a replica has to take the text, and another one after a loss.
        """
        self.id = ""
        """The id of the last attempt, for its lease. A replica may not have ended the one before."""
        self.reused = 0
        self.moved = 0
        """How often another replica, or the same one again, had to go on."""
        self._ask, self._options, self._timeout = ask, dict(options), timeout
        self._prompt, self._drawn = list(prompt_ids), list[int]()
        self._before: int = self._options.pop("drawn", 0)
        self._most: int = self._options.pop("max_new_tokens")
        self._stop_ids = frozenset(options.get("stop_ids", ()))
        self._cancelled = False
        self._over = self._done
        self._attempt: _Attempt | None = None if self._over else self._begun()

    def __iter__(self) -> Iterator[Step]:
        until: float | None = None
        back_off = _FIRST_BACK_OFF
        try:
            while not (self._done or self._cancelled):
                try:
                    attempt = self._attempt = self._attempt or self._begun()
                    if self._cancelled:  # while it began
                        return
                    for step in self._steps(attempt):
                        yield step
                        until, back_off = None, _FIRST_BACK_OFF
                    return
                except Elsewhere as lost:
                    self._end_attempt()
                    logs.debug("a text goes on after %d tokens: %s", len(self._drawn), lost.reason)
                    if self._cancelled or self._done:
                        return
                    until = until or time.monotonic() + self._timeout
                    if time.monotonic() >= until:
                        raise self._unreachable(lost) from None
                    self.moved += 1
                    time.sleep(back_off)
                    back_off = min(2 * back_off, _LAST_BACK_OFF)
        finally:
            self._over = True
            self._end_attempt()

    @property
    def runs(self) -> bool:
        """Return whether somebody waits for it."""
        return not self._over

    @property
    def _done(self) -> bool:
        return len(self._drawn) >= self._most or (bool(self._drawn) and self._drawn[-1] in self._stop_ids)

    def _begun(self) -> _Attempt:
        self.id = secrets.token_hex(8)
        options = {
            **self._options,
            "max_new_tokens": self._most - len(self._drawn),
            "drawn": self._before + len(self._drawn),
        }
        return _Attempt(lambda: self._ask(self.id, [*self._prompt, *self._drawn], options))

    def _steps(self, attempt: _Attempt) -> Iterator[Step]:
        wait, taken = self._timeout, False
        while True:
            try:
                message = attempt.message(wait)
            except Empty:
                if taken:
                    raise Elsewhere(f"no message for {wait:g} s") from None
                raise self._not_taken() from None
            if message is _Cancelled:
                return
            if message[0] == END:
                return
            if message[0] == ERROR:
                _, elsewhere, problems = message
                found = tuple(Problem(**problem) for problem in problems)
                if elsewhere:
                    raise Elsewhere(str(found[0]), found)
                raise BundleError(found)
            _, reused, steps = message
            if not self._drawn:
                self.reused = reused
            for token, chance, top in steps:
                self._drawn.append(token)
                logprobs = None if chance is None else (chance,)
                yield Step(ids=(token,), logprobs=logprobs, top=None if top is None else (top,))
            wait, taken = SILENCE, True

    def _not_taken(self) -> BundleError:
        expected = f"a replica that takes the text within {self._timeout:g} s"
        return _problem("peer.unreachable" if self.moved else "server.full", expected, "none")

    def _unreachable(self, lost: Elsewhere) -> BundleError:
        if lost.problems:
            return BundleError(lost.problems)
        return _problem("peer.unreachable", f"a replica that goes on within {self._timeout:g} s", lost.reason)

    def cancel(self) -> None:
        """Make no more steps, and free the row. Another thread may call this."""
        self._cancelled = self._over = True
        self._end_attempt()

    close = cancel

    def fail(self, error: BaseException) -> None:
        """End the text with an error, which its reader gets. Another thread calls this."""
        attempt = self._attempt
        if attempt is not None:
            attempt.fail(error)

    def _end_attempt(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.cancel()


class _Attempt:
    """One request to a replica. A thread of its own reads it, so that a wait for a message can have a deadline."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        self._messages: SimpleQueue[Any] = SimpleQueue()
        self._request = _asked(ask)
        threading.Thread(target=self._read, name="splitbundle-ray-text", daemon=True).start()

    def _read(self) -> None:
        try:
            for message in self._request:
                self._messages.put(message)
            self._messages.put(Elsewhere("the replica ended the text too early"))
        except BaseException as error:  # noqa: BLE001  # it is raised where the message is waited for
            self._messages.put(error)

    def message(self, timeout: float) -> Any:
        """Return the next message.

        Raises:
            Empty: there is none in time.
            Elsewhere: another replica may go on.
            BundleError: ``server.full``; ``server.draining``; ``server.failed``.
        """
        found = self._messages.get(timeout=timeout)
        if isinstance(found, BaseException):
            raise judged(found) from None
        return found

    def fail(self, error: BaseException) -> None:
        """Let the one who waits for a message get an error."""
        self._messages.put(error)

    def cancel(self) -> None:
        """End the request, without waiting."""
        if ray.is_initialized():  # otherwise Ray would start a cluster, to cancel something in it
            self._request.cancel()
        self._messages.put(_Cancelled)


def _asked(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except (exceptions.RayError, RayServeException) as error:
        raise judged(error) from None


def judged(error: BaseException) -> BaseException:
    """Return what an error of Ray means for a request: ``Elsewhere``, or the error for the user."""
    reason = " ".join(str(error).split())[:300]
    if isinstance(error, BackPressureError):
        return _problem("server.full", "room in the queue of the deployment", reason)
    if isinstance(error, DeploymentUnavailableError):
        return _problem("server.draining", "a deployment that is up", reason)
    if isinstance(error, exceptions.RayTaskError):
        lines = str(error).strip().splitlines()
        return _problem("server.failed", "a step that a replica can compute", lines[-1][:300] if lines else reason)
    if isinstance(error, exceptions.RayError | RayServeException):  # a dead replica, or one that is being ended
        return Elsewhere(f"{type(error).__name__}: {reason}")
    return error


def _problem(code: str, expected: str, got: str) -> BundleError:
    return BundleError(Problem(code=code, argument="replicas", expected=expected, got=got))
