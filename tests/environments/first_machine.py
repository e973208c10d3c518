"""The machine that has the bottom and the top: ``first_machine BUNDLE COMMAND …``.

The command starts the other machine. Two rows of different lengths are continued by the likeliest tokens. Each step
sends the hidden states, ``past`` and ``count`` through the other machine's pipe, as ``docs/guides/pipe.md``
shows. Every stage keeps its cache. The tokens of both rows are printed, and then those of a pipeline that computes all
shards in this process.
"""

from __future__ import annotations

import struct
import subprocess
import sys

import torch

import splitbundle

PROMPTS = [[44, 308, 68, 455, 270, 618, 325], [44, 308, 68]]
STEPS = 12


def through_the_trunk(trunk: subprocess.Popen[bytes], hidden: torch.Tensor, past: list[int], count: list[int]) -> None:
    """Send hidden states, and put what comes back in their place."""
    assert trunk.stdin is not None
    assert trunk.stdout is not None
    data = bytearray(hidden.nbytes)
    copy = torch.frombuffer(data, dtype=torch.float32).view_as(hidden)
    copy.copy_(hidden)
    trunk.stdin.write(struct.pack("<6q", *hidden.shape[1:], *past, *count) + data)
    trunk.stdin.flush()
    if trunk.stdout.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise ConnectionError("the other machine gave no answer")
    if any(row[tokens:].any() for row, tokens in zip(copy, count, strict=True)):
        raise ValueError("the other machine computed padding as if it were tokens")
    hidden.copy_(copy)


def main() -> int:
    """Print the tokens of two machines, and of one."""
    path, *command = sys.argv[1:]
    whole = splitbundle.open(path)
    bottom, top = whole.stage("bottom", backend="torch"), whole.stage("top", backend="torch")
    longest = max(map(len, PROMPTS))
    first = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in PROMPTS])
    capacity = longest + STEPS
    below, above = bottom.cache(2, capacity), top.cache(2, capacity)
    token_ids, past, count, steps = first, [0, 0], [len(prompt) for prompt in PROMPTS], []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trunk, torch.no_grad():
        assert trunk.stdin is not None
        trunk.stdin.write(struct.pack("<2q", 2, capacity))
        for _ in range(STEPS):
            hidden = bottom(token_ids, past=past, count=count, cache=below)
            through_the_trunk(trunk, hidden, past, count)
            logits = top(hidden, past=past, count=count, cache=above, logits="last")
            past = [before + brought for before, brought in zip(past, count, strict=True)]
            token_ids, count = logits[:, -1:].argmax(-1), [1, 1]
            steps.append(token_ids[:, 0].tolist())
    mask = torch.tensor([[int(i < len(prompt)) for i in range(longest)] for prompt in PROMPTS])
    generated = whole.pipeline(backend="torch").generate(first, attention_mask=mask, max_new_tokens=STEPS)
    for result in (steps, [[int(token) for token in step] for step in generated]):
        sys.stdout.write(f"{[list(row) for row in zip(*result, strict=True)]}\n")
    return trunk.returncode


if __name__ == "__main__":
    sys.exit(main())
