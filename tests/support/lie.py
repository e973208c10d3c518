"""What a lie is, and the parts that several lies have in common. ``lies`` has them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal, NamedTuple

from tests.support.http_server import Exchange


class Lie(NamedTuple):
    """A lie."""

    name: str
    outcome: Literal["A", "R"]
    """Whether a correct client succeeds all the same (A, with at least two tries), or refuses (R)."""
    tell: Callable[[Exchange, bytes], None]
    """Answer a request with it. The bytes are the true content."""
    about_content: bool
    """Whether it is told in place of content alone."""
    told: int | None
    """How many requests get it, until the truth is told. None is all."""
    waits: bool
    """Whether a client needs its timeout to see it."""

    def true_after(self, times: int) -> bool:
        """Return whether the truth is told after the lie was told so many times."""
        return self.told is not None and times >= self.told


LIES: Final[dict[str, Lie]] = {}
"""Every lie by its name."""
Tell = Callable[[Exchange, bytes], None]


def lie(
    name: str, outcome: Literal["A", "R"], *, content: bool = True, told: int | None = None, waits: bool = False
) -> Callable[[Tell], Tell]:
    def add(tell: Tell) -> Tell:
        LIES[name] = Lie(name, outcome, tell, content, told, waits)
        return tell

    return add


def honest(exchange: Exchange, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Return the honest status, headers and body."""
    start = exchange.range_start
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(data) - start)}
    if "range" not in exchange.headers:
        return 200, headers, data
    return 206, {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:]


def wrong(data: bytes) -> bytes:
    return bytes(byte ^ 0x55 for byte in data)


def cut(exchange: Exchange, data: bytes) -> None:
    """Send the first half of an honest answer, and end the connection."""
    status, headers, body = honest(exchange, data)
    exchange.head(status, headers)
    exchange.body_bytes(body[: len(body) // 2])
    exchange.close()
