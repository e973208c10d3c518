"""Continue a text in a forked process, and print the pieces in the parent.

    python examples/text/forked_worker.py license.splitbundle "Licensed under the Apache License"

The parent opens the bundle, and the child loads the pipeline. Processes share the memory of the weights all the same,
as weights are mapped from their files. The parent must not import onnxruntime, because a child that inherits it can
hang. Opening a bundle imports no backend. Windows has no fork: start processes there as docs/guides/workers.md does.
"""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.connection import Connection

import splitbundle


def work(bundle: splitbundle.Bundle, prompt: str, pieces: Connection) -> None:
    """Send the pieces of the new text, as UTF-8."""
    for piece in bundle.pipeline().stream_text(prompt, max_new_tokens=40):
        pieces.send_bytes(piece.encode())
    pieces.close()


def main() -> int:
    """Print the text, and return the exit status of the child."""
    if len(sys.argv) != 3:
        print("usage: python forked_worker.py BUNDLE PROMPT", file=sys.stderr)
        return 2
    path, prompt = sys.argv[1:]
    bundle = splitbundle.open(path)
    context = multiprocessing.get_context("fork")
    mine, childs = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(bundle, prompt, childs))
    child.start()
    childs.close()  # now the pipe ends when the child ends, whatever happens there
    try:
        while True:
            print(mine.recv_bytes().decode(), end="", flush=True)
    except EOFError:
        print()
    child.join()
    return child.exitcode or 0


if __name__ == "__main__":
    sys.exit(main())
