"""What one client may hold of a server: sessions, and the memory of their caches. No I/O; the caller has a lock."""

from __future__ import annotations

from splitbundle.records import record
from splitbundle.serving.refusals import Refusal


@record(frozen=True, slots=True, kw_only=True)
class Quota:
    """The most that one client may hold; None for as much as the server has."""

    sessions: int | None = None
    max_bytes: int | None = None
    """The bytes of the caches of its sessions, as far as they are reserved."""


class _Held:
    __slots__ = ("sessions", "slots")

    def __init__(self) -> None:
        self.sessions = self.slots = 0


class Quotas:
    """What each client holds, by its name."""

    def __init__(self, quota: Quota, slot_bytes: int) -> None:
        """Begin without clients.

        Args:
            quota: the most that one client may hold.
            slot_bytes: the bytes of a slot.
        """
        self._quota = quota
        self._most_slots = None if quota.max_bytes is None else quota.max_bytes // max(slot_bytes, 1)
        self._held: dict[str, _Held] = {}

    def __len__(self) -> int:
        return len(self._held)

    def take(self, owner: str, *, sessions: int = 0, slots: int) -> None:
        """Give a client more sessions and slots, or nothing.

        Raises:
            Refusal: ``server.quota``.
        """
        held, quota = self._held.get(owner) or _Held(), self._quota
        if sessions and quota.sessions is not None and held.sessions + sessions > quota.sessions:
            expected = f"at most {quota.sessions} sessions of one client"
            raise Refusal("server.quota", "sessions", expected, "one more", "other")
        if self._most_slots is not None and held.slots + slots > self._most_slots:
            left = max(self._most_slots - held.slots, 0)
            expected = f"at most {left} slots, which this client has left of {self._most_slots}"
            raise Refusal("server.quota", "capacity", expected, f"{slots}", "other")
        held.sessions += sessions
        held.slots += slots
        self._held[owner] = held

    def give_back(self, owner: str, *, sessions: int = 0, slots: int = 0) -> None:
        """Take sessions and slots from a client that it held."""
        held = self._held[owner]
        held.sessions -= sessions
        held.slots -= slots
        if not held.sessions and not held.slots:
            del self._held[owner]
