"""The file server: what it hands out, the requests of good and of hostile clients, and the command around it."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import splitbundle
from splitbundle.cli.main import main
from splitbundle.errors import BundleError
from splitbundle.sharing.file_requests import byte_range, path_of, pull_command
from splitbundle.sharing.file_server import MAX_HEAD, FileServer
from splitbundle.sharing.served_files import ServedFiles
from tests.support.command_line import run as run_command
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
NAME = "gpt2.splitbundle"
LAYER = f"{NAME}/layer-000.safetensors"
SIGNATURE = "signatures/a1.sigstore.json"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a bundle, an archive, and much that nobody should get."""
    root = tmp_path / "served"
    shutil.copytree(GOLDEN, root / NAME)
    (root / NAME / "signatures").mkdir()
    (root / NAME / SIGNATURE).write_text("{}\n")
    (root / NAME / "signatures" / "private.key").write_text("secret\n")
    (root / NAME / "notes.txt").write_text("secret\n")
    (root / "one.tar").write_bytes(bytes(range(256)) * 40)
    (root / "secret.txt").write_text("secret\n")
    (root / "other").mkdir()
    (root / "other" / "manifest.json").write_text("secret\n")
    (tmp_path / "secret.txt").write_text("secret\n")
    (root / "linked.tar").symlink_to(tmp_path / "secret.txt")
    (root / "linked.splitbundle").symlink_to(root / NAME)
    return root


@contextlib.contextmanager
def serving(served: Path, **options: object) -> Iterator[FileServer]:
    """Serve a directory in a thread."""
    server = FileServer(ServedFiles(served), port=0, **options)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.stop()


Ask = Callable[..., tuple[int, dict[str, str], bytes]]


@pytest.fixture
def lines() -> list[str]:
    """The lines of the log."""
    return []


@pytest.fixture
def server(directory: Path, lines: list[str]) -> Iterator[FileServer]:
    with serving(directory, log=lines.append) as found:
        yield found


@pytest.fixture
def ask(server: FileServer) -> Iterator[Ask]:
    """Ask on one connection for all requests."""
    connection = http.client.HTTPConnection(server.own_host, timeout=60)

    def call(path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, f"/{path}", headers=named)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()

    yield call
    connection.close()


def exchange(server: FileServer, sent: bytes) -> bytes:
    """Send bytes, and return all that comes until the server closes the connection."""
    with socket.create_connection(server.server_address[:2], timeout=60) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(2**16), b""))


def test_every_file_of_a_bundle_comes_with_its_digest(ask: Ask, directory: Path) -> None:
    bundle = splitbundle.open(directory / NAME)
    for path, listed in bundle.manifest.files.items():
        status, headers, body = ask(f"{NAME}/{path}")
        assert (status, hashlib.sha256(body).hexdigest()) == (200, listed.sha256)
        assert headers["ETag"] == f'"{listed.sha256}"'
        assert headers["Content-Length"] == str(listed.size)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Accept-Ranges"] == "bytes"
        assert "html" not in headers["Content-Type"]
    for path in ("manifest.json", "SHA256SUMS", SIGNATURE):
        status, headers, body = ask(f"{NAME}/{path}")
        assert (status, body) == (200, (directory / NAME / path).read_bytes())
        assert headers["ETag"] == f'"{hashlib.sha256(body).hexdigest()}"'
    assert ask("one.tar")[2] == (directory / "one.tar").read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "secret.txt",
        "other/manifest.json",
        "linked.tar",
        "linked.splitbundle/manifest.json",
        f"{NAME}/notes.txt",
        f"{NAME}/signatures/private.key",
        f"{NAME}/signatures/../notes.sigstore.json",
        f"{NAME}/signatures",
        f"{NAME}/",
        NAME,
        f"{NAME}//manifest.json",
        f"{NAME}/./manifest.json",
        f"{NAME}/../secret.txt",
        "../secret.txt",
        "..%2fsecret.txt",
        "%2e%2e/secret.txt",
        "%2e%2e%2fsecret.txt",
        "..%5csecret.txt",
        "..%c0%afsecret.txt",
        "%252e%252e/secret.txt",
        f"{NAME}/manifest.json%00",
        f"{NAME}/manifest.json%00.tar",
        f"{NAME}%2fmanifest.json/..",
        f"{NAME.upper()}/manifest.json",
        f"{NAME}/MANIFEST.JSON",
        f"{NAME}/manifest.json:stream",
        "one.tar/",
        "one.tar/x",
        "%",
        "%zz",
        "C:/secret.txt",
        "http://127.0.0.1/one.tar",
    ],
)
def test_nothing_else_is_served(ask: Ask, path: str) -> None:
    status, headers, body = ask(path)
    assert status == 404
    assert b"secret" not in body
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_a_file_that_became_a_link_or_another_size_is_not_served(ask: Ask, directory: Path, tmp_path: Path) -> None:
    place = directory / LAYER
    data = place.read_bytes()
    assert ask(LAYER)[0] == 200
    place.write_bytes(data + b"x")
    assert ask(LAYER)[0] == 404
    place.unlink()
    assert ask(LAYER)[0] == 404
    (tmp_path / "elsewhere").write_bytes(data)
    place.symlink_to(tmp_path / "elsewhere")
    assert ask(LAYER)[0] == 404
    place.unlink()
    os.mkfifo(place)
    assert ask(LAYER)[0] == 404
    place.unlink()
    place.write_bytes(data)
    assert ask(LAYER)[2] == data


def test_a_bundle_that_is_replaced_is_served_anew(ask: Ask, directory: Path) -> None:
    before = ask("")[2].decode()
    assert before.count("sha256:") == 1
    old = splitbundle.open(directory / NAME).id
    (directory / NAME).rename(directory / "gone")
    assert ask(LAYER)[0] == 404
    assert NAME not in ask("")[2].decode()
    shutil.copytree(TESTS / "golden" / "v1.0" / "llama.splitbundle", directory / NAME)
    assert old in before
    assert splitbundle.open(directory / NAME).id in ask("")[2].decode()
    assert hashlib.sha256(ask(LAYER)[2]).hexdigest() == hashlib.sha256((directory / LAYER).read_bytes()).hexdigest()


def test_a_broken_manifest_serves_nothing(directory: Path, ask: Ask) -> None:
    (directory / NAME / "manifest.json").write_text("[")
    assert ask(f"{NAME}/manifest.json")[0] == 404
    assert ask(LAYER)[0] == 404
    assert [name for name, _ in ServedFiles(directory).left_out()] == [NAME]
    with pytest.raises(BundleError, match="json"):
        ServedFiles(directory / NAME)


@pytest.mark.parametrize(
    ("header", "status", "first", "stop"),
    [
        ("bytes=0-", 206, 0, 70624),
        ("bytes=100-", 206, 100, 70624),
        ("bytes=100-199", 206, 100, 200),
        ("bytes=70623-", 206, 70623, 70624),
        ("bytes=70000-99999999", 206, 70000, 70624),
        ("bytes=-5", 206, 70619, 70624),
        ("bytes=-99999999", 206, 0, 70624),
        ("bytes=0-0", 206, 0, 1),
        ("bytes=5-4", 200, 0, 70624),
        ("bytes=0-1,5-6", 200, 0, 70624),
        ("bytes=-", 200, 0, 70624),
        ("bytes=x-", 200, 0, 70624),
        ("bytes=٣-", 200, 0, 70624),
        ("bytes=1-9999999999999999999999", 200, 0, 70624),
        ("lines=1-2", 200, 0, 70624),
        ("", 200, 0, 70624),
        ("bytes=70624-", 416, 0, 0),
        ("bytes=999999999-", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
    ],
)
def test_ranges(ask: Ask, directory: Path, header: str, status: int, first: int, stop: int) -> None:
    got, headers, body = ask(LAYER, Range=header.encode().decode("latin-1"))
    assert got == status
    if status == 416:
        assert headers["Content-Range"] == "bytes */70624"
        return
    assert body == (directory / LAYER).read_bytes()[first:stop]
    assert headers.get("Content-Range") == (f"bytes {first}-{stop - 1}/70624" if status == 206 else None)


def test_validators(ask: Ask, directory: Path) -> None:
    data = (directory / LAYER).read_bytes()
    tag = f'"{hashlib.sha256(data).hexdigest()}"'
    for same in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        status, headers, body = ask(LAYER, If_None_Match=same)
        assert (status, headers["ETag"], body) == (304, tag, b"")
    assert ask(LAYER, If_None_Match='"x"')[0] == 200
    assert ask(LAYER, Range="bytes=1-2", If_Range=tag)[0] == 206
    assert ask(LAYER, Range="bytes=1-2", If_Range='"x"')[::2] == (200, data)
    before = ask("one.tar")[1]["ETag"]
    assert ask("one.tar", If_None_Match=before)[0] == 304
    replaced = directory / "new.part"
    replaced.write_bytes(b"y" * 10240)
    replaced.rename(directory / "one.tar")
    assert ask("one.tar", If_None_Match=before)[0] == 200


def test_head_has_the_headers_and_no_body(ask: Ask) -> None:
    for path in (LAYER, "", "nothing", "one.tar"):
        status, headers, _ = ask(path)
        got, same, body = ask(path, "HEAD")
        assert (got, body) == (status, b"")
        assert {**same, "Date": ""} == {**headers, "Date": ""}


def test_the_index_names_the_command(ask: Ask, directory: Path, server: FileServer) -> None:
    status, headers, body = ask("")
    text = body.decode()
    assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    assert splitbundle.open(directory / NAME).id in text
    assert f"splitbundle pull http://{server.own_host}/{NAME}\n" in text
    assert f"http://{server.own_host}/one.tar\n" in text
    assert "linked" not in text
    assert "secret" not in text


def test_a_single_bundle_is_served_under_its_name(directory: Path) -> None:
    with serving(directory / NAME) as server:
        for path, status in ((f"{NAME}/manifest.json", b"200"), ("manifest.json", b"404"), (f"{NAME}/x", b"404")):
            got = exchange(server, f"GET /{path} HTTP/1.0\r\n\r\n".encode())
            assert got.split(b" ", 2)[1] == status


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1.evil.example\r\n\r\n", 421),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
        (b"GET / HTTP/x\r\nHost: localhost\r\n\r\n", 400),
        (b"GET http://127.0.0.1/one.tar HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),  # TLS
        (b"<script>alert(1)</script>\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc", 405),
        (b"DELETE /one.tar HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc", 413),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413),
        (b"GET /" + b"a" * MAX_HEAD + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * MAX_HEAD, 431),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * MAX_HEAD + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
    ],
)
def test_hostile_requests(server: FileServer, sent: bytes, status: int) -> None:
    got = exchange(server, sent)
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 ")
    assert int(head.split(b" ", 2)[1]) == status
    assert head.count(b"HTTP/1.1") == 1  # the content isn't read as a second request
    assert b"script" not in body
    assert exchange(server, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")  # it goes on


def test_the_log_has_a_line_for_each_request_without_control_characters(
    server: FileServer, ask: Ask, lines: list[str]
) -> None:
    ask(LAYER)
    ask(LAYER, Range="bytes=7-9")
    exchange(server, b"GET /\x1b[31m\x07\xff HTTP/1.0\r\n\r\n")
    exchange(server, b"GET /" + b"a" * 5000 + b" HTTP/1.0\r\n\r\n")
    deadline = time.monotonic() + 60  # a line is written after its answer, by the thread of its connection
    while len(lines) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert f"127.0.0.1 GET /{LAYER} HTTP/1.1 200 70624" in lines
    assert f"127.0.0.1 GET /{LAYER} HTTP/1.1 206 3" in lines
    assert len(lines) == 4
    assert all(line.isprintable() and len(line) < 300 for line in lines)


def test_a_client_that_drips_is_cut_off(directory: Path) -> None:
    """It sends a byte now and then, so that no single wait is long: only a deadline for the whole request helps."""
    with serving(directory, seconds=0.3) as server, socket.create_connection(server.server_address[:2]) as slow:
        slow.settimeout(60)
        with contextlib.suppress(OSError):
            while True:  # until the server closes the connection
                slow.sendall(b"X")
                slow.settimeout(0.05)
                try:
                    if not slow.recv(1):
                        break
                except TimeoutError:
                    pass
        assert exchange(server, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_client_that_reads_nothing_is_cut_off(directory: Path) -> None:
    (directory / "large.tar").write_bytes(bytes(64 * 2**20))  # more than the buffers of the sockets
    lines: list[str] = []
    ended = threading.Event()

    def log(line: str) -> None:
        lines.append(line)
        ended.set()

    with serving(directory, seconds=0.3, log=log) as server, socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        slow.connect(server.server_address[:2])
        slow.sendall(b"GET /large.tar HTTP/1.0\r\n\r\n")
        assert ended.wait(60)
    assert int(lines[0].split()[-1]) < 64 * 2**20


def test_too_many_connections(directory: Path) -> None:
    with serving(directory, connections=2) as server, contextlib.ExitStack() as held:
        for _ in range(2):
            connection = held.enter_context(socket.create_connection(server.server_address[:2], timeout=60))
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(9) == b"HTTP/1.1 "
        got = exchange(server, b"")
        assert got.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 1\r\n" in got
        held.close()
        while not exchange(server, b"GET / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 "):
            pass


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_stays_flat(directory: Path) -> None:
    """A file of 128 MiB is sent by the system from its cache."""
    with (directory / "large.tar").open("wb") as file:
        file.truncate(128 * 2**20)
    with serving(directory) as server, socket.create_connection(server.server_address[:2], timeout=60) as connection:
        connection.sendall(b"GET /large.tar HTTP/1.0\r\n\r\n")
        before, most, view, moved = memory(), 0, memoryview(bytearray(2**20)), 0
        while count := connection.recv_into(view):
            moved += count
            most = max(most, memory()) if moved % 16 == 0 else most
    assert moved > 128 * 2**20
    assert max(most, memory()) - before < 32 * 2**20


def memory() -> int:
    """Return the bytes of private memory of this process."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/a/b?x=%00", "a/b"),
        ("/a%2Fb", "a/b"),
        ("/", ""),
        ("/?x", ""),
        ("*", None),
        ("a", None),
        ("//a", None),
        ("/a/", None),
        ("/a/../b", None),
        ("/a/.../b", None),
        ("/%2e%2e", None),
        ("/a\\b", None),
        ("/a%0d%0ab", None),
        ("/a%7f", None),
        ("/%ff", None),
    ],
)
def test_paths(target: str, path: str | None) -> None:
    assert path_of(target) == path


def test_an_empty_file_has_no_range() -> None:
    assert byte_range(None, 0) is None
    assert byte_range("bytes=0-", 0) == (0, 0)


@pytest.fixture
def started(directory: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command in a process of its own."""
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "splitbundle", "serve-files", str(directory), "--port", "0", *options]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command(
    started: Callable[..., subprocess.Popen[str]], directory: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = started("--json")
    assert process.stdout is not None
    said = json.loads(process.stdout.readline())
    bundle = splitbundle.open(directory / NAME)
    assert said["ok"] is True
    assert said["bundles"] == [{"name": NAME, "bundle_id": bundle.id}]
    assert said["archives"] == ["one.tar"]
    target = tmp_path / "pulled.splitbundle"
    reference = f"{said['url']}{NAME}@{bundle.id}"
    assert main(["pull", reference, "--output", str(target), "--quiet"]) == 0
    assert splitbundle.open(target).id == bundle.id
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"GET /{LAYER} HTTP/1.1 200 70624" in err
    assert "Traceback" not in err


def test_quiet_logs_nothing(started: Callable[..., subprocess.Popen[str]]) -> None:
    process = started("--quiet")
    assert process.stdout is not None
    url = process.stdout.readline().split()[0]
    connection = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=60)
    connection.request("GET", "/one.tar")
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert "GET" not in err


def test_what_the_command_refuses(
    directory: Path, tmp_path: Path, server: FileServer, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run_command(capsys, "serve-files", tmp_path / "none")
    assert (status, "[file.missing]" in err) == (1, True)
    status, _, err = run_command(capsys, "serve-files", directory / "one.tar")
    assert (status, "got a file" in err) == (1, True)
    status, _, err = run_command(capsys, "serve-files", directory, "--port", server.server_address[1])
    assert (status, "[usage.arguments] --port" in err) == (2, True)
    status, _, err = run_command(capsys, "serve-files", directory, "--host", "nowhere.invalid")
    assert (status, "[usage.arguments] --host" in err) == (2, True)
    status, _, err = run_command(capsys, "serve-files", directory, "--port", "65536")
    assert status == 2


def test_a_part_and_a_name_that_no_url_has(directory: Path, tmp_path: Path) -> None:
    splitbundle.open(directory / NAME).extract(tmp_path / "more" / "part.splitbundle", "trunk")
    (tmp_path / "more" / "my model.splitbundle").mkdir()
    served = ServedFiles(tmp_path / "more")
    assert [(each.name, each.shards) for each in served.bundles()] == [("part.splitbundle", ("trunk",))]
    assert [(name, problem.code) for name, problem in served.left_out()] == [("my model.splitbundle", "input.value")]
    assert pull_command("http://127.0.0.1:1/", "x", ("trunk",)).endswith("http://127.0.0.1:1/x --shard trunk")


def test_a_note_where_others_can_read(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "splitbundle", "serve-files", str(directory), "--port", "0", "--host", "0.0.0.0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stderr is not None
        try:
            assert "everybody who reaches 0.0.0.0:" in process.stderr.readline()
        finally:
            process.kill()
