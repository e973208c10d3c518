"""Generate text from three chained shards, by hand, in a process that imports no model zoo.

    python examples/chain_three_shards.py license.splitbundle "Licensed under the Apache License"

Each shard could also run on a separate machine. A shard sends only the tensor ``hidden`` and two integers for each row
to the next shard.
"""

from __future__ import annotations

import sys

import torch

import splitbundle
from splitbundle.text.huggingface import TextTokenizer

NEW_TOKENS = 60


def main() -> int:
    """Print the text while it is generated, and the shards that took part. Return the exit status."""
    path, prompt = sys.argv[1], sys.argv[2]
    bundle = splitbundle.open(path)
    stages = [bundle.stage(shard.name) for shard in bundle.shards]
    tokenizer = TextTokenizer(bundle)
    ids = tokenizer.encode(prompt)
    caches = [stage.cache(batch_size=1, capacity=len(ids) + NEW_TOKENS) for stage in stages]
    past, now, text = 0, ids, tokenizer.stream(ids)
    print(prompt, end="")
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            x = torch.tensor([now])
            for stage, cache in zip(stages, caches, strict=True):
                x = stage(x, past=[past], cache=cache, logits="last")
            past += len(now)
            now = [int(x[0, -1].argmax())]
            print(text.piece(now[0]), end="", flush=True)
    zoo = sorted({"transformers", "safetensors", "onnx", "onnxruntime"} & sys.modules.keys())
    print(f"\n\n{len(stages)} shards ({', '.join(stage.name for stage in stages)}), {NEW_TOKENS} tokens.")
    print(f"Model zoos imported: {', '.join(zoo) or 'none'}.")
    return 1 if zoo else 0


if __name__ == "__main__":
    sys.exit(main())
