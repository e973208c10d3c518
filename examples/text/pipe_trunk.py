"""Compute the trunk of a model for the program at the other end of a pipe. ``pipe_client.py`` starts it.

    python examples/text/pipe_trunk.py trunk.splitbundle

A call is three integers of 8 bytes, little-endian: the number of past tokens, the number of new ones, and the width of
a hidden state. Then come the hidden states of the new tokens as float32. The answer is the hidden states after the
trunk's last layer. A call with 0 past tokens begins a new text. The end of the input ends the program. It needs numpy,
which torch alone doesn't bring.
"""

from __future__ import annotations

import struct
import sys

import numpy

import splitbundle

CAPACITY = 256
"""The number of tokens that a text may have here."""


def main() -> None:
    """Answer calls until the input ends."""
    if len(sys.argv) != 2:
        print("usage: python pipe_trunk.py BUNDLE", file=sys.stderr)
        sys.exit(2)
    stage = splitbundle.open(sys.argv[1]).stage("trunk").over_numpy()  # torch or onnxruntime, both take numpy arrays
    cache = stage.cache(1, CAPACITY)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while header := source.read(24):
        past, length, width = struct.unpack("<3q", header)
        hidden = numpy.frombuffer(source.read(4 * length * width), "<f4").reshape(1, length, width)
        sink.write(stage(hidden, past=[past], cache=cache).astype("<f4").tobytes())
        sink.flush()


if __name__ == "__main__":
    main()
