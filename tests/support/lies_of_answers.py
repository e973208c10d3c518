"""Lies in place of answers: statuses, redirects, broken connections, and what isn't HTTP."""

from __future__ import annotations

import email.utils
import time
from typing import Final, Literal

from tests.support.http_server import Exchange
from tests.support.lie import LIES, Lie, lie
from tests.support.lies_of_content import DRIP_SECONDS, PIECE

FOREVER: Final = "99999999"


# Statuses and redirects.


def _status(name: str, outcome: Literal["A", "R"], status: int, told: int | None = None, **headers: str) -> None:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    body = f"status {status}, with \x1b[31mcontrol characters\n".encode()

    def tell(exchange: Exchange, _: bytes) -> None:
        date = email.utils.formatdate(time.time() + 1, usegmt=True)
        sent = {key: value.replace("IN A SECOND", date) for key, value in named.items()}
        exchange.answer(status, body, {"Content-Type": "text/plain", **sent})

    LIES[name] = Lie(name, outcome, tell, False, told, False)


_status("401", "R", 401, WWW_Authenticate='Basic realm="x"')
_status("403", "R", 403)
_status("404", "R", 404)
_status("429", "R", 429, Retry_After="0")
_status("429 once", "A", 429, 1, Retry_After="0")
_status("429 with a date", "A", 429, 1, Retry_After="IN A SECOND")
_status("429 with a date in the past", "A", 429, 1, Retry_After="Thu, 01 Jan 1970 00:00:00 GMT")
_status("429 with nonsense", "A", 429, 1, Retry_After="soon\xff")
_status("429 for ever", "R", 429, Retry_After=FOREVER)
_status("500", "R", 500)
_status("503 twice", "A", 503, 2, Retry_After="0")
_status("503", "R", 503)
_status("204", "R", 204)
_status("304", "R", 304)
_status("999", "R", 999)
_status("redirect to a file", "R", 302, Location="file:///etc/passwd")
_status("redirect to FTP", "R", 302, Location="ftp://127.0.0.1/file")
_status("redirect to data", "R", 302, Location="data:,x")
_status("redirect to nowhere", "R", 302)
_status("redirect to nonsense", "R", 302, Location="http://[::1")


@lie("redirect to another host", "A", content=False)
def _redirect(exchange: Exchange, _: bytes) -> None:
    """The other host is honest. No credential may come there: ``LoopbackServer.requests`` has what came."""
    other = exchange.server.other_url()
    if exchange.seen.host == other.removeprefix("http://"):
        exchange.lie = None
        exchange.server.respond(exchange)
        return
    exchange.answer(302, b"", {"Location": other + exchange.path})


@lie("redirect loop", "R", content=False)
def _redirect_loop(exchange: Exchange, _: bytes) -> None:
    exchange.answer(302, b"", {"Location": exchange.path})


@lie("redirect to ever new places", "R", content=False)
def _redirect_on(exchange: Exchange, _: bytes) -> None:
    exchange.answer(307, b"", {"Location": f"{exchange.path}?step={int(exchange.query.get('step', 0)) + 1}"})


# Connections, and what isn't HTTP.


@lie("reset", "R", content=False)
def _reset(exchange: Exchange, _: bytes) -> None:
    exchange.reset()


LIES["reset once"] = Lie("reset once", "A", _reset, False, 1, False)


@lie("no answer", "R", content=False)
def _no_answer(exchange: Exchange, _: bytes) -> None:
    exchange.close()


@lie("silence", "R", content=False, waits=True)
def _silence(exchange: Exchange, _: bytes) -> None:
    exchange.pause(3600)


@lie("drip of headers", "R", content=False, waits=True)
def _drip_headers(exchange: Exchange, _: bytes) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\n")
    while True:
        for byte in b"X-Slow: a\r\n":
            exchange.raw(bytes([byte]))
            exchange.pause(DRIP_SECONDS)


@lie("garbage", "R", content=False)
def _garbage(exchange: Exchange, _: bytes) -> None:
    exchange.raw(b"\x00\xff\x1b[2J garbage\r\n\r\n" + bytes(range(256)))
    exchange.close()


@lie("huge header", "R", content=False)
def _huge_header(exchange: Exchange, _: bytes) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\nX-Huge: ")
    for _ in range(160):
        exchange.raw(b"x" * PIECE)
    exchange.raw(b"\r\nContent-Length: 0\r\n\r\n")


@lie("many headers", "R", content=False)
def _many_headers(exchange: Exchange, _: bytes) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\n" + b"X-Many: y\r\n" * 100_000 + b"Content-Length: 0\r\n\r\n")
