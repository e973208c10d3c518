"""Generate text with the middle of a model on a server. The server dies on the way, and a second one takes over.

    python examples/stages_over_a_network.py license.splitbundle "Licensed under the Apache License"

The servers are processes of this machine. On another machine, ``splitbundle serve-stage`` starts one, and needs the
files of its own shard alone. Its address then begins with ``grpcs://``, and the pipeline takes ``tls=``, the directory
of a certificate (docs/tutorial/two-machines.md).
"""

from __future__ import annotations

import json
import subprocess
import sys

import splitbundle

NEW_TOKENS = 60
KILLED_AFTER = 20


def start(path: str, shard: str) -> tuple[subprocess.Popen[str], str]:
    """Start a server at a free port, and return it with its address."""
    command = [sys.executable, "-m", "splitbundle", "serve-stage", path, shard, "--listen", "127.0.0.1:0", "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    facts = json.loads((server.stdout and server.stdout.readline()) or '{"ok": false}')  # its first line
    if not facts["ok"]:
        raise SystemExit("the server didn't start; stderr says why")
    return server, facts["url"]


def main() -> int:
    """Print the text while it is generated, and then whether it is that of one machine. Return the exit status."""
    path, prompt = sys.argv[1], sys.argv[2]
    bundle = splitbundle.open(path)
    shard = next(shard.name for shard in bundle.shards if not (shard.embeds or shard.head))
    started = [start(path, shard) for _ in range(2)]
    servers, addresses = [server for server, _ in started], [address for _, address in started]
    try:
        pipeline = bundle.pipeline(remote={shard: addresses})  # the first is used, and then the next one
        pieces = []
        print(prompt, end="")
        for piece in pipeline.stream_text(prompt, max_new_tokens=NEW_TOKENS):
            print(piece, end="", flush=True)
            pieces.append(piece)
            if len(pieces) == KILLED_AFTER:
                servers[0].kill()  # as kill -9 does: it has no time to say anything
    finally:
        for server in servers:
            server.terminate()
            server.wait()
    expected = bundle.pipeline(kernels="torch").complete_text(prompt, max_new_tokens=NEW_TOKENS).text
    same = "".join(pieces) == expected
    print(f"\n\nThe first server of {shard} was killed after {KILLED_AFTER} pieces of the text.")
    print(f"The text is {'that' if same else 'NOT that'} of one machine.")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
