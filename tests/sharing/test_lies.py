"""Every lie is told: seen by a client over a raw socket, which believes nothing."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.support import lies
from tests.support.lies import LIES
from tests.support.static_server import StaticFiles, static_server

TRUE = bytes(range(256)) * 20
STATUSES = {
    "401": 401,
    "403": 403,
    "404": 404,
    "429": 429,
    "429 for ever": 429,
    "500": 500,
    "503": 503,
    "204": 204,
    "304": 304,
    "999": 999,
    "429 once": 429,
    "429 with a date": 429,
    "429 with a date in the past": 429,
    "429 with nonsense": 429,
    "503 twice": 503,
    "redirect to a file": 302,
    "redirect to FTP": 302,
    "redirect to data": 302,
    "redirect to nowhere": 302,
    "redirect to nonsense": 302,
    "redirect to another host": 302,
    "redirect loop": 302,
    "redirect to ever new places": 307,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(TRUE)
    return tmp_path


def get(
    server: StaticFiles, start: int | None = None, *, limit: int = 2**18, seconds: float = 60, path: str = "/file"
) -> bytes:
    """Ask once, and return what comes: at most ``limit`` bytes, in some time."""
    host, port = server.host.split(":")
    wanted = "" if start is None else f"Range: bytes={start}-\r\n"
    got = b""
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {server.host}\r\n{wanted}Connection: close\r\n\r\n".encode())
        ends = time.monotonic() + seconds
        try:
            while len(got) < limit and time.monotonic() < ends and (piece := connection.recv(2**16)):
                got += piece
        except TimeoutError:
            pass
    return got


def split(got: bytes) -> tuple[int, str, bytes]:
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), head.decode("latin-1"), body


def served(root: Path, name: str) -> StaticFiles:
    return static_server(root, lies={"/file": name})


@pytest.mark.parametrize("name", ["wrong bytes", "wrong last byte", "changes half-way", "login page as a file"])
def test_other_bytes_of_the_right_size(root: Path, name: str) -> None:
    with served(root, name) as server:
        status, head, body = split(get(server))
        assert (status, len(body)) == (200, len(TRUE))
        assert f"Content-Length: {len(TRUE)}" in head
        assert body != TRUE
        assert (body[: len(TRUE) // 2] == TRUE[: len(TRUE) // 2]) is (name in ("wrong last byte", "changes half-way"))
        if name != "login page as a file":
            status, head, rest = split(get(server, 100))
            assert (status, rest) == (206, body[100:])
        assert server.sent == sum(len(each) for each in ((body, rest) if "login" not in name else (body,)))


@pytest.mark.parametrize(
    ("name", "stated", "sent"),
    [
        ("short body", len(TRUE), 10),
        ("shorter length", len(TRUE) - 1, len(TRUE) - 1),
        ("longer length", len(TRUE) + 1, len(TRUE) + 1),
        ("one byte more without a length", None, len(TRUE) + 1),
        ("no length", None, len(TRUE)),
        ("reset half-way", len(TRUE), 10),
    ],
)
def test_other_sizes(root: Path, name: str, stated: int | None, sent: int) -> None:
    with served(root, name) as server:
        if name == "reset half-way":
            with pytest.raises(ConnectionResetError):
                for _ in range(100):  # the reset may overtake the bytes, and be seen at the next
                    _whole_or_reset(server)
            return
        _, head, body = split(get(server))
        assert len(body) == sent
        assert ("Content-Length" in head) is (stated is not None)
        assert stated is None or f"Content-Length: {stated}\r\n" in head + "\r\n"
        assert body[: len(TRUE)] == TRUE[:sent]


def _whole_or_reset(server: StaticFiles) -> None:
    host, port = server.host.split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(b"GET /file HTTP/1.1\r\nHost: x\r\n\r\n")
        while connection.recv(2**16):
            pass


def test_once_and_then_the_truth(root: Path) -> None:
    with served(root, "short body once") as server:
        half = split(get(server))[2]
        assert half == TRUE[: len(TRUE) // 2]
        status, _, rest = split(get(server, len(half)))
        assert (status, half + rest) == (206, TRUE)
        assert server.sent == len(TRUE)
        assert len(server.requests) == 2
    with served(root, "503 twice") as server:
        assert [split(get(server))[0] for _ in range(4)] == [503, 503, 200, 200]
    with served(root, "reset once") as server:
        with pytest.raises(ConnectionResetError):
            _whole_or_reset(server)
        assert split(get(server))[2] == TRUE


@pytest.mark.parametrize("name", [name for name in LIES if name.startswith("endless")])
def test_endless_bodies(root: Path, name: str) -> None:
    with served(root, name) as server:
        got = get(server, limit=4 * 2**20)
        assert len(got) >= 4 * 2**20
        assert ("chunked" in name) is (b"Transfer-Encoding: chunked" in got[:300]) or "chunks" in name
        assert (b"Content-Length: 1152921504606846976" in got[:300]) is (name == "endless body with a length")


@pytest.mark.parametrize("name", [name for name, lie in LIES.items() if lie.waits])
def test_slow_answers(root: Path, name: str) -> None:
    with served(root, name) as server:
        got = get(server, seconds=1.0)
        body = got.partition(b"\r\n\r\n")[2]
        if name == "silence":
            assert got == b""
        elif name == "drip of headers":
            assert got.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"\r\n\r\n" not in got
            assert len(got) < 40
        else:
            assert 0 < len(body) <= 10


@pytest.mark.parametrize("name", STATUSES)
def test_statuses(root: Path, name: str) -> None:
    with served(root, name) as server:
        status, head, body = split(get(server))
        assert status == STATUSES[name]
        assert TRUE not in body
        assert ("Retry-After: " in head) is (name.startswith("429") or name == "503 twice")
        if name == "redirect to another host":
            place = head.partition("Location: ")[2].split("\r\n")[0]
            assert place.startswith("http://127.0.0.2:")
            other = static_at(place)
            assert other == TRUE
            assert [seen.host.split(":")[0] for seen in server.requests] == ["127.0.0.1", "127.0.0.2"]
        if name == "redirect loop":
            assert "Location: /file\r\n" in head + "\r\n"
        if name == "redirect to ever new places":
            assert "/file?step=8" in split(get(server, path="/file?step=7"))[1]


def static_at(url: str) -> bytes:
    host, _, path = url.removeprefix("http://").partition("/")
    name, port = host.split(":")
    with socket.create_connection((name, int(port)), timeout=60) as connection:
        connection.sendall(f"GET /{path} HTTP/1.0\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(2**16), b"")).partition(b"\r\n\r\n")[2]


def test_a_date_comes_in_a_second(root: Path) -> None:
    with served(root, "429 with a date") as server:
        assert " GMT" in split(get(server))[1].partition("Retry-After: ")[2].split("\r\n")[0]
        assert split(get(server))[2] == TRUE


@pytest.mark.parametrize("name", ["200 in place of 206", "416 once", "416", "changes at resume"])
def test_after_half_a_file(root: Path, name: str) -> None:
    with served(root, name) as server:
        first = split(get(server))[2]
        assert first == TRUE[: len(TRUE) // 2] or (name == "416" and first == TRUE[:10])
        status, head, body = split(get(server, len(first)))
        if name == "200 in place of 206":
            assert (status, body) == (200, TRUE)
        elif name == "changes at resume":
            assert status == 206
            assert first + body != TRUE
            assert len(first + body) == len(TRUE)
        else:
            assert status == 416
            assert f"Content-Range: bytes */{len(TRUE)}" in head
            assert (split(get(server))[2] == TRUE) is (name == "416 once")


@pytest.mark.parametrize("name", [name for name in LIES if name.startswith("range")])
def test_wrong_ranges(root: Path, name: str) -> None:
    with served(root, name) as server:
        for _ in range(2):
            assert split(get(server))[2] == TRUE[: len(TRUE) // 2]
        status, head, body = split(get(server, 100))
        assert (status, body) == (206, TRUE[100:])
        assert "Content-Range: " in head
        assert f"Content-Range: bytes 100-{len(TRUE) - 1}/{len(TRUE)}\r\n" not in head + "\r\n"


def test_what_is_not_http(root: Path) -> None:
    with served(root, "garbage") as server:
        assert not get(server).startswith(b"HTTP")
    with served(root, "no answer") as server:
        assert get(server) == b""
    with served(root, "huge header") as server:
        assert get(server, limit=2**30).index(b"\r\n\r\n") > 10 * 2**20
    with served(root, "many headers") as server:
        assert get(server, limit=2**30).count(b"X-Many") == 100_000
    with served(root, "reset") as server, pytest.raises(ConnectionResetError):
        _whole_or_reset(server)
    with served(root, "contradictory lengths") as server:
        assert split(get(server))[1].count("Content-Length") == 2
    with served(root, "length that is none") as server:
        assert "9" * 5000 in split(get(server))[1]


def test_what_is_another_file(root: Path) -> None:
    with served(root, "login page") as server:
        _, head, body = split(get(server))
        assert "text/html" in head
        assert body == lies.PAGE
    with served(root, "another document") as server:
        assert split(get(server))[2].startswith(b'{"schemaVersion": 2')
    with served(root, "gzip bomb") as server:
        _, head, body = split(get(server))
        assert "Content-Encoding: gzip" in head
        assert len(body) * 500 < len(gzip.decompress(body))


def test_every_lie_is_in_a_test_above() -> None:
    text = Path(__file__).read_text("utf-8")
    groups = ("endless", "range ")
    left = [
        name for name, lie in LIES.items() if not name.startswith(groups) and not lie.waits and f'"{name}"' not in text
    ]
    assert left == []
    assert {lie.outcome for lie in LIES.values()} == {"A", "R"}
    assert set(lies.names("A")) | set(lies.names("R")) == set(LIES)


def test_a_file_is_replaced_between_two_requests(root: Path) -> None:
    with static_server(root) as server:
        lies.after_first(server, lambda seen: seen.path == "/file", lambda: (root / "file").write_bytes(b"new"))
        assert [split(get(server))[2] for _ in range(3)] == [TRUE, b"new", b"new"]


def test_an_honest_server(root: Path) -> None:
    """Ranges, counters, a token, and several clients at once."""
    with static_server(root) as server:
        assert split(get(server))[::2] == (200, TRUE)
        status, head, body = split(get(server, 5000))
        assert (status, body) == (206, TRUE[5000:])
        assert f"Content-Range: bytes 5000-{len(TRUE) - 1}/{len(TRUE)}" in head
        assert split(get(server, len(TRUE)))[0] == 416
        assert server.sent == len(TRUE) + len(TRUE) - 5000
        assert [seen.method for seen in server.seen(path="/fi*")] == ["GET"] * 3
        assert split(get(server, path="/none"))[0] == 404
        assert split(get(server, path="/../etc/passwd"))[0] == 404
        server.reset_counters()
        threads = [threading.Thread(target=get, args=(server,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (server.sent, len(server.requests)) == (8 * len(TRUE), 8)
    with static_server(root, ranges=False) as server:
        assert split(get(server, 5000))[::2] == (200, TRUE)
    with static_server(root, token="secret") as server:
        assert split(get(server))[0] == 401
