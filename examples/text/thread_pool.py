"""Answer several prompts at once: threads share one pipeline, and each thread has a session of its own.

    python examples/text/thread_pool.py license.splitbundle "Licensed under" "You may obtain" "Unless required by"

A session holds what one row has computed, so one thread uses it at a time. A thread keeps its session for the next
prompt: what both prompts begin with isn't computed again.
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import splitbundle

THREADS = 8


def main() -> None:
    """Print each prompt with its continuation, in the order of the prompts."""
    if len(sys.argv) < 3:
        print("usage: python thread_pool.py BUNDLE PROMPT…", file=sys.stderr)
        sys.exit(2)
    path, *prompts = sys.argv[1:]
    # Eight threads compute at the same time, so each call takes one core.
    pipeline = splitbundle.open(path).pipeline(threads=1)
    own = threading.local()

    def begin() -> None:
        own.session = pipeline.session()

    def answer(prompt: str) -> str:
        return pipeline.complete_text(prompt, max_new_tokens=24, session=own.session).text

    with ThreadPoolExecutor(THREADS, initializer=begin) as pool:
        for prompt, text in zip(prompts, pool.map(answer, prompts), strict=True):
            print(repr(prompt + text))


if __name__ == "__main__":
    main()
