"""Measure many users at once: rows that are computed together, and ``serve`` beside llama.cpp's server.

    python -m benchmarks.serving rows BUNDLE --rounds 5
    python -m benchmarks.serving peers BUNDLE --gguf FILE --llama-server PROGRAM --users 1,8 --rounds 5

``rows``: twelve texts of different lengths, one after another, and then from twelve threads over four rows of a
``SharedPipeline``. In the same round, four texts of one length, one after another and as a batch of four, which no
queue can beat: all rows work to the end. And the twelve texts as three batches of four, each as long as its longest
text. The results are the gains, and the first gain divided by each of the other two.

``peers``: ``splitbundle serve`` and ``llama-server`` with the same weights, each in a process of its own, in turn. Each
user asks for a text of its own over HTTP, as a stream, and all ask at once. The results are the ratios of tokens a
second and of the time to the first token. Both servers have the same number of threads and of rows. The one that isn't
measured is stopped (SIGSTOP), as its threads would disturb.

Each round gives ratios. The result is the median ratio, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

LENGTHS: Final = {
    "wide": (16, 24, 32, 40, 48, 56, 64, 72, 80, 24, 40, 56),
    "narrow": (60, 44, 76, 52, 80, 40, 68, 56, 84, 48, 72, 64),
}
"""The new tokens of the twelve texts. In their order, the rows of "wide" rest longer at the end."""
PROMPT: Final = 32
"""The tokens of each prompt."""


def prompts(number: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Return prompts of random tokens, which have nothing in common."""
    draw = random.Random(seed)
    return [[draw.randrange(200, vocab_size) for _ in range(PROMPT)] for _ in range(number)]


def rows(path: str, rounds: int, lengths: tuple[int, ...], options: dict[str, Any]) -> dict[str, list[float]]:
    """Return the seconds of each round: twelve texts apart and shared, four apart and as a batch."""
    import splitbundle

    loading: Any = splitbundle.open(path).pipeline
    pipeline = loading(**options)
    vocab_size = pipeline.first.architecture.vocab_size
    found: dict[str, list[float]] = {name: [] for name in ("apart", "shared", "four", "batch", "batches")}

    def one(owner: Any, prompt: list[int], tokens: int) -> None:
        for _ in owner.row_steps(prompt, session=None, max_new_tokens=tokens):
            pass

    with splitbundle.SharedPipeline(pipeline, rows=4) as shared, ThreadPoolExecutor(12) as pool:
        for turn in range(rounds + 1):
            texts = list(zip(prompts(12, vocab_size, turn), lengths, strict=True))
            began = time.perf_counter()
            for prompt, tokens in texts:
                one(pipeline, prompt, tokens)
            apart = time.perf_counter()
            list(pool.map(lambda text: one(shared, *text), texts))
            together = time.perf_counter()
            four = [prompt for prompt, _ in texts[:4]]
            for prompt in four:
                one(pipeline, prompt, 64)
            each = time.perf_counter()
            for _ in pipeline.generate(pipeline.token_ids(four), max_new_tokens=64):
                pass
            batch = time.perf_counter()
            for first in range(0, 12, 4):
                group = texts[first : first + 4]
                longest = max(tokens for _, tokens in group)
                for _ in pipeline.generate(pipeline.token_ids([own for own, _ in group]), max_new_tokens=longest):
                    pass
            times = (began, apart, together, each, batch, time.perf_counter())
            if turn:  # the first one warms up
                for name, start, stop in zip(found, times, times[1:], strict=False):
                    found[name].append(stop - start)
    return found


@contextlib.contextmanager
def serving(command: Sequence[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends. It is stopped while nobody asks it."""
    log = subprocess.DEVNULL
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process:
        try:
            until = time.monotonic() + 180
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"the server didn't start: {' '.join(command)}")
                time.sleep(0.2)
            process.send_signal(signal.SIGSTOP)
            yield process
        finally:
            process.kill()


def _answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/v1/models")
        return connection.getresponse().status == 200
    except OSError:
        return False


def ask(port: int, prompt: list[int], tokens: int) -> tuple[float, float, int]:
    """Ask for a text, and return the seconds to the first token and to the end, and the number of tokens."""
    body = {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "stop_token_ids": [],
        "ignore_eos": True,  # llama-server
        "cache_prompt": False,  # likewise: prompts have nothing in common
    }
    began, first, made = time.perf_counter(), 0.0, 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - began
            usage = json.loads(line[6:]).get("usage")
            made = usage["completion_tokens"] if usage else made
    connection.close()
    return first, time.perf_counter() - began, made


def load(port: int, users: int, tokens: int, vocab_size: int, seed: int) -> tuple[float, float]:
    """Let users ask at once, and return all tokens a second and the median time to the first token."""
    texts = prompts(users, vocab_size, seed)
    found: list[tuple[float, float, int]] = []
    threads = [threading.Thread(target=lambda text=text: found.append(ask(port, text, tokens))) for text in texts]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if len(found) != users or any(made != tokens for _, _, made in found):
        raise RuntimeError(f"{users} texts of {tokens} tokens were asked for, and {found} came")
    return users * tokens / seconds, statistics.median(first for first, _, _ in found)


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port: int = made.getsockname()[1]
        return port


def peers(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of each round: of ours and of theirs, for each number of users."""
    import splitbundle

    vocab_size = splitbundle.open(args.bundle).architecture.vocab_size
    most = max(args.users)
    own, other = free_port(), free_port()
    ours = [sys.executable, "-m", "splitbundle", "serve", args.bundle, "--listen", f"127.0.0.1:{own}"]
    ours += ["--rows", str(most), "--threads", str(args.threads), *(args.option or [])]
    theirs = [args.llama_server, "--model", args.gguf, "--port", str(other), "--parallel", str(most)]
    theirs += ["--threads", str(args.threads), "--ctx-size", str(512 * most), "--no-webui"]
    found: dict[str, Any] = {f"{n} users": {"ours": [], "theirs": []} for n in args.users}
    with serving(ours, own) as first, serving(theirs, other) as second:
        for turn in range(args.rounds + 1):
            for users in args.users:
                for which, process, port in (("ours", first, own), ("theirs", second, other)):
                    process.send_signal(signal.SIGCONT)
                    figures = load(port, users, args.tokens, vocab_size, 1000 * turn + users)
                    process.send_signal(signal.SIGSTOP)
                    if turn:
                        found[f"{users} users"][which].append(figures)
    return found


def spread(ratios: Sequence[float]) -> str:
    """Return the median of ratios, with the least and the greatest."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> int:
    """Measure, and print a table or one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("rows", "peers"))
    parser.add_argument("bundle")
    parser.add_argument("--gguf", help="the same weights for llama.cpp")
    parser.add_argument("--llama-server", default="llama-server", help="the program (default: %(default)s)")
    parser.add_argument("--users", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (default: %(default)s)")
    parser.add_argument("--option", action="append", help="a further option of serve, such as --option=--backend=torch")
    parser.add_argument("--lengths", choices=tuple(LENGTHS), default="wide", help="for rows: of the texts")
    parser.add_argument("--backend", help="for rows: the backend")
    parser.add_argument("--dtype", help="for rows: the dtype to compute in")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.what == "rows":
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported
        given = {"backend": args.backend, "dtype": args.dtype, "threads": args.threads}
        document: dict[str, Any] = rows(
            args.bundle,
            args.rounds,
            LENGTHS[args.lengths],
            {name: value for name, value in given.items() if value is not None},
        )
        if not args.json:
            shared = [a / b for a, b in zip(document["apart"], document["shared"], strict=True)]
            batch = [a / b for a, b in zip(document["four"], document["batch"], strict=True)]
            static = [a / b for a, b in zip(document["apart"], document["batches"], strict=True)]
            print("| | gain | gain of 12 texts over 4 rows, of it |\n|---|---|---|")
            print(f"| 12 texts over 4 rows | {spread(shared)} | |")
            for name, gains in (("a batch of 4 of one length", batch), ("the 12 texts as 3 batches", static)):
                print(f"| {name} | {spread(gains)} | {spread([a / b for a, b in zip(shared, gains, strict=True)])} |")
    else:
        document = peers(args)
        if not args.json:
            print("| users | tokens/s | of theirs | ratio | first token, s | of theirs | ratio |\n" + "|---" * 7 + "|")
            for name, both in document.items():
                cells = []
                for place in (0, 1):
                    ours, theirs = ([each[place] for each in both[which]] for which in ("ours", "theirs"))
                    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
                    cells += [f"{statistics.median(ours):.3g}", f"{statistics.median(theirs):.3g}", spread(ratios)]
                print(f"| {name.split()[0]} | {' | '.join(cells)} |")
    if args.json:
        print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
