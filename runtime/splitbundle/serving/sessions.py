"""Sessions of a stage server: leases, a budget, and numbered steps. No I/O; the clock is given.

A lock protects the table. A session has a lock of its own, which a step holds while it is computed.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from typing import Any, Final

from splitbundle.serving.quotas import Quota, Quotas
from splitbundle.serving.refusals import Refusal, unknown
from splitbundle.serving.shared_cache import LEAST_CAPACITY, SharedCache, SharedRows
from splitbundle.wire.messages import Limits

ID_BYTES: Final = 16
MAX_KEPT_BYTES: Final = 256 * 2**20
"""The bytes of all frames and answers that are kept for a repeated step. A session without them begins anew."""


class Session:
    """A KV cache of one client, and the last step that was computed with it."""

    def __init__(self, name: str, owner: str, cache: Any, rows: int, capacity: int, expires: float) -> None:
        self.name, self.owner, self.cache, self.rows, self.capacity = name, owner, cache, rows, capacity
        self.expires, self.steps_waiting, self.ended = expires, 0, False
        self.reserved = 0
        """The slots that are reserved for this session alone."""
        self.lock = threading.Lock()
        self.number = 0
        """The number of the last step."""
        self.request = b""
        """The frame of the last step, with which the same frame again is compared."""
        self.answer = b""
        """The last answer, which the same frame gets once more."""

    @property
    def kept_bytes(self) -> int:
        """Return the bytes that are kept for a repeated step."""
        return len(self.request) + len(self.answer)


class Sessions:
    """The sessions of a server."""

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float],
        *,
        max_bytes: int,
        slot_bytes: int,
        shared_rows: int = 0,
        architecture: Any = None,
        quota: Quota | None = None,
    ) -> None:
        """Make an empty table.

        Args:
            limits: the limits of slots, sessions and rows, and the lease.
            clock: returns the time in seconds. It never goes back.
            max_bytes: the bytes that all caches may take.
            slot_bytes: the bytes of a slot.
            shared_rows: the rows of the cache that sessions share; 0 for none.
            architecture: the model's architecture, for a shared cache.
            quota: what one client may hold of all this; None for all of it.
        """
        self._limits, self._clock = limits, clock
        self._most = min(limits.slots, max_bytes // max(slot_bytes, 1))
        self._shared_rows, self._architecture = shared_rows, architecture
        self._shared: SharedCache | None = None
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self.quotas = Quotas(Quota() if quota is None else quota, slot_bytes)
        self._reserved = self._kept_bytes = self._opening = 0
        self.expired = 0
        """The number of sessions whose lease ran out."""

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def slots(self) -> int:
        """Return the number of reserved slots."""
        return self._reserved

    def open(self, owner: str, rows: int, capacity: int, make: Callable[[int, int], Any]) -> Session:
        """Reserve the slots of a session, and make its cache.

        Raises:
            Refusal: ``server.full``, ``server.quota``; ``session.capacity`` for more rows or slots than the limits
                allow at all.
            BundleError: what ``make`` raises.
        """
        limits = self._limits
        if rows > limits.rows or capacity > limits.capacity:
            expected = f"at most {limits.rows} rows of at most {limits.capacity} slots"
            raise Refusal("session.capacity", "capacity", expected, f"{rows} rows of {capacity} slots", "other")
        with self._lock:
            if len(self._sessions) + self._opening >= limits.sessions:
                raise Refusal("server.full", "sessions", f"at most {limits.sessions} sessions", "one more", "other")
            self.quotas.take(owner, sessions=1, slots=rows * capacity)
            try:
                cache: Any = self._shared_rows_for(rows, capacity, make)
                own = 0 if cache is not None else rows * capacity
                self._reserve(own)
            except BaseException:
                self.quotas.give_back(owner, sessions=1, slots=rows * capacity)
                raise
            self._opening += 1
        try:
            cache = make(rows, capacity) if cache is None else cache
        except BaseException:
            with self._lock:
                self._opening -= 1
                self._reserved -= own
                self.quotas.give_back(owner, sessions=1, slots=rows * capacity)
            raise
        session = Session(secrets.token_hex(ID_BYTES), owner, cache, rows, capacity, self._clock() + limits.lease)
        session.reserved = own
        with self._lock:
            self._opening -= 1
            self._sessions[session.name] = session
        return session

    def _shared_rows_for(self, rows: int, capacity: int, make: Callable[[int, int], Any]) -> SharedRows | None:
        """Return rows of the shared cache, which is made first if need be; None if a session has to have its own."""
        if self._shared is None:
            slots = 2 ** (max(capacity, LEAST_CAPACITY) - 1).bit_length()
            limit = getattr(self._architecture, "position_limit", None)
            slots = slots if limit is None else max(capacity, min(slots, limit))
            # Half of the budget is left to sessions that need caches of their own.
            needed = self._shared_rows * slots
            if not rows <= self._shared_rows or needed > min(self._most // 2, self._most - self._reserved):
                return None
            shared = SharedCache(self._architecture, make, self._shared_rows, slots)
            if shared.cache.thresholds:  # rotations depend on the length of a call, and so on its other rows
                self._shared_rows = 0
                return None
            self._shared = shared
            self._reserved += shared.slots
        return self._shared.take(rows, capacity)

    def _reserve(self, slots: int) -> None:
        if self._reserved + slots > self._most:
            expected = f"at most {self._most - self._reserved} slots, which are free of {self._most}"
            raise Refusal("server.full", "capacity", expected, f"{slots}", "other")
        self._reserved += slots

    def grow(self, session: Session, capacity: int) -> None:
        """Reserve more slots for a session. The caller holds its lock, and then grows the cache.

        Raises:
            Refusal: ``server.full``, ``server.quota``, ``session.capacity``.
        """
        if not session.capacity <= capacity <= self._limits.capacity:
            expected = f"{session.capacity} to {self._limits.capacity} slots"
            raise Refusal("session.capacity", "capacity", expected, f"{capacity}")
        more = session.rows * (capacity - session.capacity)
        with self._lock:
            self.quotas.take(session.owner, slots=more)
            try:
                if isinstance(session.cache, SharedRows):
                    self._grow_shared(session, session.cache.shared, capacity)
                else:
                    self._reserve(more)
                    session.reserved = session.rows * capacity
            except BaseException:
                self.quotas.give_back(session.owner, slots=more)
                raise
            session.capacity = capacity

    def _grow_shared(self, session: Session, shared: SharedCache, capacity: int) -> None:
        """Give the shared cache more slots if need be, or end the session. The caller computes nothing meanwhile."""
        more = shared.rows * (capacity - shared.cache.capacity)
        if more <= 0:
            return
        if self._reserved + more > self._most:
            self._end(session)
            raise unknown()
        shared.cache.grow(capacity)
        self._reserved += more

    def shrink(self, session: Session, capacity: int) -> None:
        """Give back slots that ``grow`` reserved, where the step was refused after all."""
        less = session.rows * (session.capacity - capacity)
        with self._lock:
            self.quotas.give_back(session.owner, slots=less)
            if not isinstance(session.cache, SharedRows):  # a shared cache keeps what it has
                self._reserved -= less
                session.reserved = session.rows * capacity
            session.capacity = capacity

    def enter(self, name: str, owner: str) -> Session:
        """Return a session for a step. Its lease doesn't end before ``leave``.

        Raises:
            Refusal: ``session.unknown`` if there is no such session, or another client opened it.
        """
        with self._lock:
            self._end_leases()
            session = self._sessions.get(name)
            if session is None or session.owner != owner:
                raise unknown()
            session.steps_waiting += 1
            return session

    def leave(self, session: Session) -> None:
        """Begin the lease again after a step."""
        with self._lock:
            session.steps_waiting -= 1
            session.expires = self._clock() + self._limits.lease
            if session.ended and not session.steps_waiting:
                self._free(session)

    def keep(self, session: Session, request: bytes, answer: bytes) -> None:
        """Keep the last step's frame and its answer. If there are too many bytes of them, those of idle sessions go."""
        with self._lock:
            if session.ended:
                return
            self._kept_bytes += len(request) + len(answer) - session.kept_bytes
            session.request, session.answer = request, answer
            if self._kept_bytes > MAX_KEPT_BYTES:
                for other in sorted(self._sessions.values(), key=lambda each: each.expires):
                    if other is not session and self._kept_bytes > MAX_KEPT_BYTES:
                        self._kept_bytes -= other.kept_bytes
                        other.request = other.answer = b""

    def end(self, session: Session) -> None:
        """End a session. A step that still waits for its lock finds that it has ended."""
        with self._lock:
            self._end(session)

    def end_all(self) -> None:
        """End all sessions."""
        with self._lock:
            for session in list(self._sessions.values()):
                self._end(session)

    def end_leases(self) -> None:
        """End the sessions whose lease ran out."""
        with self._lock:
            self._end_leases()

    def _end_leases(self) -> None:
        now = self._clock()
        for session in [s for s in self._sessions.values() if not s.steps_waiting and s.expires <= now]:
            self._end(session)
            self.expired += 1

    def _end(self, session: Session) -> None:
        if not session.ended:
            session.ended = True
            del self._sessions[session.name]
            self.quotas.give_back(session.owner, sessions=1)
            self._kept_bytes -= session.kept_bytes
            session.request = session.answer = b""
            if not session.steps_waiting:  # otherwise a step may hold the cache, and its slots aren't free
                self._free(session)

    def _free(self, session: Session) -> None:
        self._reserved -= session.reserved
        self.quotas.give_back(session.owner, slots=session.rows * session.capacity)
        cache, session.cache = session.cache, None  # at once, and not when the last reference to the session goes
        if isinstance(cache, SharedRows):
            cache.shared.release(cache)
            if cache.shared.is_unused and cache.shared is self._shared:
                self._reserved -= cache.shared.slots
                self._shared = None
