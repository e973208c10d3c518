"""Who may compute with a server: strangers, stolen and revoked names, wrong tokens, and frames that are too long."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

import splitbundle
from splitbundle import BundleError, StageServer
from splitbundle.remote.address import METHOD, SERVICE, parse_address
from splitbundle.remote.carrier import Lost
from splitbundle.remote.channel import Channel
from splitbundle.remote.tls_files import read_identity
from splitbundle.serving import keys
from splitbundle.serving.stage_server import Budget
from splitbundle.wire import frames
from splitbundle.wire.messages import PROTOCOL, Close, Failure, Hello, Open, Opened, Renew, Run
from tests.support.stage_servers import StageProcess, open_files

pytestmark = pytest.mark.usefixtures("one_thread")
SHARD = "trunk-3"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities: a group with a server and two clients, and strangers."""
    root: Path = tmp_path_factory.mktemp("keys")
    for name in ("group", "strangers"):
        keys.init(root / name)
        keys.server(root / name, "localhost", "127.0.0.1")
    for client in ("alice", "bob"):
        keys.client(root / "group", client)
    keys.client(root / "strangers", "alice")
    return root


@pytest.fixture(scope="module")
def server(every_cut: splitbundle.Bundle, group: Path) -> Iterator[StageServer]:
    with StageServer(every_cut, SHARD, tls=group / "group" / "servers" / "localhost") as made:
        yield made


def channel(server: StageServer, directory: Path | None, token: str | None = None) -> Channel:
    return Channel(parse_address(server.url), None if directory is None else read_identity(directory), token)


def ask(way: Channel, message: Any, payload: bytes = b"") -> Any:
    return frames.unpack(way.call(frames.pack(message, (payload,)), 10.0))[0]


def run(session: str | None, number: int = 1, **changes: Any) -> Run:
    given = {"past": (0,), "count": (1,), "sequence": 1, "width": 96, "encoding": "float32"}
    return Run(session=session, number=number, **(given | changes))  # type: ignore[arg-type]


def test_a_client_of_the_group_computes(every_cut: splitbundle.Bundle, server: StageServer, group: Path) -> None:
    assert server.url.startswith("grpcs://")
    tls = group / "group" / "clients" / "alice"
    far, near = every_cut.stage(SHARD, remote=server.url, tls=str(tls)), every_cut.stage(SHARD, kernels="torch")
    hidden = torch.randn(2, 3, 96)
    with torch.no_grad():
        assert torch.equal(far(hidden), near(hidden))


@pytest.mark.parametrize("who", ["stranger", "nobody", "server", "unknown authority", "without TLS"])
def test_others_are_refused(
    every_cut: splitbundle.Bundle, server: StageServer, group: Path, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A client refuses its own certificate before it connects, if it is a server's. Here the server has to.
    monkeypatch.setattr("splitbundle.remote.peers.check_purpose", lambda *_: None)
    mixed = group / "mixed"  # it believes the server, which doesn't believe it
    if not mixed.exists():
        shutil.copytree(group / "strangers" / "clients" / "alice", mixed)
        shutil.copy(group / "group" / "ca.pem", mixed / "ca.pem")
    tls: dict[str, Any] = {
        "stranger": {"tls": mixed},
        "nobody": {},
        "server": {"tls": group / "group" / "servers" / "localhost"},
        "unknown authority": {"tls": group / "strangers" / "clients" / "alice"},
        "without TLS": {},
    }[who]
    url = server.url.replace("grpcs", "grpc") if who == "without TLS" else server.url
    before = dict(server.service.counts)
    with pytest.raises(BundleError) as caught:
        every_cut.stage(SHARD, remote=url, timeout=0.5, **tls)
    (problem,) = caught.value.problems
    if problem.code != "peer.identity":  # how gRPC sees the end of a connection is a matter of time
        assert problem.code == "peer.unreachable"
        assert who in ("without TLS", "server", "stranger")
        assert who == "without TLS" or "may not believe this client's certificate" in problem.got
    assert server.service.counts == before


def test_a_server_without_tls_is_told_from_a_wrong_certificate(every_cut: splitbundle.Bundle) -> None:
    with (
        StageServer(every_cut, SHARD) as server,
        pytest.raises(BundleError, match="one without TLS: grpc://") as caught,
    ):
        every_cut.stage(SHARD, remote=server.url.replace("grpc", "grpcs"), timeout=0.3)
    assert caught.value.codes == ("peer.unreachable",)


def test_a_client_at_its_quota_is_told_so(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, SHARD, budget=Budget(sessions_per_client=1)) as server, torch.no_grad():
        far = every_cut.stage(SHARD, remote=server.url, timeout=0.3)
        hidden, caches = torch.zeros(1, 1, 96), [far.cache(1, 8) for _ in range(2)]
        far(hidden, cache=caches[0])
        with pytest.raises(BundleError, match=r"server.quota.*End sessions of this client") as caught:
            far(hidden, cache=caches[1])
        assert caught.value.codes == ("peer.unreachable",)


def test_a_revoked_certificate_ends_running_connections(every_cut: splitbundle.Bundle, tmp_path: Path) -> None:
    root = tmp_path / "group"
    keys.init(root)
    keys.server(root, "localhost", "127.0.0.1")
    keys.client(root, "carol")
    lines: list[str] = []
    tls = root / "servers" / "localhost"
    with StageServer(every_cut, SHARD, tls=tls, log=lines.append) as server, torch.no_grad():
        far = every_cut.stage(SHARD, remote=server.url, tls=str(root / "clients" / "carol"), timeout=0.5)
        hidden = torch.zeros(1, 1, 96)
        cache = far.cache(1, 8)
        far(hidden, cache=cache)
        keys.revoke(root, "carol")
        with pytest.raises(BundleError, match=r"\[peer.identity\].*Ask who runs the server for a new certificate"):
            far(hidden, past=[1], cache=cache)
        assert "certificate:carol: a call was refused: peer.identity" in lines
        assert server.service.counts["call", "peer.identity"] == lines.count(lines[-1])
        (tls / "revoked.json").write_text("[")
        with pytest.raises(BundleError, match=r"\[peer.identity\]"):
            far(hidden, past=[1], cache=cache)
        assert any("revoked.json" in line and "What was revoked before stays revoked" in line for line in lines)
        keys.rotate(root, "carol")
        again = every_cut.stage(SHARD, remote=server.url, tls=str(root / "clients" / "carol"))
        again(hidden)


def test_a_stolen_session_is_no_session(server: StageServer, group: Path) -> None:
    alice, bob = (channel(server, group / "group" / "clients" / name) for name in ("alice", "bob"))
    opened = ask(alice, Open(rows=1, capacity=8))
    assert isinstance(opened, Opened)
    payload = bytes(4 * 96)
    for message in (run(opened.session), Renew(session=opened.session), Close(session=opened.session)):
        answer = ask(bob, message, payload if isinstance(message, Run) else b"")
        assert isinstance(answer, Failure)
        assert answer.code == "session.unknown"
    assert ask(alice, run(opened.session), payload).op == "ran"
    assert ask(alice, Close(session=opened.session)).op == "closed"


def test_tokens(every_cut: splitbundle.Bundle, group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = {"alice": "alice-has-a-long-token", "bob": "bob-has-another-token"}
    tls = str(group / "group" / "servers" / "localhost")
    with StageServer(every_cut, SHARD, tls=tls, tokens=tokens) as server, torch.no_grad():
        authority = group / "just-the-authority"
        authority.mkdir()
        (authority / "ca.pem").write_bytes((group / "group" / "ca.pem").read_bytes())
        for wrong in (None, "alice-has-a-long-tokem", tokens["alice"] * 2):
            with pytest.raises(BundleError, match=r"\[peer.identity\] .*a token that this server knows"):
                every_cut.stage(SHARD, remote=server.url, tls=str(authority), token=wrong)
        assert dict(server.service.counts) == {("call", "peer.identity"): 3}
        far = every_cut.stage(SHARD, remote=server.url, tls=str(authority), token=tokens["alice"])
        far(torch.zeros(1, 1, 96))
        monkeypatch.setenv("SPLITBUNDLE_STAGE_TOKEN", tokens["bob"])
        far = every_cut.stage(SHARD, remote=server.url, tls=str(authority))
        opened = ask(channel(server, authority, tokens["alice"]), Open(rows=1, capacity=4))
        stolen = ask(channel(server, authority, tokens["bob"]), Close(session=opened.session))
        assert stolen.code == "session.unknown"
    for weak in ({"a": "short"}, {"a": "has a space in it, which no header"}, {}):
        with pytest.raises(BundleError, match=r"\[input.value\]"):
            StageServer(every_cut, SHARD, tokens=weak)


def test_a_wrong_name_is_said_at_once(every_cut: splitbundle.Bundle, tmp_path: Path) -> None:
    root = tmp_path / "group"
    keys.init(root)
    keys.server(root, "elsewhere.example")
    keys.client(root, "alice")
    with StageServer(every_cut, SHARD, tls=root / "servers" / "elsewhere.example") as server:
        with pytest.raises(BundleError) as caught:
            every_cut.stage(SHARD, remote=server.url, tls=str(root / "clients" / "alice"), timeout=20)
        assert caught.value.codes == ("peer.identity",)


def test_a_server_that_does_not_know_the_client_is_left_for_one_that_does(
    every_cut: splitbundle.Bundle,
) -> None:
    known, changed = {"alice": "alice-has-a-long-token"}, {"alice": "alice-has-a-long-token"}
    with (
        StageServer(every_cut, SHARD, tokens=changed) as first,
        StageServer(every_cut, SHARD, tokens=known) as second,
        torch.no_grad(),
    ):
        far = every_cut.stage(SHARD, remote=[first.url, second.url], token=known["alice"])
        hidden = torch.randn(1, 1, 96)
        cache = far.cache(1, 8)
        far(hidden, cache=cache)
        assert len(first.service.sessions) == 1
        changed["alice"] = "another-token-of-today"
        far(hidden, past=[1], cache=cache)
        assert second.service.counts["run", "ok"] == 2
    with pytest.raises(BundleError, match=r"\[input.value\] token"):
        every_cut.stage(SHARD, remote="grpc://127.0.0.1:1", token="with a\nnewline")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_another_address_needs_tls(every_cut: splitbundle.Bundle, host: str) -> None:
    with pytest.raises(BundleError, match=r"\[server.address\] .*TLS, as other machines reach this address"):
        StageServer(every_cut, SHARD, host=host)
    shown = f"[{host}]" if ":" in host else host
    with pytest.raises(BundleError, match=r"\[input.value\] remote: expected grpcs://, as this is another machine"):
        every_cut.stage(SHARD, remote=f"grpc://{shown}:7000")


def test_frames_that_are_too_long(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, SHARD, budget=Budget(message=2**18)) as server:
        way = channel(server, None)
        with pytest.raises(BundleError, match=r"\[wire.size\]"):
            way.call(bytes(2**18 + 1), 10.0)
        assert not server.service.counts  # gRPC doesn't take it into memory
        assert ask(way, Hello(protocol=PROTOCOL, fingerprint=None, layers=None)).op == "welcome"


def test_a_message_that_is_no_call_of_the_method(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, SHARD) as server, grpc.insecure_channel(server.url[7:]) as raw:
        with pytest.raises(grpc.RpcError) as caught:
            raw.unary_unary("/splitbundle.v1.Stage/Other")(b"", timeout=5)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        answer = raw.unary_unary(f"/{SERVICE}/{METHOD}")(b"", timeout=5)
        assert frames.unpack(answer)[0].code == "wire.frame"  # type: ignore[union-attr]


# Nothing is left over.


def _disorderly(url: str, seed: int, sessions: int) -> None:
    """Open sessions, and leave them in all kinds of ways."""
    drawn = random.Random(seed)
    way = Channel(parse_address(url), None, None)
    payload = bytes(4 * 96 * 16)
    for _ in range(sessions):
        opened = ask(way, Open(rows=drawn.randint(1, 3), capacity=32))
        if isinstance(opened, Failure):
            time.sleep(0.01)
            continue
        rows = None
        for number in range(1, drawn.randint(1, 4)):
            rows = 1
            message = run(opened.session, number, past=(0,), count=(16,), sequence=16)
            frame = frames.pack(message, (payload,))
            way_out = drawn.random()
            if way_out < 0.3:  # hang up in the middle of a prompt
                try:
                    way.call(frame, drawn.random() * 0.002)
                except Lost:
                    break
            elif way_out < 0.4:
                way.send(frame, 0.001)
                way.close()
                break
            else:
                way.call(frame, 10.0)
        if drawn.random() < 0.3 and rows:
            ask(way, Close(session=opened.session))
        elif drawn.random() < 0.2:
            way.close()
    way.close()


CLIENTS = 8
"""Clients of a storm, at once."""


def _counted(process: StageProcess) -> tuple[int, int, int]:
    """Return the threads, the file descriptors and the resident memory (KiB) of a server, from the system."""
    root = Path(f"/proc/{process.process.pid}")
    status = dict(line.split(":", 1) for line in (root / "status").read_text().splitlines())
    return int(status["Threads"]), len(os.listdir(root / "fd")), int(status["VmRSS"].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="the counts come from /proc")
@pytest.mark.parametrize("sessions", [160, pytest.param(2000, marks=pytest.mark.long)])
def test_sessions_that_are_left_leave_nothing(every_cut: splitbundle.Bundle, sessions: int) -> None:
    """Threads, descriptors and memory of the server's process are those of a server after a quiet client."""
    options = ("--threads", "1", "--lease", "0.4", "--status", "127.0.0.1:0")
    with StageProcess(every_cut.path, SHARD, *options) as process:
        status = process.facts["status_url"]

        def metric(name: str) -> float:
            text = _get(f"{status}/metrics")
            return float(
                next(line.split()[1] for line in text.splitlines() if line.startswith(f"splitbundle_stage_{name} "))
            )

        def settle() -> None:
            deadline = time.monotonic() + 30
            while metric("sessions") or _connections(process):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            time.sleep(0.5)

        def storm(number: int) -> None:
            threads = [
                threading.Thread(target=_disorderly, args=(process.url, seed, number // CLIENTS))
                for seed in range(CLIENTS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            settle()

        storm(80)  # the pools of gRPC and of the stage are filled
        before, own = _counted(process), open_files()
        storm(sessions)
        after = _counted(process)
        assert metric("sessions") == metric("slots") == 0
        assert metric("expired_total") > 0
        # A pool has as many threads as there were calls at once, which depends on the moment. A thread that a session
        # leaves would be one for each of them.
        assert after[0] <= before[0] + CLIENTS, (before, after)
        assert after[1] <= before[1] + 2, (before, after)
        assert after[2] <= before[2] * 1.1, (before, after)
        assert open_files() <= own + 4
        assert _get(f"{status}/healthz") == "ok\n"


def _connections(process: StageProcess) -> int:
    """Return the number of connections that the server's port has."""
    port = f"{process.port:04X}"
    lines = [line.split() for line in Path(f"/proc/{process.process.pid}/net/tcp").read_text().splitlines()[1:]]
    return sum(fields[1].endswith(f":{port}") and fields[3] == "01" for fields in lines)


def _get(url: str) -> str:
    import urllib.request

    with urllib.request.urlopen(url, timeout=10) as answer:
        return str(answer.read().decode())


def test_the_command_ends_with_status_zero_and_says_where_it_is(every_cut: splitbundle.Bundle) -> None:
    with StageProcess(every_cut.path, SHARD, "--status", "127.0.0.1:0") as process:
        facts = process.facts
        assert facts["shard"] == SHARD
        assert facts["layers"] == [2, 3]
        assert facts["fingerprint"] == every_cut.fingerprint
        made = subprocess.run(
            [
                *(sys.executable, "-m", "splitbundle", "peers", process.url, "--bundle", str(every_cut.path)),
                *("--shard", SHARD, "--repeats", "3", "--json"),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert '"golden": [{"where": "hidden.3"' in made.stdout
        assert process.end() == 0


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"lease": 0}, "lease"),
        ({"lease": 1e6}, "lease"),
        ({"message": 1000}, "message"),
        ({"message": 2**30}, "message"),
    ]
    + [({name: 0}, name) for name in ("slots", "sessions", "rows", "tickets", "max_bytes")],
)
def test_budgets_that_no_client_could_use(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(BundleError, match=rf"\[input.value\] {named}: "):
        Budget(**wrong)
