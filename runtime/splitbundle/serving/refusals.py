"""What a stage server refuses, and what its client may do then."""

from __future__ import annotations

from typing import Any

from splitbundle.errors import BundleError, Problem


class Refusal(BundleError):
    """A refusal, and what the client may do: ``never``, ``same``, ``other`` or ``replay``."""

    def __init__(self, code: str, argument: str, expected: str, got: str, retry: str = "never") -> None:
        super().__init__(Problem(code=code, argument=argument, expected=expected, got=got))
        self.retry = retry

    def __reduce__(self) -> Any:
        problem = self.problems[0]
        return type(self), (problem.code, problem.argument, problem.expected, problem.got, self.retry)


def unknown() -> Refusal:
    """Return the refusal of a session that has ended, or never was."""
    return Refusal("session.unknown", "session", "a session that lives", "none of this name", "replay")


def draining(retry: str) -> Refusal:
    """Return the refusal of a server that is ending."""
    return Refusal("server.draining", "server", "a server that goes on", "one that is ending", retry)


def compare(code: str, asked: object, own: object) -> None:
    """Refuse a hello that asks for something else than this server has. None asks for nothing.

    Raises:
        BundleError: the code.
    """
    if asked is not None and asked != own:
        raise BundleError(Problem(code=code, argument="hello", expected=str(own), got=str(asked)))


def retry_of(code: str) -> str:
    """Return what a client may do about a problem of a library, or of the wire."""
    if code.startswith("peer."):
        return "other"
    return "same" if code in ("wire.frame", "wire.payload") else "never"  # these were damaged on the way
