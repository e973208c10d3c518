"""Errors of the network, and how often and how long a transfer is tried."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.records import record

TIMEOUT: Final = "SPLITBUNDLE_TIMEOUT"
RETRIES: Final = "SPLITBUNDLE_RETRIES"
LONGEST_WAIT: Final = 60.0
"""Seconds. A server that asks for more than this before the next try is left alone."""
MINIMUM_RATE: Final = 1024
"""Bytes a second. A transfer that is slower than this for a whole timeout has stalled."""

ResultT = TypeVar("ResultT")


class NetworkError(BundleError):
    """Another machine didn't deliver."""

    transient = False
    """Whether a second try may help."""
    wait: float | None = None
    """The seconds that the server asks to wait before it."""


@record(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait, and how often to try."""

    timeout: float = 30.0
    """Seconds without a byte, or with fewer than ``MINIMUM_RATE`` bytes a second, until a try has failed."""
    retries: int = 5
    """How often to try again without any progress. A try that moves bytes doesn't count."""
    backoff: float = 0.5
    """Seconds before the second try. Each further wait is twice as long, up to ``LONGEST_WAIT``."""
    tell: Callable[[str], object] | None = None
    """A function for a line that says what failed, before the next try."""


def patience(timeout: float | None = None, retries: int | None = None) -> Patience:
    """Return what the caller asks for, else what the environment says, else the defaults.

    Raises:
        BundleError: ``input.value``.
    """
    seconds = _number("timeout", timeout, TIMEOUT, 30.0, 0.05, 3600.0)
    return Patience(timeout=seconds, retries=int(_number("retries", retries, RETRIES, 5, 0, 100)))


def _number(argument: str, given: float | None, variable: str, default: float, least: float, most: float) -> float:
    text = os.environ.get(variable) if given is None else None
    value: float = default if given is None else given
    if text:
        argument = variable
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
    if isinstance(value, bool) or not least <= value <= most:
        raise wrong_argument(argument, f"a number from {least:g} to {most:g}", quoted(text or given))
    return value


def persistently(
    work: Callable[[], ResultT], patience: Patience, progressed: Callable[[], bool] | None = None
) -> ResultT:
    """Do some work, and do it again after a failure that may pass.

    Args:
        work: the work. It raises ``NetworkError`` for a failure of the network.
        patience: how often and how long.
        progressed: tells whether the last try moved bytes. Then the count of tries begins anew.

    Raises:
        NetworkError: the last failure.
    """
    tries = 0
    while True:
        try:
            return work()
        except NetworkError as error:
            if not error.transient:
                raise
            tries = 1 if progressed is not None and progressed() else tries + 1
            wait = error.wait if error.wait is not None else patience.backoff * 2 ** (tries - 1)
            if tries > patience.retries or (error.wait or 0) > LONGEST_WAIT:
                raise
            if patience.tell is not None:
                problem = error.problems[0]
                patience.tell(f"{problem.file}: {problem.got}. Trying again in {min(wait, LONGEST_WAIT):.1f} s")
        # Clients that lost one server shouldn't all come back in the same moment.
        time.sleep(min(wait, LONGEST_WAIT) * random.uniform(0.8, 1.2))


def network_error(
    code: str,
    place: str,
    expected: str,
    got: str,
    hint: str | None = None,
    *,
    transient: bool = False,
    wait: float | None = None,
) -> NetworkError:
    """Return an error of the network for the place, a URL without secrets."""
    error = NetworkError(Problem(code=code, file=place, expected=expected, got=got, hint=hint))
    error.transient, error.wait = transient, wait
    return error


def lost(place: str, error: object, hint: str | None = None) -> NetworkError:
    """Return the error of a connection that failed or ended early. Another try may help."""
    said = hint or "Run this again: it goes on where it stopped"
    got = str(error) or type(error).__name__
    return network_error("network", place, "an answer from there", got, said, transient=True)


class Pace:
    """Notices a transfer that drips: fewer than ``MINIMUM_RATE`` bytes a second over a whole timeout."""

    def __init__(self, place: str, timeout: float) -> None:
        self._place, self._timeout = place, timeout
        self._since, self._moved = time.monotonic(), 0

    def moved(self, count: int) -> None:
        """Count bytes that came.

        Raises:
            NetworkError: ``network`` if the transfer has stalled.
        """
        self._moved += count
        passed = time.monotonic() - self._since
        if passed < self._timeout:
            return
        if self._moved < MINIMUM_RATE * passed:
            raise lost(self._place, f"{self._moved} bytes in {passed:.1f} seconds")
        self._since, self._moved = time.monotonic(), 0
