"""Generate in a worker of each kind, with splitbundle or, for contrast, in the usual way.

    python tests/environments/workers.py splitbundle fork BUNDLE
    python tests/environments/workers.py transformers fork CHECKPOINT

The parent imports and generates first, as a notebook does. Then a worker does the same. The worker's time is limited:
a worker that hasn't finished by then is ended, and the exit status is 1. With --intel-openmp, Intel's OpenMP (PyPI:
intel-openmp) is loaded before torch brings GNU's, as in Anaconda.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

PROMPT = [44, 308, 68, 455, 270, 618, 325]
TOKENS = 8


def by_splitbundle(path: str, backend: str = "torch") -> list[int]:
    """Generate tokens from three chained shards."""
    import splitbundle

    pipeline = splitbundle.open(path).pipeline(backend=backend)
    prompt = pipeline.token_ids([PROMPT])
    pipeline(pipeline.token_ids([PROMPT * 16] * 4))  # enough work for every thread
    return [int(token[0]) for token in pipeline.generate(prompt, max_new_tokens=TOKENS)]


def by_transformers(path: str) -> list[int]:
    """Generate tokens from the whole model, built by the model zoo."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model(torch.tensor([PROMPT * 16] * 4))
        tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False)
    return [int(token) for token in tokens[0, len(PROMPT) :]]


WAYS: dict[str, Callable[[str], list[int]]] = {
    "splitbundle": by_splitbundle,
    "splitbundle-onnxruntime": partial(by_splitbundle, backend="onnxruntime"),
    "transformers": by_transformers,
}


def work(way: str, path: str) -> None:
    """Run in a worker: print the tokens, in one piece, at once."""
    sys.stdout.write(f"worker {WAYS[way](path)}\n")
    sys.stdout.flush()


def main() -> int:
    """Return 0 if the worker finished in time and well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("worker", choices=["thread", "fork", "spawn", "forkserver"])
    parser.add_argument("path", help="a bundle for splitbundle, a checkpoint for transformers")
    parser.add_argument("--intel-openmp", action="store_true")
    parser.add_argument("--cold", action="store_true", help="the parent doesn't generate first")
    parser.add_argument("--seconds", type=float, default=300.0)
    args = parser.parse_args()
    if args.intel_openmp:
        names = ("lib/libiomp5.so", "lib/libiomp5.dylib", "Library/bin/libiomp5md.dll")
        libraries = [path for path in (Path(sys.prefix, name) for name in names) if path.exists()]
        if not libraries:
            parser.error("intel-openmp isn't installed in this environment")
        ctypes.CDLL(str(libraries[0]), mode=ctypes.RTLD_GLOBAL)
    if not args.cold:
        sys.stdout.write(f"parent {WAYS[args.way](args.path)}\n")
        sys.stdout.flush()
    began = time.monotonic()
    if args.worker == "thread":
        thread = threading.Thread(target=work, args=(args.way, args.path), daemon=True)
        thread.start()
        thread.join(args.seconds)
        good = not thread.is_alive()
    else:
        process = multiprocessing.get_context(args.worker).Process(target=work, args=(args.way, args.path))
        process.start()
        process.join(args.seconds)
        good = process.exitcode == 0
        if process.is_alive():
            process.kill()
    sys.stdout.write(f"{'finished' if good else 'NOT finished'} after {time.monotonic() - began:.1f} s\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
