"""Lies that a test server can tell, by name, and what a correct client does about each.

``LIES`` is for parametrization. A lie about content needs an answer that would have had content, and is told of the
true bytes. Any other lie takes the place of every answer, also to a request that sends something. ``LoopbackServer``
says how a lie is bound to requests. Each lie is told anew for each path.
"""

from __future__ import annotations

import email.utils
import gzip
import io
import time
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

from tests.support.http_server import Exchange, LoopbackServer, Seen

DRIP_SECONDS: Final = 0.2
FOREVER: Final = "99999999"
PAGE: Final = b"<!DOCTYPE html>\n<html><head><title>Log in</title></head><body><form>...</form></body></html>\n"
PIECE: Final = 2**16


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


def _lie(
    name: str, outcome: Literal["A", "R"], *, content: bool = True, told: int | None = None, waits: bool = False
) -> Callable[[Tell], Tell]:
    def add(tell: Tell) -> Tell:
        LIES[name] = Lie(name, outcome, tell, content, told, waits)
        return tell

    return add


def _part(exchange: Exchange, data: bytes) -> tuple[int, dict[str, str], bytes]:
    """Return the honest status, headers and body."""
    start = exchange.range_start
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(data) - start)}
    if "range" not in exchange.headers:
        return 200, headers, data
    return 206, {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:]


def _wrong(data: bytes) -> bytes:
    return bytes(byte ^ 0x55 for byte in data)


def _cut(exchange: Exchange, data: bytes) -> None:
    """Send the first half of an honest answer, and end the connection."""
    status, headers, body = _part(exchange, data)
    exchange.head(status, headers)
    exchange.body_bytes(body[: len(body) // 2])
    exchange.close()


# Bodies.


@_lie("wrong bytes", "R")
def _wrong_bytes(exchange: Exchange, data: bytes) -> None:
    status, headers, body = _part(exchange, _wrong(data))
    exchange.head(status, headers)
    exchange.body_bytes(body)


@_lie("wrong last byte", "R")
def _wrong_last_byte(exchange: Exchange, data: bytes) -> None:
    status, headers, body = _part(exchange, data[:-1] + _wrong(data[-1:]))
    exchange.head(status, headers)
    exchange.body_bytes(body)


@_lie("short body", "R")
def _short_body(exchange: Exchange, data: bytes) -> None:
    """Send the first 10 bytes of the file, whatever is asked for, so that no number of tries gets further."""
    status, headers, body = _part(exchange, data)
    exchange.head(status, headers)
    exchange.body_bytes(body[: max(0, 10 - exchange.range_start)])
    exchange.close()


LIES["short body once"] = Lie("short body once", "A", _cut, True, 1, False)


@_lie("shorter length", "R")
def _shorter_length(exchange: Exchange, data: bytes) -> None:
    status, headers, body = _part(exchange, data[:-1])
    exchange.head(status, headers)
    exchange.body_bytes(body)


@_lie("longer length", "R")
def _longer_length(exchange: Exchange, data: bytes) -> None:
    status, headers, body = _part(exchange, data + b"x")
    exchange.head(status, headers)
    exchange.body_bytes(body)


@_lie("one byte more without a length", "R")
def _one_more(exchange: Exchange, data: bytes) -> None:
    status, headers, body = _part(exchange, data + b"x")
    del headers["Content-Length"]
    exchange.head(status, {**headers, "Connection": "close"})
    exchange.body_bytes(body)
    exchange.close()


@_lie("no length", "A")
def _no_length(exchange: Exchange, data: bytes) -> None:
    """Send the true bytes, and show their end by closing the connection, as HTTP/1.0 servers do it."""
    status, headers, body = _part(exchange, data)
    del headers["Content-Length"]
    exchange.head(status, {**headers, "Connection": "close"})
    exchange.body_bytes(body)
    exchange.close()


def _endless(exchange: Exchange, data: bytes, headers: dict[str, str], wrap: Callable[[bytes], bytes]) -> None:
    exchange.head(200, {"Content-Type": "application/octet-stream", **headers})
    exchange.body_bytes(wrap(data))
    while True:
        exchange.body_bytes(wrap(bytes(PIECE)))
        exchange.pause(0)


@_lie("endless body without a length", "R")
def _endless_body(exchange: Exchange, data: bytes) -> None:
    _endless(exchange, data, {"Connection": "close"}, lambda piece: piece)


@_lie("endless body in chunks", "R")
def _endless_chunks(exchange: Exchange, data: bytes) -> None:
    _endless(exchange, data, {"Transfer-Encoding": "chunked"}, lambda piece: b"%x\r\n%b\r\n" % (len(piece), piece))


@_lie("endless body with a length", "R")
def _huge_length(exchange: Exchange, data: bytes) -> None:
    _endless(exchange, data, {"Content-Length": str(2**60)}, lambda piece: piece)


@_lie("drip", "R", waits=True)
def _drip(exchange: Exchange, data: bytes) -> None:
    status, headers, body = _part(exchange, data)
    exchange.head(status, headers)
    for at in range(len(body)):
        exchange.body_bytes(body[at : at + 1])
        exchange.pause(DRIP_SECONDS)


@_lie("stall", "R", waits=True)
def _stall(exchange: Exchange, data: bytes) -> None:
    """Send the first 10 bytes, and then nothing."""
    status, headers, body = _part(exchange, data)
    exchange.head(status, headers)
    exchange.body_bytes(body[: max(0, 10 - exchange.range_start)])
    exchange.pause(3600)


@_lie("changes half-way", "R")
def _changes(exchange: Exchange, data: bytes) -> None:
    half = len(data) // 2
    status, headers, body = _part(exchange, data[:half] + _wrong(data[half:]))
    exchange.head(status, headers)
    exchange.body_bytes(body)


@_lie("changes at resume", "R")
def _changes_at_resume(exchange: Exchange, data: bytes) -> None:
    """Break off in the middle of the true file. From then on, the file is another one."""
    if not exchange.times:
        _cut(exchange, data)
        return
    _wrong_bytes(exchange, data)


@_lie("gzip bomb", "R")
def _gzip_bomb(exchange: Exchange, data: bytes) -> None:
    made = io.BytesIO()
    with gzip.GzipFile(fileobj=made, mode="wb", compresslevel=9) as file:
        file.write(data + bytes(64 * 2**20))
    exchange.answer(200, made.getvalue(), {"Content-Type": "application/octet-stream", "Content-Encoding": "gzip"})


@_lie("contradictory lengths", "R")
def _contradictory(exchange: Exchange, data: bytes) -> None:
    exchange.head(200, [("Content-Length", str(max(0, len(data) - 7))), ("Content-Length", str(len(data)))])
    exchange.body_bytes(data)
    exchange.close()


@_lie("login page", "R")
def _login_page(exchange: Exchange, _: bytes) -> None:
    exchange.answer(200, PAGE, {"Content-Type": "text/html; charset=utf-8"})


@_lie("login page as a file", "R")
def _login_page_as_file(exchange: Exchange, data: bytes) -> None:
    """A page of the right size, and with a type that says nothing."""
    exchange.answer(200, (PAGE + b" " * len(data))[: len(data)], {"Content-Type": "application/octet-stream"})


@_lie("another document", "R")
def _another_document(exchange: Exchange, _: bytes) -> None:
    """A good JSON document that isn't the one that was asked for."""
    document = b'{"schemaVersion": 2, "config": {}, "layers": []}'
    exchange.answer(200, document, {"Content-Type": "application/vnd.oci.image.manifest.v1+json"})


# Ranges. The request for the whole file is cut off, so that a client asks for the rest.


@_lie("200 in place of 206", "A")
def _whole_again(exchange: Exchange, data: bytes) -> None:
    if not exchange.times:
        _cut(exchange, data)
        return
    exchange.answer(200, data, {"Content-Type": "application/octet-stream"})


def _wrong_range(exchange: Exchange, data: bytes, text: str) -> None:
    status, headers, body = _part(exchange, data)
    if status == 200:
        _cut(exchange, data)
        return
    exchange.head(206, {**headers, "Content-Range": text})
    exchange.body_bytes(body)


@_lie("range of another place", "R")
def _range_elsewhere(exchange: Exchange, data: bytes) -> None:
    start = exchange.range_start
    _wrong_range(exchange, data, f"bytes {start - 1}-{len(data) - 2}/{len(data)}")


@_lie("range of another file", "R")
def _range_of_another(exchange: Exchange, data: bytes) -> None:
    _wrong_range(exchange, data, f"bytes {exchange.range_start}-{len(data) - 1}/{len(data) + 99}")


@_lie("range that is none", "R")
def _range_garbage(exchange: Exchange, data: bytes) -> None:
    _wrong_range(exchange, data, "bytes x-\xff/9" + "9" * 5000)


@_lie("416", "R")
def _no_such_range(exchange: Exchange, data: bytes) -> None:
    if "range" not in exchange.headers:
        _short_body(exchange, data)
        return
    exchange.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})


@_lie("416 once", "A")
def _no_such_range_once(exchange: Exchange, data: bytes) -> None:
    """The connection breaks, and the server doesn't know the rest. It sends the whole file to one who asks for it."""
    if not exchange.times:
        _cut(exchange, data)
    elif "range" in exchange.headers:
        exchange.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    else:
        exchange.answer(200, data, {"Content-Type": "application/octet-stream"})


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


@_lie("redirect to another host", "A", content=False)
def _redirect(exchange: Exchange, _: bytes) -> None:
    """The other host is honest. No credential may come there: ``LoopbackServer.requests`` has what came."""
    other = exchange.server.other_url()
    if exchange.seen.host == other.removeprefix("http://"):
        exchange.lie = None
        exchange.server.respond(exchange)
        return
    exchange.answer(302, b"", {"Location": other + exchange.path})


@_lie("redirect loop", "R", content=False)
def _redirect_loop(exchange: Exchange, _: bytes) -> None:
    exchange.answer(302, b"", {"Location": exchange.path})


@_lie("redirect to ever new places", "R", content=False)
def _redirect_on(exchange: Exchange, _: bytes) -> None:
    exchange.answer(307, b"", {"Location": f"{exchange.path}?step={int(exchange.query.get('step', 0)) + 1}"})


# Connections, and what isn't HTTP.


@_lie("reset", "R", content=False)
def _reset(exchange: Exchange, _: bytes) -> None:
    exchange.reset()


LIES["reset once"] = Lie("reset once", "A", _reset, False, 1, False)


@_lie("reset half-way", "R")
def _reset_half_way(exchange: Exchange, data: bytes) -> None:
    _short_body(exchange, data)
    exchange.reset()


@_lie("no answer", "R", content=False)
def _no_answer(exchange: Exchange, _: bytes) -> None:
    exchange.close()


@_lie("silence", "R", content=False, waits=True)
def _silence(exchange: Exchange, _: bytes) -> None:
    exchange.pause(3600)


@_lie("drip of headers", "R", content=False, waits=True)
def _drip_headers(exchange: Exchange, _: bytes) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\n")
    while True:
        for byte in b"X-Slow: a\r\n":
            exchange.raw(bytes([byte]))
            exchange.pause(DRIP_SECONDS)


@_lie("garbage", "R", content=False)
def _garbage(exchange: Exchange, _: bytes) -> None:
    exchange.raw(b"\x00\xff\x1b[2J garbage\r\n\r\n" + bytes(range(256)))
    exchange.close()


@_lie("huge header", "R", content=False)
def _huge_header(exchange: Exchange, _: bytes) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\nX-Huge: ")
    for _ in range(160):
        exchange.raw(b"x" * PIECE)
    exchange.raw(b"\r\nContent-Length: 0\r\n\r\n")


@_lie("many headers", "R", content=False)
def _many_headers(exchange: Exchange, _: bytes) -> None:
    exchange.raw(b"HTTP/1.1 200 OK\r\n" + b"X-Many: y\r\n" * 100_000 + b"Content-Length: 0\r\n\r\n")


@_lie("length that is none", "R")
def _odd_length(exchange: Exchange, data: bytes) -> None:
    exchange.head(200, {"Content-Length": "9" * 5000, "Connection": "close"})
    exchange.body_bytes(data[: len(data) // 2])
    exchange.close()


def names(outcome: Literal["A", "R"] | None = None) -> list[str]:
    """Return the names of the lies with an outcome, or of all."""
    return [name for name, lie in LIES.items() if outcome in (None, lie.outcome)]


def after_first(server: LoopbackServer, fits: Callable[[Seen], bool], change: Callable[[], Any]) -> None:
    """Change a server between the first request that fits and the second: a tag that moves, a replaced file."""
    came = 0

    def hook(seen: Seen) -> None:
        nonlocal came
        came += fits(seen)
        if came == 2 and fits(seen):
            came += 1
            change()

    server.before.append(hook)
