"""Backends are imported at first use, by several threads at once."""

from __future__ import annotations

import subprocess
import sys

from tests.support.paths import TESTS

CODE = """
import sys, threading
import splitbundle
bundle = splitbundle.open(sys.argv[1])
failed, start = [], threading.Barrier(8)
def load():
    start.wait()
    try:
        bundle.pipeline()
    except Exception as error:
        failed.append(error)
threads = [threading.Thread(target=load) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(failed)
"""


def test_threads_load_a_pipeline_at_once() -> None:
    bundle = TESTS / "golden" / "v1.0" / "gpt2.splitbundle"
    made = subprocess.run([sys.executable, "-c", CODE, str(bundle)], capture_output=True, text=True, check=True)
    assert made.stdout == "[]\n", made.stdout
