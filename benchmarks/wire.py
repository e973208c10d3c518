"""Measure what the wire costs, beside a bare gRPC echo of the same bytes, and a remote trunk beside a local one.

    python -m benchmarks.wire hop --rounds 7
    python -m benchmarks.wire decode --model smollm2-135m --rounds 5

``hop``: a stage that computes nothing, in a process of its own, gets steps of 8 KB and of 4 MB. In turn, a gRPC server
of four lines, in another process, sends the same bytes back. ``decode``: a model of random weights in three shards
generates with its trunk in this process and on a server at a loopback address, in turn. All processes of ``decode``
wait for work as a stage server does (``OMP_WAIT_POLICY=PASSIVE``).

Each round gives ratios of medians. The result is the median ratio, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from benchmarks.files import Workshop
from benchmarks.shapes import SHAPES

WIDTH: Final = 2048
HOPS: Final = {"8 KB": (1, 300), "4 MB": (512, 40)}
"""The name of a size -> the tokens of a step, and the steps of a round."""
FREED: Final = 31 * 2**20
"""The bytes that each process of ``hop`` takes and frees first, as programs that compute with tensors do. Otherwise
glibc gives the memory of each message of 4 MB back, and takes it anew for the next one: mallopt(3), the threshold that
adjusts itself."""
ECHO: Final = """
import grpc
from concurrent.futures import ThreadPoolExecutor
server = grpc.server(ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", -1)])
echo = grpc.unary_unary_rpc_method_handler(lambda data, context: data)
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo", {"Echo": echo}),))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
print(f"127.0.0.1:{port}", flush=True)
server.wait_for_termination()
"""
IDLE: Final = """
import time
from benchmarks.wire import serve_nothing
server = serve_nothing()
print(f"grpc://127.0.0.1:{server.port}", flush=True)
time.sleep(1e6)
"""


class NothingStage:
    """A stage that returns what it gets: tensors of torch, as a real one."""

    def __init__(self) -> None:
        from splitbundle.backends.torch import payloads

        self._payloads = payloads
        self.embeds = self.has_head = False
        self.name, self.backend, self.dtype = "nothing", "none", "float32"
        self.fingerprint, self.layer_range = f"sha256:{'0' * 64}", (0, 1)
        self.stage, self.architecture, self.hidden_size = self, self, WIDTH

    def cache(self, rows: int, capacity: int) -> Any:
        """Return a cache that holds nothing."""
        return SimpleNamespace(lengths=[0] * rows, capacity=capacity)

    def decode(self, payload: memoryview, encoding: str, count: Any, sequence: int) -> Any:
        """Return the tensor of a payload."""
        return self._payloads.decode(payload, encoding, count, sequence, WIDTH)

    def check(self, hidden: Any, **given: Any) -> None:
        """Check nothing."""

    def run(self, hidden: Any, positions: Any, cache: Any) -> Any:
        """Compute nothing."""
        return hidden

    def encode(self, hidden: Any, count: Any, encoding: str) -> list[memoryview]:
        """Return the payload of a tensor."""
        return self._payloads.encode(hidden, count, encoding)


def serve_nothing() -> Any:
    """Serve a stage that computes nothing, and return the server."""
    from splitbundle.serving.grpc_server import GrpcServer
    from splitbundle.serving.stage_service import Served, StageService
    from splitbundle.wire.frames import MAX_FRAME
    from splitbundle.wire.messages import Limits

    slots = 2**40
    limits = Limits(message=MAX_FRAME, rows=64, capacity=slots, slots=slots, sessions=9, tickets=9, lease=60.0)
    offer = Served(bundle=f"sha256:{'0' * 64}", limits=limits, max_bytes=slots, slot_bytes=1)
    server = GrpcServer(StageService(NothingStage(), offer).answer, "127.0.0.1", 0, max_message=MAX_FRAME)
    server.start()
    return server


@contextlib.contextmanager
def started(code: str, **environment: str) -> Iterator[str]:
    """Run code in a process of its own, and yield the first line that it prints."""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment) as process:
        try:
            yield (process.stdout.readline() if process.stdout else "").strip()
        finally:
            process.kill()


def timed(call: Callable[[], object], times: int) -> float:
    """Return the median seconds of a call."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def hop(rounds: int) -> dict[str, Any]:
    """Return the seconds of each round: of the echo, and of steps with a session.

    Each round starts both servers anew, as one pair of processes may stay faster than another.
    """
    bytearray(FREED)
    found: dict[str, Any] = {name: {"echo": [], "step": []} for name in HOPS}
    for _ in range(rounds):
        with started(f"bytearray({FREED})" + ECHO) as echo_at, started(f"bytearray({FREED})" + IDLE) as stage_at:
            for name, figures in one_round(echo_at, stage_at).items():
                for which, seconds in figures.items():
                    found[name][which].append(seconds)
    return found


def one_round(echo_at: str, stage_at: str) -> dict[str, dict[str, float]]:
    """Return the median seconds of the echo and of a step, for each size. All of it is done twice, to warm up first."""
    import grpc
    import torch

    from splitbundle.backends.torch.payloads import decode, encode
    from splitbundle.remote.link import Link, RemoteCache
    from splitbundle.remote.options import RemoteOptions
    from splitbundle.remote.peers import Expected, Peers
    from splitbundle.stages.call import Call

    class Facts:
        position_limit = None

    options = RemoteOptions.of()
    expected = Expected(name="nothing", fingerprint=None, layers=None, width=WIDTH)
    link = Link(Peers(stage_at, expected, options), options)
    found: dict[str, dict[str, float]] = {}
    with grpc.insecure_channel(echo_at, [("grpc.max_receive_message_length", -1)]) as channel:
        echo = channel.unary_unary("/echo/Echo")
        for name, (tokens, times) in [*HOPS.items()] * 2:
            hidden = torch.randn(1, tokens, WIDTH)
            data = b"".join(encode(hidden, (tokens,), "float32"))
            facts: Any = Facts()
            cache = RemoteCache(facts, (0, 0), 1, 2**30)

            def step(tokens: int = tokens, hidden: Any = hidden, cache: Any = cache) -> None:
                call = Call([0], [tokens], tokens)
                payload = link.run(call, encode(hidden, (tokens,), "float32"), cache, tokens)
                decode(payload, "float32", (tokens,), tokens, WIDTH)

            found[name] = {
                "echo": timed(lambda data=data: echo(data, timeout=60), times),  # type: ignore[misc]
                "step": timed(step, times),
            }
    return found


def decode(model: str, rounds: int, tokens: int, threads: int, directory: str | None) -> dict[str, Any]:
    """Return the seconds a token of each round, with a local trunk and with a remote one."""
    import splitbundle

    found: dict[str, Any] = {"local": [], "remote": []}
    with tempfile.TemporaryDirectory(prefix="splitbundle-benchmark-") as temporary:
        shards = Workshop(Path(directory or temporary)).make("shards", model, "float32")
        bundle = splitbundle.open(shards)
        name = bundle.shards[1].name
        serve = "import sys; from splitbundle.__main__ import run; sys.exit(run())"
        arguments = ["serve-stage", str(shards), name, "--listen", "127.0.0.1:0", "--json", "--threads", str(threads)]
        code = f"import sys; sys.argv[1:] = {arguments!r}; {serve}"
        with started(code) as line:
            url = json.loads(line)["url"]
            loading: Any = bundle.pipeline
            given = {"threads": threads, "kernels": "torch"}
            local, remote = loading(**given), loading(remote={name: url}, **given)
            ids = local.token_ids([[1 + i % 500 for i in range(64)]])
            for turn in range(rounds + 1):
                for which, pipeline in (("local", local), ("remote", remote)):
                    steps = pipeline.generate(ids, max_new_tokens=tokens + 1)
                    next(steps)
                    seconds = timed(lambda steps=steps: next(steps), tokens)  # type: ignore[misc]
                    if turn:
                        found[which].append(seconds)
    return found


def main() -> int:
    """Measure, and print a table or one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wire", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("hop", "decode"))
    parser.add_argument("--model", choices=tuple(SHAPES), default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of a round (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (default: %(default)s)")
    parser.add_argument("--directory", help="where the models are kept (default: a temporary directory)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.what == "hop":
        document = hop(args.rounds)
        pairs = {name: (own["step"], own["echo"]) for name, own in document.items()}
        what = "step / echo"
    else:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
        document = decode(args.model, args.rounds, args.tokens, args.threads, args.directory)
        pairs = {f"{args.model}, a token": (document["remote"], document["local"])}
        what = "remote / local"
    if args.json:
        print(json.dumps(document))
        return 0
    print(f"| | ms | of it | {what} (least to greatest) |\n|---|---|---|---|")
    for name, (ours, theirs) in pairs.items():
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        first, second = (1000 * statistics.median(each) for each in (ours, theirs))
        print(f"| {name} | {first:.3f} | {second:.3f} | {spread} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
