"""A server that preloads and forks, in the documented way: ``preload_and_fork BACKEND THREADS TIMES BUNDLE``.

The master opens the bundle. It may compute with torch, and does not import onnxruntime: a child that inherits that
aborts when it ends. Each worker loads a pipeline of its own, generates, and ends as a worker of a server does: by
``sys.exit``. A worker that takes longer than the limit is ended, and the status is 1.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import splitbundle

LIMIT = 120.0
"""Seconds for a worker."""
EXPECTED = [455, 270, 618]


def work(bundle: splitbundle.Bundle, backend: str, threads: int | None) -> None:
    pipeline = bundle.pipeline(backend=backend, threads=threads)
    prompt = pipeline.token_ids([[44, 308, 68]])
    pipeline(pipeline.token_ids([[44, 308, 68] * 30] * 4))  # enough work for every thread
    tokens = [int(token[0]) for token in pipeline.generate(prompt, max_new_tokens=3)]
    sys.exit(0 if tokens == EXPECTED else 3)


def main() -> int:
    backend, threads, times, path = sys.argv[1:]
    if backend == "torch":
        import torch

        torch.ones(512, 512) @ torch.ones(512, 512)  # the master has computed, and so has threads
    bundle = splitbundle.open(path)
    for number in range(int(times)):
        child = os.fork()
        if not child:
            work(bundle, backend, None if threads == "default" else int(threads))
        end, status = time.monotonic() + LIMIT, None
        while status is None and time.monotonic() < end:
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
            time.sleep(0.005)
        if status != 0:
            if status is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            sys.stderr.write(f"worker {number}: {'hangs' if status is None else f'status {status}'}\n")
            return 1
    sys.stdout.write(f"{times} workers ended well\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
