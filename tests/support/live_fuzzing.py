"""Attack a stage server that listens: bytes that are no HTTP/2, HTTP/2 that is no gRPC, wrong requests of many clients.

    GRPC_VERBOSITY=NONE python -m tests.support.live_fuzzing --seconds 600

Afterwards the server must answer a hello, and hold no session and no slot. Counts go to stdout. Without the variable,
gRPC says on stderr what it thinks of each connection.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import grpc

import splitbundle
from splitbundle.errors import BundleError
from splitbundle.remote.streams import Ended, Streams, TimedOut
from splitbundle.serving.stage_server import Budget, StageServer, Trainer
from splitbundle.wire import frames, headers
from splitbundle.wire.messages import PROTOCOL, Hello, Welcome
from tests.support.paths import TESTS

BUNDLE: Final = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
LEASE: Final = 1.0
BUDGET: Final = Budget(slots=512, sessions=16, rows=4, message=2**18, tickets=4, lease=LEASE)
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
METHOD: Final = "/splitbundle.v1.Stage/Call"
STREAM: Final = "/splitbundle.v1.Stage/Stream"
HELLO: Final = frames.pack(Hello(protocol=PROTOCOL, fingerprint=None, layers=None))
_PATIENCE: Final = 0.2
"""The seconds that an attacker waits for what the server says."""


class Attack:
    """What all attackers share: the server, their end, and what they saw."""

    def __init__(self, port: int, until: float) -> None:
        self.port, self.until = port, until
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def problem(self, what: str) -> None:
        with self._lock:
            self.problems.append(what)

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until or bool(self.problems)


def raw_bytes(attack: Attack, drawn: random.Random) -> None:
    """Send bytes that are no gRPC, over a connection each, and don't always end it properly."""
    while not attack.over:
        try:
            with socket.create_connection(("127.0.0.1", attack.port), timeout=5) as connection:
                if drawn.random() < 0.5:  # a reset in place of an end
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                kind = drawn.choice(("noise", "http2", "grpc"))
                parts = {"noise": noise, "http2": http2, "grpc": grpc_frames}[kind](drawn)
                for part in parts:
                    connection.sendall(part)
                connection.settimeout(_PATIENCE)
                if drawn.random() < 0.7:
                    connection.recv(4096)
        except OSError:
            attack.count("connections that the server ended")
        attack.count("connections with raw bytes")
        time.sleep(0.01)  # the requests of clients reach further, and need the processor


def noise(drawn: random.Random) -> list[bytes]:
    first = drawn.choice((b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", frames.MAGIC, PREFACE[:10]))
    return [first, drawn.randbytes(drawn.choice((0, 1, 100, 10_000)))]


def http2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return a frame of HTTP/2 (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def http2(drawn: random.Random) -> list[bytes]:
    """A right beginning, and then frames of any kind."""
    parts = [PREFACE, http2_frame(4, 0, 0, b"")]
    for _ in range(drawn.randint(1, 30)):
        payload = drawn.randbytes(drawn.choice((0, 4, 5, 6, 8, 100, 17_000)))
        parts.append(http2_frame(drawn.randrange(12), drawn.randrange(256), drawn.choice((0, 1, 2, 3, 2**31)), payload))
    return parts


def literal(name: str, value: str) -> bytes:
    """Return a header field as a literal without indexing (RFC 7541, section 6.2.2)."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def grpc_frames(drawn: random.Random) -> list[bytes]:
    """A call of the method, its messages cut, doubled, or of another length than they say."""
    path = drawn.choice((METHOD, METHOD, STREAM, "/splitbundle.v1.Stage/Other", "/", ""))
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    fields["content-type"] = drawn.choice(("application/grpc", "application/grpc", "text/html"))
    if drawn.random() < 0.2:
        fields[drawn.choice(("grpc-timeout", "grpc-encoding", "authorization"))] = drawn.choice(
            ("1n", "gzip", "x" * 99)
        )
    parts = [PREFACE, http2_frame(4, 0, 0, b"")]
    for stream in range(1, 2 * drawn.randint(1, 5), 2):
        parts.append(http2_frame(1, 4, stream, b"".join(literal(*field) for field in fields.items())))
        for _ in range(drawn.randint(0, 3)):
            message = drawn.choice((HELLO, b"", drawn.randbytes(200), HELLO[: drawn.randrange(len(HELLO))]))
            length = drawn.choice((len(message), len(message), 0, len(message) + 1, 2**32 - 1, 2**17 + 1))
            data = struct.pack(">BI", drawn.choice((0, 0, 0, 1, 255)), length) + message
            parts.append(http2_frame(0, drawn.choice((0, 1)), stream, data[: drawn.choice((len(data), 3, 7))]))
        if drawn.random() < 0.3:
            parts.append(http2_frame(3, 0, stream, struct.pack(">I", drawn.randrange(14))))
    return parts


class Client:
    """A client that asks for what it may ask, and often for something else."""

    def __init__(self, attack: Attack, drawn: random.Random) -> None:
        self.attack, self.drawn = attack, drawn
        self.sessions: list[tuple[str, int, list[int], int]] = []
        self.runs: list[str] = ["0" * 32]
        self.ticket = self.step = 0
        self.last = HELLO

    def header(self, width: int) -> dict[str, Any]:
        drawn = self.drawn
        encoding = drawn.choice(("float32", "float32", "float16", "bfloat16", "int8"))
        kind = drawn.choice(("hello", "open", *["run"] * 8, "renew", "close", "health", *["train"] * 2, "free"))
        if kind == "open" or not self.sessions:
            return {"op": "open", "rows": drawn.randint(1, 4), "capacity": drawn.randint(1, 32)}
        session, number, lengths, capacity = drawn.choice(self.sessions)
        count = [drawn.randint(0, 3) for _ in lengths]
        past = [drawn.randint(0, n) if drawn.random() < 0.2 else n for n in lengths]
        call = {"count": count, "sequence": max(1, *count), "width": width, "encoding": encoding}
        if kind == "run":
            header = {"op": "run", "session": session, "number": number + 1, "past": past, **call}
            if drawn.random() < 0.1:
                header["order"] = [drawn.randrange(len(lengths)) for _ in lengths]
            if drawn.random() < 0.2:
                rows = drawn.sample(range(len(lengths)), drawn.randint(1, len(lengths)))
                header |= {"rows": rows, "past": [past[row] for row in rows], "count": [count[row] for row in rows]}
            if drawn.random() < 0.1:
                header["capacity"] = capacity + drawn.randint(0, 8)
            return header
        if kind == "free":
            return {"op": "run", "session": None, "number": 0, "past": [0] * len(count), **call}
        if kind == "train":
            return self.training(call)
        return {
            "hello": {"op": "hello", "protocol": 1, "fingerprint": None, "layers": None},
            "renew": {"op": "renew", "session": session},
            "close": {"op": "close", "session": session},
        }.get(kind, {"op": "health"})

    def training(self, call: dict[str, Any]) -> dict[str, Any]:
        run = self.runs[-1]
        kind = self.drawn.choice(("train", "forward", "forward", "backward", "backward", "step", "discard"))
        if kind == "train":
            return {"op": "train"}
        if kind == "forward":
            self.ticket += 1
            return {"op": "forward", "run": run, "ticket": self.ticket, **call}
        if kind == "backward":
            tail = {"tokens": sum(call["count"]), "width": call["width"], "encoding": "float32"}
            return {"op": "backward", "run": run, "ticket": max(self.ticket, 1), **tail}
        if kind == "step":
            return {"op": "step", "run": run, "number": self.step + 1, "learning_rate": 1e-3}
        return {"op": "discard", "run": run}

    def changed(self, header: dict[str, Any]) -> dict[str, Any]:
        drawn = self.drawn
        name = drawn.choice([*header, "rows", "order", "capacity", "session", "x"])
        values = (None, -1, 0, 1, 2**31 - 1, 2**53, 0.5, True, "", "x" * 2000, [], [0], [0] * 5000, [-1, 2**31], {})
        header[name] = drawn.choice(values)
        if drawn.random() < 0.1:
            del header[name]
        return header

    def frame(self, width: int) -> bytes:
        drawn = self.drawn
        if drawn.random() < 0.1:
            return self.last
        header = self.header(width)
        if drawn.random() < 0.3:
            header = self.changed(header)
        text = json.dumps(header).encode()
        try:
            size = min(frames.payload_size(headers.parse(text)), 2**17)
        except BundleError:
            size = drawn.choice((0, 8, 5000))
        if drawn.random() < 0.05:
            size = max(size + drawn.randint(-9, 9), 0)
        payload = drawn.randbytes(size) if drawn.random() < 0.3 else bytes(size)
        data = bytearray(frames.MAGIC + len(text).to_bytes(4, "little") + text + payload)
        if drawn.random() < 0.1:
            data[drawn.randrange(min(len(data), 300))] = drawn.randrange(256)
        self.last = bytes(data)
        return self.last

    def learn(self, frame: bytes, answer: Any) -> None:
        """Note what an answer says of sessions and of training."""
        if answer.op == "opened":
            asked, _ = frames.unpack(frame)
            self.sessions = [*self.sessions[-3:], (answer.session, 0, [0] * asked.rows, asked.capacity)]  # type: ignore[union-attr]
        elif answer.op == "ran":
            asked, _ = frames.unpack(frame)
            for place, (session, number, lengths, capacity) in enumerate(self.sessions):
                if session == asked.session:  # type: ignore[union-attr]
                    lengths = [lengths[row] for row in asked.order or range(len(lengths))]  # type: ignore[union-attr]
                    own = asked.rows or range(len(lengths))  # type: ignore[union-attr]
                    for row, past, count in zip(own, asked.past, asked.count, strict=True):  # type: ignore[union-attr]
                        lengths[row] = past + count
                    most = asked.capacity or capacity  # type: ignore[union-attr]
                    self.sessions[place] = (session, max(number, answer.number), lengths, most)
        elif getattr(answer, "code", "") in ("session.unknown", "session.gap", "server.failed"):
            self.sessions = self.sessions[:-1]
        elif answer.op == "training":
            self.runs, self.ticket, self.step = [answer.run], 0, answer.number
        elif answer.op == "stepped":
            self.step = answer.number


def clients(attack: Attack, drawn: random.Random) -> None:
    """Ask as a client would, with deadlines that are often too short, and with calls that are cancelled."""
    while not attack.over:
        channel = grpc.insecure_channel(f"127.0.0.1:{attack.port}", [("grpc.use_local_subchannel_pool", 1)])
        method = channel.unary_unary(METHOD)
        streams = Streams(channel, STREAM, None)
        streaming = drawn.random() < 0.5
        client = Client(attack, drawn)
        for _ in range(drawn.randint(1, 300)):
            if attack.over:
                break
            frame = client.frame(48)
            fate = drawn.random()
            if fate < 0.05:
                method.future(frame, timeout=5).cancel()
                attack.count("calls that were cancelled")
                continue
            try:
                timeout = 0.002 if fate < 0.1 else 60
                data = streams.ask(frame, timeout) if streaming else method(frame, timeout=timeout)
            except (TimedOut, Ended) as error:
                attack.count(f"streams that ended with {type(error).__name__}")
                continue
            except grpc.RpcError as error:
                status = error.code().name
                attack.count(f"calls that ended with {status}")
                if status not in ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"):
                    attack.problem(f"{status}: {error.details()}")
                continue
            try:
                answer, _ = frames.unpack(data)
                attack.count(f"answers {getattr(answer, 'code', answer.op)}")
                client.learn(frame, answer)
                # Weights that training has moved far may give NaN, which health finds. No other request may fail.
                if getattr(answer, "code", "") == "server.failed" and b'"health"' not in frame:
                    attack.problem(f"{answer} to {frame[:300]!r}")
            except BundleError as error:
                attack.problem(f"an answer that is no frame: {error}")
        streams.close()
        channel.close()


ATTACKERS: Final[tuple[Callable[[Attack, random.Random], None], ...]] = (raw_bytes, raw_bytes, *[clients] * 5)


def run(seconds: float, seed: int = 0) -> Counter[str]:
    """Attack a server for some time. Return what happened how often.

    Raises:
        RuntimeError: the server gave an answer that it mustn't give, or holds something afterwards.
    """
    bundle = splitbundle.open(BUNDLE)
    trainer = Trainer(optimizer="sgd", learning_rate=1e-3)
    with StageServer(bundle, "trunk", backend="torch", budget=BUDGET, trainer=trainer) as server:
        port = int(server.url.rpartition(":")[2])
        attack = Attack(port, time.monotonic() + seconds)
        threads = [
            threading.Thread(target=attacker, args=(attack, random.Random(f"{seed} {i}")))
            for i, attacker in enumerate(ATTACKERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 300)
        if attack.problems or any(thread.is_alive() for thread in threads):
            raise RuntimeError("; ".join(attack.problems) or "an attacker waits for ever")
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            answer, _ = frames.unpack(channel.unary_unary(METHOD)(HELLO, timeout=60))
        if not isinstance(answer, Welcome):
            raise RuntimeError(f"a hello got {answer}")
        sessions = server.service.sessions
        for _ in range(int(100 * LEASE) + 1000):
            if not len(sessions) and not sessions.slots and not sessions._kept_bytes:
                return attack.counts
            time.sleep(0.01)
        raise RuntimeError(
            f"{len(sessions)} sessions, {sessions.slots} slots and {sessions._kept_bytes} bytes are left"
        )


def main() -> int:
    """Attack a server, and print the counts."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.support.live_fuzzing", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=600, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other requests")
    args = parser.parse_args()
    for what, number in sorted(run(args.seconds, args.seed).items()):
        print(f"{number:>10,} {what}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
