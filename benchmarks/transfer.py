"""Measure push and pull through a registry on loopback, beside curl and openssl with the same bytes.

    python -m benchmarks.transfer --gigabytes 2 --rounds 3

It makes a bundle of random weights, and starts Debian's ``docker-registry`` for it. In each round it pulls the bundle
into an empty cache, and then fetches the same layers with ``curl`` and hashes them with ``openssl dgst -sha256``. The
result is a ratio of times, and the private memory (``RssAnon`` of ``/proc``) of push and pull. It needs Linux,
``docker-registry``, ``curl`` and ``openssl``, and disk space of five times the size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import operator
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.conversion_memory import INTERVAL, private, write_checkpoint

PROGRAMS: Final = ("docker-registry", "curl", "openssl")
ACCEPT: Final = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
CONFIGURATION: Final = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {root}}}, delete: {{enabled: true}}}}
http: {{addr: "{address}"}}
"""


def main() -> int:
    """Measure, and print a table or one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the bundle (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of measurements (default: %(default)s)")
    parser.add_argument("--directory", help="where to write (default: the system's temporary directory)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        raise SystemExit(f"not installed: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(prefix="splitbundle-benchmark-", dir=given.directory) as folder:
        found = measure(Path(folder), given.gigabytes, given.rounds)
    if given.json:
        print(json.dumps(found))
        return 0
    print("| round | pull | curl, then openssl | pull's speed / theirs |\n|---|---|---|---|")
    for i, (ours, theirs) in enumerate(zip(found["pull"], found["peer"], strict=True)):
        print(f"| {i + 1} | {ours:.2f} s | {theirs:.2f} s | {theirs / ours:.2f} |")
    ratio = statistics.median(map(operator.truediv, found["peer"], found["pull"]))
    print(f"\nMedian: {ratio:.2f}")
    memory = f"push {found['push_memory'] / 2**20:.0f} MiB, pull {found['pull_memory'] / 2**20:.0f} MiB"
    print(f"\n{found['bytes'] / 1e9:.2f} GB. Private memory: {memory}.")
    return 0


def measure(folder: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    """Return the seconds of each round, and the memory in bytes."""
    import splitbundle_converter

    write_checkpoint(folder / "source", gigabytes, 4)
    bundle = splitbundle_converter.convert(folder / "source", folder / "b.splitbundle", split=[1], check=False)
    shutil.rmtree(folder / "source")
    pull, peer, pull_memory = [], [], 0
    with registry(folder / "registry") as address:
        reference = f"oci://{address}/benchmark:v1"
        _, push_memory = ran(["push", str(bundle.path), reference], folder / "cache")
        for _ in range(rounds):
            os.sync()  # what is still to be written to the disk would slow down the one that comes next
            seconds, memory = ran(["pull", reference], folder / "cache")
            shutil.rmtree(folder / "cache")
            pull.append(seconds)
            pull_memory = max(pull_memory, memory)
            os.sync()
            peer.append(fetched(address, folder / "fetched"))
            shutil.rmtree(folder / "fetched")
    size = sum(file.size for file in bundle.manifest.files.values())
    return {"bytes": size, "pull": pull, "peer": peer, "push_memory": push_memory, "pull_memory": pull_memory}


@contextlib.contextmanager
def registry(root: Path, more: str = "") -> Iterator[str]:
    """Run a registry, with more lines of configuration, and yield its host and port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    root.mkdir()
    configuration = root / "configuration.yml"
    configuration.write_text(CONFIGURATION.format(root=root, address=address) + more)
    with subprocess.Popen(["docker-registry", "serve", str(configuration)], stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(100):
                try:
                    urllib.request.urlopen(f"http://{address}/v2/").close()
                    break
                except urllib.error.HTTPError:  # it runs, and wants a login
                    break
                except OSError:
                    pass
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()


def ran(arguments: list[str], cache: Path) -> tuple[float, int]:
    """Run the command, and return its seconds and its largest private memory in bytes."""
    environment = {**os.environ, "SPLITBUNDLE_CACHE": str(cache)}
    began, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "splitbundle", *arguments, "--quiet"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as child:
        while child.poll() is None:
            with contextlib.suppress(OSError):
                peak = max(peak, private(child.pid))
            time.sleep(INTERVAL)
    if child.returncode:
        raise SystemExit(f"splitbundle {arguments[0]} ended with status {child.returncode}")
    return time.perf_counter() - began, peak


def fetched(address: str, folder: Path) -> float:
    """Fetch all layers with curl, hash them with openssl, and return the seconds."""
    folder.mkdir()
    base = f"http://{address}/v2/benchmark"
    with urllib.request.urlopen(urllib.request.Request(f"{base}/manifests/v1", headers=ACCEPT)) as answer:
        digests = {layer["digest"] for layer in json.load(answer)["layers"]}
    urls = "".join(f'url = "{base}/blobs/{digest}"\noutput = "{folder / digest[7:]}"\n' for digest in sorted(digests))
    began = time.perf_counter()
    subprocess.run(["curl", "--silent", "--fail", "--config", "-"], input=urls.encode(), check=True)
    files = [str(path) for path in sorted(folder.iterdir())]
    subprocess.run(["openssl", "dgst", "-sha256", *files], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
