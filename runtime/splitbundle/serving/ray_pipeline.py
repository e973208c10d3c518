"""A pipeline whose texts are made by replicas of Ray Serve."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
from ray import exceptions
from ray.serve.exceptions import RayServeException

from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.integers import as_integer, as_integers, as_token_ids
from splitbundle.serving.ray_leases import Pulse
from splitbundle.serving.ray_settings import ERROR, Settings
from splitbundle.serving.ray_texts import Elsewhere, RaySteps, judged
from splitbundle.stages.generation import chosen_logprobs, chosen_sampling
from splitbundle.stages.session import Session
from splitbundle.stages.text_generation import Completion
from splitbundle.stages.text_pipeline import TextPipeline

if TYPE_CHECKING:
    from splitbundle.bundle import Bundle

STATE_TIMEOUT = 5.0
"""The seconds in which replicas tell their numbers."""


class RayPipeline(TextPipeline):
    """A pipeline that replicas of Ray Serve compute. ``splitbundle.ray.deploy`` makes one. Threads may share it.

    It has the methods of ``SharedPipeline`` for text. This process holds no weights. ``close`` ends the deployment.
    A program with an event loop calls these methods in threads: Ray refuses to wait in a loop.
    """

    where = "Ray"
    client: str | None = None
    """Who asks. Clients take turns where texts wait for a row."""

    def __init__(self, bundle: Bundle, handle: Any, settings: Settings, end: Callable[[], None]) -> None:
        """Take over a deployment.

        Args:
            bundle: the bundle, for its tokenizer and its architecture.
            handle: the handle of the deployment.
            settings: how it was deployed.
            end: called by ``close``.
        """
        self.bundle, self.settings = bundle, settings
        self.first = SimpleNamespace(architecture=bundle.architecture)
        """What this process knows of the stage that takes token ids: its architecture."""
        self._handle, self._streams = handle, handle.options(stream=True)
        self._closing = _Once(end)
        self._pulse = Pulse(_renewal(handle))

    @property
    def context_length(self) -> int:
        """Return the number of tokens that a text may have."""
        return self.settings.context

    def of(self, client: object) -> RayPipeline:
        """Return this pipeline for one client."""
        own = copy.copy(self)
        own.client = str(client)
        return own

    def row_steps(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int = 20,
        stop_ids: Sequence[int] = (),
        session: Session | None = None,
        logprobs: int | None = None,
        prompt_lookup: int | None = None,
        **sampling: Any,
    ) -> RaySteps:
        """Begin to continue one row in a replica, and return its steps. ``stream_text`` calls this.

        If the replica is lost, another one goes on. The draws of a text with a seed are the same as without the loss.

        Args:
            prompt_ids: the prompt.
            max_new_tokens: the largest number of steps.
            stop_ids: tokens that end it.
            session: None: replicas have sessions of their own.
            logprobs: as for ``steps``.
            prompt_lookup: it has no effect: rows that are computed together need one token at a time.
            sampling: as for ``generate``.

        Raises:
            BundleError: ``input.*``; ``server.full``; ``server.draining`` after ``close``. While the steps are read:
                ``peer.unreachable`` if no replica goes on in time; ``server.failed``.
        """
        if session is not None:
            raise wrong_argument("session", "None: replicas have sessions of their own", type(session).__name__)
        self._check_open()
        vocab_size = self.bundle.architecture.vocab_size
        ids = as_token_ids(prompt_ids, "prompt", vocab_size)
        most = as_integer(max_new_tokens)
        if most is None or most < 0:
            raise wrong_argument("max_new_tokens", "a number from 0", quoted(max_new_tokens))
        chosen_sampling(sampling, vocab_size)
        options = {
            "max_new_tokens": most,
            "stop_ids": as_integers(stop_ids, "stop_ids"),
            "logprobs": chosen_logprobs(logprobs, vocab_size),
            **sampling,
        }
        client = self.client

        def ask(text: str, prompt: list[int], given: dict[str, Any]) -> Any:
            self._check_open()
            return self._streams.steps.remote(text, prompt, given, client)

        try:
            text = RaySteps(ask, ids, options, self.settings.timeout)
        except Elsewhere as lost:
            raise _unreachable(lost.reason) from None
        self._pulse.add(text)
        return text

    def _complete_texts(self, prompts: list[Any], options: dict[str, Any]) -> list[Completion]:
        return [self.complete_text(prompt, **options) for prompt in prompts]

    def log_probabilities(self, token_ids: Any, *, last: int | None = None) -> list[list[float]]:
        """Return the logarithm of the probability of each token. See ``TextPipeline.log_probabilities``.

        ``token_ids`` may also be a list of rows of equal lengths.

        Raises:
            BundleError: as there; ``peer.unreachable`` if no replica answers in time.
        """
        self._check_open()
        given = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        vocab_size = self.bundle.architecture.vocab_size
        rows = [as_token_ids(row, "token_ids", vocab_size) for row in given]
        if len({len(row) for row in rows}) != 1:
            raise wrong_argument("token_ids", "rows of one length", quoted([len(row) for row in rows]))
        try:
            answer = self._handle.scores.remote(rows, last).result(timeout_s=self.settings.timeout)
        except TimeoutError:
            raise _unreachable(f"no answer in {self.settings.timeout:g} s") from None
        except (exceptions.RayError, RayServeException) as error:
            found = judged(error)
            raise (_unreachable(found.reason) if isinstance(found, Elsewhere) else found) from None
        if answer[0] == ERROR:
            raise BundleError(Problem(**problem) for problem in answer[2])
        scores: list[list[float]] = answer[1]
        return scores

    @property
    def replicas(self) -> list[dict[str, Any]]:
        """Return the numbers of each replica: those of ``SharedPipeline.state``, its process, and its actors.

        A replica that doesn't answer in time isn't there.
        """
        self._check_open()
        return [state for state in _told(self._handle, "state") if isinstance(state, dict)]

    @property
    def state(self) -> dict[str, float]:
        """Return numbers for monitoring: the replicas that answer, and the sums of their numbers."""
        each = self.replicas
        sums: dict[str, float] = {"replicas": len(each)}
        for state in each:
            for name, value in state.items():
                if name != "pid" and isinstance(value, int | float):
                    sums[name] = sums.get(name, 0) + value
        return sums

    def _check_open(self) -> None:
        if self._closing.done or not ray.is_initialized():  # without this, Ray would start a cluster
            raise _closed()

    def close(self) -> None:
        """End the deployment: its texts, replicas, actors and placement groups. Also end a cluster that it started."""
        self._closing()
        for text in self._pulse.texts:
            text.fail(_closed())

    def __enter__(self) -> RayPipeline:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Once:
    """Calls a function at the first call alone."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self._lock, self.done = work, threading.Lock(), False

    def __call__(self) -> None:
        with self._lock:
            if not self.done:
                self.done = True
                self._work()


def _told(handle: Any, method: str, *arguments: Any) -> list[Any]:
    """Call a method of every replica. Return the answers that come in time, and errors among them."""
    try:
        calls = handle.broadcast(method, *arguments)
        answers: list[Any] = calls.results(timeout_s=STATE_TIMEOUT, return_exceptions=True)
    except (TimeoutError, FutureTimeout, exceptions.RayError, RayServeException):
        return []
    return answers


def _renewal(handle: Any) -> Callable[[list[str]], object]:
    return lambda texts: _told(handle, "renew", texts) if ray.is_initialized() else []


def _closed() -> BundleError:
    expected, got = "a deployment that is up", "one that was closed"
    return BundleError(Problem(code="server.draining", argument="pipeline", expected=expected, got=got))


def _unreachable(reason: str) -> BundleError:
    expected = "a replica that answers"
    return BundleError(Problem(code="peer.unreachable", argument="replicas", expected=expected, got=reason))
