"""Show all steps on a real model: convert with two cuts, inspect, verify, and generate from three shards.

``make demo`` runs this program. It prints each command before it runs it. It writes only to a temporary directory.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROMPT = "Licensed under the Apache License"


def main() -> int:
    """Run all steps. Return the exit status of the first step that fails, or 0."""
    with tempfile.TemporaryDirectory(prefix="splitbundle-demo-") as directory:
        bundle = str(Path(directory, "license.splitbundle"))
        steps = [
            (
                "Convert a GPT-2 checkpoint, cut before layers 2 and 4",
                ["convert", str(HERE / "license-gpt2"), "--split", "2,4", "-o", bundle],
            ),
            ("Inspect it, without reading any weights", ["inspect", bundle]),
            (
                "Verify every file, and compare the shards with the original model's results",
                ["verify", "--run", bundle],
            ),
        ]
        for title, arguments in steps:
            if status := run(title, [sys.executable, "-m", "splitbundle", *arguments]):
                return status
        script = str(HERE / "chain_three_shards.py")
        return run("Chain the three shards by hand, with torch alone", [sys.executable, script, bundle, PROMPT])


def run(title: str, command: list[str]) -> int:
    """Print a title and a command, and run the command. Return its exit status."""
    shown = " ".join(f'"{part}"' if " " in part else part for part in command[1:])
    print(f"\n== {title}\n$ python {shown}", flush=True)
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
