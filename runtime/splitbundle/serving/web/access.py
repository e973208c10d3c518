"""Who may ask: keys from a file, and limits of each key.

Each line of the file has a name, a space, a key, and limits, if there are any:

    alice  sk-3f…    concurrent=4 requests-per-minute=60 tokens-per-minute=20000
"""

from __future__ import annotations

import contextlib
import hmac
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from splitbundle.errors import BundleError, Problem
from splitbundle.records import record
from splitbundle.serving.web.errors import RequestError
from splitbundle.storage import files

MAX_BYTES: Final = 2**20
LEAST_KEY: Final = 16
"""The characters of the shortest key. A shorter one could be guessed."""
_MINUTE: Final = 60.0
_LIMITS: Final = {
    "concurrent": "concurrent",
    "requests-per-minute": "requests_per_minute",
    "tokens-per-minute": "tokens_per_minute",
}


@record(frozen=True, slots=True, kw_only=True)
class Key:
    """A key, and what its holder may do. None stands for no limit."""

    name: str
    key: str
    concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


def read_keys(path: str | os.PathLike[str]) -> tuple[Key, ...]:
    """Read a file of keys.

    Raises:
        BundleError: ``keys.file`` for a line of another form, or a name or key twice; ``file.*``.
    """
    place = Path(os.path.abspath(path))
    try:
        text = files.read_file(place.parent, place.name, MAX_BYTES).decode("utf-8", "replace")
    except BundleError as error:
        got = error.problems[0].got
        problem = Problem(
            code="keys.file", file=str(path), expected=f"a file of keys, up to {MAX_BYTES} bytes", got=got
        )
        raise BundleError(problem) from None
    found: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue

        def refuse(expected: str, got: str, number: int = number) -> BundleError:
            return BundleError(Problem(code="keys.file", file=f"{path}, line {number}", expected=expected, got=got))

        if len(words) < 2:
            raise refuse("a name, a space, and a key", "one word")
        name, key, *rest = words
        if len(key) < LEAST_KEY or not key.isascii() or not key.isprintable():
            raise refuse(f"a key of at least {LEAST_KEY} printable ASCII characters", "another one")
        if any(name == other.name or key == other.key for other in found):
            raise refuse("a new name and a new key", "one twice")
        limits: dict[str, int] = {}
        for word in rest:
            limit, equals, value = word.partition("=")
            if limit not in _LIMITS or not equals or not value.isdigit() or not 0 < int(value) < 10**12:
                raise refuse(f"limits such as {next(iter(_LIMITS))}=4, among {', '.join(_LIMITS)}", "another word")
            limits[_LIMITS[limit]] = int(value)
        found.append(Key(name=name, key=key, **limits))
    if not found:
        raise BundleError(Problem(code="keys.file", file=str(path), expected="at least one key", got="none"))
    return tuple(found)


class _Use:
    """What the holder of a key has done."""

    def __init__(self) -> None:
        self.running = 0
        self.requests: deque[float] = deque()
        """The times of the last minute's requests."""
        self.tokens: deque[tuple[float, int]] = deque()
        """The times of the last minute's answers, with their tokens."""
        self.reserved = 0
        """The tokens that running requests may still make."""


class Grant:
    """The leave to answer one request."""

    def __init__(self, key: Key | None, use: _Use, lock: threading.Lock, clock: Callable[[], float]) -> None:
        self._key, self._use, self._lock, self._clock = key, use, lock, clock
        self._reserved = 0

    def reserve(self, tokens: int) -> None:
        """Set tokens aside that the answer may have. A request alone may have more than the limit of a minute.

        Raises:
            RequestError: 429 where other requests of the key have, or may make, as many as its limit allows.
        """
        limit = None if self._key is None else self._key.tokens_per_minute
        if limit is None:
            return
        with self._lock:
            use, now = self._use, self._clock()
            _forget(use, now)
            known = use.reserved + sum(n for _, n in use.tokens)
            if known and known + tokens > limit:
                wait = use.tokens[0][0] + _MINUTE - now if use.tokens else 1.0
                raise _limited(f"{limit} tokens in a minute", wait)
            self._reserved = tokens
            use.reserved += tokens

    def spend(self, tokens: int) -> None:
        """Note the tokens of the request and its answer."""
        with self._lock:
            self._use.tokens.append((self._clock(), tokens))

    def end(self) -> None:
        """Give back what was set aside."""
        with self._lock:
            self._use.running -= 1
            self._use.reserved -= self._reserved


class Access:
    """The keys of a server, and what their holders have done. Threads may share it."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Read the keys.

        Args:
            path: the file of keys, which is read again when it changes; None if everybody may ask.
            clock: returns the time in seconds.
            note: called with a line if the file can't be read again. Then the last keys hold on.

        Raises:
            BundleError: as ``read_keys``.
        """
        self._path, self._clock, self._lock, self._note = path, clock, threading.Lock(), note
        self._keys = () if path is None else read_keys(path)
        self._stamp = self._changed_at()
        self._uses: dict[str, _Use] = {}

    @property
    def is_open(self) -> bool:
        """Return whether everybody may ask."""
        return self._path is None

    def _changed_at(self) -> tuple[int, int] | None:
        try:
            found = None if self._path is None else os.stat(self._path)
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_size)

    def identify(self, authorization: str) -> Key | None:
        """Return the key that a client shows; None if everybody may ask.

        Raises:
            RequestError: 401 for no key, and for one that isn't in the file.
        """
        if self._path is None:
            return None
        stamp = self._changed_at()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._keys = read_keys(self._path)
            except BundleError as error:  # it may be half written: the last keys hold on until it changes again
                self._note(f"the keys stay as they were: {error.problems[0]}")
        kind, _, shown = authorization.partition(" ")
        found = None
        for key in self._keys:  # all of them, so that the time says nothing
            if hmac.compare_digest(key.key.encode(), shown.strip().encode("utf-8", "replace")):
                found = key
        if kind.lower() != "bearer" or found is None:
            message = "This server wants an API key, in the header Authorization: Bearer KEY"
            raise RequestError(401, message, reason="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return found

    @contextlib.contextmanager
    def using(self, key: Key | None) -> Iterator[Grant]:
        """Count a request, which the block answers.

        Raises:
            RequestError: 429 where the key's limits are reached.
        """
        if key is None:
            yield Grant(None, _Use(), self._lock, self._clock)
            return
        with self._lock:
            use, now = self._uses.setdefault(key.name, _Use()), self._clock()
            _forget(use, now)
            if key.concurrent is not None and use.running >= key.concurrent:
                raise _limited(f"{key.concurrent} requests at once", 1.0)
            if key.requests_per_minute is not None and len(use.requests) >= key.requests_per_minute:
                wait = use.requests[0] + _MINUTE - now
                raise _limited(f"{key.requests_per_minute} requests in a minute", wait)
            use.requests.append(now)
            use.running += 1

        grant = Grant(key, use, self._lock, self._clock)
        try:
            yield grant
        finally:
            grant.end()


def _forget(use: _Use, now: float) -> None:
    while use.requests and use.requests[0] <= now - _MINUTE:
        use.requests.popleft()
    while use.tokens and use.tokens[0][0] <= now - _MINUTE:
        use.tokens.popleft()


def _limited(limit: str, wait: float) -> RequestError:
    seconds = max(math.ceil(wait), 1)
    message = f"This key may have {limit}. Try again in {seconds} s"
    return RequestError(429, message, reason="rate_limit_exceeded", headers={"Retry-After": str(seconds)})
