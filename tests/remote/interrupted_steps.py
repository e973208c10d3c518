"""Interrupt a remote pipeline at random moments, and go on: interrupted_steps.py BUNDLE SHARD URL TIMES.

It prints "equal" if all steps that came to an end gave what a local pipeline gives.
"""

from __future__ import annotations

import random
import signal
import sys

import torch

import splitbundle


def interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(path: str, shard: str, url: str, times: int) -> None:
    bundle, drawn = splitbundle.open(path), random.Random(times)
    near = bundle.pipeline(kernels="torch", threads=1)
    far = bundle.pipeline(kernels="torch", threads=1, remote={shard: url}, timeout=20.0)
    signal.signal(signal.SIGALRM, interrupt)
    ids = torch.tensor([[44, 308, 68]])
    interrupted = 0
    with torch.no_grad():
        mine, theirs = near.session(1, 64), far.session(1, 64)
        while interrupted < times:
            if mine.past[0] > 48:
                mine, theirs = near.session(1, 64), far.session(1, 64)
            expected = near(ids, session=mine)
            while True:
                try:
                    # Not always, because on a busy machine a step may take longer than that.
                    soon = drawn.uniform(0.0005, 0.01) if drawn.random() < 0.7 and interrupted < times else 0
                    signal.setitimer(signal.ITIMER_REAL, soon)
                    got = far(ids, session=theirs)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
                    if theirs.past != mine.past:
                        continue
                    break
                if not torch.equal(got, expected):
                    raise SystemExit(f"other numbers after {interrupted} interruptions")
                break
    print("equal")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
