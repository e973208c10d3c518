"""Lies about content: its bytes, its length, its ranges, its pace."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from typing import Final

from tests.support.http_server import Exchange
from tests.support.lie import LIES, Lie, cut, honest, lie, wrong

DRIP_SECONDS: Final = 0.2
PAGE: Final = b"<!DOCTYPE html>\n<html><head><title>Log in</title></head><body><form>...</form></body></html>\n"
PIECE: Final = 2**16


# Bodies.


@lie("wrong bytes", "R")
def _wrong_bytes(exchange: Exchange, data: bytes) -> None:
    status, headers, body = honest(exchange, wrong(data))
    exchange.head(status, headers)
    exchange.body_bytes(body)


@lie("wrong last byte", "R")
def _wrong_last_byte(exchange: Exchange, data: bytes) -> None:
    status, headers, body = honest(exchange, data[:-1] + wrong(data[-1:]))
    exchange.head(status, headers)
    exchange.body_bytes(body)


@lie("short body", "R")
def _short_body(exchange: Exchange, data: bytes) -> None:
    """Send the first 10 bytes of the file, whatever is asked for, so that no number of tries gets further."""
    status, headers, body = honest(exchange, data)
    exchange.head(status, headers)
    exchange.body_bytes(body[: max(0, 10 - exchange.range_start)])
    exchange.close()


LIES["short body once"] = Lie("short body once", "A", cut, True, 1, False)


@lie("shorter length", "R")
def _shorter_length(exchange: Exchange, data: bytes) -> None:
    status, headers, body = honest(exchange, data[:-1])
    exchange.head(status, headers)
    exchange.body_bytes(body)


@lie("longer length", "R")
def _longer_length(exchange: Exchange, data: bytes) -> None:
    status, headers, body = honest(exchange, data + b"x")
    exchange.head(status, headers)
    exchange.body_bytes(body)


@lie("one byte more without a length", "R")
def _one_more(exchange: Exchange, data: bytes) -> None:
    status, headers, body = honest(exchange, data + b"x")
    del headers["Content-Length"]
    exchange.head(status, {**headers, "Connection": "close"})
    exchange.body_bytes(body)
    exchange.close()


@lie("no length", "A")
def _no_length(exchange: Exchange, data: bytes) -> None:
    """Send the true bytes, and show their end by closing the connection, as HTTP/1.0 servers do it."""
    status, headers, body = honest(exchange, data)
    del headers["Content-Length"]
    exchange.head(status, {**headers, "Connection": "close"})
    exchange.body_bytes(body)
    exchange.close()


@lie("chunks", "A")
def _chunks(exchange: Exchange, data: bytes) -> None:
    """Send the true bytes in chunks of odd sizes."""
    status, headers, body = honest(exchange, data)
    del headers["Content-Length"]
    exchange.head(status, {**headers, "Transfer-Encoding": "chunked"})
    for at in range(0, len(body), 9973):
        piece = body[at : at + 9973]
        exchange.raw(b"%x\r\n" % len(piece))
        exchange.body_bytes(piece)
        exchange.raw(b"\r\n")
    exchange.raw(b"0\r\n\r\n")


def _endless(exchange: Exchange, data: bytes, headers: dict[str, str], wrap: Callable[[bytes], bytes]) -> None:
    exchange.head(200, {"Content-Type": "application/octet-stream", **headers})
    exchange.body_bytes(wrap(data))
    while True:
        exchange.body_bytes(wrap(bytes(PIECE)))
        exchange.pause(0)


@lie("endless body without a length", "R")
def _endless_body(exchange: Exchange, data: bytes) -> None:
    _endless(exchange, data, {"Connection": "close"}, lambda piece: piece)


@lie("endless body in chunks", "R")
def _endless_chunks(exchange: Exchange, data: bytes) -> None:
    _endless(exchange, data, {"Transfer-Encoding": "chunked"}, lambda piece: b"%x\r\n%b\r\n" % (len(piece), piece))


@lie("endless body with a length", "R")
def _huge_length(exchange: Exchange, data: bytes) -> None:
    _endless(exchange, data, {"Content-Length": str(2**60)}, lambda piece: piece)


@lie("drip", "R", waits=True)
def _drip(exchange: Exchange, data: bytes) -> None:
    status, headers, body = honest(exchange, data)
    exchange.head(status, headers)
    for at in range(len(body)):
        exchange.body_bytes(body[at : at + 1])
        exchange.pause(DRIP_SECONDS)


@lie("stall", "R", waits=True)
def _stall(exchange: Exchange, data: bytes) -> None:
    """Send the first 10 bytes, and then nothing."""
    status, headers, body = honest(exchange, data)
    exchange.head(status, headers)
    exchange.body_bytes(body[: max(0, 10 - exchange.range_start)])
    exchange.pause(3600)


@lie("changes half-way", "R")
def _changes(exchange: Exchange, data: bytes) -> None:
    half = len(data) // 2
    status, headers, body = honest(exchange, data[:half] + wrong(data[half:]))
    exchange.head(status, headers)
    exchange.body_bytes(body)


@lie("changes at resume", "R")
def _changes_at_resume(exchange: Exchange, data: bytes) -> None:
    """Break off in the middle of the true file. From then on, the file is another one."""
    if not exchange.times:
        cut(exchange, data)
        return
    _wrong_bytes(exchange, data)


@lie("gzip bomb", "R")
def _gzip_bomb(exchange: Exchange, data: bytes) -> None:
    made = io.BytesIO()
    with gzip.GzipFile(fileobj=made, mode="wb", compresslevel=9) as file:
        file.write(data + bytes(64 * 2**20))
    exchange.answer(200, made.getvalue(), {"Content-Type": "application/octet-stream", "Content-Encoding": "gzip"})


@lie("contradictory lengths", "R")
def _contradictory(exchange: Exchange, data: bytes) -> None:
    exchange.head(200, [("Content-Length", str(max(0, len(data) - 7))), ("Content-Length", str(len(data)))])
    exchange.body_bytes(data)
    exchange.close()


@lie("login page", "R")
def _login_page(exchange: Exchange, _: bytes) -> None:
    exchange.answer(200, PAGE, {"Content-Type": "text/html; charset=utf-8"})


@lie("login page as a file", "R")
def _login_page_as_file(exchange: Exchange, data: bytes) -> None:
    """A page of the right size, and with a type that says nothing."""
    exchange.answer(200, (PAGE + b" " * len(data))[: len(data)], {"Content-Type": "application/octet-stream"})


@lie("another document", "R")
def _another_document(exchange: Exchange, _: bytes) -> None:
    """A good JSON document that isn't the one that was asked for."""
    document = b'{"schemaVersion": 2, "config": {}, "layers": []}'
    exchange.answer(200, document, {"Content-Type": "application/vnd.oci.image.manifest.v1+json"})


# Ranges. The request for the whole file is cut off, so that a client asks for the rest.


@lie("200 in place of 206", "A")
def _whole_again(exchange: Exchange, data: bytes) -> None:
    if not exchange.times:
        cut(exchange, data)
        return
    exchange.answer(200, data, {"Content-Type": "application/octet-stream"})


def _wrong_range(exchange: Exchange, data: bytes, text: str) -> None:
    status, headers, body = honest(exchange, data)
    if status == 200:
        cut(exchange, data)
        return
    exchange.head(206, {**headers, "Content-Range": text})
    exchange.body_bytes(body)


@lie("range of another place", "R")
def _range_elsewhere(exchange: Exchange, data: bytes) -> None:
    start = exchange.range_start
    _wrong_range(exchange, data, f"bytes {start - 1}-{len(data) - 2}/{len(data)}")


@lie("range of another file", "R")
def _range_of_another(exchange: Exchange, data: bytes) -> None:
    _wrong_range(exchange, data, f"bytes {exchange.range_start}-{len(data) - 1}/{len(data) + 99}")


@lie("range that is none", "R")
def _range_garbage(exchange: Exchange, data: bytes) -> None:
    _wrong_range(exchange, data, "bytes x-\xff/9" + "9" * 5000)


@lie("416", "R")
def _no_such_range(exchange: Exchange, data: bytes) -> None:
    if "range" not in exchange.headers:
        _short_body(exchange, data)
        return
    exchange.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})


@lie("416 once", "A")
def _no_such_range_once(exchange: Exchange, data: bytes) -> None:
    """The connection breaks, and the server doesn't know the rest. It sends the whole file to one who asks for it."""
    if not exchange.times:
        cut(exchange, data)
    elif "range" in exchange.headers:
        exchange.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    else:
        exchange.answer(200, data, {"Content-Type": "application/octet-stream"})


# Connections that end, and lengths that are none.


@lie("reset half-way", "R")
def _reset_half_way(exchange: Exchange, data: bytes) -> None:
    _short_body(exchange, data)
    exchange.reset()


@lie("length that is none", "R")
def _odd_length(exchange: Exchange, data: bytes) -> None:
    exchange.head(200, {"Content-Length": "9" * 5000, "Connection": "close"})
    exchange.body_bytes(data[: len(data) // 2])
    exchange.close()
