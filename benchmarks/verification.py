"""The speed of verifying beside ``openssl dgst -sha256`` on the same files: on one core, and on all that there are."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import splitbundle


def main() -> int:
    """Times both in turn, and prints the medians and their ratios, or one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verification", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", help="a .splitbundle of some hundred MB (python -m benchmarks.backends makes one)")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if shutil.which("openssl") is None:
        parser.error("there is no openssl to compare with")
    bundle = splitbundle.open(args.bundle)
    paths = [str(bundle.path / path) for path in bundle.manifest.files]
    size = sum(file.size for file in bundle.manifest.files.values())
    cores = sorted(os.sched_getaffinity(0))
    ways: dict[str, tuple[list[int], Callable[[], object]]] = {
        "openssl, one core": (
            cores[:1],
            lambda: subprocess.run(["openssl", "dgst", "-sha256", *paths], stdout=subprocess.DEVNULL, check=True),
        ),
        "verify, one core": (cores[:1], bundle.verify),
        # What the machine can give: cores may share what hashes, or be lent to others.
        f"openssl, {len(cores)} at once": (cores, lambda: _at_once(paths, len(cores))),
        f"verify, {len(cores)} cores": (cores, bundle.verify),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(args.rounds + 1):
        for name, (used, way) in ways.items():
            os.sched_setaffinity(0, used)
            start, before = time.perf_counter(), os.times()
            way()
            after = os.times()
            if i:  # the first round brings the files into memory
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(sum(after[:4]) - sum(before[:4]))
    reference = next(iter(ways))
    rows = [
        {
            "way": name,
            "seconds": statistics.median(seconds[name]),
            "processor_seconds": statistics.median(processor[name]),
            "megabytes_a_second": size / 1e6 / statistics.median(seconds[name]),
            # Round by round, so that what else the machine did counts for both.
            "ratio": statistics.median(a / b for a, b in zip(seconds[reference], seconds[name], strict=True)),
        }
        for name in ways
    ]
    if args.json:
        print(json.dumps({"bytes": size, "files": len(paths), "rounds": args.rounds, "ways": rows}))
        return 0
    print(f"{len(paths)} files, {size:,} bytes, median of {args.rounds} rounds")
    for row in rows:
        print(
            f"{row['way']:20} {row['seconds']:6.2f} s {row['processor_seconds']:6.2f} s of processor time "
            f"{row['megabytes_a_second']:6.0f} MB/s  {row['ratio']:5.2f} x openssl"
        )
    return 0


def _at_once(paths: list[str], count: int) -> None:
    """As many processes, with equal shares of the files."""
    shares = [paths[i::count] for i in range(count)]
    running = [subprocess.Popen(["openssl", "dgst", "-sha256", *share], stdout=subprocess.DEVNULL) for share in shares]
    for process in running:
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
