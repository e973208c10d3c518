r"""Continue a text with the bottom and the top of a model here, and its trunk in another process.

    splitbundle extract license.splitbundle --shard bottom --shard top --text -o ends.splitbundle
    splitbundle extract license.splitbundle --shard trunk -o trunk.splitbundle
    python examples/text/pipe_client.py ends.splitbundle "Licensed under the Apache License" \
        python examples/text/pipe_trunk.py trunk.splitbundle

The arguments after the prompt are the command that computes the trunk. For another machine, begin it with ``ssh``. The
trunk gets hidden states and never sees a token. Each side may have another backend. Both need numpy, which torch alone
doesn't bring: ``pip install numpy``.
"""

from __future__ import annotations

import struct
import subprocess
import sys

import numpy

import splitbundle

NEW_TOKENS = 40


def ask(trunk: subprocess.Popen[bytes], hidden: numpy.ndarray, past: int) -> numpy.ndarray:
    """Send hidden states through the trunk. *Shape:* (1, sequence, width) -> the same, float32.

    Raises:
        ConnectionError: The trunk ended.
    """
    assert trunk.stdin is not None
    assert trunk.stdout is not None
    trunk.stdin.write(struct.pack("<3q", past, *hidden.shape[1:]) + hidden.astype("<f4").tobytes())
    trunk.stdin.flush()
    answer = trunk.stdout.read(hidden.size * 4)
    if len(answer) != hidden.size * 4:
        raise ConnectionError("the trunk gave no answer; its messages on stderr say why")
    return numpy.frombuffer(answer, "<f4").reshape(hidden.shape)


def main() -> None:
    """Print the new text piece by piece, the likeliest token each time."""
    if len(sys.argv) < 4:
        print("usage: python pipe_client.py BUNDLE PROMPT COMMAND…", file=sys.stderr)
        sys.exit(2)
    ends, prompt, *command = sys.argv[1:]
    bundle = splitbundle.open(ends)
    tokenizer = bundle.tokenizer()
    bottom, top = bundle.stage("bottom").over_numpy(), bundle.stage("top").over_numpy()
    past, now = 0, tokenizer.encode(prompt)
    caches = [stage.cache(1, len(now) + NEW_TOKENS) for stage in (bottom, top)]
    text = tokenizer.stream(now)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trunk:
        for _ in range(NEW_TOKENS):
            hidden = bottom(numpy.array([now]), past=[past], cache=caches[0])
            logits = top(ask(trunk, hidden, past), past=[past], cache=caches[1], logits="last")
            past += len(now)
            now = [int(logits[0, -1].argmax())]
            if now[0] in tokenizer.stop_ids:
                break
            print(text.piece(now[0]), end="", flush=True)
    print(text.rest())


if __name__ == "__main__":
    main()
